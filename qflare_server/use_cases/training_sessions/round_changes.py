"""Changes of the rule by which the rounds of a training session close: quorum, target and deadline.

The configuration is replaced as a whole, so that task and model statements name the digest of the one in force. The
replaced one is kept: it explains the statements that were signed under it.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import InvalidRequestError, WrongStateError
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import audit, replaced_configs, training_sessions
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.idempotent_calls import run_once
from qflare_server.storage.tables import ENDED, RiskLevel, RoundState
from qflare_server.storage.training_configs import from_json, to_json
from qflare_server.training.config import deadline_s
from qflare_server.training.evaluation import awaits_evaluation
from qflare_server.training.rounds import NOBODY, config_digest, round_target
from qflare_server.use_cases.training_sessions.administration import checked, require_found


@dataclass(frozen=True)
class RoundChange:
    """The values to change; None leaves a value as it is."""

    quorum: int | None = None
    target: int | None = None
    deadline: Duration | None = None


@dataclass(frozen=True)
class Changed:
    """A change that was made: when, in which round (0 before the first), and the configurations before and after."""

    at: datetime
    round_number: int
    before: training_pb2.TrainingConfig
    after: training_pb2.TrainingConfig


class RoundChanges:
    """Changes the rule of rounds; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, caller: Caller, training_session_id: str, change: RoundChange) -> TrainingSession:
        """Change a training session that has not ended, and its open round.

        The same values again have no effect. Of two callers that change the same value, the last one prevails; the
        audit log holds the old and new values of each.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            InvalidRequestError: The configuration would not be accepted at creation.
            WrongStateError: It has ended, or a closed round is being published.
        """

        def work(session: Session) -> TrainingSession:
            at = self._context.clock()
            found = require_found(
                training_sessions.lock_session(session, training_session_id), training_session_id
            )
            if found.state in ENDED:
                raise WrongStateError(f"the training session is {found.state}")
            config = _changed(found, change)
            if config.rounds != found.config.rounds:
                _replace(session, caller, found, config, at)
            return require_found(
                training_sessions.get_session(session, training_session_id), training_session_id
            )

        at = self._context.clock()
        changed = self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )
        self._context.wake()
        return changed

    def list(self, training_session_id: str, limit: int) -> list[Changed]:
        """Return the newest changes of a training session, newest first.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            found = require_found(
                training_sessions.get_session(session, training_session_id), training_session_id
            )
            rows = replaced_configs.list_replaced(session, training_session_id, limit)
        configs = [from_json(row.config) for row in rows] + [found.config]
        changes = [
            Changed(row.replaced_at, row.last_round, before, after)
            for row, before, after in zip(rows, configs, configs[1:], strict=False)
        ]
        return changes[::-1]


def _changed(row: TrainingSession, change: RoundChange) -> training_pb2.TrainingConfig:
    """Return the configuration after a change, validated as at creation.

    Raises:
        InvalidRequestError: It would not be accepted.
    """
    wanted = training_pb2.TrainingConfig()
    wanted.CopyFrom(row.config)
    if change.quorum is not None:
        wanted.rounds.quorum = change.quorum
    if change.target is not None:
        wanted.rounds.target = change.target
    if change.deadline is not None:
        wanted.rounds.deadline.CopyFrom(change.deadline)
    _require_free(row.config, wanted)
    done = checked(row.name, row.model_type, wanted)
    result = training_pb2.TrainingConfig()
    result.CopyFrom(row.config)
    result.rounds.CopyFrom(done.rounds)
    return result


def _require_free(config: training_pb2.TrainingConfig, wanted: training_pb2.TrainingConfig) -> None:
    """Refuse a change that would contradict what devices or helpers were promised."""
    for field in ("quorum", "target", "deadline"):
        if getattr(config.rounds, field) == getattr(wanted.rounds, field):
            continue
        if config.secure_aggregation.helpers:
            raise InvalidRequestError(
                f"{field}: cannot be changed with secure aggregation: helpers compare the configuration of a round's "
                "task with that of its version",
                field=field,
            )
        if config.secure_aggregation.mode:
            raise InvalidRequestError(
                f"{field}: cannot be changed with secure aggregation: transcripts name the configuration of a round's "
                "task, which must be that of its version",
                field=field,
            )
        if config.privacy.noise_multiplier and field != "deadline":
            raise InvalidRequestError(
                f"{field}: cannot be changed with differential privacy: the noise is calibrated for it",
                field=field,
            )
        if field != "deadline" and getattr(wanted.rounds, field) < 1:
            raise InvalidRequestError(f"{field}: want 1 or more", field=field)


def _replace(
    session: Session,
    caller: Caller,
    row: TrainingSession,
    config: training_pb2.TrainingConfig,
    at: datetime,
) -> None:
    current = training_sessions.lock_round(session, row.id, row.current_round)
    if current is not None and current.state == RoundState.CLOSED.value:
        raise WrongStateError(
            f"round {current.number} is being published; repeat the change afterwards"
        )
    replaced_configs.insert_replaced(session, row.id, to_json(row.config), row.current_round, at)
    training_sessions.update_session(session, row.id, {"config": to_json(config)})
    if current is not None and current.state == RoundState.OPEN.value:
        values = _of_open_round(session, row, current, config, at)
        training_sessions.update_round(session, row.id, current.number, values)
    details: dict[str, Any] = {
        "round": row.current_round,
        "old": _facts(row.config),
        "new": _facts(config),
    }
    subject = f"training_session:{row.id}"
    event = Event("training_session.changed", subject, RiskLevel.MEDIUM, details)
    audit.record(session, caller, event, at)


def _of_open_round(
    session: Session,
    row: TrainingSession,
    current: Round,
    config: training_pb2.TrainingConfig,
    at: datetime,
) -> dict[str, Any]:
    """Return the changed columns of the open round; it closes if it has its updates."""
    selected = max(current.selected_count, 0) if current.selected_count else None
    target = round_target(config, 0 if current.selected_count == NOBODY else selected)
    values: dict[str, Any] = {"quorum": config.rounds.quorum, "target": target}
    if config.rounds.deadline != row.config.rounds.deadline:
        values["deadline_at"] = current.opened_at + timedelta(seconds=deadline_s(config))
    is_full = current.accepted_count >= target
    if is_full and not awaits_evaluation(session, row.id, config, current.base_version):
        values |= {"state": RoundState.CLOSED.value, "closed_at": at}
    return values


def _facts(config: training_pb2.TrainingConfig) -> dict[str, Any]:
    """Return what can change of a configuration, and its digest, which statements name."""
    return {
        "quorum": config.rounds.quorum,
        "target": config.rounds.target,
        "deadline_s": deadline_s(config),
        "config_digest": config_digest(config),
    }
