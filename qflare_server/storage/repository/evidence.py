"""Read-only queries for lineage evidence, in batches."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import bindparam, select, tuple_
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.records import (
    AuditLog,
    Device,
    DeviceKey,
    Evaluation,
    GlobalModel,
    ModelUpdate,
    Payload,
    Round,
    Rows,
)
from qflare_server.storage.repository.updates import (
    EVERY_UPDATE,
    ROUND_OF,
    UPDATE_ROWS,
    in_version,
)

AUDIT = tables.AuditLog.__table__
DOCUMENTS = tables.TrustDocument.__table__
DEVICES = tables.Device.__table__
KEYS = tables.DeviceKey.__table__
EVALUATIONS = tables.Evaluation.__table__
MODELS = tables.GlobalModel.__table__
PAYLOADS = tables.Payload.__table__
ROUNDS = tables.Round.__table__
SESSIONS = tables.TrainingSession.__table__
UPDATES = tables.ModelUpdate.__table__
_ENTRIES = Rows(AuditLog, AUDIT)
_DEVICES = Rows(Device, DEVICES)
_EVALUATIONS = Rows(Evaluation, EVALUATIONS)
_KEYS = Rows(DeviceKey, KEYS)
_MODELS = Rows(GlobalModel, MODELS)
_PAYLOADS = Rows(Payload, PAYLOADS)
_ROUNDS = Rows(Round, ROUNDS)

_ENTRY: Final = (
    _ENTRIES.select.where(
        AUDIT.c.subject == bindparam("about"), AUDIT.c.event_type == bindparam("kind")
    )
    .order_by(AUDIT.c.id)
    .limit(1)
)


def trust_documents(session: Session, kind: str) -> Sequence[bytes]:
    """Return every signed document of a kind, `root` or `keyset`, by ascending version."""
    query = select(DOCUMENTS.c.envelope).where(DOCUMENTS.c.kind == kind)
    return session.scalars(query.order_by(DOCUMENTS.c.version)).all()


class UpdateOfVersion(NamedTuple):
    """Evidence that an update is part of a version."""

    id: str
    acceptance_sequence: int
    device_id: str
    statement: bytes | None
    signature: bytes | None
    statement_digest: str
    origin: str
    location: str


def updates_of_version(
    session: Session, training_session_id: str, version: int, after: int, limit: int
) -> Sequence[UpdateOfVersion]:
    """Return the updates in a version, in the order of their acceptance, from after a sequence number."""
    query = (
        select(
            UPDATES.c.id,
            UPDATES.c.acceptance_sequence,
            UPDATES.c.device_id,
            UPDATES.c.statement,
            UPDATES.c.signature,
            UPDATES.c.statement_digest,
            UPDATES.c.origin,
            PAYLOADS.c.location,
        )
        .join(PAYLOADS, PAYLOADS.c.id == UPDATES.c.payload_id)
        .join(ROUNDS, ROUND_OF)
        .where(in_version(training_session_id, version), UPDATES.c.acceptance_sequence > after)
        .order_by(UPDATES.c.acceptance_sequence)
        .limit(limit)
    )
    return [UpdateOfVersion._make(row) for row in session.execute(query)]


def keys_of(session: Session, device_ids: Collection[str]) -> Sequence[DeviceKey]:
    """Return all keys of devices, current and retired, by device and sequence."""
    query = _KEYS.select.where(KEYS.c.device_id.in_(sorted(device_ids)))
    return _KEYS.all(session, query.order_by(KEYS.c.device_id, KEYS.c.sequence))


def find_event(session: Session, event_type: str, subject: str) -> AuditLog | None:
    """Return the first audit entry of a type about a subject."""
    return _ENTRIES.one(session, _ENTRY, {"about": subject, "kind": event_type})


def session_ids(session: Session, after: str, limit: int) -> Sequence[str]:
    """Return ids of training sessions after an id, in order."""
    query = select(SESSIONS.c.id).where(SESSIONS.c.id > after).order_by(SESSIONS.c.id).limit(limit)
    return session.scalars(query).all()


def models_after(
    session: Session, training_session_id: str, version: int, limit: int
) -> Sequence[GlobalModel]:
    """Return versions of a training session after a version, in order."""
    query = (
        _MODELS.select.where(
            MODELS.c.training_session_id == training_session_id, MODELS.c.version > version
        )
        .order_by(MODELS.c.version)
        .limit(limit)
    )
    return _MODELS.all(session, query)


def downloads_after(session: Session, after: tuple[str, int], limit: int) -> Sequence[GlobalModel]:
    """Return, in order, the versions of all training sessions that have a smaller download encoding.

    Args:
        session: Open session.
        after: Training session and version of the last version read before.
        limit: Most versions to return.
    """
    key = tuple_(MODELS.c.training_session_id, MODELS.c.version)
    query = (
        _MODELS.select.where(MODELS.c.download_encoding.is_not(None), key > after)
        .order_by(MODELS.c.training_session_id, MODELS.c.version)
        .limit(limit)
    )
    return _MODELS.all(session, query)


def updates_after(session: Session, after: str, limit: int) -> Sequence[ModelUpdate]:
    """Return updates of all training sessions after an id, by id."""
    query = EVERY_UPDATE.where(UPDATES.c.id > after).order_by(UPDATES.c.id).limit(limit)
    return UPDATE_ROWS.all(session, query)


def keys_after(session: Session, after: str, limit: int) -> Sequence[DeviceKey]:
    """Return device keys after an id, by id."""
    query = _KEYS.select.where(KEYS.c.key_id > after).order_by(KEYS.c.key_id).limit(limit)
    return _KEYS.all(session, query)


def payloads_after(session: Session, after: str, limit: int) -> Sequence[Payload]:
    """Return payload rows after an id, by id, without their bytes."""
    query = _PAYLOADS.select.where(PAYLOADS.c.id > after).order_by(PAYLOADS.c.id).limit(limit)
    return _PAYLOADS.all(session, query)


class LoggedUpdate(NamedTuple):
    """Columns of an update that the audit log records too."""

    id: str
    training_session_id: str
    round_number: int
    acceptance_sequence: int
    statement_digest: str
    has_statement: bool


def accepted_updates(session: Session, update_ids: Collection[str]) -> dict[str, LoggedUpdate]:
    """Return, by id, the columns of updates that the audit log records too; unknown ids are left out."""
    query = select(
        UPDATES.c.id,
        UPDATES.c.training_session_id,
        UPDATES.c.round_number,
        UPDATES.c.acceptance_sequence,
        UPDATES.c.statement_digest,
        UPDATES.c.statement.is_not(None),
    ).where(UPDATES.c.id.in_(sorted(update_ids)))
    return {row.id: LoggedUpdate._make(row) for row in session.execute(query)}


def known_digests(session: Session, digests: Collection[str]) -> set[str]:
    """Return which digests are digests of versions."""
    query = select(MODELS.c.digest).where(MODELS.c.digest.in_(sorted(digests)))
    return set(session.scalars(query))


def devices_after(session: Session, after: str, limit: int) -> Sequence[Device]:
    """Return devices after an id, by id."""
    query = _DEVICES.select.where(DEVICES.c.id > after).order_by(DEVICES.c.id).limit(limit)
    return _DEVICES.all(session, query)


def stored_config(session: Session, training_session_id: str) -> Mapping[str, Any] | None:
    """Return the stored configuration of a training session, unvalidated; None without a session."""
    query = select(SESSIONS.c.config).where(SESSIONS.c.id == training_session_id)
    return session.execute(query).scalar_one_or_none()


def latest_version(session: Session, training_session_id: str) -> int:
    """Return a training session's current version number; -1 if there is no such session."""
    query = select(SESSIONS.c.current_version).where(SESSIONS.c.id == training_session_id)
    found = session.execute(query).scalar_one_or_none()
    return -1 if found is None else found


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
    query = _EVALUATIONS.select.where(tuple_(*columns) > after).order_by(*columns)
    return _EVALUATIONS.all(session, query.limit(limit))


def known_evaluations(session: Session, digests: Collection[str]) -> set[str]:
    """Return which digests are statement digests of evaluations."""
    query = select(EVALUATIONS.c.statement_digest)
    found = session.scalars(query.where(EVALUATIONS.c.statement_digest.in_(sorted(digests))))
    return {digest for digest in found if digest is not None}


def last_events(
    session: Session, event_types: Collection[str], subjects: Collection[str]
) -> dict[tuple[str, str], AuditLog]:
    """Return the last entry of each type about each subject, by type and subject."""
    query = _ENTRIES.select.where(
        AUDIT.c.event_type.in_(sorted(event_types)), AUDIT.c.subject.in_(sorted(subjects))
    ).order_by(AUDIT.c.id)
    return {(row.event_type, row.subject): row for row in _ENTRIES.all(session, query)}
