"""Evaluation reports: accepted only if requested, signed, and once per version.

Constructor: ``Evaluations(context)``.

A report's example count is capped at `evaluation.max_example_count` or, if that is unset, at the count stated by the
device's own updates, so no device weighs more in evaluation than in training. The signed statement is kept as
evidence.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.crypto.signing import InvalidKeyError, PublicKey, algorithm_of
from qflare.evidence.statements import StatementError, digest_of, open_evaluation
from qflare.evidence.verification import EVALUATION_REPORTED
from qflare.v1 import security_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    AlgorithmNotAcceptedError,
    DuplicateEvaluationError,
    GlobalModelNotFoundError,
    InvalidRequestError,
    InvalidSignatureError,
    NotSelectedError,
)
from qflare_server.storage.records import Device
from qflare_server.storage.repository import (
    audit,
    devices,
    evaluations,
    global_models,
    training_sessions,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import DeviceState
from qflare_server.training.evaluation import (
    awaits_evaluation,
    is_worth_summarizing,
    summarize,
    was_asked,
)
from qflare_server.training.reported_metrics import check_example_count, check_metrics
from qflare_server.training.rounds import close_if_complete
from qflare_server.use_cases.access.statements import parse_statement
from qflare_server.use_cases.devices.keys import AcceptedAlgorithms
from qflare_server.use_cases.updates.submission import Contributor, require_identity

MAX_GROUP: Final = 100
FIELD: Final = "statement"


@dataclass(frozen=True)
class _Evaluation:
    """A checked report."""

    statement: security_pb2.EvaluationStatement
    envelope: security_pb2.SignedEnvelope
    digest: str


class Evaluations:
    """Accepts evaluation reports; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._algorithms = AcceptedAlgorithms(context.config)

    def report(
        self, caller: Caller, contributor: Contributor, envelope: security_pb2.SignedEnvelope
    ) -> None:
        """Record a device's evaluation and update the version's mean metrics. Idempotent.

        Raises:
            InvalidRequestError: The statement is malformed, of another deployment or device, or a metric or the
                example count is out of range or reserved.
            InvalidSignatureError: The report is not signed with the device's current key.
            NotSelectedError: The device was not asked to measure the version, or is not active.
            GlobalModelNotFoundError: There is no such version.
            DuplicateEvaluationError: The device has sent a different report for the version.
        """
        try:
            evaluation = self._check(contributor, envelope)
        except (InvalidSignatureError, AlgorithmNotAcceptedError):
            if self._is_recorded(contributor, envelope):
                return
            raise

        def work(session: Session) -> bool:
            return self._record(session, caller, evaluation, self._context.clock())

        if self._context.database.write(work):
            self._context.wake()

    def _is_recorded(self, contributor: Contributor, envelope: security_pb2.SignedEnvelope) -> bool:
        """Return whether a report was recorded under a key or algorithm that is no longer valid."""
        stated = parse_statement(
            security_pb2.EvaluationStatement, envelope.payload, f"{FIELD}.payload"
        )
        named = stated.training_session_id, stated.version, contributor.device_id
        with self._context.database.read() as session:
            known = evaluations.find_digest(session, *named)
        return known == digest_of(envelope.payload)

    def _check(
        self, contributor: Contributor, envelope: security_pb2.SignedEnvelope
    ) -> _Evaluation:
        """Check everything about a report that needs no transaction."""
        stated = parse_statement(
            security_pb2.EvaluationStatement, envelope.payload, f"{FIELD}.payload"
        )
        if (stated.realm, stated.device_id) != (self._context.config.realm, contributor.device_id):
            raise InvalidRequestError("statement: of another realm or device", field=FIELD)
        check_metrics(dict(stated.metrics))
        check_example_count(stated.example_count)
        if contributor.key_id is None or stated.key_id != contributor.key_id:
            raise InvalidSignatureError("key_id: it is not the device's current key")
        key = _key(contributor)
        self._algorithms.require(key.algorithm)
        require_identity(self._context, contributor.device_id, contributor.key_id, key)
        statement = _open(envelope, key)
        if not was_asked(self._context, statement):
            raise NotSelectedError(f"the device was not asked to measure version {stated.version}")
        return _Evaluation(statement, envelope, digest_of(envelope.payload))

    def _record(
        self, session: Session, caller: Caller, evaluation: _Evaluation, at: datetime
    ) -> bool:
        """Store a report with its consequences; return whether it closed a waiting round."""
        statement = evaluation.statement
        named = statement.training_session_id, statement.version
        training_session = training_sessions.lock_session(session, statement.training_session_id)
        model = global_models.get_model(session, *named)
        if training_session is None or model is None:
            raise GlobalModelNotFoundError(f"no version {statement.version}")
        if model.digest != statement.version_digest:
            raise InvalidRequestError("version_digest: of another version", field=FIELD)
        known = evaluations.find_digest(session, *named, statement.device_id)
        if known is not None:
            if known != evaluation.digest:
                raise DuplicateEvaluationError
            return False
        device = devices.get_device(session, statement.device_id)
        if device is None or device.state != DeviceState.ACTIVE.value:
            raise NotSelectedError("only active devices measure versions")
        config = training_session.config
        weight = _weight(session, config.evaluation, statement)
        group = _group(config.evaluation, device)
        evaluations.insert_evaluation(session, _row(evaluation, weight, group, at))
        if is_worth_summarizing(evaluations.count(session, *named)):
            summarize(session, training_session, statement.version, at)
        audit.record(session, caller, _event(evaluation, weight), at)
        if training_session.current_version != statement.version:
            return False
        if awaits_evaluation(session, training_session.id, config, statement.version):
            return False
        return close_if_complete(session, training_session.id, training_session.current_round, at)


def _key(contributor: Contributor) -> PublicKey:
    if contributor.algorithm is None or contributor.public_key is None:
        raise InvalidSignatureError("key_id: the device has no key")
    try:
        return PublicKey(algorithm_of(contributor.algorithm), contributor.public_key)
    except InvalidKeyError as error:
        raise InvalidSignatureError("key_id: the device's key is not valid") from error


def _open(
    envelope: security_pb2.SignedEnvelope, key: PublicKey
) -> security_pb2.EvaluationStatement:
    if len(envelope.signatures) != 1:
        raise InvalidSignatureError(f"signatures: got {len(envelope.signatures)}, want 1")
    try:
        return open_evaluation(envelope, key)
    except StatementError as error:
        if error.__cause__ is not None:  # the envelope, not its content
            raise InvalidSignatureError("the evaluation's signature does not verify") from error
        raise InvalidRequestError(f"statement: {error}", field=FIELD) from error


def _weight(
    session: Session,
    policy: training_pb2.EvaluationPolicy,
    statement: security_pb2.EvaluationStatement,
) -> int:
    """Return a report's example count after the cap."""
    cap = policy.max_example_count or evaluations.largest_example_count(
        session, statement.training_session_id, statement.device_id
    )
    return min(statement.example_count, cap or 1)


def _group(policy: training_pb2.EvaluationPolicy, device: Device) -> str:
    """Return the group of a device's results, empty without groups."""
    attribute = policy.group_by
    if not attribute:
        return ""
    if attribute == "device_type":
        return device.device_type
    value = device.capabilities.get(attribute, device.hardware_info.get(attribute, ""))
    return str(value)[:MAX_GROUP]


def _row(evaluation: _Evaluation, weight: int, group: str, at: datetime) -> dict[str, Any]:
    statement = evaluation.statement
    return {
        "training_session_id": statement.training_session_id,
        "version": statement.version,
        "device_id": statement.device_id,
        "example_count": statement.example_count,
        "metrics": dict(statement.metrics),
        "device_group": group,
        "reported_at": at,
        "statement": evaluation.envelope.payload,
        "statement_digest": evaluation.digest,
        "signature": evaluation.envelope.signatures[0].SerializeToString(),
        "key_id": statement.key_id,
        "weight": weight,
    }


def _event(evaluation: _Evaluation, weight: int) -> Event:
    statement = evaluation.statement
    details = {
        "training_session_id": statement.training_session_id,
        "version": statement.version,
        "example_count": statement.example_count,
        "weight": weight,
    }
    return Event(EVALUATION_REPORTED, f"evaluation:{evaluation.digest}", details=details)
