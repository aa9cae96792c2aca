"""What coordinators on one database tell each other."""

from datetime import datetime

from sqlalchemy import BigInteger, Index, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.types import Base


class Lease(Base):
    """Who does a piece of work until when, so that several coordinators do not do it twice in vain."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime]


class Replica(Base):
    """A coordinator process that serves on this database."""

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    address: Mapped[str] = mapped_column(String(255))
    version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class Epoch(Base):
    """One row that counts changes which every call must notice at once.

    `security` counts changes of who may call, `rounds` changes that may give a device something to do: what a
    coordinator remembers of either is good for as long as the count stands.
    """

    __tablename__ = "epochs"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    security: Mapped[int] = mapped_column(BigInteger, default=0)
    rounds: Mapped[int] = mapped_column(BigInteger, default=0)


class IdempotentCall(Base):
    """The answer to a call that carried a request id, given again to the same call."""

    __tablename__ = "idempotent_calls"

    request_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    method: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    response: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]

    __table_args__ = (Index(None, "created_at"),)


class UsedNonce(Base):
    """A value that may be used once, such as a finished handshake; deleted after it has expired."""

    __tablename__ = "used_nonces"

    nonce: Mapped[str] = mapped_column(Text, primary_key=True)
    expires_at: Mapped[datetime]

    __table_args__ = (Index(None, "expires_at"),)
