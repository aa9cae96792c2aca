"""Statements on passes over the updates of a round that several coordinators on PostgreSQL do slice by slice.

A slice is leased by the clock of the database server, which is read in the statement itself: the clocks of coordinators
and how long a process was frozen do not matter. Every acquisition increments the slice's fence, and only the holder of
the current fence renews, releases or records a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Interval,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.repository.payloads import LONG_AGO, begin_upload
from qflare_server.storage.tables import RoundState

PASSES = tables.FoldPass.__table__
SLICES = tables.FoldSlice.__table__
PAYLOADS = tables.Payload.__table__
ROUNDS = tables.Round.__table__
_NOW: Final = func.clock_timestamp(type_=SLICES.c.expires_at.type)
_IS_FREE: Final = and_(
    SLICES.c.payload_id.is_(None),
    or_(SLICES.c.expires_at.is_(None), SLICES.c.expires_at <= _NOW),
)
_OF_PASS: Final = SLICES.c.pass_id == PASSES.c.id


@dataclass(frozen=True)
class FoldPass:
    """A pass, as the coordinators that work on it read it."""

    id: str
    training_session_id: str
    round_number: int
    name: str
    inputs: bytes


@dataclass(frozen=True)
class SliceLease:
    """One acquisition of a slice."""

    pass_id: str
    slice_index: int
    first_element: int
    end_element: int
    fence: int


@dataclass(frozen=True)
class SliceResult:
    """The recorded result of a slice."""

    payload_id: str
    authenticator: bytes


def begin_pass(
    session: Session,
    new: FoldPass,
    leader: str,
    format_number: int,
    bounds: Sequence[tuple[int, int]],
    at: datetime,
) -> None:
    """Insert a pass with its slices."""
    session.execute(
        insert(PASSES).values(
            id=new.id,
            training_session_id=new.training_session_id,
            round_number=new.round_number,
            leader=leader,
            name=new.name,
            format=format_number,
            inputs=new.inputs,
            created_at=at,
        )
    )
    rows = [
        {
            "pass_id": new.id,
            "slice_index": index,
            "first_element": first,
            "end_element": end,
            "holder": "",
            "fence": 0,
        }
        for index, (first, end) in enumerate(bounds)
    ]
    session.execute(insert(SLICES), rows)


def get_pass(session: Session, pass_id: str) -> FoldPass | None:
    """Return a pass; None if it has ended."""
    row = session.execute(
        select(
            PASSES.c.id,
            PASSES.c.training_session_id,
            PASSES.c.round_number,
            PASSES.c.name,
            PASSES.c.inputs,
        ).where(PASSES.c.id == pass_id)
    ).one_or_none()
    return None if row is None else FoldPass(*row)


def has_free_slice(
    session: Session, holder: str, format_number: int, without: Sequence[str]
) -> bool:
    """Return whether a slice of another leader's pass can be acquired; does not lock anything."""
    wanted = _of_others(holder, format_number, without)
    query = select(exists().where(_OF_PASS, _IS_FREE, wanted))
    return bool(session.execute(query).scalar_one())


def _of_others(holder: str, format_number: int, without: Sequence[str]) -> ColumnElement[bool]:
    return and_(
        PASSES.c.leader != holder,
        PASSES.c.format == format_number,
        PASSES.c.id.not_in(without),
    )


def acquire_any(
    session: Session, holder: str, format_number: int, without: Sequence[str], life_s: float
) -> SliceLease | None:
    """Acquire a free slice of another leader's pass, the oldest first; None without one.

    Args:
        session: Write transaction.
        holder: Name of the acquiring coordinator.
        format_number: Format of the inputs that it can read.
        without: Ids of passes to leave to others.
        life_s: Seconds until the lease expires.
    """
    wanted = _of_others(holder, format_number, without)
    return _acquire(session, wanted, holder, life_s)


def acquire_of(
    session: Session, pass_id: str, first_index: int, holder: str, life_s: float
) -> SliceLease | None:
    """Acquire a free slice of a pass, the first from an index on; None without one."""
    wanted = and_(PASSES.c.id == pass_id, SLICES.c.slice_index >= first_index)
    return _acquire(session, wanted, holder, life_s)


def _acquire(
    session: Session, wanted: ColumnElement[bool], holder: str, life_s: float
) -> SliceLease | None:
    query = (
        select(SLICES.c.pass_id, SLICES.c.slice_index)
        .join(PASSES, _OF_PASS)
        .where(_IS_FREE, wanted)
        .order_by(PASSES.c.created_at, SLICES.c.pass_id, SLICES.c.slice_index)
        .limit(1)
        .with_for_update(skip_locked=True, of=SLICES)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return None
    taken = session.execute(
        update(SLICES)
        .where(SLICES.c.pass_id == found[0], SLICES.c.slice_index == found[1])
        .values(holder=holder, fence=SLICES.c.fence + 1, expires_at=_after(life_s))
        .returning(
            SLICES.c.pass_id,
            SLICES.c.slice_index,
            SLICES.c.first_element,
            SLICES.c.end_element,
            SLICES.c.fence,
        )
    ).one()
    return SliceLease(*taken)


def _after(life_s: float) -> ColumnElement[Any]:
    return _NOW + literal(timedelta(seconds=life_s), Interval)


def _held(lease: SliceLease) -> ColumnElement[bool]:
    return and_(
        SLICES.c.pass_id == lease.pass_id,
        SLICES.c.slice_index == lease.slice_index,
        SLICES.c.fence == lease.fence,
        SLICES.c.payload_id.is_(None),
    )


def renew(session: Session, lease: SliceLease, life_s: float) -> bool:
    """Extend a lease; False if the slice was acquired again, has a result, or its pass has ended."""
    changed = session.execute(update(SLICES).where(_held(lease)).values(expires_at=_after(life_s)))
    return bool(changed.rowcount)  # type: ignore[attr-defined]  # a CursorResult has it


def release(session: Session, lease: SliceLease) -> None:
    """Give a lease back before it expires."""
    session.execute(update(SLICES).where(_held(lease)).values(expires_at=None))


def lock_current(session: Session, lease: SliceLease) -> bool:
    """Lock the row of a slice; False if the fence of the lease is not the current one, or there is a result.

    Nobody acquires the slice before the transaction ends. An expired lease whose slice nobody has acquired since is
    still current: the result is the same whoever computes it.
    """
    query = select(SLICES.c.fence).where(_held(lease)).with_for_update()
    return session.execute(query).one_or_none() is not None


def record(session: Session, lease: SliceLease, result: SliceResult) -> None:
    """Record the result of a slice in the transaction that has locked it (`lock_current`)."""
    session.execute(
        update(SLICES)
        .where(_held(lease))
        .values(payload_id=result.payload_id, authenticator=result.authenticator, expires_at=None)
    )


def result_of(session: Session, pass_id: str, slice_index: int) -> SliceResult | None:
    """Return the result of a slice; None without one."""
    row = session.execute(
        select(SLICES.c.payload_id, SLICES.c.authenticator).where(
            SLICES.c.pass_id == pass_id,
            SLICES.c.slice_index == slice_index,
            SLICES.c.payload_id.is_not(None),
        )
    ).one_or_none()
    return None if row is None else SliceResult(*row)


def is_under_way(session: Session, pass_id: str) -> bool:
    """Return whether a pass has not ended."""
    return bool(session.execute(select(exists().where(PASSES.c.id == pass_id))).scalar_one())


def end_pass(session: Session, pass_id: str) -> None:
    """Delete a pass with its slices and their results; chunks in a payload store are left to be swept."""
    locked = select(SLICES.c.slice_index).where(SLICES.c.pass_id == pass_id).with_for_update()
    session.execute(locked).all()  # a result that is being recorded is seen below
    results = session.execute(
        select(PAYLOADS.c.id, PAYLOADS.c.chunks_id, PAYLOADS.c.store)
        .join(SLICES, SLICES.c.payload_id == PAYLOADS.c.id)
        .where(SLICES.c.pass_id == pass_id)
    ).all()
    session.execute(delete(SLICES).where(SLICES.c.pass_id == pass_id))
    session.execute(delete(PASSES).where(PASSES.c.id == pass_id))
    for _, chunks_id, store in results:
        if chunks_id is not None:
            begin_upload(session, payload_id=chunks_id, store=store, at=LONG_AGO)
    session.execute(delete(PAYLOADS).where(PAYLOADS.c.id.in_([row[0] for row in results])))


def end_earlier(session: Session, training_session_id: str, round_number: int) -> None:
    """End all passes of a round, as after a crash of their leader."""
    query = select(PASSES.c.id).where(
        PASSES.c.training_session_id == training_session_id, PASSES.c.round_number == round_number
    )
    for pass_id in session.scalars(query).all():
        end_pass(session, pass_id)


def end_abandoned(session: Session) -> int:
    """End the passes of rounds that are over, as after a crash of their leader; return their number."""
    over = session.scalars(
        select(PASSES.c.id)
        .join(
            ROUNDS,
            and_(
                ROUNDS.c.training_session_id == PASSES.c.training_session_id,
                ROUNDS.c.number == PASSES.c.round_number,
            ),
        )
        .where(ROUNDS.c.state != RoundState.CLOSED.value)
    ).all()
    for pass_id in over:
        end_pass(session, pass_id)
    return len(over)
