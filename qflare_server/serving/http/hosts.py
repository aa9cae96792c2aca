"""Host names by which an HTTP server is asked: the defense against DNS rebinding."""

import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from cryptography import x509

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_PLAIN: Final = (b"content-type", b"text/plain; charset=utf-8")


class KnownHosts:
    """Wraps an application so that it is reached by its own names only.

    A site whose name is made to point at this address would otherwise read the pages as its own (DNS rebinding). It
    cannot do so by an IP address.

    Args:
        app: What answers.
        names: Names beside IP addresses and localhost; empty ones are left out. `*.example.org` stands for any name of
            one label before it, as in certificates.
        setting: Where further names are set, for whoever is refused.
    """

    def __init__(self, app: Application, names: Collection[str], setting: str) -> None:
        self._app = app
        self._names = {"localhost", *(name.strip().lower() for name in names)} - {""}
        self._setting = setting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and self.is_known(hosts[0].decode("latin-1")):
            await self._app(scope, receive, send)
        else:
            text = f"This server is not known by this name: see {self._setting}.\n"
            await answer(send, HTTPStatus.MISDIRECTED_REQUEST, text.encode())

    def is_known(self, host: str) -> bool:
        """Return whether a request may ask for a host, as its header states it: with or without a port."""
        name = host
        before, _, port = host.rpartition(":")
        if before and port.isascii() and port.isdigit():
            name = before
        if name.startswith("[") and name.endswith("]"):
            return _is_address(name[1:-1], ipaddress.IPv6Address)
        if _is_address(name, ipaddress.IPv4Address):
            return True
        name = name.lower()
        return name in self._names or f"*.{name.partition('.')[2]}" in self._names


def _is_address(text: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def certificate_names(path: Path | None) -> list[str]:
    """Return the DNS names of the first certificate of a PEM file; none if there is none or it cannot be read."""
    if path is None:
        return []
    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return names.value.get_values_for_type(x509.DNSName)
    return []


async def answer(
    send: Send,
    code: HTTPStatus,
    body: bytes,
    *headers: tuple[bytes, bytes],
    content_type: tuple[bytes, bytes] = _PLAIN,
) -> None:
    """Send a whole answer.

    Args:
        send: Of the request's ASGI call.
        code: Status code.
        body: Sent with its length.
        headers: Further headers.
        content_type: Header of that name.
    """
    length = (b"content-length", str(len(body)).encode())
    start = {
        "type": "http.response.start",
        "status": code,
        "headers": [content_type, length, *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
