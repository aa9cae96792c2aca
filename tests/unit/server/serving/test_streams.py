"""A stream that is received ahead: in order, with its errors, within bounds, and without a thread that waits for it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from qflare.tensors import CHUNK_BYTES
from qflare.v1.coordinator_service_pb2 import Chunk
from qflare_server.errors import DisconnectedError, StalledError
from qflare_server.serving.rpc.streams import END, READ_AHEAD, MessageStream, Stopwatch, rest_of

WAIT_S = 10.0


class Transport:
    """Gives messages when it is told to, each only if it was asked for."""

    def __init__(self, stall_timeout_s: float = WAIT_S) -> None:
        self.asked_count = 0
        self.stream = MessageStream(self._ask, stall_timeout_s)

    def _ask(self) -> None:
        self.asked_count += 1

    def give(self, message: bytes) -> None:
        """Let a message arrive, and the next one be asked for, as a call does."""
        self.stream.arrived(message)
        self.stream.start()

    def end(self, ending: BaseException = END) -> None:
        """End the stream."""
        self.stream.ended(ending)


@pytest.fixture
def transport() -> Transport:
    return Transport()


def test_messages_come_in_order(transport: Transport) -> None:
    sent = [bytes([number]) for number in range(READ_AHEAD)]
    transport.stream.start()
    for message in sent:
        transport.give(message)
    transport.end()

    assert list(transport.stream) == sent
    assert transport.stream.received_bytes == len(sent)


def test_no_more_is_asked_for_than_is_held(transport: Transport) -> None:
    transport.stream.start()
    transport.stream.start()
    assert transport.asked_count == 1

    for _ in range(READ_AHEAD):
        transport.give(b"x")
    assert transport.asked_count == READ_AHEAD

    next(transport.stream)
    next(transport.stream)
    assert transport.asked_count == READ_AHEAD + 1


def test_an_error_of_the_stream_comes_after_its_messages(transport: Transport) -> None:
    transport.stream.start()
    transport.give(b"a")
    transport.end(DisconnectedError())

    assert next(transport.stream) == b"a"
    for _ in range(2):
        with pytest.raises(DisconnectedError):
            next(transport.stream)


def test_the_first_ending_counts(transport: Transport) -> None:
    transport.end(StalledError())
    transport.end()

    with pytest.raises(StalledError):
        next(transport.stream)


def test_nothing_is_asked_for_after_the_end(transport: Transport) -> None:
    transport.end()

    assert list(transport.stream) == []
    assert transport.asked_count == 0


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_stream_that_brings_nothing_more_stalls(before: int) -> None:
    transport = Transport(0.02)
    transport.stream.start()
    for _ in range(before):
        transport.give(b"x")

    with pytest.raises(StalledError, match=r"no message came for 0\.02 s"):
        list(transport.stream)
    assert transport.stream.waits.total_s >= 0.02


@pytest.mark.parametrize(
    "act",
    [lambda transport: transport.give(b"late"), lambda transport: transport.end()],
    ids=["message", "end"],
)
def test_a_consumer_that_waits_is_woken(
    transport: Transport, act: Callable[[Transport], None]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        consumed = pool.submit(next, transport.stream, b"")
        while not transport.asked_count:
            time.sleep(0.001)
        act(transport)

        assert consumed.result(WAIT_S) in {b"late", b""}


def test_a_stopwatch_shows_the_wait_under_way() -> None:
    watch, entered, leave = Stopwatch(), threading.Event(), threading.Event()

    def wait() -> None:
        with watch.running():
            entered.set()
            leave.wait(WAIT_S)

    waiter = threading.Thread(target=wait)
    waiter.start()
    entered.wait(WAIT_S)
    first = watch.total_s
    while watch.total_s <= first:
        time.sleep(0.001)
    leave.set()
    waiter.join()

    assert watch.total_s == watch.total_s > first


def test_end_of_a_short_stream_is_waited_for() -> None:
    rest, is_whole = rest_of(Chunk(data=b"short"), iter(()))

    assert is_whole
    assert list(rest) == []


def test_what_follows_a_short_chunk_is_kept() -> None:
    rest, is_whole = rest_of(Chunk(data=b"short"), iter((1, 2)))

    assert not is_whole
    assert list(rest) == [1, 2]


@pytest.mark.parametrize("first", [None, Chunk(data=bytes(CHUNK_BYTES))])
def test_stream_that_may_go_on_is_not_waited_for(first: Chunk | None) -> None:
    messages = iter((1, 2))

    rest, is_whole = rest_of(first, messages)

    assert not is_whole
    assert list(rest) == [1, 2]
