"""A TCP line between a device and a coordinator that is slow, silent or cut when a test says so."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

_PIECE_BYTES = 16 * 2**10


class Line:
    """Relays connections to an address; a context manager.

    Attributes:
        address: Where it listens, host:port.
        up_bytes: Bytes that it has carried upwards.
        down_bytes: Bytes that it has carried downwards.

    Args:
        target: Where it leads: host:port, or the path of a Unix socket.
        bytes_per_s: Most bytes that it carries upwards in a second; 0 means as many as come.
        when_carried: Told after every piece how many bytes went upwards so far.
    """

    def __init__(
        self,
        target: str,
        *,
        bytes_per_s: int = 0,
        when_carried: Callable[["Line", int], None] | None = None,
    ) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._when_carried = when_carried or (lambda *_: None)
        self._ended = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self.up_bytes = self.down_bytes = 0
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._ended.set()
        self.cut()
        self.speak()
        self._thread.join()

    def hush(self) -> None:
        """Carry nothing in either direction, without a word to either side."""
        self._open.clear()

    def speak(self) -> None:
        """Carry again what has come meanwhile."""
        self._open.set()

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = self._connect()
            except OSError:
                return
            with self._lock:
                self._ends += [near, far]
            for source, sink, upwards in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._carry, args=(source, sink, upwards), daemon=True
                ).start()

    def _connect(self) -> socket.socket:
        if self._target.startswith("/"):
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            return far
        host, _, port = self._target.rpartition(":")
        return socket.create_connection((host, int(port)))

    def _carry(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                self._open.wait()
                if upwards and self._bytes_per_s:
                    self._ended.wait(len(data) / self._bytes_per_s)
                sink.sendall(data)
                if upwards:
                    self.up_bytes += len(data)
                    self._when_carried(self, self.up_bytes)
                else:
                    self.down_bytes += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
