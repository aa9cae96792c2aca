"""Message streams: split into header and chunks, with bounded waits."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

from qflare.tensors import CHUNK_BYTES
from qflare_server.errors import InvalidRequestError, StalledError

READ_AHEAD: Final = 3
"""Messages of a stream that are held before one is consumed; a chunk is 1 MiB."""
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


class Stopwatch:
    """Adds up waits; one thread waits, others read."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since: float | None = None

    @property
    def total_s(self) -> float:
        """Seconds of all waits, the present one included."""
        since = self._since
        return self._total_s + (0.0 if since is None else time.monotonic() - since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        began = self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None
            self._total_s += time.monotonic() - began


class MessageStream:
    """The messages of one call, in order; received ahead of their consumer, while no thread waits for them.

    gRPC's own iterator holds a thread from the beginning of a call to its last message. Here the transport is asked
    for a message and says when it is there, so a thread is needed only once there is something to work on, and a
    consumer that waits does so within a bound.

    Args:
        receive: Asks the transport for the next message; it answers by `arrived` or `ended`, in a thread of its own.
        stall_timeout_s: Longest wait of the consumer for one message.

    Attributes:
        received_bytes: Bytes of the messages that have come.
        waits: Times that the consumer has waited for messages.
    """

    def __init__(self, receive: Callable[[], None], stall_timeout_s: float) -> None:
        self._receive = receive
        self._stall_timeout_s = stall_timeout_s
        self._changed = threading.Condition(threading.Lock())
        self._held: deque[bytes] = deque()
        self._receiving = False
        self._ending: BaseException | None = None
        self.received_bytes = 0
        self.waits = Stopwatch()

    @property
    def held_count(self) -> int:
        """Messages that have come and are not consumed."""
        return len(self._held)

    @property
    def ending(self) -> BaseException | None:
        """What comes after the last message: `END`, or the error that ended the stream; None while it may go on."""
        return self._ending

    def start(self) -> None:
        """Ask for the next message, unless one is under way or enough are held."""
        with self._changed:
            if self._receiving or self._ending is not None or len(self._held) >= READ_AHEAD:
                return
            self._receiving = True
        self._receive()

    def arrived(self, message: bytes) -> None:
        """Take a message from the transport."""
        with self._changed:
            self._receiving = False
            self._held.append(message)
            self.received_bytes += len(message)
            self._changed.notify()

    def ended(self, ending: BaseException) -> None:
        """Let nothing come after the messages that are held; the first ending counts."""
        with self._changed:
            self._receiving = False
            self._ending = self._ending or ending
            self._changed.notify()

    def stop_receiving(self) -> None:
        """Ask for nothing more: nobody consumes the messages."""
        with self._changed:
            self._ending = self._ending or END
            self._receive = _nothing

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next message.

        Raises:
            StopIteration: There is none.
            StalledError: It did not come in time.
            QflareError: What else ended the stream.
        """
        self.start()
        with self._changed:
            if not self._held and self._ending is None:
                self._wait()
            if self._held:
                return self._held.popleft()
            if self._ending is None:
                raise StalledError(f"no message came for {self._stall_timeout_s:g} s")
            if (
                self._ending is END
            ):  # shared by all streams: raised itself, it would collect their frames
                raise StopIteration
            raise self._ending

    def _wait(self) -> None:
        with self.waits.running():
            self._changed.wait_for(
                lambda: self._held or self._ending is not None, self._stall_timeout_s
            )


def _nothing() -> None:
    """Ask nobody."""
