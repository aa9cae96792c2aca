"""A stream that is read ahead: in order, with its errors, and never for a consumer that has gone."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from qflare.tensors import CHUNK_BYTES
from qflare.v1.coordinator_service_pb2 import Chunk
from qflare_server.errors import StalledError
from qflare_server.servicers.streams import Pump, rest_of

WAIT_S = 10.0


@pytest.fixture
def pump() -> Iterator[Pump]:
    made = Pump(1, WAIT_S)
    yield made
    made.close()


def test_messages_come_in_order(pump: Pump) -> None:
    assert list(pump.ahead(iter(range(50)))) == list(range(50))


def test_an_error_of_the_stream_comes_after_its_messages(pump: Pump) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ConnectionError("gone")

    messages = pump.ahead(broken())

    assert next(messages) == 1
    with pytest.raises(ConnectionError, match="gone"):
        next(messages)


def test_a_stream_that_brings_nothing_stalls() -> None:
    release = threading.Event()
    pump = Pump(1, 0.02)

    def silent() -> Iterator[int]:
        release.wait(WAIT_S)
        yield 1

    with pytest.raises(StalledError, match=r"no chunk came for 0\.02 s"):
        next(pump.ahead(silent()))

    release.set()
    pump.close()


def test_a_consumer_that_goes_frees_the_reader_at_once(pump: Pump) -> None:
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.set()

    messages = pump.ahead(endless())
    next(messages)
    messages.close()  # type: ignore[attr-defined]  # a generator

    assert ended.wait(WAIT_S / 2)
    assert list(pump.ahead(iter([7]))) == [7]


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
