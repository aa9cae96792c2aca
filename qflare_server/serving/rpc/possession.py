"""Proofs of possession at the gRPC boundary: an interceptor for deployments behind a proxy that terminates TLS.

It runs inside `interceptor.CallInterceptor`, which has authorized the caller and maps errors to statuses. A proof
covers the serialized first message as received, so messages are passed through it with their bytes. A stream's first
message is received before its handler is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import grpc

from qflare_server.serving.rpc.behaviors import Behavior, replace_behavior
from qflare_server.serving.rpc.call import current_call
from qflare_server.use_cases.access.login import Login


class _ReceivedRequest(NamedTuple):
    """A request message and its serialized bytes."""

    data: bytes
    message: Any


class PossessionInterceptor(grpc.ServerInterceptor):
    """Checks the proof of possession of every device call.

    Args:
        login: Login use case, which has the sessions' binding keys.
    """

    def __init__(self, login: Login) -> None:
        self._login = login

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one of our methods."""
        found = continuation(handler_call_details)
        method = handler_call_details.method
        if found is None or not method.startswith("/qflare."):
            return found
        handler: Any = found  # grpc returns a named tuple, despite its type stub
        check = self._checker(method, handler_call_details.invocation_metadata)
        return replace_behavior(
            handler,
            lambda behavior: _checked(behavior, check),
            lambda behavior: _checked_stream(behavior, check),
            request_deserializer=_reader(handler.request_deserializer),
        )

    def _checker(self, method: str, metadata: Any) -> Callable[[bytes], None]:
        def check(first_message: bytes) -> None:
            self._login.check_pop(current_call().principal, method, metadata, first_message)

        return check


def _reader(parse: Callable[[bytes], Any]) -> Callable[[bytes], _ReceivedRequest]:
    return lambda data: _ReceivedRequest(data, parse(data))


def _checked(
    behavior: Behavior, check: Callable[[bytes], None]
) -> Callable[[_ReceivedRequest, grpc.ServicerContext], Any]:
    def call(request: _ReceivedRequest, context: grpc.ServicerContext) -> Any:
        check(request.data)
        return behavior(request.message, context)

    return call


def _checked_stream(
    behavior: Behavior, check: Callable[[bytes], None]
) -> Callable[[Iterator[_ReceivedRequest], grpc.ServicerContext], Any]:
    def call(requests: Iterator[_ReceivedRequest], context: grpc.ServicerContext) -> Any:
        first = next(requests, None)
        check(b"" if first is None else first.data)
        received = requests if first is None else chain((first,), requests)
        return behavior((item.message for item in received), context)

    return call
