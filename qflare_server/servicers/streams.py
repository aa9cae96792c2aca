"""Turning streams of messages into a header and chunks, and back."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar

from qflare.tensors import CHUNK_BYTES
from qflare_server.errors import InvalidRequestError, StalledError

Message = TypeVar("Message")
Ready: TypeAlias = "queue.Queue[tuple[Any, BaseException | None]]"
QUEUED_MESSAGES: Final = 2  # beside the one on either side: a chunk is 1 MiB


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


class Pump:
    """Reads streams ahead in threads of its own, so that receiving and checking overlap and a stall is noticed.

    Args:
        stream_count: Streams at once.
        timeout_s: Longest wait for a message.
    """

    def __init__(self, stream_count: int, timeout_s: float) -> None:
        self._executor = ThreadPoolExecutor(stream_count, thread_name_prefix="upload-reader")
        self._timeout_s = timeout_s

    def ahead(self, messages: Iterator[Message]) -> Iterator[Message]:
        """Yield the messages of a stream.

        Raises:
            StalledError: None came in time.
        """
        ready: Ready = queue.Queue(QUEUED_MESSAGES)
        gone = threading.Event()
        self._executor.submit(_fill, messages, ready, gone, 4 * self._timeout_s)
        try:
            yield from self._taken(ready)
        finally:  # also where the consumer has had enough: the reader must not wait for room
            gone.set()
            _drain(ready)

    def _taken(self, ready: "Ready") -> Iterator[Any]:
        while True:
            try:
                message, error = ready.get(timeout=self._timeout_s)
            except queue.Empty:
                raise StalledError(f"no chunk came for {self._timeout_s:g} s") from None
            if error is not None:
                raise error
            if message is None:
                return
            yield message

    def close(self) -> None:
        """Let the threads end once their streams have."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _drain(ready: Ready) -> None:
    with suppress(queue.Empty):
        while True:
            ready.get_nowait()


def _fill(messages: Iterator[Any], ready: Ready, gone: threading.Event, room_s: float) -> None:
    """Move messages into the queue until its consumer is gone, or has taken none for `room_s` seconds."""
    with suppress(queue.Full):
        try:
            for message in messages:
                ready.put((message, None), timeout=room_s)
                if gone.is_set():
                    return
            ready.put((None, None), timeout=room_s)
        except queue.Full:
            return
        except BaseException as error:  # noqa: BLE001 - raised again where the messages are consumed
            ready.put((None, error), timeout=room_s)
