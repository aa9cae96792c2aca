"""Why a coordinator closes connections at their TLS handshake, which gRPC does not tell.

With mutual TLS, a server refuses a client certificate after the client's side of the handshake is complete: with an
alert (RFC 8446, section 4.4.2.4), or, if it is gRPC's own server, without a word. gRPC reports both as a closed
socket, like a restart. `refusal` repeats the handshake with Python's TLS and sends nothing. A server that accepts the
connection sends its HTTP/2 settings at once; one that shuts down accepts no further connection. One that completes
three handshakes in a row and closes each connection refuses the certificate.
"""

import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Final

from qflare_client.rpc.tls import Tls

TIMEOUT_S: Final = 2.0
ATTEMPTS: Final = 3
PAUSE_S: Final = 0.3
REQUIRED: Final = "the coordinator accepts only connections with a client certificate"
NOT_ACCEPTED: Final = (
    "the coordinator refuses the client certificate: expired, or of an authority unknown to it"
)
SPEAKS_TLS: Final = "the coordinator speaks TLS at this address, and this connection is plaintext"
_ALERTS: Final = (
    "CERTIFICATE_REQUIRED",
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
)
"""Alerts of RFC 8446, section 6.2, on a client certificate, as OpenSSL names them after a prefix."""


def refusal(host: str, port: int, tls: Tls | None, wait: Callable[[float], bool]) -> str | None:
    """Return why a coordinator refuses connections permanently; None if it does not, or that cannot be told.

    Args:
        host: Name or IP address.
        port: Its TCP port.
        tls: Settings of the connection that was closed; None for plaintext.
        wait: Waits for a number of seconds; returns True if the caller gave up.
    """
    reason = REQUIRED if tls is None or tls.certificate_chain is None else NOT_ACCEPTED
    try:
        for _ in range(ATTEMPTS):
            if tls is None:
                return SPEAKS_TLS if _speaks_tls(host, port) else None
            is_refused = _is_refused(host, port, tls)
            if is_refused is None or wait(PAUSE_S):
                return None
            if is_refused:
                return reason
    except (OSError, ValueError, OverflowError):  # it is away, or the TLS settings cannot be used
        return None
    return reason


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        _connected(context, host, port).close()
    except ssl.SSLError as error:
        return "_ALERT_" in (error.reason or "")
    return True


def _is_refused(host: str, port: int, tls: Tls) -> bool | None:
    """Return whether the server refuses the certificate: False if it closes the connection without a word."""
    context = ssl.create_default_context(cadata=_text(tls.certificate_authorities))
    context.set_alpn_protocols(["h2"])
    if tls.certificate_chain is not None and tls.private_key is not None:
        with _readable(tls.certificate_chain) as chain, _readable(tls.private_key) as key:
            context.load_cert_chain(chain, key, password="")
    try:
        with _connected(context, host, port, tls.server_name or host) as stream:
            return None if stream.recv(1) else False
    except ssl.SSLError as error:
        name = error.reason or ""
        return True if "_ALERT_" in name and name.endswith(_ALERTS) else None


def _connected(
    context: ssl.SSLContext, host: str, port: int, server_name: str | None = None
) -> ssl.SSLSocket:
    """Return a connection whose TLS handshake is complete; raise OSError if none of the host's addresses answers.

    The socket is wrapped before it connects: of a connection that the peer has reset already, `wrap_socket` loses
    the socket without closing it.
    """
    unreachable = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        with socket.socket(family, kind, protocol) as plain:
            plain.settimeout(TIMEOUT_S)
            stream = context.wrap_socket(plain, server_hostname=server_name)
        try:
            stream.connect(address)
        except BaseException as error:
            stream.close()
            if isinstance(error, ssl.SSLError) or not isinstance(error, OSError):
                raise
            unreachable = error
        else:
            return stream
    raise unreachable


def _text(authorities: bytes | None) -> str | None:
    return None if authorities is None else authorities.decode("ascii", "replace")


@contextlib.contextmanager
def _readable(content: bytes) -> Iterator[str]:
    """Yield a path that can be read once: Python takes keys as files only, and a key must not be written to one."""
    reader, writer = os.pipe()

    def write() -> None:
        with contextlib.suppress(OSError), os.fdopen(writer, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write, name="qflare-pem", daemon=True)
    thread.start()
    try:
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)
        thread.join()


def endpoint(address: str) -> tuple[str, int] | None:
    """Return host and port of an address host:port; None for other forms."""
    found = re.fullmatch(r"(?:\[([^]]+)\]|([^:/]+)):(\d{1,5})", address)
    return (found[1] or found[2], int(found[3])) if found else None
