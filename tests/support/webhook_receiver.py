"""A receiver of webhooks: a real HTTP server whose answers a test chooses, and the verification of the manual."""

import queue
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests.support.manual_pages import FILE, ROOT, blocks

SECRET: Final = "whsec_QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU="
STALL: Final = 0
"""Answer that never comes."""
TRICKLE: Final = 1
"""Answer of which a byte comes every 50 ms."""


@dataclass(frozen=True)
class Received:
    """A request."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Receiver(ThreadingHTTPServer):
    """Answers with the statuses in `answers`, then with 204."""

    daemon_threads = True

    def __init__(self, certificates: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.received: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self.released = threading.Event()
        self._scheme = "http"
        if certificates is not None:
            self._scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server_port}/path-credential"

    def next(self) -> Received:
        """Return the next request; wait for it."""
        return self.received.get(timeout=60)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that refuse the certificate are meant."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.put(Received(self.path, headers, body))
        status = 204 if self.server.answers.empty() else self.server.answers.get()
        if status == STALL:
            self.server.released.wait(60)
        elif status == TRICKLE:
            self._trickle()
        else:
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_CONNECT(self) -> None:
        """Refuse to be a proxy, and keep what was asked for."""
        self.server.received.put(Received(self.path, {}, b""))
        self.send_response(502)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True

    def _trickle(self) -> None:
        try:
            while not self.server.released.wait(0.05):
                self.wfile.write(b"H")
        except OSError:
            self.close_connection = True

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def receiver(certificates: Path | None = None) -> Iterator[Receiver]:
    """Yield a running receiver."""
    with Receiver(certificates) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def secret_file(folder: Path, text: str = SECRET + "\n", mode: int = 0o600) -> Path:
    """Write a secret file."""
    path = folder / "webhook.secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def is_genuine(message: Received, now: float, secret: str = SECRET) -> bool:
    """Return what the verification of `docs/webhooks.md` says of a request."""
    page = (ROOT / "docs/webhooks.md").read_text()
    (code,) = (block.code for block in blocks(page) if FILE.match(block.code))
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(code, names)
    return bool(names["verify"](message.headers, message.body, secret, now))
