"""Requests to the receiver of a webhook: signed, over https or to loopback, with one deadline for the whole request.

The headers are those of Standard Webhooks 1.0: ``webhook-id``, ``webhook-timestamp`` and ``webhook-signature``, which
is ``v1,`` and HMAC-SHA256 in base64 over id, timestamp and body, joined by full stops, for each secret.
"""

import base64
import binascii
import hashlib
import hmac
import http.client
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

import qflare
from qflare.addresses import is_loopback_host
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.keys.secret_files import KeyStoreError, read_secret
from qflare_server.use_cases.webhooks.messages import Message

logger = logging.getLogger(__name__)

PREFIX: Final = "whsec_"
MIN_SECRET_BYTES: Final = 24
MAX_SECRET_BYTES: Final = 64
MAX_SECRETS: Final = 4
SECRET_HELP: Final = (
    f"write {PREFIX} and 32 random bytes in base64 into it: "
    f"(printf {PREFIX}; openssl rand -base64 32) > FILE"
)


class DeliveryError(Exception):
    """The receiver has not accepted a message; the text has no part of its answer."""


def read_webhook_secrets(path: Path) -> tuple[bytes, ...]:
    """Read the secrets of webhooks: one a line, `whsec_` and 24 to 64 bytes in base64.

    Raises:
        KeyStoreError: The file cannot be read, is open to others, or holds none, too many or a malformed one.
    """
    lines = [line.strip() for line in read_secret(path).split(b"\n") if line.strip()]
    if not 1 <= len(lines) <= MAX_SECRETS:
        raise KeyStoreError(f"{path}: want 1 to {MAX_SECRETS} secrets", remedy=SECRET_HELP)
    return tuple(_decoded(path, line) for line in lines)


def _decoded(path: Path, line: bytes) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(PREFIX.encode()), validate=True)
    except binascii.Error:
        secret = b""
    if not line.startswith(PREFIX.encode()) or not (
        MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES
    ):
        raise KeyStoreError(f"{path} holds no secret of a webhook", remedy=SECRET_HELP)
    return secret


def signature(secrets: Sequence[bytes], number: str, timestamp: int, body: bytes) -> str:
    """Return the value of the header ``webhook-signature``: one signature for each secret."""
    signed = f"{number}.{timestamp}.".encode() + body
    digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def place_of(url: str) -> str:
    """Return scheme and host of a URL, for logs: the path may be a credential."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


class Sender:
    """Sends messages to one receiver, one at a time.

    Args:
        config: The `webhook_*` settings.
        url: The receiver.

    Raises:
        ConfigError: There is no secret file, or the file of the authorities cannot be used.
        KeyStoreError: As `read_webhook_secrets`.
    """

    def __init__(self, config: ServerConfig, url: str) -> None:
        assert config.webhook_secret_file is not None
        self._secrets = read_webhook_secrets(config.webhook_secret_file)
        self._url = url
        self._timeout_s = config.webhook_timeout_s
        self._open: list[http.client.HTTPConnection] = []
        self._closed = threading.Event()
        try:
            tls = ssl.create_default_context(cafile=config.webhook_ca_file)
        except OSError as error:
            raise ConfigError(
                f"QFLARE_WEBHOOK_CA_FILE: cannot read certificates: {error.strerror or error}"
            ) from error
        self._opener = self._build(tls)

    def _build(self, tls: ssl.SSLContext) -> OpenerDirector:
        """Return what opens URLs: no redirects; the environment's proxy, but not for this machine."""
        opened = self._open

        class Plain(HTTPHandler):
            def http_open(self, req: Request) -> Any:
                return self.do_open(_kept(http.client.HTTPConnection, opened), req)

        class Secure(HTTPSHandler):
            def https_open(self, req: Request) -> Any:
                connect = _kept(http.client.HTTPSConnection, opened)
                return self.do_open(connect, req, context=tls)

        host = urlsplit(self._url).hostname or ""
        proxies = ProxyHandler({}) if is_loopback_host(host) else ProxyHandler()
        return build_opener(_NoRedirects, proxies, Plain, Secure(context=tls))

    @property
    def is_closed(self) -> bool:
        """Whether it was closed; an attempt that fails afterwards says nothing of the receiver."""
        return self._closed.is_set()

    def close(self) -> None:
        """End the request under way."""
        self._closed.set()
        self._abort()

    def send(self, message: Message, at: datetime) -> None:
        """Send a message; return once the receiver has accepted it.

        Args:
            message: What to send.
            at: The time of this attempt.

        Raises:
            DeliveryError: There is no answer in time, or its status is not 200 to 299.
        """
        if self.is_closed:
            raise DeliveryError("the coordinator stops")
        timestamp = int(at.timestamp())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"qflare/{qflare.__version__}",
            "webhook-id": message.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._secrets, message.id, timestamp, message.body),
        }
        request = Request(self._url, message.body, headers)  # noqa: S310 - the configuration checks it
        try:
            with self._deadline(), self._opener.open(request, timeout=self._timeout_s):
                return
        except HTTPError as error:
            status = error.code
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DeliveryError(_cause(error)) from None
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            raise DeliveryError(f"HTTP status {status}: redirects are not followed")
        raise DeliveryError(f"HTTP status {status}")

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """Bound the whole request: the timeout of a socket starts again with every byte."""
        timer = threading.Timer(self._timeout_s, self._abort)
        timer.name, timer.daemon = "webhook-deadline", True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            for connection in self._open:
                connection.close()
            self._open.clear()

    def _abort(self) -> None:
        for connection in list(self._open):
            current = connection.sock
            if current is not None:
                with suppress(OSError):
                    current.shutdown(socket.SHUT_RDWR)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the answer then is an error."""


def _kept(kind: type[http.client.HTTPConnection], opened: list[http.client.HTTPConnection]) -> Any:
    """Return a function that makes a connection and keeps it where a deadline finds it."""

    def connect(host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        opened.append(connection)
        return connection

    return connect


def _cause(error: Exception) -> str:
    """Return the kind of a failure; its own text may quote the receiver."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"TLS: {cause.verify_message}"
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    return f"no answer: {type(cause).__name__}"
