"""The load: calls that were made ready before, sent from one event loop as bytes.

The generator spends as little as it can beside the server that it measures: no message is built or parsed while the
clock runs. Every device in flight has a connection of its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from tests.bench.figures import Latencies

MAX_MESSAGE_BYTES = 16 * 2**20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)
COORDINATOR = "/qflare.v1.CoordinatorService/"
ADMIN = "/qflare.v1.AdminService/"
CALL_TIMEOUT_S = 300.0
DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class Call:
    """One call, ready to be sent: a full method name, its serialized messages and the caller's token."""

    method: str
    messages: Sequence[bytes]
    token: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class Connection:
    """One device's connection."""

    def __init__(self, address: str) -> None:
        self.refused_count = 0
        """How often the server has sent a call away for a while."""
        # Messages go as bytes, for which the stubs of grpc have no types.
        self._channel: Any = grpc.aio.insecure_channel(address, options=OPTIONS)

    async def ready(self) -> None:
        """Wait until it is up."""
        await self._channel.channel_ready()

    async def close(self) -> None:
        """Close it."""
        await self._channel.close()

    async def send(self, call: Call) -> bytes:
        """Make a call and return its last message; repeat it when the server asks for that."""
        while True:
            try:
                return await self._attempt(call)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                self.refused_count += 1
                await asyncio.sleep(_retry_delay_s(error))

    async def _attempt(self, call: Call) -> bytes:
        options: dict[str, Any] = {"metadata": call.metadata, "timeout": CALL_TIMEOUT_S}
        if call.method.endswith(("/SubmitUpdate", "/UploadInitialModel")):
            answer = self._channel.stream_unary(call.method)(iter(call.messages), **options)
            return bytes(await answer)
        if call.method.endswith("Model"):
            last = b""
            async for message in self._channel.unary_stream(call.method)(
                call.messages[0], **options
            ):
                last = message
            return last
        return bytes(await self._channel.unary_unary(call.method)(call.messages[0], **options))

    async def timed(self, call: Call) -> float:
        """Make a call and return the seconds that it took."""
        begun = time.perf_counter()
        await self.send(call)
        return time.perf_counter() - begun


def _retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    """Return how long the server asks to wait.

    Raises:
        AioRpcError: It does not ask to be called again.
    """
    trailing: Any = error.trailing_metadata() or ()
    status = status_pb2.Status.FromString(dict(trailing).get(DETAILS_KEY, b""))
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToNanoseconds()) / 1e9
    raise error


@contextlib.asynccontextmanager
async def connections(address: str, count: int) -> AsyncIterator[list[Connection]]:
    """Open connections and wait until all are up."""
    opened = [Connection(address) for _ in range(count)]
    try:
        await asyncio.gather(*(connection.ready() for connection in opened))
        yield opened
    finally:
        await asyncio.gather(*(connection.close() for connection in opened))


def closed_loop(address: str, calls: Sequence[Call], in_flight: int) -> Latencies:
    """Make all calls, so many at once, each device sending its next call when it has its answer."""
    return asyncio.run(_closed_loop(address, calls, in_flight))


async def _closed_loop(address: str, calls: Sequence[Call], in_flight: int) -> Latencies:
    waiting: Iterator[Call] = iter(calls)
    seconds: list[float] = []

    async def device(connection: Connection) -> None:
        for call in waiting:
            seconds.append(await connection.timed(call))  # noqa: PERF401 - in the order of their ends

    async with connections(address, in_flight) as opened:
        begun = time.perf_counter()
        await asyncio.gather(*(device(connection) for connection in opened))
        return Latencies(seconds, time.perf_counter() - begun, _refused(opened))


def side_by_side(
    addresses: Sequence[str], calls: Sequence[Sequence[Call]], in_flight: int
) -> Latencies:
    """Load several servers at the same time, each with its own calls, so many at once on each."""
    begun = time.perf_counter()
    done = asyncio.run(_side_by_side(addresses, calls, in_flight))
    joined = Latencies.joined(done)
    return Latencies(joined.seconds, time.perf_counter() - begun, joined.refused_count)


async def _side_by_side(
    addresses: Sequence[str], calls: Sequence[Sequence[Call]], in_flight: int
) -> list[Latencies]:
    loops = (_closed_loop(*pair, in_flight) for pair in zip(addresses, calls, strict=True))
    return list(await asyncio.gather(*loops))


def _refused(opened: Sequence[Connection]) -> int:
    return sum(connection.refused_count for connection in opened)


def paced(
    address: str,
    calls: Sequence[Call],
    rate: float,
    connection_count: int,
    until: Callable[[], bool] = lambda: False,
) -> Latencies:
    """Make calls at a steady rate, whether earlier ones are answered or not.

    A call's latency counts from the moment at which it was due, so that a server that stalls is not measured less
    often for it.

    Args:
        address: Of the server.
        calls: In their order.
        rate: Calls due per second.
        connection_count: Connections, which take turns.
        until: When it returns true, calls that become due are not made any more.
    """
    return asyncio.run(_paced(address, calls, rate, connection_count, until))


async def _paced(
    address: str,
    calls: Sequence[Call],
    rate: float,
    connection_count: int,
    until: Callable[[], bool],
) -> Latencies:
    async with connections(address, connection_count) as opened:
        begun = time.perf_counter()

        async def due(number: int, call: Call) -> float | None:
            moment = begun + number / rate
            await asyncio.sleep(moment - time.perf_counter())
            if until():
                return None
            await opened[number % connection_count].send(call)
            return time.perf_counter() - moment

        taken = await asyncio.gather(*(due(number, call) for number, call in enumerate(calls)))
        seconds = [each for each in taken if each is not None]
        return Latencies(seconds, time.perf_counter() - begun, _refused(opened))


def sequence(address: str, calls: Sequence[Call]) -> Latencies:
    """Make calls one after the other from one device."""
    return closed_loop(address, calls, 1)


def alternating(
    addresses: Sequence[str], calls: Sequence[Sequence[Call]], in_flight: int, parts: int = 3
) -> list[Latencies]:
    """Load servers in turns, a part of the calls at a time, so that all meet the same machine.

    Args:
        addresses: Of the servers.
        calls: For each server.
        in_flight: Calls at once.
        parts: Turns of each server.
    """
    done: list[list[Latencies]] = [[] for _ in addresses]
    for part in range(parts):
        for address, own, mine in zip(addresses, calls, done, strict=True):
            mine.append(closed_loop(address, own[part::parts], in_flight))
    return [Latencies.joined(mine) for mine in done]
