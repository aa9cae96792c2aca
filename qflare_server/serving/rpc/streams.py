"""Message streams: split into header and chunks, with bounded waits."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

from qflare.tensors import CHUNK_BYTES, BytesLike
from qflare_server.errors import InvalidRequestError, StalledError

READ_AHEAD: Final = 3
"""Maximum number of buffered messages of a stream; a chunk is 1 MiB."""
END: Final = StopIteration()


def split_header(messages: Iterator[Any]) -> tuple[Any, Any]:
    """Return the first message's header and its chunk, or None if it has no chunk.

    Raises:
        InvalidRequestError: There is no message, or the first has no header.
    """
    first = next(messages, None)
    if first is None or not first.HasField("header"):
        raise InvalidRequestError("the first message has no header", field="header")
    return first.header, first.chunk if first.HasField("chunk") else None


def chunks_of(first: Any, messages: Iterator[Any]) -> Iterator[tuple[int, BytesLike]]:
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

    A partial chunk is the last one; only the end of the stream can follow, and this function waits for it.
    """
    if first is None or len(first.data) >= CHUNK_BYTES:
        return messages, False
    further = next(messages, None)
    if further is None:
        return iter(()), True
    return chain((further,), messages), False


class Stopwatch:
    """Total waiting time; one thread waits, others read it."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since: float | None = None

    @property
    def total_s(self) -> float:
        """Total seconds of all waits, including the current one."""
        since = self._since
        return self._total_s + (0.0 if since is None else time.monotonic() - since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the duration of the block."""
        began = self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None
            self._total_s += time.monotonic() - began


class MessageStream:
    """The messages of one call, in order; received in advance, without a waiting thread.

    gRPC's own iterator occupies a thread from the start of a call to its last message. This one requests messages from
    the transport, which reports their arrival. A thread is needed only when there is work, and a consumer waits only
    for a bounded time.

    Args:
        receive: Requests the next message from the transport, which calls `arrived` or `ended` in its own thread.
        stall_timeout_s: Longest wait of the consumer for one message.

    Attributes:
        received_bytes: Bytes of the received messages.
        waits: Time that the consumer has waited for messages.
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
        """Messages that were received and not yet consumed."""
        return len(self._held)

    @property
    def first_held(self) -> bytes | None:
        """The next message, which stays; None if none has been received."""
        return self._held[0] if self._held else None

    @property
    def is_only_one(self) -> bool:
        """Whether the stream has ended after a single message, which has not been consumed."""
        return self._ending is END and len(self._held) == 1

    @property
    def ending(self) -> BaseException | None:
        """End of the stream: `END`, or the error that ended it; None while more messages may follow."""
        return self._ending

    def start(self) -> None:
        """Request the next message, unless a request is pending or the buffer is full."""
        with self._changed:
            if self._receiving or self._ending is not None or len(self._held) >= READ_AHEAD:
                return
            self._receiving = True
        self._receive()

    def arrived(self, message: bytes) -> None:
        """Accept a message from the transport."""
        with self._changed:
            self._receiving = False
            self._held.append(message)
            self.received_bytes += len(message)
            self._changed.notify()

    def ended(self, ending: BaseException) -> None:
        """End the stream after the buffered messages; only the first end counts."""
        with self._changed:
            self._receiving = False
            self._ending = self._ending or ending
            self._changed.notify()

    def stop_receiving(self) -> None:
        """Stop requesting messages, because they are no longer consumed."""
        with self._changed:
            self._ending = self._ending or END
            self._receive = _nothing

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next message.

        Raises:
            StopIteration: There is none.
            StalledError: It did not arrive in time.
            QflareError: The error that ended the stream.
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
            ):  # shared by all streams: raising this instance would accumulate their frames
                raise StopIteration
            raise self._ending

    def _wait(self) -> None:
        with self.waits.running():
            self._changed.wait_for(
                lambda: self._held or self._ending is not None, self._stall_timeout_s
            )


def _nothing() -> None:
    """Request nothing."""
