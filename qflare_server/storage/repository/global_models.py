"""Statements on versions of global models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import Select, and_, bindparam, select, tuple_, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from qflare_server.storage import tables
from qflare_server.storage.paging import Order, Page, PageRequest, read_page
from qflare_server.storage.prepared import PreparedInsert
from qflare_server.storage.records import GlobalModel, Payload, Replacement, Rows, TrainingSession

MAX_STATEMENTS_BYTES: Final = 2**20
"""Most bytes of the statements in one message; leaves room for the manifest in a header."""

MODELS = tables.GlobalModel.__table__
SESSIONS = tables.TrainingSession.__table__
PAYLOADS = tables.Payload.__table__
_MODELS = Rows(GlobalModel, MODELS)
_PAYLOADS = Rows(Payload, PAYLOADS)
_MODEL = _MODELS.select.where(
    MODELS.c.training_session_id == bindparam("session"), MODELS.c.version == bindparam("number")
)
_DIGEST = select(MODELS.c.digest).where(
    MODELS.c.training_session_id == bindparam("session"), MODELS.c.version == bindparam("number")
)

_ARCHITECTURE = select(MODELS.c.architecture).where(
    MODELS.c.training_session_id == bindparam("session"), MODELS.c.version == bindparam("number")
)

_INSERT_MODEL = PreparedInsert(MODELS, MODELS.c.keys())


def insert_model(session: Session, values: Mapping[str, Any]) -> None:
    """Insert a version; the primary key rejects a second one of the same number."""
    _INSERT_MODEL.run(session, [values])


def get_model(session: Session, training_session_id: str, version: int) -> GlobalModel | None:
    """Return a version."""
    return _MODELS.one(session, _MODEL, {"session": training_session_id, "number": version})


def digest_of(session: Session, training_session_id: str, version: int) -> str | None:
    """Return the digest of a version, None if there is no such version."""
    wanted = {"session": training_session_id, "number": version}
    return session.connection().execute(_DIGEST, wanted).scalar_one_or_none()


def architecture_of(
    session: Session, training_session_id: str, version: int
) -> dict[str, str] | None:
    """Return the description of a version, None if there is no such version."""
    wanted = {"session": training_session_id, "number": version}
    return session.connection().execute(_ARCHITECTURE, wanted).scalar_one_or_none()


def _served(version: ColumnElement[Any], payload_id: ColumnElement[Any]) -> Select[Any]:
    wanted = and_(MODELS.c.training_session_id == SESSIONS.c.id, MODELS.c.version == version)
    return (
        select(version.label("wanted"), *_MODELS.columns, *_PAYLOADS.columns)
        .select_from(
            SESSIONS.outerjoin(MODELS, wanted).outerjoin(PAYLOADS, PAYLOADS.c.id == payload_id)
        )
        .where(SESSIONS.c.id == bindparam("session"))
    )


_WANTED: Final[Mapping[str, ColumnElement[Any]]] = {
    "given": bindparam("version", type_=MODELS.c.version.type),
    "current": SESSIONS.c.current_version,
    "released": SESSIONS.c.released_version,
}
_SERVED: Final = {
    (name, encoded): _served(
        version, MODELS.c.download_payload_id if encoded else MODELS.c.payload_id
    )
    for name, version in _WANTED.items()
    for encoded in (False, True)
}


def find_served(
    session: Session,
    training_session_id: str,
    version: int | None,
    *,
    released: bool = False,
    encoded: bool = False,
) -> tuple[int | None, GlobalModel | None, Payload | None] | None:
    """Return a version's number, its row and its payload, in one query; None without the training session.

    Each of the three is None where it does not exist.

    Args:
        session: Open session.
        training_session_id: Training session.
        version: Version; None means the latest.
        released: With `version` None: the latest released version instead.
        encoded: Return the payload that devices download, if it differs from the version's own.
    """
    kind = "given" if version is not None else "released" if released else "current"
    wanted: dict[str, Any] = {"session": training_session_id}
    if version is not None:
        wanted["version"] = version
    row = session.connection().execute(_SERVED[kind, encoded], wanted).one_or_none()
    if row is None:
        return None
    wanted_version, *values = row
    model, payload = values[: len(_MODELS.columns)], values[len(_MODELS.columns) :]
    return (
        wanted_version,
        None if model[0] is None else _MODELS.from_values(model),
        None if payload[0] is None else _PAYLOADS.from_values(payload),
    )


def update_model(
    session: Session, training_session_id: str, version: int, values: Mapping[str, Any]
) -> None:
    """Update the columns of a version that evaluation and release change; all others are immutable."""
    session.execute(
        update(MODELS)
        .where(MODELS.c.training_session_id == training_session_id, MODELS.c.version == version)
        .values(**values)
    )


def private_versions(session: Session, training_session_id: str) -> dict[str, int]:
    """Return the numbers of the versions made by rounds with differential privacy, by digest."""
    query = select(MODELS.c.digest, MODELS.c.version).where(
        MODELS.c.training_session_id == training_session_id,
        MODELS.c.epsilon.is_not(None),
        MODELS.c.round_number > 0,
    )
    return {row[0]: row[1] for row in session.execute(query)}


def find_rollback(
    session: Session, training_session_id: str, after_version: int, last_version: int
) -> int | None:
    """Return a version made by a rollback, above `after_version` up to `last_version`; None without one."""
    query = select(MODELS.c.version).where(
        MODELS.c.training_session_id == training_session_id,
        MODELS.c.version > after_version,
        MODELS.c.version <= last_version,
        MODELS.c.rollback_version.is_not(None),
    )
    return session.execute(query.limit(1)).scalar_one_or_none()


def release(session: Session, training_session: TrainingSession, version: int) -> None:
    """Mark a version as released; the training session's released version never decreases."""
    update_model(session, training_session.id, version, {"released": True})
    if training_session.released_version is None or version > training_session.released_version:
        session.execute(
            update(SESSIONS)
            .where(SESSIONS.c.id == training_session.id)
            .values(released_version=version)
        )


def list_models(
    session: Session, training_session_id: str, request: PageRequest
) -> Page[GlobalModel]:
    """Return the versions of a training session, newest first."""
    query = _MODELS.select.where(MODELS.c.training_session_id == training_session_id).order_by(
        MODELS.c.version.desc()
    )
    order = Order[GlobalModel](
        (int,), lambda row: [row.version], lambda key: MODELS.c.version < key[0], probe_rows=8
    )
    return read_page(
        partial(_MODELS.all, session), query, request, order, "models", training_session_id
    )


def statements(
    session: Session,
    training_session_id: str,
    first: int,
    last: int,
    limit: int,
    most_bytes: int | None = None,
) -> Sequence[tuple[bytes, bytes]]:
    """Return statements and signatures of consecutive versions, in ascending order.

    Returns at least one, up to `limit` and `most_bytes`; None means `MAX_STATEMENTS_BYTES`.
    """
    query = (
        select(MODELS.c.statement, MODELS.c.signature)
        .where(
            MODELS.c.training_session_id == training_session_id,
            MODELS.c.version >= first,
            MODELS.c.version <= last,
        )
        .order_by(MODELS.c.version)
        .limit(limit)
    )
    rows = [(row[0], row[1]) for row in session.execute(query)]
    sizes = accumulate(len(statement) + len(signature) for statement, signature in rows)
    room = MAX_STATEMENTS_BYTES if most_bytes is None else most_bytes
    count = sum(size <= room for size in sizes)
    return rows[: max(1, count)]


@dataclass(frozen=True)
class StoredSignature:
    """A version's statement, and the serialized envelope with its signature."""

    training_session_id: str
    version: int
    statement: bytes
    signature: bytes


def signatures_after(
    session: Session, after: tuple[str, int], limit: int
) -> Sequence[StoredSignature]:
    """Return the signed statements of all training sessions, in order.

    Args:
        session: Open session.
        after: Training session and version of the last statement read before.
        limit: Most statements to return.
    """
    columns = MODELS.c.training_session_id, MODELS.c.version
    query = (
        select(*columns, MODELS.c.statement, MODELS.c.signature)
        .where(tuple_(*columns) > after)
        .order_by(*columns)
        .limit(limit)
    )
    return [StoredSignature(*row) for row in session.execute(query)]


def replace_signature(session: Session, version: Replacement) -> None:
    """Replace the signature of a version's statement."""
    session.execute(
        update(MODELS)
        .where(
            MODELS.c.training_session_id == version.training_session_id,
            MODELS.c.version == version.number,
            MODELS.c.signature == version.earlier,
        )
        .values(signature=version.renewed)
    )
