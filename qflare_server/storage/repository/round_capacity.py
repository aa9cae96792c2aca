"""Capacity of a round: accepted count, target count, and the lock for accepting updates."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.prepared import PreparedStatement
from qflare_server.storage.tables import RoundState

SESSIONS = tables.TrainingSession.__table__
ROUNDS = tables.Round.__table__


@dataclass(frozen=True)
class RoundCapacity:
    """The columns of a round and its training session on which the acceptance of updates depends."""

    training_session_id: str
    session_state: str
    current_version: int
    number: int
    state: str
    base_version: int
    accepted_count: int
    target: int
    selected_count: int
    deadline_at: datetime


_PLACES = (
    select(
        SESSIONS.c.id,
        SESSIONS.c.state,
        SESSIONS.c.current_version,
        ROUNDS.c.number,
        ROUNDS.c.state,
        ROUNDS.c.base_version,
        ROUNDS.c.accepted_count,
        ROUNDS.c.target,
        ROUNDS.c.selected_count,
        ROUNDS.c.deadline_at,
    )
    .select_from(ROUNDS.join(SESSIONS, SESSIONS.c.id == ROUNDS.c.training_session_id))
    .where(SESSIONS.c.id == bindparam("session"))
)
_OF_ROUND = _PLACES.where(ROUNDS.c.number == bindparam("round"))
_OF_CURRENT = _PLACES.where(ROUNDS.c.number == SESSIONS.c.current_round)
_PLACES_OF_ROUND, _PLACES_OF_CURRENT = PreparedStatement(_OF_ROUND), PreparedStatement(_OF_CURRENT)
_LOCKED_PLACES_OF_ROUND = PreparedStatement(_OF_ROUND.with_for_update(of=ROUNDS))
_LOCKED_PLACES_OF_CURRENT = PreparedStatement(_OF_CURRENT.with_for_update(of=ROUNDS))


def lock_capacity(
    session: Session, training_session_id: str, round_number: int | None
) -> RoundCapacity | None:
    """Return a round with its row locked, the current round if no number is given; None if it does not exist."""
    current = round_number is None
    query = _LOCKED_PLACES_OF_CURRENT if current else _LOCKED_PLACES_OF_ROUND
    return _places(session, query, training_session_id, round_number)


def read_capacity(
    session: Session, training_session_id: str, round_number: int | None
) -> RoundCapacity | None:
    """Return a round without a lock, the current round if no number is given; None if it does not exist."""
    query = _PLACES_OF_CURRENT if round_number is None else _PLACES_OF_ROUND
    return _places(session, query, training_session_id, round_number)


def _places(
    session: Session, query: PreparedStatement, training_session_id: str, round_number: int | None
) -> RoundCapacity | None:
    parameters: dict[str, Any] = {"session": training_session_id}
    if round_number is not None:
        parameters["round"] = round_number
    rows = query.rows(session, parameters)
    return RoundCapacity(*rows[0]) if rows else None


_FILL = PreparedStatement(
    update(ROUNDS)
    .where(
        ROUNDS.c.training_session_id == bindparam("session"),
        ROUNDS.c.number == bindparam("round"),
    )
    .values(
        accepted_count=bindparam("accepted"),
        example_count=ROUNDS.c.example_count + bindparam("examples"),
        state=bindparam("now"),
        closed_at=bindparam("closed"),
    )
)


def record_accepted(
    session: Session,
    places: RoundCapacity,
    accepted_count: int,
    example_count: int,
    at: datetime,
    *,
    closed: bool,
) -> None:
    """Write the accepted count of a locked round, and its closing if that filled it."""
    _FILL.run(
        session,
        {
            "session": places.training_session_id,
            "round": places.number,
            "accepted": accepted_count,
            "examples": example_count,
            "now": RoundState.CLOSED.value if closed else places.state,
            "closed": at if closed else None,
        },
    )
