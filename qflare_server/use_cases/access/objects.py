"""Object-level authorization: one rule per method, checked in one place.

Roles decide which methods a caller may call (`access.roles`); these rules decide for which objects. Every call is
checked with its first message, before the method runs; a method without a rule cannot be called. Administrators may
access every object of the methods that their role allows.

A device may access the training sessions that it is eligible for: those open to all devices or to one of its groups,
whose requirements it meets (`training.selection`). It may access versions once the session is started; unreleased
versions only if the session does not sample devices, or has sampled this one. It may access its own updates only. An
object that it may not access is reported as not found.
"""

from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    GlobalModelNotFoundError,
    InvalidRequestError,
    PermissionDeniedError,
    TrainingSessionNotFoundError,
    UpdateNotFoundError,
)
from qflare_server.storage.epochs import Epochs
from qflare_server.storage.repository import global_models, updates
from qflare_server.training.selection import (
    Relation,
    find_common_relation,
    find_relation,
    find_relations,
)
from qflare_server.use_cases.access.authentication import Principal
from qflare_server.use_cases.access.statements import parse_statement

MAX_REMEMBERED: Final = 50_000


class ObjectAccess:
    """Checks calls of devices against the rules; thread-safe.

    Lookups are cached until permissions or rounds change: one for each training session where all devices have the same
    relation to it, else one for each device.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[tuple[str, str], tuple[Epochs, Relation | None]] = {}
        self._common: dict[str, tuple[Epochs, Relation | None]] = {}

    def check(self, principal: Principal, method: str, message: Any) -> None:
        """Refuse a call for an object that the caller may not access.

        Args:
            principal: The caller.
            method: Full name of the method.
            message: First message of the call.

        Raises:
            PermissionDeniedError: The method has no rule.
            NotFoundError: Or a subclass: the object does not exist, or the caller may not access it.
        """
        rule = RULES.get(method)
        if rule is None:
            raise PermissionDeniedError("no rule says what this method is for")
        if principal.device_id is not None:
            rule(self, principal.device_id, message)

    def require_relation(self, device_id: str, training_session_id: str) -> Relation:
        """Return the relation of a device to a training session.

        Raises:
            TrainingSessionNotFoundError: The training session does not exist, or the device takes no part in it.
        """
        epochs = self._context.database.epochs()
        return self._require(device_id, training_session_id, epochs)

    def require_recent_relation(self, device_id: str, training_session_id: str) -> Relation:
        """Return the relation of a device to a training session as polls see it: from memory.

        A change by another coordinator is seen within `storage.epochs.MAX_AGE_S`.

        Raises:
            TrainingSessionNotFoundError: As `require_relation`.
        """
        epochs = self._context.database.recent_epochs()
        return self._require(device_id, training_session_id, epochs)

    def remembers(self, device_id: str, training_session_id: str, epochs: Epochs) -> bool:
        """Return whether memory, current at some counters, has a relation of a device to a training session."""
        return self._remembered(device_id, training_session_id, epochs) is not None

    def _remembered(
        self, device_id: str, training_session_id: str, epochs: Epochs
    ) -> Relation | None:
        for known in (
            self._common.get(training_session_id),
            self._known.get((device_id, training_session_id)),
        ):
            if known is not None and known[0] == epochs and known[1] is not None:
                return known[1]
        return None

    def _require(self, device_id: str, training_session_id: str, epochs: Epochs) -> Relation:
        relation = self._relation(device_id, training_session_id, epochs)
        if relation is None:
            raise TrainingSessionNotFoundError
        return relation

    def participants(
        self, training_session_id: str, device_ids: Collection[str], epochs: Epochs | None = None
    ) -> set[str]:
        """Return which of some devices take part in a training session.

        Takes at most one block of queries, however many devices there are.

        Args:
            training_session_id: The training session.
            device_ids: The devices.
            epochs: Counters at which memory has to be current; None reads them as they are now.
        """
        epochs = epochs or self._context.database.epochs()
        related, missing = set(), []
        for device_id in device_ids:
            if self._remembered(device_id, training_session_id, epochs) is None:
                missing.append(device_id)
            else:
                related.add(device_id)
        if missing:
            related |= self._look_up(training_session_id, missing, epochs)
        return related

    def _look_up(
        self, training_session_id: str, device_ids: Collection[str], epochs: Epochs
    ) -> set[str]:
        """Look up the relations of devices that memory does not know; return the devices that have one."""
        with self._context.database.read() as session:
            if self._find_common(session, training_session_id, epochs) is not None:
                return set(device_ids)
            found = find_relations(session, training_session_id, device_ids)
        if found:  # do not cache unknown ids
            self._remember_common(training_session_id, epochs, None)
        for device_id, relation in found.items():
            self._remember((device_id, training_session_id), epochs, relation)
        return set(found)

    def require_own_update(self, device_id: str, update_id: str) -> None:
        """Check that an accepted update belongs to a device.

        Raises:
            UpdateNotFoundError: The update does not exist, or belongs to another device.
        """
        with self._context.database.read() as session:
            known = updates.find_accepted(session, update_id)
        if known is None or known.device_id != device_id:
            raise UpdateNotFoundError

    def is_released(self, training_session_id: str, version: int) -> bool:
        """Return whether a version is released; a release is permanent."""
        with self._context.database.read() as session:
            model = global_models.get_model(session, training_session_id, version)
            return model is not None and model.released

    def _relation(
        self, device_id: str, training_session_id: str, epochs: Epochs
    ) -> Relation | None:
        known = self._remembered(device_id, training_session_id, epochs)
        if known is not None:
            return known
        with self._context.database.read() as session:
            common = self._find_common(session, training_session_id, epochs)
            relation = common or find_relation(session, training_session_id, device_id)
        if relation is not None and common is None:  # do not cache unknown ids
            self._remember_common(training_session_id, epochs, None)
            self._remember((device_id, training_session_id), epochs, relation)
        return relation

    def _find_common(
        self, session: Session, training_session_id: str, epochs: Epochs
    ) -> Relation | None:
        """Look up the relation that all devices have to a training session, unless it is known that there is none."""
        if self._common.get(training_session_id) == (epochs, None):
            return None
        common = find_common_relation(session, training_session_id)
        if common is not None:
            self._remember_common(training_session_id, epochs, common)
        return common

    def _remember_common(
        self, training_session_id: str, epochs: Epochs, common: Relation | None
    ) -> None:
        """Keep the relation of all devices to a training session; None says that each device has its own."""
        if len(self._common) >= MAX_REMEMBERED:
            self._common.clear()
        self._common[training_session_id] = (epochs, common)

    def _remember(self, key: tuple[str, str], epochs: Epochs, relation: Relation) -> None:
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = (epochs, relation)


STEPS: Final[dict[str, tuple[type[Any], str]]] = {
    "advertisement": (security_pb2.NeighborAdvertisement, "advertisement"),
    "shares": (security_pb2.NeighborShares, "shares.statement"),
    "confirmation": (security_pb2.NeighborConfirmation, "confirmation"),
    "reveal": (security_pb2.NeighborReveal, "reveal"),
}
"""Statement of each step of secure aggregation with neighbors, and the path of its envelope in the request."""

Rule = Callable[[ObjectAccess, str, Any], None]
"""Rule: refuses a device's call for an object named in its first message."""


def names_nothing(_access: ObjectAccess, _device_id: str, _message: Any) -> None:
    """Allow every device that may call the method: it names no training session, version, update or other device."""


def own_only(_access: ObjectAccess, _device_id: str, _message: Any) -> None:
    """Allow every device that may call the method: it reaches only the device's own keys, profile or uploads."""


def administrators_only(_access: ObjectAccess, _device_id: str, _message: Any) -> None:
    """Deny devices; the method is for administrators."""
    raise PermissionDeniedError("the method is for administrators")


def any_or_own_session(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow a participating device, if the message names a training session; else the method selects one of its own."""
    if message.training_session_id:
        access.require_recent_relation(device_id, message.training_session_id)


def own_session(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow a device that takes part in the training session that the message names."""
    access.require_relation(device_id, message.training_session_id)


def signed_session(kind: type[Any], envelope_field: str) -> Rule:
    """Return a rule: the device must take part in the training session named by its signed statement."""
    envelope_of = attrgetter(envelope_field)

    def rule(access: ObjectAccess, device_id: str, message: Any) -> None:
        payload = envelope_of(message).payload
        statement = parse_statement(kind, payload, f"{envelope_field}.payload")
        access.require_relation(device_id, statement.training_session_id)

    return rule


def signed_step(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow a device that takes part in the training session that the statement of its step names."""
    step = message.WhichOneof("step")
    if step is None:
        raise InvalidRequestError("step: want one", field="step")
    kind, path = STEPS[step]
    payload = attrgetter(path)(message).payload
    statement = parse_statement(kind, payload, f"{path}.payload")
    access.require_relation(device_id, statement.training_session_id)


def signed_by_each(_access: ObjectAccess, _device_id: str, _message: Any) -> None:
    """Allow every device that may call the method to carry updates of others.

    The method authorizes each update on its own: the device that signed it must take part in the training session
    that its statement names (`require_relation`), once the signature is verified.
    """


def visible_version(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow a device that takes part in the training session and may see the requested version."""
    session_id = message.training_session_id
    relation = access.require_relation(device_id, session_id)
    if not relation.is_started:
        raise GlobalModelNotFoundError("no version is handed out before the start")
    if relation.is_drawn or (message.released and not message.HasField("version")):
        return
    if not (message.HasField("version") and access.is_released(session_id, message.version)):
        raise GlobalModelNotFoundError("no such version that is released")


def started_session(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow a device that takes part in the training session, once started."""
    if not access.require_relation(device_id, message.training_session_id).is_started:
        raise GlobalModelNotFoundError("no version is handed out before the start")


def own_update(access: ObjectAccess, device_id: str, message: Any) -> None:
    """Allow the device whose update the message names."""
    access.require_own_update(device_id, message.update_id)


_COORDINATOR: Final = "/qflare.v1.CoordinatorService/"
_ADMIN: Final = "/qflare.v1.AdminService/"
_ADMINISTRATIVE: Final = (
    "CreateTrainingSession",
    "UploadInitialModel",
    "StartTrainingSession",
    "PauseTrainingSession",
    "ResumeTrainingSession",
    "UpdateTrainingSession",
    "CancelTrainingSession",
    "GetTrainingSession",
    "ListTrainingSessions",
    "WatchTrainingSession",
    "ListRounds",
    "ListGlobalModels",
    "DescribeGlobalModel",
    "ListMetrics",
    "RollbackGlobalModel",
    "ReleaseGlobalModel",
    "DownloadGlobalModel",
    "ListUpdates",
    "GetAggregationStatus",
    "GetDevice",
    "ListDevices",
    "RenameDevice",
    "SuspendDevice",
    "ReinstateDevice",
    "RevokeDevice",
    "SetDeviceGroups",
    "ConfirmDeviceProfile",
    "IssueEnrollmentTokens",
    "IssueAdminToken",
    "ListTokens",
    "RevokeToken",
    "ListAuditEntries",
    "ExportAuditEntries",
    "GetCoordinatorStatus",
    "GetAuditProof",
    "ExportVerificationBundle",
)

RULES: Final[dict[str, Rule]] = {
    _COORDINATOR + "GetKeyset": names_nothing,
    _COORDINATOR + "BeginRegistration": names_nothing,
    _COORDINATOR + "Register": names_nothing,
    _COORDINATOR + "BeginAuthentication": names_nothing,
    _COORDINATOR + "Authenticate": names_nothing,
    _COORDINATOR + "RefreshToken": names_nothing,
    _COORDINATOR + "RotateKeys": own_only,
    _COORDINATOR + "GetTask": any_or_own_session,
    _COORDINATOR + "GetGlobalModel": visible_version,
    _COORDINATOR + "SubmitUpdate": signed_session(security_pb2.UpdateStatement, "header.statement"),
    _COORDINATOR + "SubmitUpdates": signed_by_each,
    _COORDINATOR + "GetUpload": own_only,
    _COORDINATOR + "ReportEvaluation": signed_session(
        security_pb2.EvaluationStatement, "statement"
    ),
    _COORDINATOR + "ReportFailure": own_session,
    _COORDINATOR + "SecureAggregationStep": signed_step,
    _COORDINATOR + "Heartbeat": own_only,
    _COORDINATOR + "FindTrainingSession": names_nothing,
    _COORDINATOR + "GetLineage": started_session,
    _COORDINATOR + "GetContributionProof": own_update,
    _COORDINATOR + "GetAuditHead": names_nothing,
    **{_ADMIN + name: administrators_only for name in _ADMINISTRATIVE},
}
"""Object rule of each method of both services."""
