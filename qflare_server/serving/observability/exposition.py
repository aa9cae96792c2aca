"""The HTTP application of the metrics port."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST

from qflare_server.serving.http.hosts import Receive, Scope, Send, answer

PATHS: Final = ("/", "/metrics")
METHODS: Final = ("GET", "HEAD")


class MetricsSite:
    """Answers scrapes, one at a time and in a thread: a scrape reads the database.

    Those who ask while a scrape is under way share the next one, so many callers cost no more than one who goes on
    asking.

    Args:
        read: Returns the metrics in the text format of Prometheus.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"] not in PATHS:
            await answer(send, HTTPStatus.NOT_FOUND, b"The metrics are at /metrics.\n")
        elif scope["method"] not in METHODS:
            allow = (b"allow", ", ".join(METHODS).encode())
            await answer(send, HTTPStatus.METHOD_NOT_ALLOWED, b"", allow)
        else:
            if self._next is None:
                self._next = asyncio.create_task(self._scrape())
            text = await asyncio.shield(self._next)
            kind = (b"content-type", CONTENT_TYPE_LATEST.encode())
            await answer(send, HTTPStatus.OK, text, content_type=kind)

    async def _scrape(self) -> bytes:
        async with self._turn:
            self._next = None
            return await asyncio.to_thread(self._read)
