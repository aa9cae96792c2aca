"""TLS settings of a connection."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError


@dataclass(frozen=True)
class Tls:
    """TLS settings: trusted authorities, and the client certificate for mutual TLS."""

    certificate_authorities: bytes | None = None
    """PEM certificate authorities of the coordinator; None means those of the system."""

    certificate_chain: bytes | None = None
    """PEM certificate chain of this device; None means no client certificate."""

    private_key: bytes | None = None
    """PEM key of the client certificate."""

    server_name: str = ""
    """Name in the coordinator's certificate; empty means the host of the address."""

    def __post_init__(self) -> None:
        """Refuse what is no PEM file's content.

        Raises:
            InvalidArgumentError: A field has another type or is empty, or a certificate comes without its key.
        """
        for name in ("certificate_authorities", "certificate_chain", "private_key"):
            if arguments.optional(name, getattr(self, name), bytes) == b"":
                raise InvalidArgumentError(f"{name}: empty, want PEM")
        arguments.text("server_name", self.server_name)
        if (self.certificate_chain is None) != (self.private_key is None):
            raise InvalidArgumentError(
                "a client certificate and its key belong together: got one without the other"
            )

    @classmethod
    def from_files(
        cls,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        server_name: str = "",
    ) -> Self:
        """Read the PEM files.

        Raises:
            InvalidArgumentError: An argument is no path, or a certificate comes without its key.
            OSError: A file cannot be read.
        """
        ca, chain, key = (
            None if file is None else arguments.path("a file", file).read_bytes()
            for file in (ca_file, certificate_file, key_file)
        )
        return cls(ca, chain, key, server_name)


def trusting(tls: Tls | None, certificate_authorities: str) -> Tls | None:
    """Return TLS settings with the authorities of a bootstrap bundle as the default.

    Args:
        tls: The caller's settings; None for none.
        certificate_authorities: PEM certificates; empty for none.

    Raises:
        InvalidArgumentError: `tls` has another type.
    """
    tls = arguments.optional("tls", tls, Tls)
    if not certificate_authorities or (tls is not None and tls.certificate_authorities is not None):
        return tls
    return replace(tls or Tls(), certificate_authorities=certificate_authorities.encode())
