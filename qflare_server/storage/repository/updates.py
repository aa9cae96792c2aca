"""Statements on updates.

The row of an update does not say which version the update is in: its round does. A version is published only with all
accepted updates of its round, so an update that was not rejected is in the version of its round as soon as the round
has one. Publication thus writes one row, however many updates there are, and the rows of rejected updates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Integer,
    and_,
    bindparam,
    case,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.paging import Order, Page, PageRequest, read_page
from qflare_server.storage.prepared import OneOf, PreparedInsert, PreparedStatement
from qflare_server.storage.records import ModelUpdate, Rows
from qflare_server.storage.repository.device_names import NAME_BYTES
from qflare_server.storage.repository.round_capacity import RoundCapacity
from qflare_server.storage.tables import RoundState, UpdateOrigin, UpdateState

UPDATES = tables.ModelUpdate.__table__
ROUNDS = tables.Round.__table__
MODELS = tables.GlobalModel.__table__
ROUND_OF = and_(
    ROUNDS.c.training_session_id == UPDATES.c.training_session_id,
    ROUNDS.c.number == UPDATES.c.round_number,
)
"""Joins an update with its round."""
_IS_REJECTED = UPDATES.c.state == UpdateState.REJECTED.value
UPDATE_ROWS: Final = Rows(
    ModelUpdate,
    UPDATES,
    {
        "state": case(
            (_IS_REJECTED, UpdateState.REJECTED.value),
            (ROUNDS.c.version.is_not(None), UpdateState.AGGREGATED.value),
            else_=UpdateState.PENDING.value,
        ),
        "aggregated_version": case((~_IS_REJECTED, ROUNDS.c.version)),
        "aggregated_at": case((_IS_REJECTED, UPDATES.c.aggregated_at), else_=ROUNDS.c.published_at),
    },
)
EVERY_UPDATE: Final = UPDATE_ROWS.select.join_from(UPDATES, ROUNDS, ROUND_OF)
"""Selects every update; callers add conditions and order."""
PAYLOADS = tables.Payload.__table__
MAX_REASON: Final = 500
"""Most characters of the reason why an update was rejected."""


@dataclass(frozen=True)
class UpdateReceipt:
    """Receipt of an accepted update."""

    update_id: str
    statement_digest: str
    device_id: str
    training_session_id: str
    round_number: int
    base_version: int
    acceptance_sequence: int
    accepted_at: datetime


@dataclass(frozen=True)
class AcceptedUpdate:
    """An accepted update as the aggregator reads it; includes the payload's bytes if they are in its row."""

    update_id: str
    device_id: str
    acceptance_sequence: int
    base_version: int
    example_count: int
    statement_digest: str
    statement: bytes | None
    payload_id: str
    size_bytes: int
    payload_digest: str
    chunk_digests: bytes
    location: str
    store: str | None
    chunks_id: str | None
    data: bytes | None
    sealed_header: bytes | None
    sealed_key: bytes | None
    metrics: dict[str, Any]
    signature: bytes | None
    key_id: str | None
    origin: str


_ACCEPTED = select(
    UPDATES.c.id,
    UPDATES.c.statement_digest,
    UPDATES.c.device_id,
    UPDATES.c.training_session_id,
    UPDATES.c.round_number,
    UPDATES.c.base_version,
    UPDATES.c.acceptance_sequence,
    UPDATES.c.accepted_at,
)
_KNOWN = PreparedStatement(
    _ACCEPTED.where(
        or_(
            OneOf(UPDATES.c.id, "updates"),
            and_(
                UPDATES.c.training_session_id == bindparam("session"),
                UPDATES.c.round_number.between(bindparam("first"), bindparam("last")),
                OneOf(UPDATES.c.device_id, "devices"),
            ),
        )
    )
)
_INSERT = PreparedInsert(
    UPDATES,
    (
        "id",
        "training_session_id",
        "round_number",
        "device_id",
        "base_version",
        "payload_id",
        "payload_digest",
        "size_bytes",
        "statement",
        "statement_digest",
        "signature",
        "key_id",
        "origin",
        "example_count",
        "loss",
        "accuracy",
        "local_epochs",
        "training_time_s",
        "metrics",
        "state",
        "acceptance_sequence",
        "accepted_at",
    ),
)


def find_accepted(session: Session, update_id: str) -> UpdateReceipt | None:
    """Return the accepted update with this id."""
    row = session.execute(_ACCEPTED.where(UPDATES.c.id == update_id)).one_or_none()
    return None if row is None else UpdateReceipt(*row)


def find_contribution(
    session: Session, training_session_id: str, round_number: int, device_id: str, base_version: int
) -> UpdateReceipt | None:
    """Return the receipt of a device's update to a round from a base version; None without one."""
    row = session.execute(
        _ACCEPTED.where(
            UPDATES.c.training_session_id == training_session_id,
            UPDATES.c.round_number == round_number,
            UPDATES.c.device_id == device_id,
            UPDATES.c.base_version == base_version,
        )
    ).one_or_none()
    return None if row is None else UpdateReceipt(*row)


def find_known(
    session: Session,
    places: RoundCapacity,
    update_ids: Sequence[str],
    device_ids: Sequence[str],
    first_round: int,
) -> list[UpdateReceipt]:
    """Return accepted updates with one of these ids, and those of these devices since round `first_round`."""
    parameters = {
        "updates": list(update_ids),
        "session": places.training_session_id,
        "first": first_round,
        "last": places.number,
        "devices": list(device_ids),
    }
    return [UpdateReceipt(*row) for row in _KNOWN.rows(session, parameters)]


def insert_updates(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert accepted updates; their sequence numbers come from the round locked in this transaction."""
    _INSERT.run(session, rows)


def _foldable(data: ColumnElement[Any]) -> PreparedStatement:
    """Return the query of updates of a round, with `data` as the bytes of a payload."""
    return PreparedStatement(
        select(
            UPDATES.c.id,
            UPDATES.c.device_id,
            UPDATES.c.acceptance_sequence,
            UPDATES.c.base_version,
            UPDATES.c.example_count,
            UPDATES.c.statement_digest,
            UPDATES.c.statement,
            UPDATES.c.payload_id,
            PAYLOADS.c.size_bytes,
            PAYLOADS.c.digest,
            PAYLOADS.c.chunk_digests,
            PAYLOADS.c.location,
            PAYLOADS.c.store,
            PAYLOADS.c.chunks_id,
            data,
            PAYLOADS.c.sealed_header,
            PAYLOADS.c.sealed_key,
            UPDATES.c.metrics,
            UPDATES.c.signature,
            UPDATES.c.key_id,
            UPDATES.c.origin,
        )
        .join(PAYLOADS, PAYLOADS.c.id == UPDATES.c.payload_id)
        .where(
            UPDATES.c.training_session_id == bindparam("session"),
            UPDATES.c.round_number == bindparam("round"),
            UPDATES.c.acceptance_sequence > bindparam("after"),
        )
        .order_by(UPDATES.c.acceptance_sequence)
        .limit(bindparam("count", type_=Integer()))
    )


_FOLDABLE = _foldable(PAYLOADS.c.data)
_FACTS = _foldable(null().label("data"))


def accepted_after(
    session: Session, training_session_id: str, round_number: int, sequence: int, limit: int
) -> list[AcceptedUpdate]:
    """Return updates of a round after a sequence number, in order of acceptance."""
    return _read(_FOLDABLE, session, training_session_id, round_number, sequence, limit)


def facts_after(
    session: Session, training_session_id: str, round_number: int, sequence: int, limit: int
) -> list[AcceptedUpdate]:
    """Return updates as `accepted_after`, without the bytes of payloads that are in rows, which are not read."""
    return _read(_FACTS, session, training_session_id, round_number, sequence, limit)


def _read(
    statement: PreparedStatement,
    session: Session,
    training_session_id: str,
    round_number: int,
    sequence: int,
    limit: int,
) -> list[AcceptedUpdate]:
    wanted = {
        "session": training_session_id,
        "round": round_number,
        "after": sequence,
        "count": limit,
    }
    return [AcceptedUpdate(*row) for row in statement.rows(session, wanted)]


def mark_rejected(session: Session, rejected: Mapping[str, str], at: datetime) -> None:
    """Mark updates, by id, as rejected, each with its reason, cut to `MAX_REASON` characters."""
    if rejected:
        session.connection().execute(
            update(UPDATES)
            .where(UPDATES.c.id == bindparam("update"))
            .values(
                state=UpdateState.REJECTED.value, state_reason=bindparam("why"), aggregated_at=at
            ),
            [
                {"update": update_id, "why": reason[:MAX_REASON]}
                for update_id, reason in sorted(rejected.items())
            ],
        )


def record_scores(session: Session, scores: Mapping[str, float]) -> None:
    """Write the validation scores of updates, by id."""
    if scores:
        session.connection().execute(
            update(UPDATES)
            .where(UPDATES.c.id == bindparam("update"))
            .values(validation_score=bindparam("score")),
            [{"update": update_id, "score": score} for update_id, score in sorted(scores.items())],
        )


def reject_round(
    session: Session, training_session_id: str, round_number: int, reason: str, at: datetime
) -> None:
    """Reject every pending update of a round."""
    session.execute(
        update(UPDATES)
        .where(
            UPDATES.c.training_session_id == training_session_id,
            UPDATES.c.round_number == round_number,
            UPDATES.c.state == UpdateState.PENDING.value,
        )
        .values(state=UpdateState.REJECTED.value, state_reason=reason, aggregated_at=at)
    )


def count_pending(session: Session, training_session_id: str) -> int:
    """Return the number of accepted updates of a training session that are in no version yet."""
    query = select(func.coalesce(func.sum(ROUNDS.c.accepted_count), 0)).where(
        ROUNDS.c.training_session_id == training_session_id,
        ROUNDS.c.state.in_((RoundState.OPEN.value, RoundState.CLOSED.value)),
    )
    return int(session.execute(query).scalar_one())


def get_update(session: Session, update_id: str) -> ModelUpdate | None:
    """Return an update."""
    return UPDATE_ROWS.one(session, EVERY_UPDATE.where(UPDATES.c.id == update_id))


def in_version(training_session_id: str, version: int) -> ColumnElement[bool]:
    """Return the condition that an update, joined with its round by `ROUND_OF`, is in a version."""
    number = select(MODELS.c.round_number).where(
        MODELS.c.training_session_id == training_session_id, MODELS.c.version == version
    )
    return and_(
        ROUNDS.c.training_session_id == training_session_id,
        ROUNDS.c.number == number.scalar_subquery(),
        ROUNDS.c.version == version,  # a version that repeats another one names its round too
        ~_IS_REJECTED,
    )


def contributors(session: Session, training_session_id: str, version: int) -> Sequence[str]:
    """Return the statement digests of the updates in a version, in order of acceptance."""
    query = (
        select(UPDATES.c.statement_digest)
        .join(ROUNDS, ROUND_OF)
        .where(in_version(training_session_id, version))
        .order_by(UPDATES.c.acceptance_sequence)
    )
    return session.scalars(query).all()


def count_of_origin(
    session: Session, training_session_id: str, version: int, origin: UpdateOrigin
) -> int:
    """Return the number of updates in a version that are of an origin."""
    query = (
        select(func.count())
        .select_from(UPDATES.join(ROUNDS, ROUND_OF))
        .where(in_version(training_session_id, version), UPDATES.c.origin == origin.value)
    )
    return session.execute(query).scalar_one()


def list_updates(
    session: Session, training_session_id: str, round_number: int, request: PageRequest
) -> Page[ModelUpdate]:
    """Return the updates of a round, in order of acceptance."""
    query = EVERY_UPDATE.where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
    ).order_by(UPDATES.c.acceptance_sequence)
    order = Order[ModelUpdate](
        (int,),
        lambda row: [row.acceptance_sequence],
        lambda key: UPDATES.c.acceptance_sequence > key[0],
        extra_bytes=NAME_BYTES,
    )
    scope = ("updates", training_session_id, round_number)
    return read_page(partial(UPDATE_ROWS.all, session), query, request, order, *scope)


def list_of_device(
    session: Session, training_session_id: str, device_id: str, limit: int
) -> Sequence[ModelUpdate]:
    """Return the updates of a device to a training session, newest first."""
    query = EVERY_UPDATE.where(
        UPDATES.c.device_id == device_id, UPDATES.c.training_session_id == training_session_id
    ).order_by(UPDATES.c.accepted_at.desc(), UPDATES.c.id)
    return UPDATE_ROWS.all(session, query.limit(limit))
