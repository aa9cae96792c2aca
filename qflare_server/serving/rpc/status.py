"""The one table from domain errors to gRPC statuses, and the rich status of an error."""

from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from qflare_server import errors

DOMAIN: Final = "qflare"


Code = grpc.StatusCode


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
    errors.DrainingError: Code.UNAVAILABLE,
}


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status of an error, looked up through its classes; INTERNAL for what has no row."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return Code.INTERNAL


def describe(error: BaseException, request_id: str) -> status_pb2.Status:
    """Return the rich status of an error; what is not of the domain shows nothing of itself."""
    code = status_of(error).value[0]
    if not isinstance(error, errors.QflareError):
        error = errors.QflareError("internal error")
        code = Code.INTERNAL.value[0]
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, errors.InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=str(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.FailedPreconditionError):
        unmet = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, description=str(error)
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
    if isinstance(error, errors.TooManyRequestsError):
        details.extend(_quota_details(error))
    return status_pb2.Status(
        code=code, message=str(error), details=[_packed(item) for item in details]
    )


def _quota_details(error: errors.TooManyRequestsError) -> list[Any]:
    delay = Duration()
    delay.FromMilliseconds(int(error.retry_after_s * 1000))
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=error.subject or DOMAIN, description=str(error)
    )
    return [
        error_details_pb2.RetryInfo(retry_delay=delay),
        error_details_pb2.QuotaFailure(violations=[violation]),
    ]


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
