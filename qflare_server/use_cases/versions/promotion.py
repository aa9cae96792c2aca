"""Describe, release and roll back model versions.

Version numbers only increase: a rollback publishes a new version that shares the older one's payload, so that lineage
stays a chain and no bytes are copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare.tensors.encodings import Encoding
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    GlobalModelNotFoundError,
    InvalidRequestError,
    WrongStateError,
)
from qflare_server.storage.paging import Page, PageRequest
from qflare_server.storage.payload_records import Download, ReceivedPayload, describe
from qflare_server.storage.records import GlobalModel, Round, TrainingSession
from qflare_server.storage.repository import (
    audit,
    global_models,
    payloads,
    training_sessions,
    views,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.idempotent_calls import run_once
from qflare_server.storage.repository.views import VersionMetrics
from qflare_server.storage.tables import RiskLevel
from qflare_server.storage.tables import TrainingSessionState as SessionState
from qflare_server.training.premises import PremisesChangedError, repeat
from qflare_server.training.rounds import RoundTask, cancel_round, open_round, sign_next_task
from qflare_server.training.versions import (
    SignedVersion,
    VersionDraft,
    find_version,
    manifest_of,
    publish,
    sign_version,
    version_of,
)
from qflare_server.use_cases.training_sessions.administration import require_found

MAX_REASON: Final = 500
GOES_ON: Final = frozenset({SessionState.RUNNING.value, SessionState.PAUSED.value})


@dataclass(frozen=True)
class Rollback:
    """Result of a rollback: a version, and the round that trains from it if training continues."""

    model: GlobalModel
    round: Round | None


class Promotion:
    """Model version use cases."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def describe(self, training_session_id: str, version: int | None) -> GlobalModel:
        """Return a version, the latest by default.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            GlobalModelNotFoundError: There is no such version.
        """
        with self._context.database.read() as session:
            return find_version(session, training_session_id, version)[1]

    def list_metrics(self, training_session_id: str, request: PageRequest) -> Page[VersionMetrics]:
        """Return the metrics of versions, oldest first.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            require_found(
                training_sessions.get_session(session, training_session_id), training_session_id
            )
            return views.list_metrics(session, training_session_id, request)

    def recent_metrics(self, training_session_id: str, count: int) -> Sequence[VersionMetrics]:
        """Return the metrics of the latest versions, oldest first.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            require_found(
                training_sessions.get_session(session, training_session_id), training_session_id
            )
            return views.recent_metrics(session, training_session_id, count)

    def release(
        self, caller: Caller, training_session_id: str, version: int, reason: str
    ) -> GlobalModel:
        """Release a version, overriding the gate. Idempotent.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            GlobalModelNotFoundError: There is no such version.
        """
        _check_reason(reason)

        def work(session: Session) -> GlobalModel:
            training_session = require_found(
                training_sessions.lock_session(session, training_session_id), training_session_id
            )
            model = _model(session, training_session.id, version)
            if not model.released:
                global_models.release(session, training_session, version)
                details = {"version": version, "reason": reason}
                subject = f"training_session:{training_session.id}"
                event = Event("version.released", subject, RiskLevel.MEDIUM, details)
                audit.record(session, caller, event, self._context.clock())
            return _model(session, training_session_id, version)

        at = self._context.clock()
        return self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )

    def roll_back(
        self, caller: Caller, training_session_id: str, version: int, reason: str
    ) -> Rollback:
        """Make an older version the base of the next round.

        Idempotent: if the latest version already is a rollback to it, that version is returned.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            WrongStateError: It has not been started.
            GlobalModelNotFoundError: There is no such version.
            InvalidRequestError: It is the latest version.
            PayloadPrunedError: Its payload has been pruned.
        """
        _check_reason(reason)

        result = repeat(lambda: self._roll_back(caller, training_session_id, version, reason))
        self._context.wake()
        return result

    def _roll_back(
        self, caller: Caller, training_session_id: str, version: int, reason: str
    ) -> Rollback:
        at = self._context.clock()
        with self._context.database.read() as session:
            known = require_found(
                training_sessions.get_session(session, training_session_id), training_session_id
            )
            done = _rolled_back(session, known, version)
        if done is not None:
            return self._context.database.write(
                lambda session: run_once(session, caller, at, lambda: done)
            )
        with self._context.database.read() as session:
            draft = _draft(session, known, version, at)
            parent = version_of(_model(session, known.id, known.current_version))
            restored = version_of(_model(session, known.id, version))
        signed = sign_version(self._context, known.id, known.config, draft, parent, restored)
        task = self._next_task(known, signed)

        def work(session: Session) -> Rollback:
            training_session = require_found(
                training_sessions.lock_session(session, training_session_id), training_session_id
            )
            if _draft(session, training_session, version, at) != draft:
                raise PremisesChangedError("the training session went on meanwhile")
            cancel_round(session, training_session, f"rolled back to version {version}", at)
            publish(session, training_session, signed, at)
            number = None
            if training_session.state in GOES_ON:
                if task is None:
                    raise PremisesChangedError("the training session was started meanwhile")
                number = open_round(session, training_session, task, at)
            details = {"from": version, "version": draft.version, "digest": signed.digest}
            subject = f"training_session:{training_session.id}"
            event = Event(
                "version.rolled_back", subject, RiskLevel.HIGH, {**details, "reason": reason}
            )
            audit.record(session, caller, event, at)
            opened = (
                None
                if number is None
                else training_sessions.get_round(session, training_session_id, number)
            )
            return Rollback(_model(session, training_session_id, draft.version), opened)

        return self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )

    def _next_task(
        self, training_session: TrainingSession, signed: SignedVersion
    ) -> RoundTask | None:
        """Return the task of the round that trains from a rollback; None if training does not continue."""
        if training_session.state not in GOES_ON:
            return None
        return sign_next_task(self._context, training_session, signed.draft.version, signed.digest)


def _rolled_back(
    session: Session, training_session: TrainingSession, version: int
) -> Rollback | None:
    """Return the latest version and its round if that version is a rollback to this one."""
    latest = global_models.get_model(session, training_session.id, training_session.current_version)
    if latest is None or latest.rollback_version != version:
        return None
    current = None
    if training_session.state in GOES_ON:
        current = training_sessions.get_round(
            session, training_session.id, training_session.current_round
        )
    return Rollback(latest, current)


def _draft(
    session: Session, training_session: TrainingSession, version: int, at: datetime
) -> VersionDraft:
    """Return a version with the content of an older one; privacy budget already spent is not refunded.

    Raises:
        QflareError: As `Promotion.roll_back`.
    """
    if training_session.state == SessionState.CREATED.value:
        raise WrongStateError("the training session has not been started")
    if version == training_session.current_version:
        raise InvalidRequestError(f"version: {version} is the latest", field="version")
    old = _model(session, training_session.id, version)
    download = None
    if old.download_payload_id is not None and old.download_encoding is not None:
        encoding = Encoding.from_number(old.download_encoding)
        download = Download(encoding, _shared(session, old.download_payload_id))
    statement = security_pb2.ModelStatement.FromString(old.statement)
    return VersionDraft(
        version=training_session.current_version + 1,
        base_version=old.version,
        round_number=0,
        payload=_shared(session, old.payload_id),
        download=download,
        manifest=manifest_of(old),
        created_at=at,
        metrics=old.metrics,
        strategy_state=old.strategy_state,
        epsilon=training_session.epsilon_spent,
        delta=old.delta,
        rollback_version=old.version,
        sealed_version=statement.sealed_version if statement.sealed else None,
        shares_payload=True,
    )


def _shared(session: Session, payload_id: str) -> ReceivedPayload:
    stored = describe(payloads.get_payload(session, payload_id))
    return ReceivedPayload(
        stored.payload_id,
        stored.size_bytes,
        stored.digest,
        stored.chunk_digests,
        None,
        stored.seal,
        None if stored.chunks is None else stored.chunks.store,
    )


def _model(session: Session, training_session_id: str, version: int) -> GlobalModel:
    model = global_models.get_model(session, training_session_id, version)
    if model is None:
        raise GlobalModelNotFoundError(f"no version {version}")
    return model


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON:
        raise InvalidRequestError("reason: longer than 500 characters", field="reason")
