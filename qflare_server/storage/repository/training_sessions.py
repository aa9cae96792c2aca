"""Statements on training sessions, their rounds, and the devices selected."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, cast

from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    Text,
    and_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.epochs import bump_rounds
from qflare_server.storage.paging import Order, Page, PageRequest, earlier, read_page
from qflare_server.storage.prepared import OneOf, PreparedInsert, PreparedStatement, Row
from qflare_server.storage.records import Replacement, Round, Rows, TrainingSession
from qflare_server.storage.repository.membership import is_open_to
from qflare_server.storage.repository.references import is_meant
from qflare_server.storage.tables import (
    QUERY_MODEL_TYPE,
    DeviceState,
    RoundState,
    TrainingSessionState,
)
from qflare_server.storage.training_configs import parsed_config

SESSIONS = tables.TrainingSession.__table__
ROUNDS = tables.Round.__table__
SELECTED = tables.RoundDevice.__table__
UPDATES = tables.ModelUpdate.__table__
DEVICES = tables.Device.__table__
_SESSIONS = Rows(TrainingSession, SESSIONS)
_ROUNDS = Rows(Round, ROUNDS)
_SESSION = _SESSIONS.select.where(SESSIONS.c.id == bindparam("session"))
_ROUND = _ROUNDS.select.where(
    ROUNDS.c.training_session_id == bindparam("session"), ROUNDS.c.number == bindparam("round")
)


@dataclass(frozen=True)
class OpenRound:
    """An open round that a device may contribute to.

    `is_full` says that it has all its updates and waits for evaluations of its base version.
    """

    training_session_id: str
    number: int
    base_version: int
    deadline_at: datetime
    task: bytes | None
    is_full: bool


def insert_session(session: Session, values: Mapping[str, Any]) -> None:
    """Insert a training session."""
    session.execute(insert(SESSIONS).values(**values))


def get_session(session: Session, training_session_id: str) -> TrainingSession | None:
    """Return a training session."""
    return _one(session, _SESSION, training_session_id)


_STATE = PreparedStatement(select(SESSIONS.c.state).where(SESSIONS.c.id == bindparam("session")))


def state_of(session: Session, training_session_id: str) -> str | None:
    """Return the state of a training session; None if it does not exist."""
    rows = _STATE.rows(session, {"session": training_session_id})
    return rows[0][0] if rows else None


def lock_session(session: Session, training_session_id: str) -> TrainingSession | None:
    """Return a training session with its row locked, as required to make its next version or round."""
    return _one(session, _SESSION.with_for_update(), training_session_id)


def _one(session: Session, query: Select[Any], training_session_id: str) -> TrainingSession | None:
    found = _SESSIONS.one(session, query, {"session": training_session_id})
    return None if found is None else _with_config(session, found)


def _with_config(session: Session, stored: TrainingSession) -> TrainingSession:
    """Return a training session with its configuration parsed into a message."""
    return stored._replace(config=parsed_config(session, stored.id, cast("Any", stored.config)))


def last_published_rounds(session: Session, training_session_id: str, count: int) -> list[int]:
    """Return the numbers of the last rounds that published a version, newest first."""
    query = (
        select(ROUNDS.c.number)
        .where(
            ROUNDS.c.training_session_id == training_session_id,
            ROUNDS.c.state == RoundState.PUBLISHED.value,
        )
        .order_by(ROUNDS.c.number.desc())
        .limit(count)
    )
    return list(session.scalars(query))


def unpruned_rounds(
    session: Session, training_session_id: str, kept: Collection[int]
) -> list[tuple[int, int]]:
    """Return the number and the accepted updates of each round that is over, not pruned, and not among some rounds."""
    query = (
        select(ROUNDS.c.number, ROUNDS.c.accepted_count)
        .where(
            ROUNDS.c.training_session_id == training_session_id,
            ROUNDS.c.pruned_at.is_(None),
            ROUNDS.c.number.not_in(kept),
            ROUNDS.c.state.not_in((RoundState.OPEN.value, RoundState.CLOSED.value)),
        )
        .order_by(ROUNDS.c.number)
    )
    return [(row[0], row[1]) for row in session.execute(query)]


def ended_since(session: Session, since: datetime) -> list[str]:
    """Return the ids of training sessions that ended since a time."""
    return list(session.scalars(select(SESSIONS.c.id).where(SESSIONS.c.ended_at >= since)))


def update_session(session: Session, training_session_id: str, values: Mapping[str, Any]) -> None:
    """Update columns of a training session; devices notice a changed state at their next poll."""
    if "state" in values:
        bump_rounds(session)
    session.execute(update(SESSIONS).where(SESSIONS.c.id == training_session_id).values(**values))


def list_sessions(
    session: Session,
    request: PageRequest,
    state: str = "",
    reference: str = "",
    model_type: str = "",
) -> Page[TrainingSession]:
    """Return training sessions, newest first: in one state, that a reference may mean, or of a type, if given."""
    query = _SESSIONS.select.order_by(SESSIONS.c.created_at.desc(), SESSIONS.c.id.desc())
    if state:
        query = query.where(SESSIONS.c.state == state)
    if reference:
        query = query.where(is_meant(session, SESSIONS, reference))
    if model_type:
        query = query.where(SESSIONS.c.model_type == model_type)

    def read(limited: Select[Any]) -> list[TrainingSession]:
        return [_with_config(session, row) for row in _SESSIONS.all(session, limited)]

    return read_page(
        read, query, request, _NEWEST_SESSION, "sessions", state, reference, model_type
    )


WARNINGS_BYTES: Final = 2048
"""Most bytes of a training session's warnings in a message."""
_NEWEST_SESSION: Final = Order[TrainingSession](
    (datetime, str),
    lambda row: (row.created_at.isoformat(), row.id),
    lambda key: earlier(SESSIONS.c.created_at, SESSIONS.c.id, key),
    extra_bytes=WARNINGS_BYTES,
)


_INSERT_ROUND = PreparedInsert(
    ROUNDS,
    (
        "training_session_id",
        "number",
        "state",
        "base_version",
        "quorum",
        "target",
        "selected_count",
        "nonce",
        "task",
        "opened_at",
        "deadline_at",
    ),
)


def insert_round(session: Session, values: Mapping[str, Any]) -> None:
    """Insert the next round of a training session; waiting devices notice it at their next poll."""
    bump_rounds(session)
    _INSERT_ROUND.run(session, [values])


def insert_selection(
    session: Session, training_session_id: str, round_number: int, device_ids: Sequence[str]
) -> None:
    """Record the devices selected for a round."""
    if device_ids:
        session.execute(
            insert(SELECTED),
            [
                {
                    "training_session_id": training_session_id,
                    "round_number": round_number,
                    "device_id": device_id,
                }
                for device_id in device_ids
            ],
        )


def selection(session: Session, training_session_id: str, round_number: int) -> set[str]:
    """Return the devices selected for a round."""
    query = select(SELECTED.c.device_id).where(
        SELECTED.c.training_session_id == training_session_id,
        SELECTED.c.round_number == round_number,
    )
    return set(session.scalars(query))


def get_round(session: Session, training_session_id: str, number: int) -> Round | None:
    """Return a round."""
    return _ROUNDS.one(session, _ROUND, {"session": training_session_id, "round": number})


def lock_round(session: Session, training_session_id: str, number: int) -> Round | None:
    """Return a round with its row locked: no update is accepted until the transaction ends."""
    wanted = {"session": training_session_id, "round": number}
    return _ROUNDS.one(session, _ROUND.with_for_update(), wanted)


def update_round(
    session: Session, training_session_id: str, number: int, values: Mapping[str, Any]
) -> None:
    """Update columns of a round; devices notice a changed deadline at their next poll."""
    if "deadline_at" in values:
        bump_rounds(session)
    session.execute(
        update(ROUNDS)
        .where(ROUNDS.c.training_session_id == training_session_id, ROUNDS.c.number == number)
        .values(**values)
    )


def list_rounds(session: Session, training_session_id: str, request: PageRequest) -> Page[Round]:
    """Return the rounds of a training session, newest first."""
    query = _ROUNDS.select.where(ROUNDS.c.training_session_id == training_session_id).order_by(
        ROUNDS.c.number.desc()
    )
    order = Order[Round]((int,), lambda row: [row.number], lambda key: ROUNDS.c.number < key[0])
    return read_page(
        partial(_ROUNDS.all, session), query, request, order, "rounds", training_session_id
    )


_IS_MASKED = sql_cast(SESSIONS.c.config, Text).like(literal_column("'%\"secure_aggregation\": {%'"))
"""Whether a training session has secure aggregation: only a field of its configuration has this text in its JSON."""


def _is_asked(device: Any) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that a device, as a column or a parameter, has a task in an open round.

    It has none after it has contributed from the round's base version or, with secure aggregation, at all: a sum has at
    most one update of a device.
    """
    is_selected = or_(
        ROUNDS.c.selected_count == 0,
        exists().where(
            SELECTED.c.training_session_id == ROUNDS.c.training_session_id,
            SELECTED.c.round_number == ROUNDS.c.number,
            SELECTED.c.device_id == device,
        ),
    )
    has_contributed = exists().where(
        UPDATES.c.training_session_id == ROUNDS.c.training_session_id,
        UPDATES.c.round_number == ROUNDS.c.number,
        UPDATES.c.device_id == device,
        or_(
            UPDATES.c.base_version == ROUNDS.c.base_version,
            _IS_MASKED,
        ),
    )
    return (
        SESSIONS.c.state == TrainingSessionState.RUNNING.value,
        ROUNDS.c.state == RoundState.OPEN.value,
        ROUNDS.c.deadline_at > bindparam("at"),
        ROUNDS.c.task.is_not(None),
        is_open_to(SESSIONS.c.id, device),
        is_selected,
        ~has_contributed,
    )


_CURRENT_ROUND = SESSIONS.join(
    ROUNDS,
    and_(
        ROUNDS.c.training_session_id == SESSIONS.c.id,
        ROUNDS.c.number == SESSIONS.c.current_round,
    ),
)
_IS_ACTIVE = exists().where(
    DEVICES.c.id == bindparam("device"), DEVICES.c.state == DeviceState.ACTIVE.value
)
GROUPS, MEMBERS = tables.NeighborGroup.__table__, tables.NeighborMember.__table__
_HAS_GROUPS = exists().where(
    GROUPS.c.training_session_id == ROUNDS.c.training_session_id,
    GROUPS.c.round_number == ROUNDS.c.number,
)
_HAS_ADVERTISED = exists().where(
    MEMBERS.c.training_session_id == ROUNDS.c.training_session_id,
    MEMBERS.c.round_number == ROUNDS.c.number,
    MEMBERS.c.device_id == bindparam("device"),
)
_OPEN_ROUND = (
    select(
        ROUNDS.c.training_session_id,
        ROUNDS.c.number,
        ROUNDS.c.base_version,
        ROUNDS.c.deadline_at,
        ROUNDS.c.task,
        ROUNDS.c.accepted_count >= ROUNDS.c.target,
    )
    .select_from(_CURRENT_ROUND)
    .where(_IS_ACTIVE, *_is_asked(bindparam("device")), ~_HAS_ADVERTISED, ~_HAS_GROUPS)
    .order_by(sql_cast(ROUNDS.c.accepted_count, Float) / ROUNDS.c.target, ROUNDS.c.opened_at)
    .limit(1)
)


class WorkQuery:
    """A SELECT of the work that a device may do, of one training session or of all, with or without queries.

    Args:
        statement: From training sessions, with the parameters `device` and `at`.
    """

    def __init__(self, statement: Select[Any]) -> None:
        self._statements = {
            (in_session, answers_queries): PreparedStatement(
                statement.where(
                    *[SESSIONS.c.id == bindparam("session")] * in_session,
                    *[SESSIONS.c.model_type != QUERY_MODEL_TYPE] * (not answers_queries),
                )
            )
            for in_session in (False, True)
            for answers_queries in (False, True)
        }

    def rows(
        self,
        session: Session,
        device_id: str,
        training_session_id: str,
        at: datetime,
        *,
        answers_queries: bool,
    ) -> list[Row]:
        """Return the rows for a device, of one training session, or of all if empty."""
        parameters: dict[str, Any] = {"device": device_id, "at": at}
        if training_session_id:
            parameters["session"] = training_session_id
        statement = self._statements[bool(training_session_id), answers_queries]
        return statement.rows(session, parameters)


_OPEN_ROUNDS = WorkQuery(_OPEN_ROUND)


def find_open_round(
    session: Session,
    device_id: str,
    training_session_id: str,
    at: datetime,
    *,
    answers_queries: bool,
) -> OpenRound | None:
    """Return the open round that a device should contribute to, of one training session, or of all if empty.

    Queries of federated analytics count only if the device answers them; a round with secure aggregation with neighbors
    only until the device has advertised, or groups are formed: `neighbors.find_work` finds its later steps. Of several,
    the round with the smallest share of its target is returned. One read-only statement: idle devices poll with it.
    """
    rows = _OPEN_ROUNDS.rows(
        session, device_id, training_session_id, at, answers_queries=answers_queries
    )
    return OpenRound(*rows[0]) if rows else None


_ASKED = PreparedStatement(
    select(DEVICES.c.id)
    .select_from(_CURRENT_ROUND.join(DEVICES, true()))
    .where(
        SESSIONS.c.id == bindparam("session"),
        DEVICES.c.state == DeviceState.ACTIVE.value,
        *_is_asked(DEVICES.c.id),
    )
)


def list_asked(session: Session, training_session_id: str, at: datetime) -> set[str]:
    """Return the devices that `find_open_round` gives the open round of a training session."""
    parameters = {"session": training_session_id, "at": at}
    return {row[0] for row in _ASKED.rows(session, parameters)}


_SELECTED_AMONG = PreparedStatement(
    select(SELECTED.c.device_id).where(
        SELECTED.c.training_session_id == bindparam("session"),
        SELECTED.c.round_number == bindparam("round"),
        OneOf(SELECTED.c.device_id, "ids"),
    )
)


def selected_among(
    session: Session, training_session_id: str, round_number: int, device_ids: Sequence[str]
) -> set[str]:
    """Return which of these devices were selected for a round."""
    parameters = {"session": training_session_id, "round": round_number, "ids": list(device_ids)}
    return {row[0] for row in _SELECTED_AMONG.rows(session, parameters)}


@dataclass(frozen=True)
class RoundInProgress:
    """A round that is open, or closed and not published."""

    training_session_id: str
    number: int
    state: str
    base_version: int
    quorum: int
    accepted_count: int
    opened_at: datetime
    deadline_at: datetime
    closed_at: datetime | None


_IN_PROGRESS = PreparedStatement(
    select(
        ROUNDS.c.training_session_id,
        ROUNDS.c.number,
        ROUNDS.c.state,
        ROUNDS.c.base_version,
        ROUNDS.c.quorum,
        ROUNDS.c.accepted_count,
        ROUNDS.c.opened_at,
        ROUNDS.c.deadline_at,
        ROUNDS.c.closed_at,
    )
    .join(SESSIONS, SESSIONS.c.id == ROUNDS.c.training_session_id)
    .where(
        or_(ROUNDS.c.state == RoundState.OPEN.value, ROUNDS.c.state == RoundState.CLOSED.value),
        or_(
            SESSIONS.c.state == TrainingSessionState.RUNNING.value,
            ROUNDS.c.state == RoundState.CLOSED.value,
        ),
    )
    .order_by(ROUNDS.c.opened_at)
)


def rounds_in_progress(session: Session) -> list[RoundInProgress]:
    """Return the open rounds of running training sessions, and all closed rounds, by time of opening."""
    return [RoundInProgress(*row) for row in _IN_PROGRESS.rows(session, {})]


def count_published(session: Session, training_session_id: str) -> int:
    """Return the number of rounds of a training session that have made a version."""
    query = select(func.count()).where(
        ROUNDS.c.training_session_id == training_session_id,
        ROUNDS.c.state == RoundState.PUBLISHED.value,
    )
    return session.execute(query).scalar_one()


def count_barren(session: Session, training_session_id: str) -> int:
    """Return the number of rounds since the last version that had their quorum and made no version."""
    rounds = ROUNDS.alias()
    last = select(func.max(rounds.c.number)).where(
        rounds.c.training_session_id == training_session_id,
        rounds.c.state == RoundState.PUBLISHED.value,
    )
    query = select(func.count()).where(
        ROUNDS.c.training_session_id == training_session_id,
        ROUNDS.c.number > func.coalesce(last.scalar_subquery(), 0),
        ROUNDS.c.state == RoundState.FAILED.value,
        ROUNDS.c.accepted_count >= ROUNDS.c.quorum,
    )
    return session.execute(query).scalar_one()


def tasks_in_progress(session: Session) -> Sequence[tuple[str, int, bytes]]:
    """Return training session, number and signed task of all rounds that have not ended, also of paused ones."""
    query = select(ROUNDS.c.training_session_id, ROUNDS.c.number, ROUNDS.c.task).where(
        or_(ROUNDS.c.state == RoundState.OPEN.value, ROUNDS.c.state == RoundState.CLOSED.value),
        ROUNDS.c.task.is_not(None),
    )
    return [(row[0], row[1], row[2]) for row in session.execute(query)]


def replace_task(session: Session, task: Replacement) -> None:
    """Replace the signature of a round's task; devices get it at their next poll."""
    session.execute(
        update(ROUNDS)
        .where(
            ROUNDS.c.training_session_id == task.training_session_id,
            ROUNDS.c.number == task.number,
            ROUNDS.c.task == task.earlier,
        )
        .values(task=task.renewed)
    )


def count_sessions(session: Session) -> dict[str, int]:
    """Return the number of training sessions in each state."""
    rows = session.execute(select(SESSIONS.c.state, func.count()).group_by(SESSIONS.c.state))
    return {row[0]: row[1] for row in rows}
