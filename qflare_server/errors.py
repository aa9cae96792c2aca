"""Domain errors: the only exceptions that reach a caller of the coordinator.

Each class has a `reason`, the machine word that travels as `google.rpc.ErrorInfo.reason` in domain `qflare`;
its status code is in the one table of `serving.rpc.status`. Messages state actual and expected values and never
contain a secret.
"""

from collections.abc import Mapping, Sequence


class QflareError(Exception):
    """Root of the domain errors.

    Args:
        message: Actual and expected values; sent to the caller.
        metadata: Dynamic parts of the message for programs, sent in `ErrorInfo.metadata`.
    """

    reason = "INTERNAL"

    def __init__(self, message: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])
        self.metadata = dict(metadata or {})


class InvalidRequestError(QflareError):
    """A field is missing, malformed or out of range.

    Attributes:
        field: Path of the first such field, empty for the request as a whole.
        violations: Path and description of every such field; sent as `google.rpc.BadRequest`.
    """

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message, {"field": field} if field else None)
        self.field = field
        self.violations: Sequence[tuple[str, str]] = [(field, message)]

    @classmethod
    def raise_for(cls, violations: Sequence[tuple[str, str]]) -> None:
        """Raise an error for the violations of a request; do nothing if there are none.

        Args:
            violations: Path and description of every such field.
        """
        if not violations:
            return
        field, description = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        error = cls(f"{field}: {description}{more}", field=field)
        error.violations = violations
        raise error


class InvalidManifestError(InvalidRequestError):
    """Names, element types or shapes differ from the base model's, or the layout is invalid."""

    reason = "INVALID_MANIFEST"


class InvalidUpdateError(InvalidRequestError):
    """The payload is too short, too long, or holds NaN or infinity."""

    reason = "INVALID_UPDATE"


class DigestMismatchError(InvalidRequestError):
    """Bytes do not match their stated digest."""

    reason = "DIGEST_MISMATCH"


class InvalidSignatureError(InvalidRequestError):
    """A signature does not verify, or covers something else."""

    reason = "INVALID_SIGNATURE"


class AlgorithmNotAcceptedError(InvalidRequestError):
    """The signature algorithm is not accepted for devices.

    Args:
        got: Name of the key's algorithm.
        accepted: Names of the accepted algorithms; also sent in the metadata, separated by commas.
    """

    reason = "ALGORITHM_NOT_ACCEPTED"

    def __init__(self, got: str, accepted: Sequence[str]) -> None:
        wanted = ",".join(accepted)
        super().__init__(f"signature algorithm: got {got}, want one of {wanted}")
        self.metadata["accepted"] = wanted


class InvalidSealError(InvalidRequestError):
    """A sealed payload does not open: its header, its key or a segment is invalid."""

    reason = "INVALID_SEAL"


class SealingMismatchError(InvalidRequestError):
    """The payload is sealed but the training session does not use sealing, or the reverse."""

    reason = "SEALING_MISMATCH"


class UpdateTooLargeError(InvalidRequestError):
    """The payload exceeds a static limit: a retry can never succeed."""

    reason = "UPDATE_TOO_LARGE"


class StrategyRefusedError(InvalidRequestError):
    """The settings of a training session contradict each other or name something unknown."""

    reason = "STRATEGY_REFUSED"


class UnauthenticatedError(QflareError):
    """The call carries no valid credential."""

    reason = "UNAUTHENTICATED"


class InvalidEnrollmentTokenError(QflareError):
    """The enrollment token is unknown, used, expired or revoked."""

    reason = "INVALID_ENROLLMENT_TOKEN"


class PermissionDeniedError(QflareError):
    """The caller's role does not allow this method."""

    reason = "PERMISSION_DENIED"


class DeviceRevokedError(PermissionDeniedError):
    """The device is revoked."""

    reason = "DEVICE_REVOKED"


class DeviceSuspendedError(PermissionDeniedError):
    """The device is suspended."""

    reason = "DEVICE_SUSPENDED"


class NotFoundError(QflareError):
    """The requested object does not exist, or the caller may not access it."""

    reason = "NOT_FOUND"


class TrainingSessionNotFoundError(NotFoundError):
    """No such training session."""

    reason = "TRAINING_SESSION_NOT_FOUND"


class RoundNotFoundError(NotFoundError):
    """No such round."""

    reason = "ROUND_NOT_FOUND"


class GlobalModelNotFoundError(NotFoundError):
    """No such version."""

    reason = "GLOBAL_MODEL_NOT_FOUND"


class DeviceNotFoundError(NotFoundError):
    """No such device."""

    reason = "DEVICE_NOT_FOUND"


class TokenNotFoundError(NotFoundError):
    """No such token."""

    reason = "TOKEN_NOT_FOUND"


class UpdateNotFoundError(NotFoundError):
    """No such update."""

    reason = "UPDATE_NOT_FOUND"


class AuditEntryNotFoundError(NotFoundError):
    """No such audit entry, or none in the requested tree."""

    reason = "AUDIT_ENTRY_NOT_FOUND"


class PayloadPrunedError(NotFoundError):
    """The payload was deleted under the retention setting of its training session."""

    reason = "PAYLOAD_PRUNED"


class AlreadyExistsError(QflareError):
    """The object exists already and differs."""

    reason = "ALREADY_EXISTS"


class RequestIdReusedError(AlreadyExistsError):
    """The request id belongs to an earlier call of the same method with another body."""

    reason = "REQUEST_ID_REUSED"


class DuplicateUpdateError(AlreadyExistsError):
    """The device has sent a different update for this round."""

    reason = "DUPLICATE_UPDATE"


class DuplicateEvaluationError(AlreadyExistsError):
    """The device has sent a different report for this version."""

    reason = "DUPLICATE_EVALUATION"


class FailedPreconditionError(QflareError):
    """The state of the coordinator does not allow the call."""

    reason = "FAILED_PRECONDITION"


class WrongStateError(FailedPreconditionError):
    """The current state does not allow this transition."""

    reason = "WRONG_STATE"


class RoundNotOpenError(FailedPreconditionError):
    """The round does not accept updates."""

    reason = "ROUND_NOT_OPEN"


class SealKeyNotAcceptedError(FailedPreconditionError):
    """The payload is sealed to a key of the coordinator that is no longer accepted: seal it to the current one."""

    reason = "SEAL_KEY_NOT_ACCEPTED"


class NoKemKeyError(FailedPreconditionError):
    """The version is sealed, and the caller has no key that it could be sealed to."""

    reason = "NO_KEM_KEY"


class NotSelectedError(FailedPreconditionError):
    """The device was not selected for this round, or not asked to measure this version."""

    reason = "NOT_SELECTED"


class StaleBaseVersionError(FailedPreconditionError):
    """The base version is not the one that the round trains from."""

    reason = "STALE_BASE_VERSION"

    def __init__(self, got: int, current: int) -> None:
        super().__init__(
            f"base version: got {got}, want {current}", {"current_version": str(current)}
        )


class TooManyRequestsError(QflareError):
    """A dynamic limit is reached; a retry may succeed later.

    Args:
        message: The limit.
        retry_after_s: Delay before a retry, in seconds; sent as `google.rpc.RetryInfo`.
    """

    reason = "TOO_MANY_REQUESTS"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, subject: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.subject = subject


class StorageFullError(TooManyRequestsError):
    """The coordinator's storage is full."""

    reason = "STORAGE_FULL"

    def __init__(self) -> None:
        super().__init__("the coordinator's storage is full", retry_after_s=30.0)


class StalledError(QflareError):
    """The stream made no progress within its timeout."""

    reason = "STALLED"


class DisconnectedError(QflareError):
    """The caller disconnected during a stream."""

    reason = "DISCONNECTED"


class ConflictError(QflareError):
    """Conflicting concurrent call; retry the whole call."""

    reason = "CONFLICT"


class SealedPayloadLostError(FailedPreconditionError):
    """The key of a stored payload does not open under the state keys that this coordinator holds."""

    reason = "SEALED_PAYLOAD_LOST"


class StorageDamagedError(QflareError):
    """The database or the payload store holds pages that cannot be read: restore a backup."""

    reason = "STORAGE_DAMAGED"


class DamagedPayloadError(StorageDamagedError):
    """Stored bytes of a payload are missing, or are not those that were received.

    Args:
        payload_id: The payload.
        problem: Which bytes, and what they are.
    """

    reason = "PAYLOAD_DAMAGED"

    def __init__(self, payload_id: str, problem: str) -> None:
        super().__init__(f"payload {payload_id}: {problem}")
        self.payload_id = payload_id
        self.problem = problem


class StoreUnavailableError(QflareError):
    """The database or the payload store cannot be reached."""

    reason = "STORE_UNAVAILABLE"


class PayloadStoreNotConfiguredError(StoreUnavailableError):
    """A payload is in a payload store that the coordinator's settings do not name."""

    reason = "PAYLOAD_STORE_NOT_CONFIGURED"


class ObjectStoreUnavailableError(StoreUnavailableError):
    """The object store of payloads does not answer, or answers with an error, however often a request is repeated."""

    reason = "OBJECT_STORE_UNAVAILABLE"
    remedy = "check QFLARE_OBJECT_STORE_URL and the settings beside it, and that the store can be reached"


class ObjectStoreThrottledError(ObjectStoreUnavailableError):
    """The object store refuses requests because there are too many."""

    reason = "OBJECT_STORE_THROTTLED"


class ObjectStoreDeniedError(ObjectStoreUnavailableError):
    """The object store refuses the coordinator's credentials: they expired, are wrong, or lack a permission."""

    reason = "OBJECT_STORE_DENIED"
    remedy = "renew the credentials; docs/operations.md lists the permissions that they need"


class BucketMissingError(ObjectStoreUnavailableError):
    """The bucket of the object store does not exist."""

    reason = "OBJECT_STORE_BUCKET_MISSING"
    remedy = "check QFLARE_OBJECT_STORE_URL; the coordinator creates no bucket"


class PayloadStoreMismatchError(FailedPreconditionError):
    """A payload store is not the one that the database's rows refer to. Raised at start, never sent over the wire.

    Args:
        store: Name of the payload store.
        is_empty: Whether it holds nothing.
    """

    reason = "PAYLOAD_STORE_MISMATCH"

    def __init__(self, store: str, *, is_empty: bool) -> None:
        what = "lacks the payloads of this database" if is_empty else "belongs to another database"
        super().__init__(f"the payload store {store} {what}")
        self.remedy = (
            "check QFLARE_OBJECT_STORE_URL"
            if store == "object"
            else "check QFLARE_PAYLOAD_DIR, and that the disk is mounted"
        )


class PayloadPlaceTakenError(StoreUnavailableError):
    """The folder or bucket of a payload store is owned by another database, of which this one may be a copy.

    Args:
        store: Name of the payload store.
    """

    reason = "PAYLOAD_PLACE_TAKEN"
    remedy = "stop what uses the other database, then: qflare-server payloads claim"

    def __init__(self, store: str) -> None:
        super().__init__(f"the payload store {store} belongs to another copy of this database")


class PayloadStoreConflictError(FailedPreconditionError):
    """Another coordinator on the database stores new payloads elsewhere. Raised at start, never sent over the wire.

    Args:
        store: Payload store of this coordinator.
        address: Address of the other coordinator.
        theirs: Its payload store.
    """

    reason = "PAYLOAD_STORE_CONFLICT"

    def __init__(self, store: str, address: str, theirs: str) -> None:
        where = f"in {theirs}" if theirs != store else f"in {theirs}, but in another place"
        super().__init__(
            f"this coordinator stores payloads in {store}, the one at {address} on the same database {where}"
        )
        self.remedy = (
            "QFLARE_PAYLOAD_STORE=database or object for coordinators on several machines, the same for all;"
            " to change it, stop all of them, and wait a minute after a crash"
        )


class IdentityProviderUnavailableError(QflareError):
    """The identity provider cannot be reached; tokens of this coordinator are not affected."""

    reason = "IDENTITY_PROVIDER_UNAVAILABLE"


class HelperUnavailableError(QflareError):
    """A helper for secure aggregation cannot be reached, or does not answer in time."""

    reason = "HELPER_UNAVAILABLE"


class HelperRefusedError(QflareError):
    """A helper for secure aggregation refused a request, or its answer does not verify."""

    reason = "HELPER_REFUSED"


class DrainingError(QflareError):
    """The coordinator is shutting down."""

    reason = "DRAINING"


def release_frames(error: BaseException) -> None:
    """Cut an error that was handled, and the errors before it, from the frames that they were raised in.

    Frames that hold the error, and through it themselves, keep the call until a garbage collection. gRPC refuses new
    streams of a connection while a hundred ended ones are kept.
    """
    released: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in released:
        link.__traceback__ = None
        released.append(link)
        link = link.__cause__ or link.__context__
