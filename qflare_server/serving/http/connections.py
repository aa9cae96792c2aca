"""Limits on HTTP connections: their number, per peer and in total, and the duration of each phase.

A connection that sends nothing, or one byte per second, is closed within seconds. Above the limit, the oldest
connection of the peer with the most connections is closed; idle ones go first. Everything here runs in the event loop
of one server.
"""

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from qflare_server.use_cases.access.rate_limits import network_of

HANDSHAKE_S: Final = 3.0
"""Seconds in which a TLS handshake has to end."""

Address = tuple[Any, ...]


@dataclass(frozen=True)
class Bounds:
    """Bounds of one server.

    Attributes:
        max_count: Most connections in all.
        max_of_peer: Most connections of one IPv4 address or one /64 network of IPv6 addresses.
        header_s: Seconds in which the header of a request has to come as a whole.
        keep_alive_s: Seconds that a connection may wait for its next request.
        exchange_s: Seconds from the header of a request to the end of its answer, with what the visitor takes to send
            and to read.
    """

    max_count: int = 256
    max_of_peer: int = 64
    header_s: float = 3.0
    keep_alive_s: float = 5.0
    exchange_s: float = 30.0


@dataclass
class _Connection:
    """A connection that was accepted."""

    socket: socket.socket
    transport: asyncio.Transport | None = None
    is_busy: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it is open; a failed TLS handshake closes one without a word."""
        return self.socket.fileno() >= 0

    def end(self) -> None:
        """End it at once, whatever waits to be sent."""
        if self.transport is not None:
            self.transport.abort()
        else:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


class Connections:
    """The open connections of one server.

    Args:
        bounds: How many there may be, and for how long.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._of_peers: dict[str, dict[Address, _Connection]] = {}

    @property
    def count(self) -> int:
        """Connections in all."""
        return sum(len(mine) for mine in self._of_peers.values())

    def admit(self, connection: socket.socket, address: Address) -> None:
        """Count a connection that was accepted; end another one if there are too many."""
        peer = network_of(str(address[0]))
        if (
            len(self._of_peers.get(peer, {})) >= self.bounds.max_of_peer
            or self.count >= self.bounds.max_count
        ):
            self._make_room(peer)
        self._of_peers.setdefault(peer, {})[address] = _Connection(connection)

    def opened(self, address: Address, transport: asyncio.Transport) -> None:
        """Note that the TLS handshake of a connection is over, or that it needs none."""
        found = self._find(address)
        if found is not None:
            found.transport = transport

    def set_busy(self, address: Address, *, is_busy: bool) -> None:
        """Note whether a connection has a request that is not answered."""
        found = self._find(address)
        if found is not None:
            found.is_busy = is_busy

    def closed(self, address: Address) -> None:
        """Forget a connection."""
        peer = network_of(str(address[0]))
        mine = self._of_peers.get(peer, {})
        mine.pop(address, None)
        if not mine:
            self._of_peers.pop(peer, None)

    def _find(self, address: Address) -> _Connection | None:
        return self._of_peers.get(network_of(str(address[0])), {}).get(address)

    def _make_room(self, peer: str) -> None:
        self._forget_closed()
        mine = self._of_peers.get(peer, {})
        if len(mine) < self.bounds.max_of_peer:
            if self.count < self.bounds.max_count:
                return
            mine = max(self._of_peers.values(), key=len)
        idle = (address for address, connection in mine.items() if not connection.is_busy)
        address = next(idle, next(iter(mine)))
        victim = mine[address]
        self.closed(address)
        victim.end()

    def _forget_closed(self) -> None:
        gone = [
            address
            for mine in self._of_peers.values()
            for address, connection in mine.items()
            if not connection.is_open
        ]
        for address in gone:
            self.closed(address)


class Listener(socket.socket):
    """A listening socket whose connections are counted from the moment on that they are accepted.

    Args:
        listening: Is taken over.
        connections: Counts them.
    """

    def __init__(self, listening: socket.socket, connections: Connections) -> None:
        super().__init__(listening.family, listening.type, fileno=listening.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        connection, address = super().accept()
        self._connections.admit(connection, address)
        return connection, address


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers bound the time of a TLS handshake; asyncio's own bound is a minute."""

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """Create a server."""
        if options.get("ssl") is not None:
            options.update(ssl_handshake_timeout=HANDSHAKE_S, ssl_shutdown_timeout=HANDSHAKE_S)
        return await super().create_server(*arguments, **options)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn within the bounds of this module; uvicorn bounds only the time between two requests.

    Args:
        connections: Counts the connections.
        options: Of uvicorn's protocol.
    """

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._counted = connections
        self._address: Address = ()
        self._deadline: asyncio.TimerHandle | None = None
        self._answered: Any = None
        self._header_began = False
        self._exchange_ends_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._address = transport.get_extra_info("peername") or ("", 0)
        self._counted.opened(self._address, transport)
        self._header_began = True
        self._end_after(self._counted.bounds.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._counted.closed(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        if not self._header_began and not self._is_busy:
            self._header_began = True
            self._end_after(self._counted.bounds.header_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """Take what has come; the header of a request begins an exchange."""
        super().handle_events()
        if self._is_busy and self.cycle is not self._answered:
            self._answered, self._header_began = self.cycle, False
            self._exchange_ends_at = self.loop.time() + self._counted.bounds.exchange_s
            self._counted.set_busy(self._address, is_busy=True)
            self._end_after(self._counted.bounds.exchange_s)

    def on_response_complete(self) -> None:
        """Wait for the next request; where it has come already, `handle_events` takes it from here."""
        self._counted.set_busy(self._address, is_busy=False)
        if not self.transport.is_closing():
            self._end_after(self._counted.bounds.keep_alive_s)
        super().on_response_complete()

    @property
    def _is_busy(self) -> bool:
        cycle: Any = self.cycle  # none before the first request
        return cycle is not None and not cycle.response_complete

    def _end_after(self, seconds: float) -> None:
        """End the connection unless another bound is set in time."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._overdue)

    def _overdue(self) -> None:
        """End the connection; where an answer is written but not yet taken, once its exchange is overdue."""
        left_s = self._exchange_ends_at - self.loop.time()
        if self.transport.get_write_buffer_size() and left_s > 0:
            self._end_after(left_s)
        else:
            self.transport.abort()
