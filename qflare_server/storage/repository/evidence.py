"""Queries for evidence of where versions come from; they only read, in batches."""

from collections.abc import Collection, Sequence
from typing import Any, Final

from sqlalchemy import Row, bindparam, select, tuple_
from sqlalchemy.orm import Session

from qflare_server.storage.tables import (
    AuditLog,
    Device,
    DeviceKey,
    Evaluation,
    GlobalModel,
    ModelUpdate,
    Payload,
    Round,
    TrainingSession,
    TrustDocument,
)

AUDIT = AuditLog.__table__
DOCUMENTS = TrustDocument.__table__
DEVICES = Device.__table__
KEYS = DeviceKey.__table__
EVALUATIONS = Evaluation.__table__
MODELS = GlobalModel.__table__
PAYLOADS = Payload.__table__
ROUNDS = Round.__table__
SESSIONS = TrainingSession.__table__
UPDATES = ModelUpdate.__table__

_ENTRY: Final = (
    select(AUDIT)
    .where(AUDIT.c.subject == bindparam("about"), AUDIT.c.event_type == bindparam("kind"))
    .order_by(AUDIT.c.id)
    .limit(1)
)


def trust_documents(session: Session, kind: str) -> Sequence[bytes]:
    """Return every signed document of a kind, `root` or `keyset`, by ascending version."""
    query = select(DOCUMENTS.c.envelope).where(DOCUMENTS.c.kind == kind)
    return session.scalars(query.order_by(DOCUMENTS.c.version)).all()


def update_rows(
    session: Session, training_session_id: str, version: int, after: int, limit: int
) -> Sequence[Any]:
    """Return the updates in a version after a sequence number, in order of acceptance.

    Rows have the columns of the SELECT below.
    """
    query = (
        select(
            UPDATES.c.id,
            UPDATES.c.acceptance_sequence,
            UPDATES.c.device_id,
            UPDATES.c.statement,
            UPDATES.c.signature,
            UPDATES.c.statement_digest,
            PAYLOADS.c.location,
        )
        .join(PAYLOADS, PAYLOADS.c.id == UPDATES.c.payload_id)
        .where(
            UPDATES.c.training_session_id == training_session_id,
            UPDATES.c.aggregated_version == version,
            UPDATES.c.acceptance_sequence > after,
        )
        .order_by(UPDATES.c.acceptance_sequence)
        .limit(limit)
    )
    return session.execute(query).all()


def keys_of(session: Session, device_ids: Collection[str]) -> Sequence[DeviceKey]:
    """Return all keys of devices, current and retired, by device and sequence."""
    query = select(DeviceKey).where(KEYS.c.device_id.in_(sorted(device_ids)))
    return session.scalars(query.order_by(KEYS.c.device_id, KEYS.c.sequence)).all()


def find_event(session: Session, event_type: str, subject: str) -> Row[Any] | None:
    """Return the first audit entry of a type about a subject."""
    return (
        session.connection().execute(_ENTRY, {"about": subject, "kind": event_type}).one_or_none()
    )


def session_ids(session: Session, after: str, limit: int) -> Sequence[str]:
    """Return ids of training sessions after an id, in order."""
    query = select(SESSIONS.c.id).where(SESSIONS.c.id > after).order_by(SESSIONS.c.id).limit(limit)
    return session.scalars(query).all()


def models_after(
    session: Session, training_session_id: str, version: int, limit: int
) -> Sequence[GlobalModel]:
    """Return versions of a training session after a version, in order."""
    query = (
        select(GlobalModel)
        .where(MODELS.c.training_session_id == training_session_id, MODELS.c.version > version)
        .order_by(MODELS.c.version)
        .limit(limit)
    )
    return session.scalars(query).all()


def downloads_after(session: Session, after: tuple[str, int], limit: int) -> Sequence[GlobalModel]:
    """Return versions, of all training sessions, that devices download in a smaller encoding; after one, in order.

    Args:
        session: Open session.
        after: Training session and version of the last version read before.
        limit: Most versions to return.
    """
    key = tuple_(MODELS.c.training_session_id, MODELS.c.version)
    query = (
        select(GlobalModel)
        .where(MODELS.c.download_encoding.is_not(None), key > after)
        .order_by(MODELS.c.training_session_id, MODELS.c.version)
        .limit(limit)
    )
    return session.scalars(query).all()


def updates_after(session: Session, after: str, limit: int) -> Sequence[ModelUpdate]:
    """Return updates of all training sessions after an id, by id."""
    query = select(ModelUpdate).where(UPDATES.c.id > after).order_by(UPDATES.c.id).limit(limit)
    return session.scalars(query).all()


def keys_after(session: Session, after: str, limit: int) -> Sequence[DeviceKey]:
    """Return device keys after an id, by id."""
    query = select(DeviceKey).where(KEYS.c.key_id > after).order_by(KEYS.c.key_id).limit(limit)
    return session.scalars(query).all()


def payloads_after(session: Session, after: str, limit: int) -> Sequence[Payload]:
    """Return payload rows after an id, by id, without their bytes."""
    query = select(Payload).where(PAYLOADS.c.id > after).order_by(PAYLOADS.c.id).limit(limit)
    return session.scalars(query).all()


def accepted_updates(session: Session, update_ids: Collection[str]) -> dict[str, Any]:
    """Return, by id, the columns of updates that the audit log records too; unknown ids are left out."""
    query = select(
        UPDATES.c.id,
        UPDATES.c.training_session_id,
        UPDATES.c.round_number,
        UPDATES.c.acceptance_sequence,
        UPDATES.c.statement_digest,
        UPDATES.c.statement.is_not(None).label("has_statement"),
    ).where(UPDATES.c.id.in_(sorted(update_ids)))
    return {row.id: row for row in session.execute(query)}


def known_digests(session: Session, digests: Collection[str]) -> set[str]:
    """Return which digests are digests of versions."""
    query = select(MODELS.c.digest).where(MODELS.c.digest.in_(sorted(digests)))
    return set(session.scalars(query))


def devices_after(session: Session, after: str, limit: int) -> Sequence[Device]:
    """Return devices after an id, by id."""
    query = select(Device).where(DEVICES.c.id > after).order_by(DEVICES.c.id).limit(limit)
    return session.scalars(query).all()


def rounds_after(
    session: Session, training_session_id: str, number: int, limit: int
) -> Sequence[Round]:
    """Return rounds of a training session after a number, in order."""
    query = (
        select(Round)
        .where(ROUNDS.c.training_session_id == training_session_id, ROUNDS.c.number > number)
        .order_by(ROUNDS.c.number)
        .limit(limit)
    )
    return session.scalars(query).all()


def evaluations_after(
    session: Session, after: tuple[str, int, str], limit: int
) -> Sequence[Evaluation]:
    """Return evaluations of all training sessions after one, in order.

    Args:
        session: Open session.
        after: Training session, version and device of the last evaluation read before.
        limit: Most evaluations to return.
    """
    columns = (EVALUATIONS.c.training_session_id, EVALUATIONS.c.version, EVALUATIONS.c.device_id)
    query = select(Evaluation).where(tuple_(*columns) > after).order_by(*columns).limit(limit)
    return session.scalars(query).all()


def known_evaluations(session: Session, digests: Collection[str]) -> set[str]:
    """Return which digests are statement digests of evaluations."""
    query = select(EVALUATIONS.c.statement_digest)
    found = session.scalars(query.where(EVALUATIONS.c.statement_digest.in_(sorted(digests))))
    return {digest for digest in found if digest is not None}
