import pytest

from qflare_client import errors
from qflare_client.errors import error_from_answer


@pytest.mark.parametrize(
    ("code", "reason", "wanted"),
    [
        ("UNAUTHENTICATED", "UNAUTHENTICATED", errors.AuthenticationError),
        ("UNAUTHENTICATED", "INVALID_ENROLLMENT_TOKEN", errors.InvalidEnrollmentTokenError),
        ("PERMISSION_DENIED", "DEVICE_REVOKED", errors.DeviceRevokedError),
        ("PERMISSION_DENIED", "DEVICE_SUSPENDED", errors.DeviceSuspendedError),
        ("PERMISSION_DENIED", "PERMISSION_DENIED", errors.PermissionDeniedError),
        ("NOT_FOUND", "GLOBAL_MODEL_NOT_FOUND", errors.NotFoundError),
        ("INVALID_ARGUMENT", "INVALID_UPDATE", errors.InvalidRequestError),
        ("INVALID_ARGUMENT", "ALGORITHM_NOT_ACCEPTED", errors.AlgorithmNotAcceptedError),
        ("ALREADY_EXISTS", "DUPLICATE_UPDATE", errors.DuplicateUpdateError),
        ("FAILED_PRECONDITION", "ROUND_NOT_OPEN", errors.RoundNotOpenError),
        ("FAILED_PRECONDITION", "NOT_SELECTED", errors.NotSelectedError),
        ("FAILED_PRECONDITION", "WRONG_STATE", errors.FailedPreconditionError),
        ("UNIMPLEMENTED", "", errors.RejectedError),
        ("ABORTED", "CONFLICT", errors.BusyError),
        ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS", errors.BusyError),
        ("UNAVAILABLE", "STORE_UNAVAILABLE", errors.UnavailableError),
        ("DEADLINE_EXCEEDED", "", errors.DeadlineExceededError),
        ("INTERNAL", "INTERNAL", errors.CoordinatorFaultError),
    ],
)
def test_an_answer_becomes_its_error(
    code: str, reason: str, wanted: type[errors.QflareClientError]
) -> None:
    error = error_from_answer(code=code, message="no", reason=reason)

    assert type(error) is wanted


def test_a_reason_is_kept() -> None:
    error = error_from_answer(code="NOT_FOUND", message="no", reason="ROUND_NOT_FOUND")

    assert isinstance(error, errors.RejectedError)
    assert error.reason == "ROUND_NOT_FOUND"
    assert "ROUND_NOT_FOUND" in str(error)


def test_a_stale_base_version_names_the_current_one() -> None:
    error = error_from_answer(
        code="FAILED_PRECONDITION",
        message="stale",
        reason="STALE_BASE_VERSION",
        metadata={"current_version": "7"},
    )

    assert isinstance(error, errors.StaleBaseVersionError)
    assert error.current_version == 7


@pytest.mark.parametrize("code", ["UNAVAILABLE", "ABORTED"])
def test_some_errors_may_be_repeated_at_once(code: str) -> None:
    error = error_from_answer(code=code, message="later")

    assert isinstance(error, errors.UnavailableError)
    assert error.retry_after_s == 0.0


def test_a_full_coordinator_may_be_asked_again_only_when_it_says_when() -> None:
    silent = error_from_answer(code="RESOURCE_EXHAUSTED", message="full")
    spoken = error_from_answer(code="RESOURCE_EXHAUSTED", message="full", retry_after_s=3.0)

    assert isinstance(silent, errors.BusyError)
    assert isinstance(spoken, errors.BusyError)
    assert (silent.retry_after_s, spoken.retry_after_s) == (None, 3.0)


def test_a_call_that_grpc_has_sent_away_unseen_is_repeated() -> None:
    error = error_from_answer(code="CANCELLED", message="CANCELLED")

    assert isinstance(error, errors.UnavailableError)
    assert error.retry_after_s == 0.0


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        ("INTERNAL", "no", ""),
        ("DEADLINE_EXCEEDED", "no", ""),
        ("CANCELLED", "the caller went away", "DISCONNECTED"),
        ("CANCELLED", errors.CANCELLED_HERE, ""),
    ],
)
def test_other_errors_are_not_repeated(code: str, message: str, reason: str) -> None:
    error = error_from_answer(code=code, message=message, reason=reason)

    assert isinstance(error, errors.UnavailableError)
    assert error.retry_after_s is None
