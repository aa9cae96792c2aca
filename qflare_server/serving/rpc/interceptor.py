"""The gRPC boundary: the one table from errors to statuses, the one abort, the server and its limits.

`CallInterceptor` admits every call before its first message is looked at, has it answered, and its outcome
is logged in one line. Errors of the domain become rich statuses; anything else becomes INTERNAL with a fixed text
and a request id, and its traceback stays in the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import grpc

from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.context import Telemetry
from qflare_server.serving.rpc.call import Call, RunningCalls, answering
from qflare_server.serving.rpc.limits import StreamLimits, Watchdog
from qflare_server.serving.rpc.status import Code, describe, status_of
from qflare_server.serving.rpc.streams import StreamReader
from qflare_server.storage.ids import unique_name
from qflare_server.use_cases.access.authentication import Authentication
from qflare_server.use_cases.access.rate_limits import RateLimiter

logger = logging.getLogger(__name__)

DETAILS_KEY: Final = "grpc-status-details-bin"
UNKNOWN: Final = (
    "unknown"  # one name for all methods that there are not: callers must not make up labels
)
PQ_GROUP: Final = "X25519MLKEM768"
WATCHES: Final = frozenset({"/qflare.v1.AdminService/WatchTrainingSession"})
"""Streams that last long and send little: they have places of their own, so that they keep none from a download."""


class CallInterceptor(grpc.ServerInterceptor):
    """Admission, errors, limits and the log line of every call.

    Args:
        config: Limits.
        authentication: Decides who may call.
        pump: Reads streams that come in.
        watchdog: Ends calls whose message does not come, and streams that go out and are not taken.
        draining: Set once no new work is taken.
        telemetry: Hears of every call.

    Attributes:
        running: The calls under way; health checks and reflection are not among them.
    """

    def __init__(
        self,
        config: ServerConfig,
        authentication: Authentication,
        pump: StreamReader,
        watchdog: Watchdog,
        draining: threading.Event,
        telemetry: Telemetry,
    ) -> None:
        self._config = config
        self._authentication = authentication
        self._pump = pump
        self._watchdog = watchdog
        self._draining = draining
        self.telemetry = telemetry
        self.running = RunningCalls()
        self._limits = StreamLimits(config)
        self._rates = RateLimiter(config.max_calls_per_second, time.monotonic)
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one of our methods; leave health and reflection to themselves."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self.telemetry.call_started(UNKNOWN, "unary")
            self.telemetry.call_handled(
                UNKNOWN, "unary", Code.UNIMPLEMENTED.name, 0.0, "UNKNOWN_METHOD"
            )
        if handler is None or not method.startswith("/qflare."):
            return handler
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = _rewrap(handler, lambda behaviour: self._guarded(behaviour, handler, method))
        self._wrapped[method] = handler, wrapped
        return wrapped

    def _guarded(
        self, behaviour: Callable[..., Any], handler: Any, method: str
    ) -> Callable[..., Any]:
        direction = "watch" if method in WATCHES else "down"
        kind = _kind(handler)

        def received() -> None:
            self.telemetry.message_received(method, kind)

        def unary(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            metadata = context.invocation_metadata()
            with self._call(method, kind, metadata, context) as outcome:
                if handler.request_streaming:
                    with (
                        self._limits.taken("up", outcome.call.principal.name),
                        self._pump.ahead(requests) as messages,
                    ):
                        counted = _counted(messages, received)
                        answer = behaviour(self._admitted(counted, method, metadata), context)
                else:
                    request = self._only(requests, context)
                    received()
                    answer = behaviour(request, context)
                self.telemetry.message_sent(method, kind)
                return answer
            return outcome.finish()

        def streaming(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            metadata = context.invocation_metadata()
            with self._call(method, kind, metadata, context) as outcome:
                request = self._only(requests, context)
                received()
                with (
                    self._limits.taken(direction, outcome.call.principal.name),
                    self._watchdog.watching(context) as progress,
                ):
                    answers = behaviour(request, context)
                    if direction == "watch":
                        answers = self._admitted(answers, method, metadata)
                    for message in answers:
                        yield message
                        progress()
                        self.telemetry.message_sent(method, kind)
                return
            outcome.finish()

        return streaming if handler.response_streaming else unary

    def _only(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Return the message of a call that has one; a caller that never sends it is cancelled in time."""
        with self._watchdog.watching(context):
            request = next(requests, None)
        if request is None:
            raise errors.InvalidRequestError("the call has no message", field="")
        return request

    def _admitted(self, messages: Iterator[Any], method: str, metadata: Any) -> Iterator[Any]:
        """Yield the messages of a stream for as long as the caller may call: a revocation ends it in the middle."""
        for number, message in enumerate(messages):
            if number:
                self._authentication.admit(method, _bearer(metadata))
            yield message

    def _call(
        self, method: str, kind: str, metadata: Any, context: grpc.ServicerContext
    ) -> _CallScope:
        self.telemetry.call_started(method, kind)
        self.running.begin()
        if not context.add_callback(self.running.end):  # the caller has gone already
            self.running.end()
        call = Call(
            method=method,
            request_id=unique_name(64),
            find_peer=context.peer,
            tls_group=_tls_group(context) if self._config.tls_certificate_file else "",
            kind=kind,
            traceparent=_value(metadata, "traceparent"),
        )
        return _CallScope(self, call, metadata, context)

    def admit(self, call: Call, metadata: Any) -> None:
        """Set the principal of a call, or refuse it."""
        if self._draining.is_set():
            raise errors.DrainingError
        if self._config.require_pq_tls and call.tls_group != PQ_GROUP:
            raise errors.PermissionDeniedError("the connection did not negotiate X25519MLKEM768")
        call.principal = self._authentication.admit(call.method, _bearer(metadata))
        if call.principal.device_id is not None:
            self._rates.take(call.principal.name)

    def report(self, call: Call, code: grpc.StatusCode, seconds: float, reason: str = "") -> None:
        """Log the one line of a call; what devices do all the time only for who looks for it."""
        routine = code is Code.OK and call.principal.device_id is not None
        level = logging.DEBUG if routine else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "answered: method=%s caller=%s code=%s ms=%.1f request_id=%s",
                call.method,
                call.principal.name,
                code.name,
                seconds * 1000,
                call.request_id,
            )
        self.telemetry.call_handled(call.method, call.kind, code.name, seconds, reason)


class _CallScope:
    """One call from its admission to its log line: keeps its error until the `except` block is left."""

    def __init__(
        self, boundary: CallInterceptor, call: Call, metadata: Any, context: grpc.ServicerContext
    ) -> None:
        self._boundary = boundary
        self._metadata = metadata
        self._context = context
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._answering = answering(call)
        self.call = call

    def __enter__(self) -> Self:
        self._answering.__enter__()
        try:
            self._boundary.admit(self.call, self._metadata)
        except BaseException as error:  # noqa: BLE001 - the boundary: every error becomes a status
            self._error = error
        if self._error is not None:
            self._answering.__exit__(None, None, None)
            self.finish()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        self._answering.__exit__(None, None, None)
        if error is None:
            self._boundary.report(self.call, Code.OK, time.monotonic() - self._started)
            return False
        if isinstance(error, GeneratorExit):
            self._boundary.report(self.call, Code.CANCELLED, time.monotonic() - self._started)
            return False
        self._error = error
        return True

    def finish(self) -> NoReturn:
        """Abort the call with the status of its error: the one abort of the program."""
        error = self._error
        assert error is not None
        if isinstance(error, grpc.RpcError):
            error = errors.DisconnectedError()
        if status_of(error) is Code.INTERNAL:
            logger.error(
                "call failed: method=%s request_id=%s",
                self.call.method,
                self.call.request_id,
                exc_info=error,
            )
        status = describe(error, self.call.request_id)
        code = _CODES[status.code]
        reason = error.reason if isinstance(error, errors.QflareError) else "INTERNAL"
        self._boundary.report(self.call, code, time.monotonic() - self._started, reason)
        self._context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
        self._context.abort(code, status.message)
        raise AssertionError("unreachable")


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def _kind(handler: Any) -> str:
    """Return what the well-known metrics call the shape of a method."""
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


def _counted(messages: Iterator[Any], received: Callable[[], None]) -> Iterator[Any]:
    for message in messages:
        received()
        yield message


def _value(metadata: Any, wanted: str) -> str:
    """Return the text of a metadata key, empty without it."""
    for key, value in metadata or ():
        if key == wanted and isinstance(value, str):
            return value
    return ""


def _bearer(metadata: Any) -> str | None:
    value = _value(metadata, "authorization")
    return value.removeprefix("Bearer ") if value.startswith("Bearer ") else None


def _tls_group(context: grpc.ServicerContext) -> str:
    values: Any = context.auth_context().get("ssl_negotiated_key_exchange_group") or [b""]
    return str(next(iter(values)).decode())


def _rewrap(
    handler: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler with another behaviour, which takes its messages as a stream even where there is only one.

    On the wire both are the same. Left to itself gRPC waits for the one message before it calls anything of ours, so
    a caller without a credential could hold a thread for as long as it likes.
    """
    if handler.response_streaming:
        make = grpc.stream_stream_rpc_method_handler
        behaviour = handler.stream_stream or handler.unary_stream
    else:
        make = grpc.stream_unary_rpc_method_handler
        behaviour = handler.stream_unary or handler.unary_unary
    return make(
        wrap(behaviour),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
