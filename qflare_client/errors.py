"""Errors of the SDK, and the table from the coordinator's error reasons to them.

```
QflareClientError
  + UnavailableError           could not be reached or has no room; safe to try later  .reason
    - DeadlineExceededError    the time for one call passed
    - TlsError                 the TLS handshake fails, and would fail again: certificates or names are wrong
    - BusyError                a limit is reached, or a concurrent call conflicted  .retry_after_s
    - CoordinatorFaultError    it failed inside; .reason and the message name the request
  + RejectedError              the coordinator said no; .reason is the machine word, .metadata its details
    - AuthenticationError      no valid credential
      - InvalidEnrollmentTokenError
    - PermissionDeniedError    this device may not call
      - DeviceSuspendedError
      - DeviceRevokedError
    - NotFoundError            no such training session, version, update
    - InvalidRequestError      malformed, wrong shapes, NaN, digest, signature, too large
    - DuplicateUpdateError     a different update of this device is in the round
    - FailedPreconditionError  not in this state
      - RoundNotOpenError
      - NotSelectedError
      - StaleBaseVersionError  .current_version
    - ProxyRefusedError        a proxy before the coordinator said no, such as to the size
  + VerificationError          what the coordinator sent does not prove what it claims
    - UntrustedKeysetError     root documents or keyset: wrong signer, expired, rolled back
    - InvalidStatementError    a statement is not signed by the coordinator, or about something else
    - CorruptModelError        downloaded bytes do not match their statement
    - RolledBackModelError     a version below the last accepted one, or another history
    - RewrittenLogError        the audit log does not extend the one that this device knows
    - InvalidEvidenceError     a file of evidence is not what it claims to be
  + KeyStoreError              the key store cannot be used
    - NotEnrolledError         it holds no device
    - KeyStoreLockedError      another process uses it
    - WrongPassphraseError     its keys cannot be opened
  + ForkedError                the client was opened before this process was forked
  + PrivacyError               local privacy does not allow this update
    - RepeatedTaskError        an update was released for this round or a later one
    - PrivacyBudgetExceededError  it would cost more than the budget of epsilon
  + UnsupportedTaskError       the training session asks for what this SDK cannot do
  + TrainingFunctionError      the training function returned something unusable
```

No type of gRPC, protobuf or a cryptographic library is raised from a public call.
"""

from collections.abc import Mapping


class QflareClientError(Exception):
    """Root of the errors of the device SDK."""


class UnavailableError(QflareClientError):
    """The coordinator could not be reached, or cannot serve at the moment; safe to try later.

    Args:
        message: What happened.
        reason: The coordinator's machine word; empty when it gave none.
        retry_after_s: Seconds after which the same call may be repeated at the earliest; None means
            that repeating it soon is no use.
    """

    def __init__(
        self, message: str, *, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceededError(UnavailableError):
    """The time for one call passed; whether it had an effect is not known."""


class TlsError(UnavailableError):
    """The TLS handshake fails and would fail again: untrusted authority, other name, unusable certificate or key."""


class BusyError(UnavailableError):
    """The coordinator has reached a limit, or a concurrent call conflicted with this one."""


class CoordinatorFaultError(UnavailableError):
    """The coordinator failed inside; the message names the request in its log."""


class RejectedError(QflareClientError):
    """The coordinator said no; the same call would get the same answer.

    Args:
        message: The coordinator's text.
        reason: Its machine word, such as ROUND_NOT_OPEN.
        metadata: Dynamic parts of the message.
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
    """The device is revoked for good."""


class NotFoundError(RejectedError):
    """No such training session, version, update or device, or none that this device may see."""


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
    """The update is sealed and the training session takes none that are, or the other way round."""


class DuplicateUpdateError(RejectedError):
    """A different update of this device is in the round already, or a different evaluation of the version."""


class FailedPreconditionError(RejectedError):
    """The state of the coordinator does not allow the call."""


class RoundNotOpenError(FailedPreconditionError):
    """The round takes no update any more."""


class SealKeyNotAcceptedError(FailedPreconditionError):
    """The update is sealed to a key of the coordinator that is no longer accepted."""


class NotSelectedError(FailedPreconditionError):
    """The device was not selected for the round, or not asked to measure the version."""


class StaleBaseVersionError(FailedPreconditionError):
    """The update was trained from a version that the round does not train from.

    Attributes:
        current_version: The version to train from; -1 when the coordinator did not say.
    """

    @property
    def current_version(self) -> int:
        """Version that the round trains from, or -1."""
        text = self.metadata.get("current_version", "")
        return int(text) if text.isdecimal() else -1


class ProxyRefusedError(RejectedError):
    """A proxy before the coordinator refused the call, with an HTTP status of 400 to 499.

    HTTP 413 means that the proxy takes no request body of this size; nginx takes 1 MiB unless it is told otherwise.
    """


class VerificationError(QflareClientError):
    """What the coordinator sent does not prove what it claims; nothing of it was used."""


class UntrustedKeysetError(VerificationError):
    """Root documents or keyset have the wrong signers, have expired, or are older than known ones."""


class InvalidStatementError(VerificationError):
    """A statement is malformed, not signed by the coordinator, or about something else."""


class CorruptModelError(VerificationError):
    """The bytes of a downloaded version are not those of its statement."""


class RolledBackModelError(VerificationError):
    """A version below the last accepted one was offered, or one with another history."""


class RewrittenLogError(VerificationError):
    """The coordinator's audit log does not extend the one that this device knows."""


class InvalidEvidenceError(VerificationError):
    """A file of evidence, or something in it, is not what it claims to be."""


class KeyStoreError(QflareClientError):
    """The key store cannot be read or written, or its files are open to others."""


class NotEnrolledError(KeyStoreError):
    """The key store holds no enrolled device."""


class KeyStoreLockedError(KeyStoreError):
    """Another process uses the key store."""


class WrongPassphraseError(KeyStoreError):
    """The keys cannot be opened with this passphrase, or their file was altered."""


class ForkedError(QflareClientError):
    """The client was opened before this process was forked: its connection belongs to the other process."""

    def __init__(self) -> None:
        super().__init__(
            "the client was opened before this process was forked: use it in the process that opened it"
        )


class PrivacyError(QflareClientError):
    """Local privacy does not allow this update to be released."""


class RepeatedTaskError(PrivacyError):
    """The device has released an update for this round of the training session, or for a later one."""


class PrivacyBudgetExceededError(PrivacyError):
    """The update would bring all releases of the device above the budget of epsilon."""


class UnsupportedTaskError(QflareClientError):
    """The training session asks for something that this version of the SDK cannot do."""


class TrainingFunctionError(QflareClientError):
    """The training or evaluation function returned something that cannot be sent."""


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
"""gRPC's text for a call that its own caller has cancelled."""
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
    """Turn the coordinator's answer to a failed call into the error that a developer sees.

    Args:
        code: Name of the canonical status code, such as NOT_FOUND.
        message: The coordinator's text.
        reason: `google.rpc.ErrorInfo.reason`; the code stands in where there is none.
        metadata: `google.rpc.ErrorInfo.metadata`.
        retry_after_s: `google.rpc.RetryInfo.retry_delay` in seconds.
        request_id: `google.rpc.RequestInfo.request_id`, by which its log knows the call.
        resumable: The call goes on where it was when it is made again: worth it even if its time has passed.
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
            # A stream that stalled was ended by the coordinator, which kept what had come.
            again = resumable or reason == "STALLED"
            return DeadlineExceededError(
                text, reason=reason, retry_after_s=(retry_after_s or 0.0) if again else None
            )
        case "CANCELLED":
            # gRPC sends calls away, with this code and without a reason, where more wait than its server holds.
            is_shed = reason == code and message != CANCELLED_HERE
            return UnavailableError(text, reason=reason, retry_after_s=0.0 if is_shed else None)
    if code in _FAULT_CODES:
        return CoordinatorFaultError(f"{text} request {request_id or 'unknown'}", reason=reason)
    kind_of_no = _BY_REASON.get(reason) or _BY_CODE.get(code, RejectedError)
    return kind_of_no(text, reason=reason, metadata=metadata)
