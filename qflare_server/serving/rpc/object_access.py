"""Object-level authorization at the gRPC boundary: an interceptor around every method of both services.

It runs inside `interceptor.CallInterceptor`, which has authorized the caller by its role, and inside the check of
proofs of possession. `use_cases.access.objects` decides from the first message of the call which objects the caller may
access.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

import grpc

from qflare_server.serving.rpc.behaviors import Behavior, replace_behavior
from qflare_server.serving.rpc.call import current_call
from qflare_server.serving.rpc.route import Audience, audience_of
from qflare_server.use_cases.access.objects import ObjectAccess

_FOREIGN: Final = (Audience.HEALTH, Audience.REFLECTION)
Check = Callable[[Any], None]


class ObjectAccessInterceptor(grpc.ServerInterceptor):
    """Checks access to the object of every call.

    Args:
        objects: Object-level authorization.
    """

    def __init__(self, objects: ObjectAccess) -> None:
        self._objects = objects
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one of our methods, once: the interceptors around this one remember theirs by it."""
        found = continuation(handler_call_details)
        method = handler_call_details.method
        if found is None or audience_of(method) in _FOREIGN:
            return found
        known = self._wrapped.get(method)
        if known is not None and known[0] is found:
            return known[1]

        def check(first_message: Any) -> None:
            self._objects.check(current_call().principal, method, first_message)

        wrapped = replace_behavior(
            found,
            lambda behavior: _checked(behavior, check),
            lambda behavior: _checked_stream(behavior, check),
        )
        self._wrapped[method] = found, wrapped
        return wrapped


def _checked(behavior: Behavior, check: Check) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        check(request)
        return behavior(request, context)

    return call


def _checked_stream(
    behavior: Behavior, check: Check
) -> Callable[[Iterator[Any], grpc.ServicerContext], Any]:
    """Return a behavior that checks the first message; the behavior itself refuses an empty stream."""

    def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        first = next(requests, None)
        if first is None:
            return behavior(iter(()), context)
        check(first)
        return behavior(chain((first,), requests), context)

    return call
