"""Errors of the SDK, and the mapping from the coordinator's error reasons to them.

```
QflareClientError
  + UnavailableError           unreachable or overloaded; safe to retry later  .reason
    - DeadlineExceededError    a call timed out
    - TlsError                 the TLS handshake fails permanently: certificates or names are wrong
    - BusyError                a limit is reached, or a concurrent call conflicted  .retry_after_s
    - CoordinatorFaultError    internal error; .reason and the message name the request
  + RejectedError              the coordinator refused; .reason is the machine-readable reason, .metadata its details
    - AuthenticationError      no valid credential
      - InvalidEnrollmentTokenError
    - PermissionDeniedError    this device may not make the call
      - DeviceSuspendedError
      - DeviceRevokedError
    - NotFoundError            no such training session, version, update
    - InvalidRequestError      malformed, wrong shapes, NaN, digest, signature, too large
    - DuplicateUpdateError     the round already has a different update of this device
    - FailedPreconditionError  not in this state
      - RoundNotOpenError
      - NotSelectedError
      - StaleBaseVersionError  .current_version
    - ProxyRefusedError        a proxy in front of the coordinator refused, for example because of the size
  + VerificationError          data from the coordinator does not verify
    - UntrustedKeysetError     root documents or keyset: wrong signer, expired, rolled back
    - InvalidStatementError    a statement is not signed by the coordinator, or about something else
    - CorruptModelError        downloaded bytes do not match their statement
    - RolledBackModelError     a version older than the last accepted one, or with another history
    - RewrittenLogError        the audit log does not extend the last head that this device verified
    - InvalidEvidenceError     an evidence file does not verify
  + KeyStoreError              the key store cannot be used
    - NotEnrolledError         it holds no device
    - KeyStoreLockedError      another process uses it
    - WrongPassphraseError     its keys cannot be opened
  + ForkedError                the client was opened before this process was forked
  + PrivacyError               local privacy does not allow this update
    - RepeatedTaskError        an update was released for this round or a later one
    - PrivacyBudgetExceededError  the update would exceed the epsilon budget
  + InvalidArgumentError       an argument is invalid; a ValueError as well
  + UnsupportedTaskError       the training session needs a feature that this SDK lacks
  + InsufficientTaskError      the task asks for less than the device's policy for secure aggregation
  + TrainingFunctionError      the training function returned something unusable
  + TaskFailedError            raised by a training function to tell administrators why it failed
```

Public calls raise no exception types of gRPC, protobuf or cryptographic libraries.
"""

from collections.abc import Mapping


class QflareClientError(Exception):
    """Base class of the device SDK's errors."""


class UnavailableError(QflareClientError):
    """The coordinator is unreachable or overloaded; safe to retry later.

    Args:
        message: What happened.
        reason: The coordinator's machine-readable reason; empty if it gave none.
        retry_after_s: Minimum delay in seconds before the call may be repeated; None means that an early retry is
            useless.
    """

    def __init__(
        self, message: str, *, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceededError(UnavailableError):
    """A call timed out; it may or may not have had an effect."""


class TlsError(UnavailableError):
    """The TLS handshake fails permanently: untrusted authority, wrong name, unusable certificate or key."""


class BusyError(UnavailableError):
    """The coordinator has reached a limit, or a concurrent call conflicted with this one."""


class CoordinatorFaultError(UnavailableError):
    """Internal error of the coordinator; the message names the request in its log."""


class RejectedError(QflareClientError):
    """The coordinator refused the call; repeating it yields the same result.

    Args:
        message: The coordinator's text.
        reason: Its machine-readable reason, such as ROUND_NOT_OPEN.
        metadata: Variable parts of the message.
    """

    def __init__(
        self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata or {})


class AuthenticationError(RejectedError):
    """The call carried no credential that the coordinator accepts."""


class InvalidEnrollmentTokenError(AuthenticationError):
    """The enrollment token is unknown, used, expired or revoked."""


class PermissionDeniedError(RejectedError):
    """This device may not make this call."""


class DeviceSuspendedError(PermissionDeniedError):
    """The device is suspended until an administrator reinstates it."""


class DeviceRevokedError(PermissionDeniedError):
    """The device is revoked permanently."""


class NotFoundError(RejectedError):
    """No such training session, version, update or device, or none that this device can access."""


class InvalidRequestError(RejectedError):
    """The coordinator found the request or the update malformed."""


class AlgorithmNotAcceptedError(InvalidRequestError):
    """The coordinator does not accept the algorithm of this device's signature key.

    Attributes:
        accepted: Names of the algorithms that it accepts, such as ml-dsa-65.
    """

    @property
    def accepted(self) -> tuple[str, ...]:
        """Names of the algorithms that the coordinator accepts."""
        return tuple(filter(None, self.metadata.get("accepted", "").split(",")))


class SealingMismatchError(InvalidRequestError):
    """The update is sealed but the training session does not seal payloads, or vice versa."""


class DuplicateUpdateError(RejectedError):
    """The round already has a different update of this device, or the version a different evaluation."""


class FailedPreconditionError(RejectedError):
    """The state of the coordinator does not allow the call."""


class RoundNotOpenError(FailedPreconditionError):
    """The round no longer accepts updates."""


class SealKeyNotAcceptedError(FailedPreconditionError):
    """The update is sealed to a key that the coordinator no longer accepts."""


class NotSelectedError(FailedPreconditionError):
    """The device was not selected for the round, or not selected to evaluate the version."""


class StaleBaseVersionError(FailedPreconditionError):
    """The update was trained from a version that is not the round's base version.

    Attributes:
        current_version: The round's base version; -1 if the coordinator did not state it.
    """

    @property
    def current_version(self) -> int:
        """Base version of the round, or -1."""
        text = self.metadata.get("current_version", "")
        return int(text) if text.isdecimal() else -1


class ProxyRefusedError(RejectedError):
    """A proxy in front of the coordinator refused the call, with an HTTP status of 400 to 499.

    HTTP 413 means that the proxy does not accept a request body of this size; the default limit of nginx is 1 MiB.
    """


class VerificationError(QflareClientError):
    """Data from the coordinator does not verify; none of it was used."""


class UntrustedKeysetError(VerificationError):
    """Root documents or keyset have the wrong signers, have expired, or are older than the known ones."""


class InvalidStatementError(VerificationError):
    """A statement is malformed, not signed by the coordinator, or about something else."""


class CorruptModelError(VerificationError):
    """The bytes of a downloaded version do not match its statement."""


class RolledBackModelError(VerificationError):
    """A version is older than the last accepted one, or has another history."""


class RewrittenLogError(VerificationError):
    """The coordinator's audit log does not extend the last head that this device verified."""


class InvalidEvidenceError(VerificationError):
    """An evidence file, or a part of it, does not verify."""


class KeyStoreError(QflareClientError):
    """The key store cannot be read or written, or its files are open to others."""


class NotEnrolledError(KeyStoreError):
    """The key store holds no enrolled device."""


class KeyStoreLockedError(KeyStoreError):
    """Another process uses the key store."""


class WrongPassphraseError(KeyStoreError):
    """The keys cannot be decrypted with this passphrase, or their file was altered."""


class ForkedError(QflareClientError):
    """The client was opened before this process was forked: its connection belongs to the other process."""

    def __init__(self) -> None:
        super().__init__(
            "the client was opened before this process was forked: use it in the process that opened it"
        )


class PrivacyError(QflareClientError):
    """Local privacy does not allow this update to be released."""


class RepeatedTaskError(PrivacyError):
    """The device has already released an update for this round of the training session, or for a later one."""


class PrivacyBudgetExceededError(PrivacyError):
    """The update would bring the device's releases above the epsilon budget."""


class InvalidArgumentError(QflareClientError, ValueError):
    """An argument of a call cannot be used or sent: of another type, out of range, text that is not Unicode."""


class AmbiguousReferenceError(InvalidArgumentError):
    """A name or the beginning of an id means several devices or training sessions; the message lists them."""


class UnsupportedTaskError(QflareClientError):
    """The training session needs a feature that this version of the SDK lacks, or an extra that is not installed."""


class InsufficientTaskError(QflareClientError):
    """The task asks for less than the device's policy for secure aggregation; nothing was trained or sent."""


class TrainingFunctionError(QflareClientError):
    """The training or evaluation function returned something that cannot be sent."""


class TaskFailedError(QflareClientError):
    """Raised by a training or evaluation function; its text is sent to the coordinator as the reason of the failure.

    Of any other exception only the class is sent: its message could hold data. Raised `from` another exception, that
    one's class is the kind of the failure.

    Attributes:
        text: For administrators; the first 200 characters are sent, control characters as spaces. No data.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


_BY_REASON: Mapping[str, type[RejectedError]] = {
    "ALGORITHM_NOT_ACCEPTED": AlgorithmNotAcceptedError,
    "ALREADY_EXISTS": DuplicateUpdateError,
    "DEVICE_REVOKED": DeviceRevokedError,
    "DEVICE_SUSPENDED": DeviceSuspendedError,
    "DUPLICATE_EVALUATION": DuplicateUpdateError,
    "DUPLICATE_UPDATE": DuplicateUpdateError,
    "INVALID_ENROLLMENT_TOKEN": InvalidEnrollmentTokenError,
    "NOT_SELECTED": NotSelectedError,
    "ROUND_NOT_OPEN": RoundNotOpenError,
    "SEALING_MISMATCH": SealingMismatchError,
    "SEAL_KEY_NOT_ACCEPTED": SealKeyNotAcceptedError,
    "STALE_BASE_VERSION": StaleBaseVersionError,
    "UNAUTHENTICATED": AuthenticationError,
}

_BY_CODE: Mapping[str, type[RejectedError]] = {
    "ALREADY_EXISTS": DuplicateUpdateError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "OUT_OF_RANGE": InvalidRequestError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "UNAUTHENTICATED": AuthenticationError,
}

CANCELLED_HERE = "Locally cancelled by application!"
"""gRPC's error text for a call canceled by its own caller."""
_FAULT_CODES = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})


def error_from_answer(
    *,
    code: str,
    message: str,
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    retry_after_s: float | None = None,
    request_id: str = "",
    resumable: bool = False,
) -> QflareClientError:
    """Convert the coordinator's error status into an error of the SDK.

    Args:
        code: Name of the canonical status code, such as NOT_FOUND.
        message: The coordinator's text.
        reason: `google.rpc.ErrorInfo.reason`; the code is used if there is none.
        metadata: `google.rpc.ErrorInfo.metadata`.
        retry_after_s: `google.rpc.RetryInfo.retry_delay` in seconds.
        request_id: `google.rpc.RequestInfo.request_id`, the id of the call in the coordinator's log.
        resumable: A retry of the call resumes where it stopped, so it is worth retrying even after a timeout.
    """
    reason = reason or code
    text = f"{message} [{reason}]"
    match code:
        case "UNAVAILABLE" | "ABORTED":
            kind = BusyError if code == "ABORTED" else UnavailableError
            return kind(text, reason=reason, retry_after_s=retry_after_s or 0.0)
        case "RESOURCE_EXHAUSTED":
            return BusyError(text, reason=reason, retry_after_s=retry_after_s)
        case "DEADLINE_EXCEEDED":
            # The coordinator ended a stalled stream and kept the received data.
            again = resumable or reason == "STALLED"
            return DeadlineExceededError(
                text, reason=reason, retry_after_s=(retry_after_s or 0.0) if again else None
            )
        case "CANCELLED":
            # gRPC rejects calls with this code and without a reason when its server's queue is full.
            is_shed = reason == code and message != CANCELLED_HERE
            return UnavailableError(text, reason=reason, retry_after_s=0.0 if is_shed else None)
    if code in _FAULT_CODES:
        return CoordinatorFaultError(f"{text} request {request_id or 'unknown'}", reason=reason)
    kind_of_no = _BY_REASON.get(reason) or _BY_CODE.get(code, RejectedError)
    return kind_of_no(text, reason=reason, metadata=metadata)
