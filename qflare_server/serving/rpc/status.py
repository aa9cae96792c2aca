"""Mapping from domain errors to gRPC statuses, and the rich status of an error.

A status is sent in the trailers of a call: the text as percent-encoded `grpc-message`, the rich status in base64. Peers
accept 8 KiB of trailers by default and report RESOURCE_EXHAUSTED instead of anything longer, so every text is bounded.
"""

from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from qflare.v1 import coordinator_service_pb2
from qflare_server import errors

DOMAIN: Final = "qflare"
Code = grpc.StatusCode
MAX_TEXT_BYTES: Final = 512
"""Longest text of an error, in UTF-8."""
MAX_VALUE_BYTES: Final = 256
"""Maximum length of a metadata value, and of a field's path or description."""
MAX_VIOLATIONS_BYTES: Final = 2300
"""Maximum total length of all field paths and descriptions."""

STATUS: Final[dict[type[BaseException], grpc.StatusCode]] = {
    errors.InvalidRequestError: Code.INVALID_ARGUMENT,
    errors.UnauthenticatedError: Code.UNAUTHENTICATED,
    errors.InvalidEnrollmentTokenError: Code.UNAUTHENTICATED,
    errors.PermissionDeniedError: Code.PERMISSION_DENIED,
    errors.NotFoundError: Code.NOT_FOUND,
    errors.AlreadyExistsError: Code.ALREADY_EXISTS,
    errors.FailedPreconditionError: Code.FAILED_PRECONDITION,
    errors.TooManyRequestsError: Code.RESOURCE_EXHAUSTED,
    errors.StalledError: Code.DEADLINE_EXCEEDED,
    errors.DisconnectedError: Code.CANCELLED,
    errors.ConflictError: Code.ABORTED,
    errors.StorageDamagedError: Code.DATA_LOSS,
    errors.StoreUnavailableError: Code.UNAVAILABLE,
    errors.IdentityProviderUnavailableError: Code.UNAVAILABLE,
    errors.HelperUnavailableError: Code.UNAVAILABLE,
    errors.HelperRefusedError: Code.FAILED_PRECONDITION,
    errors.DrainingError: Code.UNAVAILABLE,
}


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status of an error, looked up along its base classes; INTERNAL if there is no row."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return Code.INTERNAL


def describe(error: BaseException, request_id: str) -> status_pb2.Status:
    """Return the rich status of an error; errors outside the domain reveal no details."""
    code = status_of(error).value[0]
    if not isinstance(error, errors.QflareError):
        error = errors.QflareError("internal error")
        code = Code.INTERNAL.value[0]
    text = shortened(str(error), MAX_TEXT_BYTES)
    metadata = _metadata_of(error)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, errors.InvalidRequestError):
        details.append(_bad_request(error))
    if isinstance(error, errors.FailedPreconditionError):
        unmet = error_details_pb2.PreconditionFailure.Violation(type=error.reason, description=text)
        details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
    if isinstance(error, errors.TooManyRequestsError):
        details.extend(_quota_details(error, text))
    return status_pb2.Status(code=code, message=text, details=[_packed(item) for item in details])


def refusal_of(error: errors.QflareError) -> coordinator_service_pb2.UpdateRefusal:
    """Return a refusal as it is sent within a response."""
    delay = None
    if isinstance(error, errors.TooManyRequestsError):
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
    return coordinator_service_pb2.UpdateRefusal(
        code=status_of(error).value[0],
        reason=error.reason,
        message=shortened(str(error), MAX_TEXT_BYTES),
        metadata=_metadata_of(error),
        retry_delay=delay,
    )


def _metadata_of(error: errors.QflareError) -> dict[str, str]:
    return {key: shortened(value, MAX_VALUE_BYTES) for key, value in error.metadata.items()}


def shortened(text: str, most_bytes: int) -> str:
    """Truncate a text to a number of UTF-8 bytes, with an ellipsis."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= most_bytes:
        return data.decode()
    return data[: most_bytes - 3].decode(errors="ignore") + "..."


def _bad_request(error: errors.InvalidRequestError) -> error_details_pb2.BadRequest:
    """Return the field violations, as many as fit."""
    message = error_details_pb2.BadRequest()
    room = MAX_VIOLATIONS_BYTES
    for number, (field, description) in enumerate(error.violations):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=shortened(field, MAX_VALUE_BYTES),
            description=shortened(description, MAX_VALUE_BYTES),
        )
        room -= violation.ByteSize()
        if room < 0:
            message.field_violations.add(description=f"and {len(error.violations) - number} more")
            break
        message.field_violations.append(violation)
    return message


def _quota_details(error: errors.TooManyRequestsError, text: str) -> list[Any]:
    delay = Duration()
    delay.FromMilliseconds(int(error.retry_after_s * 1000))
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=shortened(error.subject or DOMAIN, MAX_VALUE_BYTES), description=text
    )
    return [
        error_details_pb2.RetryInfo(retry_delay=delay),
        error_details_pb2.QuotaFailure(violations=[violation]),
    ]


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
