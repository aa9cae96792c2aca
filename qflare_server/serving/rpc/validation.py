"""Parsing and validation of requests, after the caller is admitted and before the method runs.

A message that does not parse and a field that breaks a constraint of the protos (`qflare.protocol.constraints`) are
refused with `InvalidRequestError`, which names all such fields. Nothing here depends on a method: a field is bounded
by its declaration in the proto.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from qflare.protocol.constraints import find_violations
from qflare_server.errors import InvalidRequestError


class RequestValidation(grpc.ServerInterceptor):
    """Has the requests of every method parsed and validated; the innermost of the interceptors.

    The deserializer of its handlers raises `InvalidRequestError`, so the interceptor around it has to call it within
    the call rather than leave it to gRPC, which would answer INTERNAL and log a traceback.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the handler of a method a deserializer that validates, once."""
        found: Any = continuation(handler_call_details)
        if found is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None and known[0] is found:
            return known[1]
        wrapped = found._replace(request_deserializer=_validating(found.request_deserializer))
        self._wrapped[method] = found, wrapped
        return wrapped  # type: ignore[no-any-return]  # grpc makes it a named tuple, whatever its stub says


def _validating(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            request = deserialize(data)
        except DecodeError as error:
            raise InvalidRequestError("the request is not a message of this method") from error
        violations = find_violations(request)
        if violations:
            InvalidRequestError.raise_for(violations)
        return request

    return parse
