"""Incoming calls: messages are received without a thread, and a call runs once they have arrived.

grpcio's synchronous server assigns a thread to a call before its first message arrives, and the thread waits for the
message: callers that send nothing can occupy all threads. Its asynchronous server has one event loop for the whole
process, which a program that embeds a coordinator may need for itself. This module therefore starts the same receive
operations as grpcio, without waiting for them. It is the only module that uses private parts of grpcio; `setup.cfg`
pins the tested versions, and `check_grpcio` checks the required interfaces at startup.
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
from qflare_server.serving.rpc.status import describe
from qflare_server.serving.rpc.streams import END, MessageStream, Stopwatch

DETAILS_KEY: Final = "grpc-status-details-bin"
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_NO_FLAGS: Final = 0
_RECEIVING: Final[str] = _server._RECEIVE_MESSAGE_TOKEN  # noqa: SLF001  # see the module's text
_SENDING: Final[str] = _server._SEND_MESSAGE_TOKEN  # noqa: SLF001
_ARGUMENTS: Final = (
    "rpc_event",
    "state",
    "behavior",
    "argument_thunk",
    "request_deserializer",
    "response_serializer",
)
_INTERFACES: Final = {
    "_unary_response_in_pool": _ARGUMENTS,
    "_stream_response_in_pool": _ARGUMENTS,
    "_status": ("rpc_event", "state", "serialized_response"),
    "_possibly_finish_call": ("state", "token"),
    "_get_initial_metadata_operation": ("state", "metadata"),
}


def check_grpcio() -> None:
    """Check that grpcio has the internal interfaces that this module uses.

    Raises:
        RuntimeError: It does not; the installed version of grpcio is not one that `setup.cfg` permits.
    """
    for name, wanted in _INTERFACES.items():
        found = tuple(inspect.signature(getattr(_server, name)).parameters)
        if found != wanted:
            raise RuntimeError(f"grpcio {grpc.__version__}: {name} takes {found}, want {wanted}")


@dataclass(frozen=True)
class Refusal:
    """A prepared refusal, sent without a thread: code, text and trailing metadata."""

    code: grpc.StatusCode
    reason: str
    text: bytes
    trailing_metadata: tuple[tuple[str, bytes], ...]

    @classmethod
    def from_error(cls, error: BaseException, request_id: str = "") -> Refusal:
        """Return the refusal for an error; one outside the domain reveals no details."""
        status = describe(error, request_id)
        details = ((DETAILS_KEY, status.SerializeToString()),)
        reason = error.reason if isinstance(error, errors.QflareError) else "INTERNAL"
        return cls(_CODES[status.code], reason, status.message.encode(), details)


class IncomingCall:
    """A call from the arrival of its headers to its end.

    Args:
        run: Enters the call's context: `contextvars.Context.run`.
        respond: grpcio's function that handles the call in the calling thread.
        arguments: Arguments of `respond`, as named in `check_grpcio`.
        stall_timeout_s: Longest wait for a message by the handling thread.

    Attributes:
        route: Route of its method.
        messages: The received messages, as bytes.
        caller: Caller to which its queue slot is charged; set by the dispatcher.
        began_at: Monotonic time of its arrival, in seconds.
        deadline_at: Monotonic deadline of the next message while no thread handles the call.
        sends: Time that the thread has waited for the caller to accept messages.
        task: Work of the thread that is assigned to the call: handling it, unless the dispatcher sets another task.
        before_message: What the handling thread does before it takes a message: nothing, unless the dispatcher sets it.

    The handling thread iterates over the call to receive its messages.
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
        self.before_message: Callable[[], None] = _nothing
        self._sent_bytes = 0
        self._posting = False
        self._unposted: bytes | None = None

    @property
    def metadata(self) -> Any:
        """Metadata of the call."""
        return self._event.invocation_metadata

    @property
    def peer_address(self) -> str:
        """Address of the caller, in gRPC's notation."""
        return str(self._event.call.peer().decode())

    @property
    def is_over(self) -> bool:
        """Whether the caller has canceled or the response was sent."""
        return not _server._is_rpc_state_active(self._state)  # noqa: SLF001

    @property
    def moved_bytes(self) -> int:
        """Bytes of the messages in both directions so far."""
        return self.messages.received_bytes + self._sent_bytes

    @property
    def waited_s(self) -> float:
        """Seconds that the handling thread has waited for the caller."""
        return self.messages.waits.total_s + self.sends.total_s

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.before_message()
        return next(self.messages)

    def receive(self, on_message: Callable[[IncomingCall], None]) -> None:
        """Start receiving; `on_message` is called in gRPC's thread after each message and at the end."""
        self._on_message = on_message
        self.messages.start()

    def leave(self) -> None:
        """Stop calling `on_message`, because a thread handles the call."""
        self._on_message = _ignore

    def answer(self) -> None:
        """Handle the call in this thread, unless it has ended."""
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

    def post(self, message: Any) -> None:
        """Send a message of a response stream without waiting; while one is being sent, only the latest is kept."""
        data = self._counting(message)
        with self._state.condition:
            if self._posting:
                self._unposted = data
            else:
                self._post(data)

    def _post(self, data: bytes) -> None:
        """Start sending, with the state's condition held."""
        if self.is_over:
            return
        operations = [cygrpc.SendMessageOperation(data, _NO_FLAGS)]
        if self._state.initial_metadata_allowed:
            operations.insert(0, _server._get_initial_metadata_operation(self._state, None))  # noqa: SLF001
            self._state.initial_metadata_allowed = False
        self._event.call.start_server_batch(operations, self._posted)
        self._state.due.add(_SENDING)
        self._posting = True

    def _posted(self, _event: Any) -> Any:
        """Send what has been posted meanwhile; called by gRPC's thread."""
        with self._state.condition:
            finished = _server._possibly_finish_call(self._state, _SENDING)  # noqa: SLF001
            self._posting = False
            data, self._unposted = self._unposted, None
            if data is not None:
                self._post(data)
        return finished

    def reply(self, message: bytes) -> None:
        """Answer a call with one message, without a thread, unless the call has ended."""
        if not self.is_over:
            _server._status(self._event, self._state, message)  # noqa: SLF001
        self._release()

    def refuse(self, refusal: Refusal) -> None:
        """Refuse the call without a thread, unless it has ended."""
        with self._state.condition:
            if not self.is_over:
                self._state.trailing_metadata = refusal.trailing_metadata
                code = refusal.code.value[0]
                _server._abort(self._state, self._event.call, code, refusal.text)  # noqa: SLF001
        self._release()

    def _release(self) -> None:
        """Break reference cycles, so that the call's memory is freed immediately instead of at a garbage collection."""
        self._on_message = _ignore
        self.task = self.before_message = _nothing
        self.messages.stop_receiving()

    def cancel(self) -> None:
        """Cancel the call whatever its thread is doing, without a reason."""
        self._event.call.cancel()

    def interrupt(self, error: errors.QflareError) -> None:
        """Stop the handling thread: an upload ends with an error, a download is aborted."""
        if self.route.response_streaming:
            self.cancel()
        else:
            self.messages.ended(error)

    def on_end(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call; return False if it has ended."""
        with self._state.condition:
            if self._state.callbacks is None:
                return False
            self._state.callbacks.append(callback)
            return True

    def _counting(self, message: Any) -> bytes:
        """Return a message as bytes, which one with a large chunk is already."""
        data = message if isinstance(message, bytes) else bytes(self._serialize(message))
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
        """Process the result of a receive operation; called by gRPC's thread."""
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
    """Do nothing."""


def _ignore(_call: IncomingCall) -> None:
    """Return without waiting."""
