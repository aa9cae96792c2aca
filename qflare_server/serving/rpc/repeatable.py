"""Calls that may be repeated: with a request id, each changes something once and is answered alike."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.message import Message

from qflare.v1 import admin_service_pb2
from qflare_server.serving.rpc.call import current_call
from qflare_server.storage.repository.audit import Caller, Claim
from qflare_server.storage.repository.idempotent_calls import RepeatedCallError
from qflare_server.use_cases.access.repeated_calls import RepeatedCalls

Result = TypeVar("Result")
Response = TypeVar("Response", bound=Message)


class RepeatableCalls:
    """Answers calls that change something.

    Args:
        repeated_calls: Knows the calls that were made before.
    """

    def __init__(self, repeated_calls: RepeatedCalls) -> None:
        self._repeated_calls = repeated_calls

    def answer(
        self,
        request: Any,
        change: Callable[[Caller], Result],
        encode: Callable[[Result], Response],
        *,
        holds_secrets: bool = False,
    ) -> Response:
        """Make a change and encode its result; where the call was made before, return what it was answered then.

        Args:
            request: With a field `request_id`; empty means that the call may be made any number of times.
            change: Makes the change, in one transaction with the caller's claim.
            encode: Depends on the result alone: it runs in the transaction of the change as well.
            holds_secrets: The response is not kept, and a repeated call is refused.

        Raises:
            RequestIdReusedError: A call with another body had the request id.
            AlreadyExistsError: The call was made before, and its response held secrets.
        """
        caller = current_call().caller
        if not request.request_id:
            return encode(change(caller))
        kept: list[Response] = []

        def encode_once(result: Any) -> bytes:
            kept[:] = [encode(result)]
            return kept[0].SerializeToString()

        claim = Claim(
            request.DESCRIPTOR.name.removesuffix("Request"),
            request.request_id,
            hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest(),
            None if holds_secrets else encode_once,
        )
        caller = replace(caller, claim=claim)
        try:
            self._repeated_calls.require_new(caller)
            result = change(caller)
        except RepeatedCallError as repeated:
            response: Response = getattr(admin_service_pb2, f"{claim.method}Response").FromString(
                repeated.response
            )
            return response
        return kept[0] if kept else encode(result)
