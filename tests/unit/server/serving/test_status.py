"""Every error of the domain has a status; nothing else shows anything of itself."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from qflare_server import errors
from qflare_server.serving.rpc.status import STATUS, describe, status_of


def every_error(
    kind: type[errors.QflareError] = errors.QflareError,
) -> Iterator[type[errors.QflareError]]:
    """Yield every subclass, however deep."""
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from every_error(child)


def details(status: status_pb2.Status, kind: type) -> list[object]:
    """Return the details of a status that are of one kind."""
    found = []
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            found.append(message)
    return found


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_has_a_status_and_a_reason_of_its_own(kind: type[errors.QflareError]) -> None:
    error = kind.__new__(kind)

    assert status_of(error) is not grpc.StatusCode.INTERNAL
    assert kind.reason.isupper()
    assert kind.reason != errors.QflareError.reason


def test_reasons_are_unique() -> None:
    reasons = [kind.reason for kind in every_error()]

    assert len(reasons) == len(set(reasons))


def test_every_row_is_an_error_of_the_domain() -> None:
    assert set(STATUS) <= set(every_error())


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("secret"), errors.QflareError("x")]
)
def test_unknown_errors_give_a_fixed_text(error: Exception) -> None:
    status = describe(error, "request-1") if not isinstance(error, errors.QflareError) else None
    if status is None:
        assert status_of(error) is grpc.StatusCode.INTERNAL
        return

    assert status.message == "internal error"
    assert b"secret" not in status.SerializeToString()
    assert details(status, error_details_pb2.RequestInfo) == [
        error_details_pb2.RequestInfo(request_id="request-1")
    ]


def test_a_bad_field_is_named() -> None:
    status = describe(errors.InvalidRequestError("name: too long", field="name"), "r")

    (bad,) = details(status, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [item.field for item in bad.field_violations] == ["name"]


def test_a_dynamic_bound_says_when_to_come_back() -> None:
    error = errors.TooManyRequestsError("too many", retry_after_s=1.5, subject="device:1")

    status = describe(error, "r")

    (retry,) = details(status, error_details_pb2.RetryInfo)
    (quota,) = details(status, error_details_pb2.QuotaFailure)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert [item.subject for item in quota.violations] == ["device:1"]


def test_a_wrong_state_is_a_precondition() -> None:
    status = describe(errors.StaleBaseVersionError(3, 7), "r")

    (unmet,) = details(status, error_details_pb2.PreconditionFailure)
    (info,) = details(status, error_details_pb2.ErrorInfo)
    assert isinstance(unmet, error_details_pb2.PreconditionFailure)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert [item.type for item in unmet.violations] == ["STALE_BASE_VERSION"]
    assert dict(info.metadata) == {"current_version": "7"}


def test_a_status_fits_into_trailers_whatever_the_caller_sent() -> None:
    violations = [("\N{SNOWMAN}" * 20_000, "\N{SNOWMAN}" * 20_000) for _ in range(100)]
    with pytest.raises(errors.InvalidRequestError) as caught:
        errors.InvalidRequestError.raise_for(violations)

    status = describe(caught.value, "r" * 36)

    percent_encoded = 3 * len(status.message.encode())
    base64_encoded = 4 * len(status.SerializeToString()) / 3
    assert percent_encoded + base64_encoded < 7500
    (bad,) = details(status, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    named = bad.field_violations[:-1]
    assert all(item.field.endswith("...") for item in named)
    assert bad.field_violations[-1].description == f"and {100 - len(named)} more"


def test_every_wrong_field_of_a_request_is_named() -> None:
    violations = [(f"config.field_{number}", "required") for number in range(30)]
    with pytest.raises(errors.InvalidRequestError, match="and 29 more") as caught:
        errors.InvalidRequestError.raise_for(violations)

    (bad,) = details(describe(caught.value, "r"), error_details_pb2.BadRequest)

    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [(item.field, item.description) for item in bad.field_violations] == violations


def test_no_violation_is_no_error() -> None:
    errors.InvalidRequestError.raise_for([])
