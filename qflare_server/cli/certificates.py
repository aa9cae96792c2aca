"""`certificates make`: TLS certificates for development and tests.

A certificate authority in the folder signs a server certificate and, on request, client certificates. All of them use
ECDSA P-256, which every TLS library supports. A second run in the same folder keeps the authority and renews the
certificates; a running coordinator reloads them.

Not for production: the authority's key is stored unencrypted beside the certificates it signs, and nothing can be
revoked. Production certificates come from an authority that supports revocation.
"""

import argparse
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qflare.command_line import whole
from qflare.files import make_private_folder
from qflare.terminal import say
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys.secret_files import read_secret, write_secret

AUTHORITY_LIFETIME: Final = timedelta(days=3650)
MAX_LIFETIME_DAYS: Final = 825
CLOCK_SKEW: Final = timedelta(minutes=5)
DEFAULT_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
AUTHORITY: Final = "ca"
SERVER: Final = "server"


@dataclass(frozen=True)
class Authority:
    """A certificate authority.

    Attributes:
        certificate: Its self-signed certificate.
        key: Its signature key.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def ensure(cls, folder: Path, at: datetime) -> "Authority":
        """Read a folder's authority; create it if absent.

        Raises:
            KeyStoreError: Its key cannot be read or written, or other users can access it.
            ValueError: Its files are not a certificate authority.
        """
        certificate_file, key_file = _files(folder, AUTHORITY)
        if key_file.exists():
            key = load_pem_private_key(read_secret(key_file), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key_file} holds no ECDSA key")
            return cls(x509.load_pem_x509_certificate(certificate_file.read_bytes()), key)
        made = _self_signed(at)
        _write(folder, AUTHORITY, [made.certificate], made.key)
        return made

    def sign(
        self,
        name: str,
        hosts: Sequence[str],
        usage: x509.ObjectIdentifier,
        at: datetime,
        lifetime: timedelta,
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """Create a key and its certificate.

        Args:
            name: Common name.
            hosts: Subject alternative names: DNS names and IP addresses; may be empty.
            usage: Extended key usage: server or client authentication.
            at: The time.
            lifetime: Validity period.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, self.certificate.subject, key, at, lifetime)
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256()), key


def add(commands: Any) -> None:
    """Add this module's parsers."""
    certificates = commands.add_parser("certificates", help="TLS certificates for development")
    actions = certificates.add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser(
        "make",
        help="create an authority, a server certificate and client certificates",
        description="Create development certificates. A second run in the same folder keeps the authority and"
        " renews the rest.",
        epilog="example: qflare-server certificates make --output certificates --host fl.example.org",
    )
    make.add_argument("--output", type=Path, required=True, help="folder")
    make.add_argument(
        "--host",
        action="append",
        metavar="NAME",
        help="DNS name or IP address of the coordinator; may be repeated; default: this machine",
    )
    make.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME",
        help="also make NAME.pem and NAME.key for mutual TLS; may be repeated",
    )
    make.add_argument("--days", type=whole(1, 825), default=365, help="validity, 1 to 825")
    make.set_defaults(run=run_make)


def run_make(_config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Make the certificates."""
    folder: Path = arguments.output
    lifetime = _lifetime(arguments.days)
    _check_names(arguments.client)
    _check_hosts(arguments.host or ())
    at = utc_now()
    make_private_folder(folder)
    authority = Authority.ensure(folder, at)
    hosts = arguments.host or DEFAULT_HOSTS
    issue(authority, folder, SERVER, hosts, ExtendedKeyUsageOID.SERVER_AUTH, at, lifetime)
    for name in arguments.client:
        issue(authority, folder, name, (), ExtendedKeyUsageOID.CLIENT_AUTH, at, lifetime)
    say(f"wrote certificates for {', '.join(hosts)} to {folder}")
    say(f"  QFLARE_TLS_CERTIFICATE_FILE={folder.absolute() / SERVER}.pem")
    say(f"  QFLARE_TLS_KEY_FILE={folder.absolute() / SERVER}.key")
    say(f"  devices trust       {folder.absolute() / AUTHORITY}.pem")
    return 0


def issue(
    authority: Authority,
    folder: Path,
    name: str,
    hosts: Sequence[str],
    usage: x509.ObjectIdentifier,
    at: datetime,
    lifetime: timedelta,
) -> None:
    """Make a certificate and write it, chain and key, into a folder.

    Raises:
        KeyStoreError: A file cannot be written.
    """
    certificate, key = authority.sign(name, hosts, usage, at, lifetime)
    _write(folder, name, [certificate, authority.certificate], key)


def read_authorities(path: Path | None) -> str:
    """Return the PEM certificates of a file; empty text if no file is given.

    Raises:
        ConfigError: It contains none.
        OSError: It cannot be read.
    """
    if path is None:
        return ""
    pem = path.read_bytes()
    try:
        x509.load_pem_x509_certificates(pem)
        return pem.decode()
    except ValueError as error:
        remedy = "the PEM file of the authority that signed the coordinator's certificate"
        raise ConfigError(f"{path} holds no certificate in PEM form", remedy=remedy) from error


def _check_hosts(names: Sequence[str]) -> None:
    for name in names:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            labels = name.removeprefix("*.").split(".")
            if not all(
                re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", label)
                for label in labels
            ):
                raise ValueError(
                    f"--host: got {name!r}, want a DNS name or an IP address"
                ) from None


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not name or name.startswith(".") or name != Path(name).name:
            raise ValueError(f"--client: got {name!r}, want a name without / or leading dot")
        if name in {AUTHORITY, SERVER}:
            raise ValueError(f"--client: {name} is the name of another certificate")


def _lifetime(days: int) -> timedelta:
    if not 1 <= days <= MAX_LIFETIME_DAYS:
        raise ValueError(f"--days: got {days}, want 1 to {MAX_LIFETIME_DAYS}")
    return timedelta(days=days)


def _self_signed(at: datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # A random part in its name keeps the authorities of two folders apart in one trust store.
    name = _name(f"QFLARE development {os.urandom(4).hex()}")
    builder = _builder(name, name, key, at, AUTHORITY_LIFETIME)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    ).add_extension(_key_usage(signs_certificates=True), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def _builder(
    subject: str | x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    at: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject if isinstance(subject, x509.Name) else _name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - CLOCK_SKEW)
        .not_valid_after(at + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.pem", folder / f"{name}.key"


def _write(
    folder: Path,
    name: str,
    chain: Sequence[x509.Certificate],
    key: ec.EllipticCurvePrivateKey,
) -> None:
    """Write the owner-only key before the chain, so a reader of the new chain finds the new key."""
    certificate_file, key_file = _files(folder, name)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_secret(key_file, pem, replace=True)
    write_secret(
        certificate_file, b"".join(c.public_bytes(Encoding.PEM) for c in chain), replace=True
    )
    certificate_file.chmod(0o644)
