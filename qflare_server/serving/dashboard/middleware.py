"""Middleware of the dashboard: security headers and the access log."""

import ipaddress
import logging
import time
from collections.abc import Collection
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex, nofollow",
}
STRICT_TRANSPORT: Final = "max-age=31536000"
STATIC: Final = "/static/"


class SecurityHeaders:
    """Wraps an application so that no answer leaves without its headers, not even one to an error.

    Args:
        app: What answers.
        secure: Browsers reach it over TLS: they are told to go on so.
    """

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._headers = dict(HEADERS)
        if secure:
            self._headers["Strict-Transport-Security"] = STRICT_TRANSPORT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started, path = time.monotonic(), scope.get("path", "")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                # Pages show what a log-in may see: neither browser nor proxy keeps them.
                headers["Cache-Control"] = "no-cache" if path.startswith(STATIC) else "no-store"
                took_ms = (time.monotonic() - started) * 1000
                logger.info("page: path=%r code=%d ms=%.1f", path[:200], message["status"], took_ms)
            await send(message)

        await self._app(scope, receive, guarded)


class KnownHosts:
    """Wraps an application so that it is reached by its own names only.

    A site whose name is made to point at this address would otherwise read the pages as its own (DNS rebinding). It
    cannot do so by an IP address, nor over TLS, where the certificate does not have its name.

    Args:
        app: What answers.
        names: Names beside IP addresses and localhost.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if self._is_known(Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        text = "The dashboard is not known by this name: see QFLARE_DASHBOARD_HOSTS.\n"
        await PlainTextResponse(text, HTTPStatus.MISDIRECTED_REQUEST)(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name = host
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name.lower() in self._names
        return True
