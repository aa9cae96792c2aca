"""The gRPC boundary: authentication, limits, error mapping and the log line of every call.

`CallInterceptor` authorizes every call before its first message is parsed, runs its handler, and logs the outcome in
one line. Domain errors become rich statuses. Other exceptions become INTERNAL with a fixed text and a request id, and
are logged with a traceback.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import grpc

from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.context import Telemetry
from qflare_server.serving.rpc.call import REQUEST_ID_BITS, Call, RunningCalls, answering
from qflare_server.serving.rpc.dispatcher import host_of
from qflare_server.serving.rpc.half_open import HalfOpenCalls
from qflare_server.serving.rpc.incoming import IncomingCall, Refusal
from qflare_server.serving.rpc.limits import StreamLimits, Watchdog
from qflare_server.serving.rpc.log_sampling import LogSampler
from qflare_server.serving.rpc.route import Route, audience_of
from qflare_server.serving.rpc.status import Code, status_of
from qflare_server.storage.ids import unique_name
from qflare_server.use_cases.access.authentication import (
    NOBODY,
    Authentication,
    KnownCaller,
    sole_value,
)
from qflare_server.use_cases.access.login import AUTHORIZATION, bearer_of
from qflare_server.use_cases.access.rate_limits import RateLimiter

logger = logging.getLogger(__name__)

UNKNOWN: Final = (
    "unknown"  # one label for all unknown methods, so that callers cannot create labels
)
PQ_GROUP: Final = "X25519MLKEM768"
MAX_HEALTH_WATCHES: Final = 100
"""Concurrent watches of the health service; each uses memory but no thread."""


class CallInterceptor(grpc.ServerInterceptor):
    """Authorization, error mapping, limits and log line of every call.

    Args:
        config: Limits.
        authentication: Authenticates and authorizes callers.
        limits: Limits the streams per caller.
        watchdog: Cancels response streams that the caller does not read.
        draining: Set when the coordinator is draining.
        telemetry: Telemetry sink.

    Attributes:
        running: The calls in flight, without health checks and reflection.
        rates: Limits the call rate of each device.
    """

    def __init__(
        self,
        config: ServerConfig,
        authentication: Authentication,
        limits: StreamLimits,
        watchdog: Watchdog,
        draining: threading.Event,
        telemetry: Telemetry,
    ) -> None:
        self._config = config
        self._authentication = authentication
        self._limits = limits
        self._watchdog = watchdog
        self._draining = draining
        self.telemetry = telemetry
        self.running = RunningCalls()
        self._health_watches = HalfOpenCalls(MAX_HEALTH_WATCHES)
        self._log_lines = LogSampler(time.monotonic)
        self.rates = RateLimiter(config.max_calls_per_second, time.monotonic)
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a method, of our services or of gRPC's own."""
        handler: Any = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self.telemetry.call_started(UNKNOWN, "unary")
            self.telemetry.call_handled(
                UNKNOWN, "unary", Code.UNIMPLEMENTED.name, 0.0, "UNKNOWN_METHOD"
            )
            return None
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        route = Route(
            method, audience_of(method), handler.request_streaming, handler.response_streaming
        )
        wrapped = _rewrap(handler, route, self._behavior(handler, route))
        self._wrapped[method] = handler, wrapped
        return wrapped

    @property
    def must_see_all(self) -> bool:
        """Whether every call has to take the general path: to refuse it while draining, to log it, or to ask for proof.

        Proofs of possession and the key exchange of the connection are checked by interceptors.
        """
        config = self._config
        return (
            config.require_pop
            or config.require_pq_tls
            or self._draining.is_set()
            or logger.isEnabledFor(logging.DEBUG)
        )

    def recognize(self, metadata: Any) -> KnownCaller | None:
        """Return the last known owner of a call's token, from memory."""
        try:
            return self._authentication.recognize(_bearer(metadata))
        except errors.UnauthenticatedError:
            return None

    def introduce(self, metadata: Any) -> KnownCaller | None:
        """Look up the token of a call; None if it is invalid or the lookup fails."""
        try:
            return self._authentication.introduce(_bearer(metadata))
        except errors.QflareError:
            return None

    def _behavior(self, handler: Any, route: Route) -> Callable[..., Any]:
        if handler.response_streaming:
            behavior = handler.stream_stream or handler.unary_stream
            if getattr(behavior, "experimental_non_blocking", False):
                return self._watched(behavior, route, handler.request_deserializer)
            return self._streaming(behavior, route, handler.request_deserializer)
        behavior = handler.stream_unary or handler.unary_unary
        return self._unary(behavior, route, handler.request_deserializer)

    def _unary(
        self, behavior: Callable[..., Any], route: Route, parse: Callable[[bytes], Any]
    ) -> Callable[..., Any]:
        """Return the behavior of a method with a single response."""

        def answer(requests: IncomingCall, context: grpc.ServicerContext) -> Any:
            metadata = context.invocation_metadata()
            with self._call(route, metadata, context) as scope:
                if route.request_streaming:
                    messages = self._admitted(self._parsed(requests, route, parse), route, metadata)
                    response = behavior(messages, context)
                else:
                    response = behavior(self._only(requests, route, parse), context)
                self.telemetry.message_sent(route.method, route.kind)
                return response
            return scope.finish()

        return answer

    def _streaming(
        self, behavior: Callable[..., Any], route: Route, parse: Callable[[bytes], Any]
    ) -> Callable[..., Any]:
        """Return the behavior of a method with a response stream."""

        def answer(requests: IncomingCall, context: grpc.ServicerContext) -> Iterator[Any]:
            metadata = context.invocation_metadata()
            with self._call(route, metadata, context) as scope:
                request = (
                    self._parsed(requests, route, parse)
                    if route.request_streaming
                    else self._only(requests, route, parse)
                )
                with (
                    self._limits.taken(route.direction, self._charged_to(scope.call, requests)),
                    self._watchdog.watching(context) as progress,
                ):
                    answers = behavior(request, context)
                    if route.direction == "watch":
                        answers = self._admitted(answers, route, metadata)
                    for message in answers:
                        with requests.sends.running():
                            yield message
                        progress()
                        self.telemetry.message_sent(route.method, route.kind)
                return
            scope.finish()

        return answer

    def _watched(
        self, behavior: Callable[..., Any], route: Route, parse: Callable[[bytes], Any]
    ) -> Callable[..., Any]:
        """Return the behavior of a method that sends responses from other threads until the caller cancels.

        If there are too many watches, the oldest watch of the caller with the most watches is canceled.
        """

        def answer(
            requests: IncomingCall,
            context: grpc.ServicerContext,
            send: Callable[[Any], None],  # noqa: ARG001  # it waits for the caller
        ) -> None:
            with self._call(route, context.invocation_metadata(), context) as scope:
                request = self._only(requests, route, parse)
                evicted = self._health_watches.add(requests)
                if evicted is not None:
                    evicted.cancel()
                if not requests.on_end(partial(self._health_watches.discard, requests)):
                    self._health_watches.discard(requests)
                behavior(request, context, requests.post)
                return
            scope.finish()

        answer.experimental_non_blocking = True  # type: ignore[attr-defined]
        return answer

    @staticmethod
    def _charged_to(call: Call, requests: IncomingCall) -> str:
        """Return the caller to which a stream is charged; an unauthenticated caller is identified by its address."""
        return requests.caller if call.principal is NOBODY else call.principal.name

    def _parsed(
        self, requests: Iterator[bytes], route: Route, parse: Callable[[bytes], Any]
    ) -> Iterator[Any]:
        """Yield the messages of a stream, parsed and counted."""
        for data in requests:
            message = parse(data)
            self.telemetry.message_received(route.method, route.kind)
            yield message

    def _only(self, requests: Iterator[bytes], route: Route, parse: Callable[[bytes], Any]) -> Any:
        """Return the single message of a call."""
        request = next(self._parsed(requests, route, parse), None)
        if request is None:
            raise errors.InvalidRequestError("the call has no message", field="")
        return request

    def _admitted(self, messages: Iterator[Any], route: Route, metadata: Any) -> Iterator[Any]:
        """Yield the messages of a stream while the caller is authorized: a revocation ends the stream."""
        for number, message in enumerate(messages):
            if number:
                self._authentication.admit(route.method, _bearer(metadata))
            yield message

    def _call(self, route: Route, metadata: Any, context: grpc.ServicerContext) -> _CallScope:
        self.telemetry.call_started(route.method, route.kind)
        if route.is_ours:
            self.running.begin()
            if not context.add_callback(self.running.end):  # the caller has already canceled
                self.running.end()
        call = Call(
            method=route.method,
            request_id=unique_name(REQUEST_ID_BITS),
            find_peer=context.peer,
            tls_group=_tls_group(context) if self._config.tls_certificate_file else "",
            kind=route.kind,
            traceparent=_traceparent(metadata),
        )
        return _CallScope(self, call, route, metadata, context)

    def admit(self, call: Call, route: Route, metadata: Any) -> None:
        """Set the principal of a call, or refuse it; gRPC's own services are open to anyone, even while draining."""
        if not route.is_ours:
            return
        if self._draining.is_set():
            raise errors.DrainingError
        if self._config.require_pq_tls and call.tls_group != PQ_GROUP:
            raise errors.PermissionDeniedError("the connection did not negotiate X25519MLKEM768")
        call.principal = self._authentication.admit(call.method, _bearer(metadata))
        if call.principal.device_id is not None:
            self.rates.take(call.principal.name)

    def sample(self, line: str, call: Call, *facts: str) -> int | None:
        """Return the number of similar lines suppressed before this one; None if this line is to be suppressed too."""
        return self._log_lines.take((line, call.method, host_of(call.find_peer()), *facts))

    def refused(self, call: Call, error: BaseException, seconds: float) -> Refusal:
        """Log and count a refused call, and return how it is refused: every error becomes a status here."""
        if isinstance(error, grpc.RpcError):
            error = errors.DisconnectedError()
        if status_of(error) is Code.INTERNAL:
            left_out = self.sample("failed", call, type(error).__name__)
            if left_out is not None:
                logger.error(
                    "call failed: method=%s request_id=%s similar_lines_left_out=%d",
                    call.method,
                    call.request_id,
                    left_out,
                    exc_info=error,
                )
        refusal = Refusal.from_error(error, call.request_id)
        self.report(call, refusal.code, seconds, refusal.reason)
        return refusal

    def report(self, call: Call, code: grpc.StatusCode, seconds: float, reason: str = "") -> None:
        """Log one line per call; routine device calls at DEBUG."""
        routine = code is Code.OK and (
            call.principal.device_id is not None or not call.method.startswith("/qflare.")
        )
        level = logging.DEBUG if routine else logging.INFO
        if logger.isEnabledFor(level):
            left_out = 0 if code is Code.OK else self.sample("answered", call, code.name, reason)
            if left_out is not None:
                logger.log(
                    level,
                    "answered: method=%s caller=%s code=%s ms=%.1f request_id=%s%s",
                    call.method,
                    call.principal.name,
                    code.name,
                    seconds * 1000,
                    call.request_id,
                    f" similar_lines_left_out={left_out}" if left_out else "",
                )
        self.telemetry.call_handled(call.method, call.kind, code.name, seconds, reason)


class _CallScope:
    """State of one call from authorization to its log line; keeps its error until the `except` block is left."""

    def __init__(
        self,
        boundary: CallInterceptor,
        call: Call,
        route: Route,
        metadata: Any,
        context: grpc.ServicerContext,
    ) -> None:
        self._boundary = boundary
        self._route = route
        self._metadata = metadata
        self._context = context
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._answering = answering(call)
        self.call = call

    def __enter__(self) -> Self:
        self._answering.__enter__()
        try:
            self._boundary.admit(self.call, self._route, self._metadata)
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
        """Abort the call with the status of its error; no other code aborts calls."""
        error, self._error = self._error, None
        assert error is not None
        refusal = self._boundary.refused(self.call, error, time.monotonic() - self._started)
        errors.release_frames(error)
        self._context.set_trailing_metadata(refusal.trailing_metadata)
        self._context.abort(refusal.code, refusal.text.decode())
        raise AssertionError("unreachable")


def _traceparent(metadata: Any) -> str:
    """Return the trace context of the caller; empty if there is none or more than one (W3C Trace Context, 3.2)."""
    values = [value for key, value in metadata or () if key == "traceparent"]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else ""


def _bearer(metadata: Any) -> str | None:
    return bearer_of(sole_value(metadata, AUTHORIZATION))


def _tls_group(context: grpc.ServicerContext) -> str:
    values: Any = context.auth_context().get("ssl_negotiated_key_exchange_group") or [b""]
    return str(next(iter(values)).decode())


def _rewrap(
    handler: Any, route: Route, behavior: Callable[..., Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler with another behavior, which receives its messages as a stream even if there is only one.

    Both are the same on the wire, and the dispatcher receives the messages instead of gRPC.
    """
    make = (
        grpc.stream_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.stream_unary_rpc_method_handler
    )
    behavior.route = route  # type: ignore[attr-defined]
    return make(behavior, response_serializer=handler.response_serializer)
