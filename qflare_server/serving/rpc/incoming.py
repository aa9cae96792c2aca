"""An incoming call: its messages are received without a thread, and it runs once they have arrived.

grpcio's synchronous server gives a call to a thread before its first message has come, and the thread waits for it:
callers that send nothing hold as many threads as there are. Its asynchronous server has one event loop for the whole
process, which a program that embeds a coordinator may need for itself. So this module starts the same receive
operations that grpcio starts, without waiting for them. It is the only one that touches private parts of grpcio;
`setup.cfg` admits the versions that it was checked with, and `check_grpcio` compares what it needs at start.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from qflare_server import errors
from qflare_server.serving.rpc.route import Route
from qflare_server.serving.rpc.status import describe, status_of
from qflare_server.serving.rpc.streams import END, MessageStream, Stopwatch

DETAILS_KEY: Final = "grpc-status-details-bin"
_NO_FLAGS: Final = 0
_RECEIVING: Final[str] = _server._RECEIVE_MESSAGE_TOKEN  # noqa: SLF001  # see the module's text
_RESPONDERS: Final = ("_unary_response_in_pool", "_stream_response_in_pool")
_ARGUMENTS: Final = (
    "rpc_event",
    "state",
    "behavior",
    "argument_thunk",
    "request_deserializer",
    "response_serializer",
)


def check_grpcio() -> None:
    """Make sure that grpcio hands calls over as this module takes them.

    Raises:
        RuntimeError: It does not; another version of grpcio is installed than `setup.cfg` admits.
    """
    for name in _RESPONDERS:
        found = tuple(inspect.signature(getattr(_server, name)).parameters)
        if found != _ARGUMENTS:
            raise RuntimeError(
                f"grpcio {grpc.__version__}: {name} takes {found}, want {_ARGUMENTS}"
            )


@dataclass(frozen=True)
class Refusal:
    """An answer to a call that no thread has seen: code, text and trailing metadata, made ready once."""

    code: grpc.StatusCode
    reason: str
    text: bytes
    trailing_metadata: tuple[tuple[str, bytes], ...]

    @classmethod
    def from_error(cls, error: errors.QflareError) -> Refusal:
        """Return the answer that an error of the domain gets."""
        status = describe(error, "")
        details = ((DETAILS_KEY, status.SerializeToString()),)
        return cls(status_of(error), error.reason, str(error).encode(), details)


class IncomingCall:
    """A call from the arrival of its headers to its end.

    Args:
        run: Enters the call's context: `contextvars.Context.run`.
        respond: Has the call answered, in the thread that calls it: a function of grpcio.
        arguments: Of `respond`, as `check_grpcio` names them.
        stall_timeout_s: Longest wait for a message by the thread that answers.

    Attributes:
        route: What is known of its method.
        messages: What the caller sends, as bytes.
        caller: Whom its place in a queue is charged to; set by the dispatcher.
        began_at: Monotonic time of its arrival, in seconds.
        deadline_at: Monotonic time by which the next message has to come while no thread has the call.
        sends: Times that the thread has waited for the caller to take messages.
        task: What a thread does when it is the call's turn: to answer, unless the dispatcher has something else.

    A thread that answers iterates over the call to get its messages.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        respond: Callable[..., None],
        arguments: tuple[Any, ...],
        stall_timeout_s: float,
    ) -> None:
        self._run = run
        self._respond = respond
        self._event, self._state, self._behavior, _, _, self._serialize = arguments
        self._on_message: Callable[[IncomingCall], None] = _ignore
        self.route: Route = self._behavior.route
        self.messages = MessageStream(self._receive, stall_timeout_s)
        self.caller = ""
        self.began_at = time.monotonic()
        self.deadline_at = self.began_at
        self.sends = Stopwatch()
        self.task: Callable[[], None] = self.answer
        self._sent_bytes = 0

    @property
    def metadata(self) -> Any:
        """Keys and values that came with the call."""
        return self._event.invocation_metadata

    @property
    def peer_address(self) -> str:
        """Address of the caller, as gRPC writes it."""
        return str(self._event.call.peer().decode())

    @property
    def is_over(self) -> bool:
        """Whether the caller has gone, or the answer has."""
        return not _server._is_rpc_state_active(self._state)  # noqa: SLF001

    @property
    def moved_bytes(self) -> int:
        """Bytes of the messages of both directions so far."""
        return self.messages.received_bytes + self._sent_bytes

    @property
    def waited_s(self) -> float:
        """Seconds that the call has waited for its caller, while a thread had it."""
        return self.messages.waits.total_s + self.sends.total_s

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.messages)

    def receive(self, on_message: Callable[[IncomingCall], None]) -> None:
        """Begin to receive; after each message and at the end, `on_message` is called in gRPC's thread."""
        self._on_message = on_message
        self.messages.start()

    def leave(self) -> None:
        """Call `on_message` no more: a thread has the call."""
        self._on_message = _ignore

    def answer(self) -> None:
        """Have the call answered in this thread, unless it is over."""
        if not self.is_over:
            self._answer()
        self._release()

    def _answer(self) -> None:
        self._run(
            self._respond,
            self._event,
            self._state,
            self._behavior,
            lambda: self,
            None,
            self._counting if self.route.response_streaming else self._serialize,
        )

    def refuse(self, refusal: Refusal) -> None:
        """Answer without a thread; a call that is over stays as it is."""
        with self._state.condition:
            if not self.is_over:
                self._state.trailing_metadata = refusal.trailing_metadata
                code = refusal.code.value[0]
                _server._abort(self._state, self._event.call, code, refusal.text)  # noqa: SLF001
        self._release()

    def _release(self) -> None:
        """Break the circles of references, so that the memory of a call is free at once, not at a collection."""
        self._on_message = _ignore
        self.task = _nothing
        self.messages.stop_receiving()

    def cancel(self) -> None:
        """End the call whatever its thread is doing; the caller learns no more than that."""
        self._event.call.cancel()

    def interrupt(self, error: errors.QflareError) -> None:
        """Have the thread that answers stop: an upload ends with an error, a download is cut off."""
        if self.route.response_streaming:
            self.cancel()
        else:
            self.messages.ended(error)

    def on_end(self, callback: Callable[[], None]) -> bool:
        """Call back once the call is over; False if it is."""
        with self._state.condition:
            if self._state.callbacks is None:
                return False
            self._state.callbacks.append(callback)
            return True

    def _counting(self, message: Any) -> bytes:
        data = bytes(self._serialize(message))
        self._sent_bytes += len(data)
        return data

    def _receive(self) -> None:
        with self._state.condition:
            if not self.is_over:
                operations = (cygrpc.ReceiveMessageOperation(_NO_FLAGS),)
                self._event.call.start_server_batch(operations, self._received)
                self._state.due.add(_RECEIVING)
                return
        self.messages.ended(errors.DisconnectedError())

    def _received(self, event: Any) -> Any:
        """Take the outcome of a receive operation; called by gRPC's thread."""
        message = event.batch_operations[0].message()
        with self._state.condition:
            gone = self._state.client == _server._CANCELLED  # noqa: SLF001
            finished = _server._possibly_finish_call(self._state, _RECEIVING)  # noqa: SLF001
        if message is not None:
            self.messages.arrived(message)
            if self.route.request_streaming:
                self.messages.start()
        else:
            self.messages.ended(errors.DisconnectedError() if gone else END)
        self._on_message(self)
        return finished


def _nothing() -> None:
    """Do nothing: the call is over."""


def _ignore(_call: IncomingCall) -> None:
    """Wait for nothing."""
