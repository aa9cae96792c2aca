"""Parsing and validation of requests, after the caller is authorized and before the method runs.

A message that does not parse and a field that breaks a constraint of the protos (`qflare.protocol.constraints`) are
refused with `InvalidRequestError`, which lists all such fields. Validation is independent of the method: the proto
declares the constraints of each field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from qflare.protocol.constraints import find_violations
from qflare_server.errors import InvalidRequestError
from qflare_server.serving.rpc.encoding.chunks import reading_chunks

CHUNKED: Final = frozenset({"/qflare.v1.CoordinatorService/SubmitUpdate"})
"""Methods whose large chunks are not copied out of their messages; the receiver checks all that constraints would."""


class RequestValidation(grpc.ServerInterceptor):
    """Parses and validates the requests of every method; the innermost interceptor.

    The deserializer of its handlers raises `InvalidRequestError`, so the surrounding interceptor has to call it within
    the call. If gRPC called it, the response would be INTERNAL and a traceback would be logged.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Add the validating deserializer to the handler of a method, once."""
        found: Any = continuation(handler_call_details)
        if found is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None and known[0] is found:
            return known[1]
        parse = validating(found.request_deserializer)
        if method in CHUNKED:
            parse = reading_chunks(parse, found.request_deserializer(b""))
        wrapped = found._replace(request_deserializer=parse)
        self._wrapped[method] = found, wrapped
        return wrapped  # type: ignore[no-any-return]  # grpc makes it a named tuple, whatever its stub says


def validating(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that raises `InvalidRequestError` for what is no valid request."""

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
