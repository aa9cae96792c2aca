"""Statements on the configurations that training sessions had before the rule of their rounds was changed."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from qflare_server.storage import tables

REPLACED = tables.ReplacedConfig.__table__


class ReplacedConfig(NamedTuple):
    """A stored configuration, the last round that was opened under it, and when it was replaced."""

    config: Mapping[str, Any]
    last_round: int
    replaced_at: datetime


def insert_replaced(
    session: Session,
    training_session_id: str,
    config: Mapping[str, Any],
    last_round: int,
    at: datetime,
) -> None:
    """Record the configuration that a training session had; its row is locked."""
    count = select(func.count()).where(REPLACED.c.training_session_id == training_session_id)
    values = {
        "training_session_id": training_session_id,
        "sequence": int(session.execute(count).scalar_one()) + 1,
        "config": dict(config),
        "last_round": last_round,
        "replaced_at": at,
    }
    session.execute(insert(REPLACED).values(**values))


def list_replaced(
    session: Session, training_session_id: str, newest: int | None = None
) -> Sequence[ReplacedConfig]:
    """Return the replaced configurations of a training session, oldest first; only the newest ones with a number."""
    query = (
        select(REPLACED.c.config, REPLACED.c.last_round, REPLACED.c.replaced_at)
        .where(REPLACED.c.training_session_id == training_session_id)
        .order_by(REPLACED.c.sequence.desc())
        .limit(newest)
    )
    return [ReplacedConfig(*row) for row in session.execute(query)][::-1]
