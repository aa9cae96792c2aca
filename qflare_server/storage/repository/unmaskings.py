"""Statements on the answers of helpers for secure aggregation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from qflare_server.storage import tables

UNMASKINGS = tables.Unmasking.__table__


@dataclass(frozen=True)
class StoredUnmasking:
    """Answer of one helper for one round.

    Attributes:
        helper_id: The helper.
        counter: Counter of the answer.
        answer: The signed answer, serialized.
        payload_id: Payload with the sum of the masks.
        refused: Reasons by id of the updates that the helper could not use.
    """

    helper_id: str
    counter: int
    answer: bytes
    payload_id: str
    refused: Mapping[str, str]


def insert_unmaskings(
    session: Session,
    training_session_id: str,
    round_number: int,
    answers: Sequence[StoredUnmasking],
) -> None:
    """Insert the answers of a round, in the order of the helpers in its task."""
    for position, answer in enumerate(answers):
        values = {
            "training_session_id": training_session_id,
            "round_number": round_number,
            "position": position,
            "helper_id": answer.helper_id,
            "counter": answer.counter,
            "answer": answer.answer,
            "payload_id": answer.payload_id,
            "refused": dict(answer.refused),
        }
        session.execute(insert(UNMASKINGS).values(**values))


def of_round(
    session: Session, training_session_id: str, round_number: int
) -> Sequence[StoredUnmasking]:
    """Return the answers of a round, in the order of the helpers in its task; empty without any."""
    query = (
        select(
            UNMASKINGS.c.helper_id,
            UNMASKINGS.c.counter,
            UNMASKINGS.c.answer,
            UNMASKINGS.c.payload_id,
            UNMASKINGS.c.refused,
        )
        .where(
            UNMASKINGS.c.training_session_id == training_session_id,
            UNMASKINGS.c.round_number == round_number,
        )
        .order_by(UNMASKINGS.c.position)
    )
    return [StoredUnmasking(*row) for row in session.execute(query)]


def last_counter(session: Session, helper_id: str) -> int:
    """Return the highest counter of a helper's stored answers; 0 for none."""
    query = select(func.max(UNMASKINGS.c.counter)).where(UNMASKINGS.c.helper_id == helper_id)
    return int(session.execute(query).scalar_one() or 0)
