"""Middleware of the dashboard: security headers and the access log."""

import logging
import time
from http import HTTPStatus
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qflare_server.serving.rpc.log_sampling import LogSampler

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
OPEN: Final = ("/login", STATIC)
"""Paths that need no log-in."""


class SecurityHeaders:
    """Adds security headers to every response, including error responses.

    Args:
        app: The wrapped application.
        secure: Whether browsers connect over TLS; then HSTS is sent.
    """

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._log_lines = LogSampler(time.monotonic)
        self._headers = dict(HEADERS)
        if secure:
            self._headers["Strict-Transport-Security"] = STRICT_TRANSPORT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        started, path = time.monotonic(), scope.get("path", "")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                # Pages depend on the login, so neither browser nor proxy may cache them.
                headers["Cache-Control"] = "no-cache" if path.startswith(STATIC) else "no-store"
                self._log(path, message["status"], (time.monotonic() - started) * 1000)
            await send(message)

        await self._app(scope, receive, guarded)

    def _log(self, path: str, code: int, took_ms: float) -> None:
        """Log a request; of those that anybody can make, the first of each kind in every minute."""
        left_out: int | None = 0
        if code != HTTPStatus.OK or path.startswith(OPEN):
            left_out = self._log_lines.take(code)
        if left_out is not None:
            more = f" left_out={left_out}" if left_out else ""
            logger.info("page: path=%a code=%d ms=%.1f%s", path[:200], code, took_ms, more)
