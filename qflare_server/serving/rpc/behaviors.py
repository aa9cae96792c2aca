"""Behaviors of gRPC handlers: what interceptors that look at the first message of a call replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc

Behavior = Callable[..., Any]
_NAMES: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def replace_behavior(
    handler: Any,
    unary: Callable[[Behavior], Behavior],
    stream: Callable[[Behavior], Behavior],
    **changes: Any,
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler with another behavior.

    Args:
        handler: Of any of the four shapes; grpc makes it a named tuple, whatever its stub says.
        unary: Makes the behavior of a method that takes one message from the handler's own.
        stream: The same for a method that takes a stream of them.
        changes: Other fields of the handler.
    """
    wrap = stream if handler.request_streaming else unary
    behaviors = {
        name: wrap(getattr(handler, name)) for name in _NAMES if getattr(handler, name) is not None
    }
    replaced: grpc.RpcMethodHandler[Any, Any] = handler._replace(**behaviors, **changes)
    return replaced
