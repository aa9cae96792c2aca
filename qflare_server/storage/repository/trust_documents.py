"""Statements on trust documents: signed root documents and keysets, all public."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from qflare_server.storage import tables

DOCUMENTS = tables.TrustDocument.__table__
ROOT: Final = "root"
KEYSET: Final = "keyset"


@dataclass(frozen=True)
class StoredTrust:
    """Serialized envelopes: all root documents by ascending version, and the newest keyset."""

    roots: tuple[bytes, ...]
    keyset: bytes | None


def load(session: Session) -> StoredTrust:
    """Return all root documents and the newest keyset."""
    query = select(DOCUMENTS.c.envelope).where(DOCUMENTS.c.kind == ROOT)
    roots = session.execute(query.order_by(DOCUMENTS.c.version)).scalars().all()
    newest = (
        select(DOCUMENTS.c.envelope)
        .where(DOCUMENTS.c.kind == KEYSET)
        .order_by(DOCUMENTS.c.version.desc())
        .limit(1)
    )
    return StoredTrust(tuple(roots), session.execute(newest).scalar_one_or_none())


def newest_version(session: Session, kind: str) -> int:
    """Return the version of the newest document of a kind, 0 if there is none."""
    query = (
        select(DOCUMENTS.c.version)
        .where(DOCUMENTS.c.kind == kind)
        .order_by(DOCUMENTS.c.version.desc())
        .limit(1)
    )
    return session.execute(query).scalar_one_or_none() or 0


def find(session: Session, kind: str, version: int) -> bytes | None:
    """Return one document."""
    query = select(DOCUMENTS.c.envelope).where(
        DOCUMENTS.c.kind == kind, DOCUMENTS.c.version == version
    )
    return session.execute(query).scalar_one_or_none()


def insert_document(
    session: Session, kind: str, version: int, envelope: bytes, at: datetime
) -> None:
    """Insert a document; the primary key rejects a second one of that version."""
    session.execute(
        insert(DOCUMENTS).values(kind=kind, version=version, envelope=envelope, created_at=at)
    )
