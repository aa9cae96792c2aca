"""Tables of several coordinators on one database: leases, replicas, slices, epochs, webhooks, idempotency, nonces."""

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.types import ACTOR_CHARACTERS, Base


class Lease(Base):
    """A lease: one coordinator's claim on a piece of work until a time. It avoids duplicate work."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime]


class Replica(Base):
    """A running coordinator process on this database; `payload_store` identifies where it stores new payloads."""

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    address: Mapped[str] = mapped_column(String(255))
    version: Mapped[str] = mapped_column(String(64))
    payload_store: Mapped[str] = mapped_column(String(32), default="")
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class FoldPass(Base):
    """A pass over the updates of a closed round that several coordinators do slice by slice.

    `leader` is the coordinator that makes the version; it deletes the row when it has the results. `name` is the pass
    (`strategies.types.PassName`), `format` the number of the format of `inputs`, which is JSON
    (`aggregation.pass_inputs`).
    """

    __tablename__ = "fold_passes"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    training_session_id: Mapped[str] = mapped_column(String(36))
    round_number: Mapped[int]
    leader: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(16))
    format: Mapped[int]
    inputs: Mapped[bytes]
    created_at: Mapped[datetime]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        Index(None, "training_session_id", "round_number"),
    )


class FoldSlice(Base):
    """Elements `first_element` to before `end_element` of a pass, leased to one coordinator at a time.

    `fence` counts the acquisitions of the lease. A result is recorded only by the transaction that finds the fence of
    its own acquisition, so that a coordinator that was frozen, or cut off, while its lease expired records nothing.
    `expires_at` is a time of the database server's clock; null while nobody holds the lease. `payload_id` is the result
    and null without one; `authenticator` is its MAC under a key that no database holds.
    """

    __tablename__ = "fold_slices"

    pass_id: Mapped[str] = mapped_column(ForeignKey("fold_passes.id"), primary_key=True)
    slice_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    first_element: Mapped[int] = mapped_column(BigInteger)
    end_element: Mapped[int] = mapped_column(BigInteger)
    holder: Mapped[str] = mapped_column(String(64), default="")
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    expires_at: Mapped[datetime | None]
    payload_id: Mapped[str | None] = mapped_column(ForeignKey("payloads.id"))
    authenticator: Mapped[bytes | None]


class Epoch(Base):
    """Counters of changes that invalidate what coordinators cache; a table of one row.

    `security` counts changes of credentials, `rounds` changes that may give devices a task.
    """

    __tablename__ = "epochs"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    security: Mapped[int] = mapped_column(BigInteger, default=0)
    rounds: Mapped[int] = mapped_column(BigInteger, default=0)


class WebhookCursor(Base):
    """How far a receiver of webhooks has come: `next_leaf` is the leaf index of the audit entry that it gets next.

    `endpoint` is the SHA-256 digest of its URL, which may be a credential. `attempts` counts failed attempts at that
    message, and `due_at` is the time of the following one.
    """

    __tablename__ = "webhook_cursors"

    endpoint: Mapped[str] = mapped_column(String(64), primary_key=True)
    next_leaf: Mapped[int] = mapped_column(BigInteger)
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime]


class IdempotentCall(Base):
    """The response to a call with a request id, returned again when the call is repeated.

    Written in the transaction of the change that the call made. `response` is null where it held secrets.
    """

    __tablename__ = "idempotent_calls"

    actor: Mapped[str] = mapped_column(String(ACTOR_CHARACTERS), primary_key=True)
    method: Mapped[str] = mapped_column(String(64), primary_key=True)
    request_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    response: Mapped[bytes | None]
    created_at: Mapped[datetime]

    __table_args__ = (Index(None, "created_at"),)


class UsedNonce(Base):
    """A value that may be used once, such as the nonce of a completed handshake; deleted after it has expired."""

    __tablename__ = "used_nonces"

    nonce: Mapped[str] = mapped_column(Text, primary_key=True)
    expires_at: Mapped[datetime]

    __table_args__ = (Index(None, "expires_at"),)
