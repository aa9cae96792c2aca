"""The life cycle of a round: opening, closing, missed quorum, cancellation.

Every function but `sign_task` runs in the caller's transaction, which holds the lock on the training session's row.
`sign_task` runs before that transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.times import timestamp_of
from qflare.v1 import security_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import audit, global_models, training_sessions, updates
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.repository.training_sessions import RoundInProgress
from qflare_server.storage.tables import RiskLevel, RoundState, TrainingSessionState, UpdateOrigin
from qflare_server.training.analytics import query_task
from qflare_server.training.config import deadline_s
from qflare_server.training.failures import TooManyFailed
from qflare_server.training.masking import masking_task
from qflare_server.training.premises import PremisesChangedError
from qflare_server.training.selection import select_devices

IN_PROCESS_PREFIX: Final = "in-process-"
"""Prefix of the ids of embedding programs' training sessions, whose rounds are not assigned to devices."""

MAX_BARREN_ROUNDS: Final = 100
"""Rounds in a row that have their quorum and make no version, after which a training session fails."""

NOBODY: Final = -1
NONCE_BYTES: Final = 32

MISSED_QUORUM: Final = "missed its quorum"
"""Prefix of the reason of a round whose deadline passed without a quorum."""

HELPER_AWAITED: Final = "waits for a helper: "
"""Prefix of the reason of a closed round that a helper for secure aggregation has not answered."""


def is_in_process(training_session_id: str) -> bool:
    """Return whether a training session is an embedding program's; exactly its updates are in-process."""
    return training_session_id.startswith(IN_PROCESS_PREFIX)


def origin_of(training_session_id: str) -> UpdateOrigin:
    """Return the only origin that the updates of a training session may have."""
    return UpdateOrigin.IN_PROCESS if is_in_process(training_session_id) else UpdateOrigin.DEVICE


@dataclass(frozen=True)
class RoundTask:
    """Signed task of a round, prepared before the transaction that opens the round.

    Attributes:
        statement: Names the round, its base version, its nonce and its deadline.
        envelope: The serialized signed statement; None where no device is asked, in rounds of embedding programs.
        deadline_at: When the round ends.
    """

    statement: security_pb2.TaskStatement
    envelope: bytes | None
    deadline_at: datetime


def sign_task(
    context: Context,
    training_session_id: str,
    config: training_pb2.TrainingConfig,
    *,
    number: int,
    base_version: int,
    base_digest: str,
) -> RoundTask:
    """Sign a round's task: one signature serves every device of the round.

    Args:
        context: The coordinator's parts.
        training_session_id: Whose round it is.
        config: Of the training session.
        number: Of the round, the training session's next.
        base_version: Version that devices train from.
        base_digest: Digest of that version.

    Raises:
        HelperUnavailableError: A helper for secure aggregation is not known here.
    """
    deadline_at = context.clock() + timedelta(seconds=deadline_s(config))
    statement = security_pb2.TaskStatement(
        realm=context.config.realm,
        training_session_id=training_session_id,
        round_number=number,
        base_version=base_version,
        base_digest=base_digest,
        task_nonce=context.draw_random(NONCE_BYTES).hex(),
        deadline_time=timestamp_of(deadline_at),
        config_digest=config_digest(config),
        device_training=config.device_training,
        transfer=config.transfer,
        masking=masking_task(context, config),
        analytics=query_task(config),
    )
    if is_in_process(training_session_id):
        return RoundTask(statement, None, deadline_at)
    payload = statement.SerializeToString(deterministic=True)
    envelope = context.signer.sign(security_pb2.KEY_ROLE_TASK, payload)
    return RoundTask(statement, envelope.SerializeToString(), deadline_at)


def sign_next_task(
    context: Context, training_session: TrainingSession, base_version: int, base_digest: str
) -> RoundTask:
    """Sign the task of a training session's next round; see `sign_task`."""
    return sign_task(
        context,
        training_session.id,
        training_session.config,
        number=training_session.current_round + 1,
        base_version=base_version,
        base_digest=base_digest,
    )


def open_round(
    session: Session, training_session: TrainingSession, task: RoundTask, at: datetime
) -> int:
    """Open the next round of a training session and return its number.

    Raises:
        PremisesChangedError: The task is for another round or another base.
    """
    config = training_session.config
    number, base_version = task.statement.round_number, task.statement.base_version
    _require_next(session, training_session, task.statement)
    selected = select_devices(session, training_session.id, config, number)
    values = {
        "training_session_id": training_session.id,
        "number": number,
        "state": RoundState.OPEN.value,
        "base_version": base_version,
        "quorum": config.rounds.quorum,
        "target": round_target(config, None if selected is None else len(selected)),
        "selected_count": _selected_count(selected),
        "nonce": task.statement.task_nonce,
        "opened_at": at,
        "deadline_at": task.deadline_at,
        "task": task.envelope,
    }
    training_sessions.insert_round(session, values)
    training_sessions.insert_selection(session, training_session.id, number, selected or [])
    training_sessions.update_session(session, training_session.id, {"current_round": number})
    details: dict[str, Any] = {"round": number, "base_version": base_version}
    if config.secure_aggregation.mode:
        details["min_cohort"] = config.secure_aggregation.min_cohort
        details["helpers"] = list(config.secure_aggregation.helpers)
    subject = f"training_session:{training_session.id}"
    event = Event("round.opened", subject, details=details)
    audit.record(session, SYSTEM, event, at)
    return number


def round_target(config: training_pb2.TrainingConfig, selected_count: int | None) -> int:
    """Return the number of updates at which a round closes.

    Args:
        config: Of the training session.
        selected_count: How many devices the round has selected; None without selection.
    """
    target = config.rounds.target
    if selected_count is not None:
        target = min(target, selected_count or 1)
    return max(target, config.rounds.quorum)


def _require_next(
    session: Session, training_session: TrainingSession, statement: security_pb2.TaskStatement
) -> None:
    """Check that a round matches its signed task."""
    stated = (statement.training_session_id, statement.round_number)
    if stated != (training_session.id, training_session.current_round + 1):
        raise PremisesChangedError("another round was opened meanwhile")
    if statement.config_digest != config_digest(training_session.config):
        raise PremisesChangedError("the configuration was changed meanwhile")
    base_digest = global_models.digest_of(session, training_session.id, statement.base_version)
    if base_digest != statement.base_digest:
        raise PremisesChangedError("the round's base version is another one")


def cancel_round(
    session: Session, training_session: TrainingSession, reason: str, at: datetime
) -> None:
    """Cancel the current round, if there is one: it makes no version, its pending updates are rejected."""
    current = training_sessions.lock_round(
        session, training_session.id, training_session.current_round
    )
    if current is None or current.state not in {RoundState.OPEN.value, RoundState.CLOSED.value}:
        return
    values = {
        "state": RoundState.CANCELLED.value,
        "state_reason": reason,
        "closed_at": current.closed_at or at,
    }
    training_sessions.update_round(session, training_session.id, current.number, values)
    updates.reject_round(session, training_session.id, current.number, reason, at)


def close_if_complete(
    session: Session, training_session_id: str, number: int, at: datetime
) -> bool:
    """Close an open round that has all its updates; return whether it closed."""
    current = training_sessions.lock_round(session, training_session_id, number)
    if (
        current is None
        or current.state != RoundState.OPEN.value
        or current.accepted_count < current.target
    ):
        return False
    values = {"state": RoundState.CLOSED.value, "closed_at": at}
    training_sessions.update_round(session, training_session_id, number, values)
    return True


def is_collecting(training_session: TrainingSession, current: Round) -> bool:
    """Return whether a round is open in a running training session."""
    return (
        training_session.state == TrainingSessionState.RUNNING.value
        and current.state == RoundState.OPEN.value
    )


def is_over(current: Round, at: datetime) -> bool:
    """Return whether a round accepts no more updates: it is closed, full, or past its deadline."""
    return (
        current.state != RoundState.OPEN.value
        or current.accepted_count >= current.target
        or current.deadline_at <= at
    )


def await_helper(session: Session, item: RoundInProgress, problem: str, now: datetime) -> None:
    """Note in a closed round why the sum of its masks is missing; the first time, record it in the audit log too."""
    training_session_id, number = item.training_session_id, item.number
    current = training_sessions.lock_round(session, training_session_id, number)
    if current is None or current.state != RoundState.CLOSED.value:
        return
    reason = f"{HELPER_AWAITED}{problem}"[:500]
    if not current.state_reason.startswith(HELPER_AWAITED):
        subject = f"training_session:{training_session_id}"
        details = {"round": number, "reason": problem[:200]}
        event = Event("round.helper_unavailable", subject, RiskLevel.MEDIUM, details)
        audit.record(session, SYSTEM, event, now)
    if current.state_reason != reason:
        values = {"state_reason": reason}
        training_sessions.update_round(session, training_session_id, number, values)


def fail_round(
    session: Session, training_session: TrainingSession, current: Round, reason: str, now: datetime
) -> None:
    """Mark a round as failed and reject its updates."""
    values = {
        "state": RoundState.FAILED.value,
        "state_reason": reason[:500],
        "closed_at": current.closed_at or now,
        "rejected_count": current.accepted_count,
    }
    training_sessions.update_round(session, training_session.id, current.number, values)
    updates.reject_round(session, training_session.id, current.number, reason[:500], now)


def end_session(
    session: Session,
    training_session: TrainingSession,
    state: TrainingSessionState,
    reason: str,
    now: datetime,
) -> None:
    """End a training session automatically."""
    values = {"state": state.value, "state_reason": reason[:500], "ended_at": now}
    training_sessions.update_session(session, training_session.id, values)
    event = Event(
        f"training_session.{state.value}",
        f"training_session:{training_session.id}",
        RiskLevel.MEDIUM,
        {"reason": reason},
    )
    audit.record(session, SYSTEM, event, now)


def opens_after_failures(config: training_pb2.TrainingConfig, current: Round) -> bool:
    """Return whether another round follows one in which too many devices failed, unless it makes a version."""
    return (
        config.failures.action == training_pb2.FAILURE_ACTION_END_ROUND
        and current.number < config.total_rounds
    )


def end_for_failures(
    session: Session,
    training_session: TrainingSession,
    current: Round,
    found: TooManyFailed,
    next_task: RoundTask | None,
    now: datetime,
) -> None:
    """Apply the action of a round in which too many devices failed.

    Args:
        session: The transaction.
        training_session: Locked.
        current: The open round, locked.
        found: The failures.
        next_task: For the round that follows, from the same base version; None where `opens_after_failures` says that
            none does.
        now: The time.
    """
    config, reason = training_session.config, found.reason
    details = {
        "round": current.number,
        "reason": reason,
        "action": training_pb2.FailureAction.Name(config.failures.action),
    }
    subject = f"training_session:{training_session.id}"
    event = Event("round.too_many_failures", subject, RiskLevel.MEDIUM, details)
    audit.record(session, SYSTEM, event, now)
    is_round_alone = config.failures.action == training_pb2.FAILURE_ACTION_END_ROUND
    if is_round_alone and current.accepted_count >= current.quorum:
        values = {"state": RoundState.CLOSED.value, "state_reason": reason, "closed_at": now}
        training_sessions.update_round(session, training_session.id, current.number, values)
        return
    fail_round(session, training_session, current, reason, now)
    if opens_after_failures(config, current):
        assert next_task is not None
        open_round(session, training_session, next_task, now)
    else:
        end_session(session, training_session, TrainingSessionState.FAILED, reason, now)


def go_on_without_version(
    session: Session,
    training_session: TrainingSession,
    reason: str,
    next_task: RoundTask,
    now: datetime,
) -> None:
    """Open another round after one that had its quorum and made no version, or end the training session.

    Such rounds cost devices their work each time: a cause that lasts ends the training session. Rounds without a quorum
    cost nothing, last until their deadlines, and follow their `missed_quorum_action`.

    Args:
        session: The transaction.
        training_session: Locked, with the round marked as failed.
        reason: Why the round has failed.
        next_task: For the round that follows, from the same base version.
        now: The time.
    """
    session_id = training_session.id
    if (
        is_in_process(session_id)  # its program decides how often it tries
        or training_sessions.count_barren(session, session_id) < MAX_BARREN_ROUNDS
    ):
        open_round(session, training_session, next_task, now)
        return
    text = f"{MAX_BARREN_ROUNDS} rounds in a row have made no version: {reason}"
    end_session(session, training_session, TrainingSessionState.FAILED, text, now)


def opens_after_missed_quorum(config: training_pb2.TrainingConfig) -> bool:
    """Return whether another round follows one whose deadline passes without a quorum."""
    return config.rounds.missed_quorum_action not in {
        training_pb2.MISSED_QUORUM_ACTION_EXTEND,
        training_pb2.MISSED_QUORUM_ACTION_FAIL,
    }


def handle_missed_quorum(
    session: Session,
    training_session: TrainingSession,
    current: Round,
    next_task: RoundTask | None,
    now: datetime,
) -> None:
    """Apply the missed-quorum action of a round whose deadline has passed.

    Args:
        session: The transaction.
        training_session: Locked.
        current: The round, locked.
        next_task: For the round that follows, from the same base version; None where `opens_after_missed_quorum` says
            that none does.
        now: The time.
    """
    config = training_session.config
    action = config.rounds.missed_quorum_action
    reason = f"{MISSED_QUORUM}: got {current.accepted_count}, want {current.quorum}"
    details = {"round": current.number, "reason": reason}
    event = Event(
        "round.missed_quorum", f"training_session:{training_session.id}", RiskLevel.MEDIUM, details
    )
    audit.record(session, SYSTEM, event, now)
    if action == training_pb2.MISSED_QUORUM_ACTION_EXTEND:
        values = {
            "deadline_at": now + timedelta(seconds=deadline_s(config)),
            "state_reason": reason,
        }
        training_sessions.update_round(session, training_session.id, current.number, values)
        _select_more(session, training_session, current, config)
        return
    fail_round(session, training_session, current, reason, now)
    if action == training_pb2.MISSED_QUORUM_ACTION_FAIL:
        end_session(session, training_session, TrainingSessionState.FAILED, reason, now)
    else:
        assert next_task is not None
        open_round(session, training_session, next_task, now)


def _selected_count(selected: Sequence[str] | None) -> int:
    """Return the selected count of a round: 0 without selection, -1 if no device is eligible."""
    return 0 if selected is None else len(selected) or NOBODY


def _select_more(
    session: Session,
    training_session: TrainingSession,
    current: Round,
    config: training_pb2.TrainingConfig,
) -> None:
    """Draw further devices for an extended round, since selected ones may be offline."""
    before = training_sessions.selection(session, training_session.id, current.number)
    drawn = select_devices(session, training_session.id, config, current.number, len(before)) or []
    added = sorted(set(drawn) - before)
    if added:
        training_sessions.insert_selection(session, training_session.id, current.number, added)
        values = {"selected_count": len(before) + len(added)}
        training_sessions.update_round(session, training_session.id, current.number, values)


def config_digest(config: training_pb2.TrainingConfig) -> str:
    """Return the hex digest of a configuration: the leaf hash of its deterministic serialization."""
    return merkle.leaf_hash(config.SerializeToString(deterministic=True)).hex()
