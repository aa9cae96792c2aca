"""A stream that is read ahead: in order, with its errors, and never for a consumer that has gone."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from qflare.tensors import CHUNK_BYTES
from qflare.v1.coordinator_service_pb2 import Chunk
from qflare_server.errors import StalledError
from qflare_server.serving.rpc.streams import HAND_OVERS, StreamReader, rest_of

WAIT_S = 10.0


@pytest.fixture
def pump() -> Iterator[StreamReader]:
    made = StreamReader(1, WAIT_S)
    yield made
    made.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_messages_come_in_order(pump: StreamReader, count: int) -> None:
    with pump.ahead(iter(range(count))) as messages:
        assert list(messages) == list(range(count))


def test_the_first_message_comes_with_the_end(pump: StreamReader) -> None:
    """One hand-over for a small update: the reader reads to the end before the consumer is woken."""
    ended = threading.Event()

    def stream() -> Iterator[int]:
        yield 1
        ended.set()

    with pump.ahead(stream()) as messages:
        next(messages)

        assert ended.is_set()


def test_an_error_of_the_stream_comes_after_its_messages(pump: StreamReader) -> None:
    def broken() -> Iterator[int]:
        yield from range(3)
        raise ConnectionError("gone")

    with pump.ahead(broken()) as messages:
        assert [next(messages) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionError, match="gone"):
            next(messages)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_stream_that_brings_nothing_more_stalls(before: int) -> None:
    release = threading.Event()
    pump = StreamReader(1, 0.02)

    def silent() -> Iterator[int]:
        yield from range(before)
        release.wait(WAIT_S)

    with (
        pump.ahead(silent()) as messages,
        pytest.raises(StalledError, match=r"no chunk came for 0\.02 s"),
    ):
        list(messages)

    release.set()
    pump.close()


def test_a_consumer_that_goes_frees_the_reader_at_once(pump: StreamReader) -> None:
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.set()

    with pump.ahead(endless()) as messages:
        next(messages)

    assert ended.wait(WAIT_S / 2)
    with pump.ahead(iter([7])) as messages:
        assert list(messages) == [7]


def test_the_reader_is_never_far_ahead(pump: StreamReader) -> None:
    read: list[int] = []

    def stream() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    with pump.ahead(stream()) as messages:
        next(messages)
        time.sleep(0.05)

        assert len(read) <= HAND_OVERS + 3


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
