"""The history of a training session as rows, for research: read once, streamed, never written.

Times are those of the coordinator, in UTC. Devices are named by their ids.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.repository.updates import ROUND_OF, UPDATE_ROWS

Row: TypeAlias = dict[str, Any]

ROUNDS = tables.Round.__table__
UPDATES = tables.ModelUpdate.__table__
VERSIONS = tables.GlobalModel.__table__
SELECTED = tables.RoundDevice.__table__
LATE = tables.LateUpdate.__table__
FAILED = tables.DeviceFailure.__table__
EVALUATIONS = tables.Evaluation.__table__
_AT_ONCE = 1000


def rounds(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the rounds of a training session, in order."""
    wanted = select(ROUNDS).where(ROUNDS.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(ROUNDS.c.number))


def versions(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the versions of a training session, in order, without signatures and layouts."""
    left_out = {"manifest", "statement", "signature", "strategy_state"}
    columns = [column for column in VERSIONS.c if column.name not in left_out]
    wanted = select(*columns).where(VERSIONS.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(VERSIONS.c.version))


def updates(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the accepted updates of a training session in the order of acceptance, without signatures."""
    left_out = {"statement", "signature", "key_id"}
    columns = [column for column in UPDATE_ROWS.columns if column.name not in left_out]
    every = select(*columns).join_from(UPDATES, ROUNDS, ROUND_OF)
    wanted = every.where(UPDATES.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(UPDATES.c.round_number, UPDATES.c.acceptance_sequence))


def selections(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the devices that were drawn for each round; none where every device could take part."""
    wanted = select(SELECTED).where(SELECTED.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(SELECTED.c.round_number, SELECTED.c.device_id))


def late(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the devices whose updates came after their round had closed."""
    wanted = select(LATE).where(LATE.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(LATE.c.round_number, LATE.c.device_id))


def failures(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the failures that devices have reported, one for each device and round."""
    wanted = select(FAILED).where(FAILED.c.training_session_id == training_session_id)
    return _rows(session, wanted.order_by(FAILED.c.round_number, FAILED.c.device_id))


def evaluations(session: Session, training_session_id: str) -> Iterator[Row]:
    """Yield the evaluations of versions by devices, without signatures."""
    left_out = {"statement", "signature", "key_id"}
    columns = [column for column in EVALUATIONS.c if column.name not in left_out]
    wanted = select(*columns).where(
        EVALUATIONS.c.training_session_id == training_session_id,
        EVALUATIONS.c.statement.is_not(None),
    )
    return _rows(session, wanted.order_by(EVALUATIONS.c.version, EVALUATIONS.c.device_id))


def _rows(session: Session, wanted: Select[Any]) -> Iterator[Row]:
    found = session.execute(wanted.execution_options(yield_per=_AT_ONCE))
    return (dict(row) for row in found.mappings())
