"""Turning streams of messages into a header and chunks, and back."""

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar

from qflare.tensors import CHUNK_BYTES
from qflare_server.errors import InvalidRequestError, StalledError

Message = TypeVar("Message")
Ready: TypeAlias = "queue.SimpleQueue[tuple[list[Any], BaseException | None]]"
Room: TypeAlias = "queue.SimpleQueue[bool]"
HAND_OVERS: Final = 2  # beside the one on either side: a chunk is 1 MiB
END: Final = StopIteration()


def split_header(messages: Iterator[Any]) -> tuple[Any, Any]:
    """Return the first message's header, and its chunk or None.

    Raises:
        InvalidRequestError: There is no message, or the first has no header.
    """
    first = next(messages, None)
    if first is None or not first.HasField("header"):
        raise InvalidRequestError("the first message has no header", field="header")
    return first.header, first.chunk if first.HasField("chunk") else None


def chunks_of(first: Any, messages: Iterator[Any]) -> Iterator[tuple[int, bytes]]:
    """Yield indices and bytes of the chunks.

    Raises:
        InvalidRequestError: A later message has a header again, or no chunk.
    """
    if first is not None:
        yield first.index, first.data
    for message in messages:
        if message.HasField("header"):
            raise InvalidRequestError("a second header", field="header")
        if not message.HasField("chunk"):
            raise InvalidRequestError("a message without a chunk", field="chunk")
        yield message.chunk.index, message.chunk.data


def rest_of(first: Any, messages: Iterator[Any]) -> tuple[Iterator[Any], bool]:
    """Return the messages after the first, and whether it is known that there are none.

    A chunk that is not full is the last one: only the end of the stream can follow, which is waited for here.
    """
    if first is None or len(first.data) >= CHUNK_BYTES:
        return messages, False
    further = next(messages, None)
    if further is None:
        return iter(()), True
    return chain((further,), messages), False


class StreamReader:
    """Reads streams ahead in threads of its own, so that receiving and checking overlap and a stall is noticed.

    gRPC's iterator waits without a bound, and who waits in it cannot answer the call: hence the second thread.

    Args:
        stream_count: Streams at once.
        timeout_s: Longest wait for a message.
    """

    def __init__(self, stream_count: int, timeout_s: float) -> None:
        self._executor = ThreadPoolExecutor(stream_count, thread_name_prefix="upload-reader")
        self._timeout_s = timeout_s

    @contextmanager
    def ahead(self, messages: Iterator[Message]) -> Iterator[Iterator[Message]]:
        """Yield the messages of a stream, for as long as the block lasts.

        Raises:
            StalledError: None came in time.
        """
        ready: Ready = queue.SimpleQueue()
        room: Room = queue.SimpleQueue()
        for _ in range(HAND_OVERS):
            room.put(True)
        self._executor.submit(_fill, messages, ready, room, 4 * self._timeout_s)
        try:
            yield self._taken(ready, room)
        finally:  # also where the consumer has had enough: the reader must not wait for room
            room.put(False)

    def _taken(self, ready: Ready, room: Room) -> Iterator[Any]:
        ending: BaseException | None = None
        while ending is None:
            try:
                messages, ending = ready.get(timeout=self._timeout_s)
            except queue.Empty:
                raise StalledError(f"no chunk came for {self._timeout_s:g} s") from None
            yield from messages
            room.put(True)
        if ending is not END:
            raise ending

    def close(self) -> None:
        """Let the threads end once their streams have."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _fill(messages: Iterator[Any], ready: Ready, room: Room, room_s: float) -> None:
    """Hand messages over until their consumer is gone, or has taken none for `room_s` seconds.

    The first two go together, or the first and the end: one hand-over for a small update.
    """
    held: list[Any] = []
    ending: BaseException = END
    with suppress(queue.Empty):
        try:
            for number, message in enumerate(messages):
                held.append(message)
                if number == 0:
                    continue
                if not room.get(timeout=room_s):
                    return
                ready.put((held, None))
                held = []
        except queue.Empty:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again where the messages are consumed
            ending = error
        ready.put((held, ending))
