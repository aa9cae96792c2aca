"""Tables of the audit log, its Merkle tree, and signed trust documents."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.states import RiskLevel
from qflare_server.storage.tables.types import ACTOR_CHARACTERS, BIG_ID, Base, one_of


class AuditLog(Base):
    """One security-relevant event, written in the same transaction as the change that it records.

    `leaf_index` is the entry's index in the Merkle tree, null until the sequencer assigns it, in batches, after the
    commit. `salt` blinds the commitment of the tree (`qflare.evidence.audit_entries`).
    """

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(BIG_ID, primary_key=True)
    leaf_index: Mapped[int | None] = mapped_column(BigInteger)
    leaf_hash: Mapped[bytes | None]
    event_type: Mapped[str] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(ACTOR_CHARACTERS))
    subject: Mapped[str] = mapped_column(String(ACTOR_CHARACTERS))
    peer_address: Mapped[str] = mapped_column(String(128), default="")
    authentication_method: Mapped[str] = mapped_column(String(32), default="")
    risk_level: Mapped[str] = mapped_column(String(8))
    details: Mapped[dict[str, Any]]
    salt: Mapped[bytes]
    created_at: Mapped[datetime]

    __table_args__ = (
        one_of("risk_level", RiskLevel),
        UniqueConstraint("leaf_index"),
        Index(
            "ix_audit_log_pending",
            "id",
            sqlite_where=text("leaf_index IS NULL"),
            postgresql_where=text("leaf_index IS NULL"),
        ),
        Index(None, "created_at", "id"),
        Index(None, "event_type", "created_at", "id"),
        Index(None, "actor", "created_at", "id"),
        Index(None, "subject", "created_at", "id"),
        Index(None, "risk_level", "created_at", "id"),
    )


class AuditNode(Base):
    """Root of one complete subtree of the audit tree; level 0 holds the leaves."""

    __tablename__ = "audit_nodes"

    level: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    node_index: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[bytes]


class AuditHead(Base):
    """A signed tree head of the audit tree."""

    __tablename__ = "audit_heads"

    size: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    root: Mapped[bytes]
    statement: Mapped[bytes]
    signature: Mapped[bytes]
    created_at: Mapped[datetime]


class TrustDocument(Base):
    """A signed root document or keyset; `kind` is `root` or `keyset`."""

    __tablename__ = "trust_documents"

    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    envelope: Mapped[bytes]
    created_at: Mapped[datetime]
