"""Tables of devices, their keys, and the credentials of devices and administrators."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.states import DeviceState, TokenKind
from qflare_server.storage.tables.types import Base, one_of


class Device(Base):
    """One enrolled device.

    `name` is for people: from the label of its enrollment token, or chosen by an administrator.
    The public keys are null for devices that an embedding program registered without keys. Selection uses `device_type`
    and `capabilities`, stated at enrollment or confirmed by an administrator at `confirmed_at`. `reported_type` and
    `reported_capabilities` come from heartbeats; null before the first.
    """

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    state_reason: Mapped[str] = mapped_column(String(500), default="")
    device_type: Mapped[str] = mapped_column(String(100), default="")
    hardware_info: Mapped[dict[str, Any]]
    network_info: Mapped[dict[str, Any]]
    capabilities: Mapped[dict[str, Any]]
    confirmed_at: Mapped[datetime | None]
    reported_type: Mapped[str | None] = mapped_column(String(100))
    reported_capabilities: Mapped[dict[str, Any] | None]
    local_epochs: Mapped[int] = mapped_column(default=1)
    batch_size: Mapped[int] = mapped_column(default=32)
    learning_rate: Mapped[float] = mapped_column(default=0.01)
    signature_algorithm: Mapped[int | None]
    signature_public_key: Mapped[bytes | None]
    signature_key_id: Mapped[str | None] = mapped_column(String(64))
    kem_public_key: Mapped[bytes | None]
    kem_key_id: Mapped[str | None] = mapped_column(String(64))
    key_rotation_count: Mapped[int] = mapped_column(default=0)
    registered_at: Mapped[datetime]
    last_seen_at: Mapped[datetime | None]

    __table_args__ = (
        one_of("state", DeviceState),
        UniqueConstraint("name"),
        UniqueConstraint("signature_key_id"),
        Index(None, "state", "last_seen_at"),
        Index(None, "state", "id"),
        Index(None, "device_type", "id"),
        Index(None, "device_type", "state", "id"),
        Index(None, "last_seen_at"),
        Index(None, "registered_at", "id"),
    )


class DeviceGroup(Base):
    """A group that a device is in."""

    __tablename__ = "device_groups"

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    group_name: Mapped[str] = mapped_column(String(63), primary_key=True)

    __table_args__ = (Index(None, "group_name", "device_id"),)


class DeviceKey(Base):
    """A signature key of a device; retired keys are kept, because old signatures remain evidence.

    `statement` is the signed receipt or rotation that introduced the key. Null only for keys that an embedding program
    set without a receipt; they prove nothing until an administrator confirms them.
    """

    __tablename__ = "device_keys"

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    sequence: Mapped[int]
    algorithm: Mapped[int]
    public_key: Mapped[bytes]
    kem_public_key: Mapped[bytes | None]
    statement: Mapped[bytes | None]
    created_at: Mapped[datetime]
    retired_at: Mapped[datetime | None]
    retired_reason: Mapped[str] = mapped_column(String(100), default="")

    __table_args__ = (UniqueConstraint("device_id", "sequence"),)


class UserToken(Base):
    """A credential, stored as the SHA-256 of its secret.

    `subject` is a device id, the name of an administrator, or the label of an enrollment token, which puts a device
    into `device_groups` (null for none). `family_id` links refresh tokens that replace each other. `binding_key`
    verifies proofs of possession on calls and refreshes.
    """

    __tablename__ = "user_tokens"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    token_hash: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(255))
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id"))
    family_id: Mapped[str | None] = mapped_column(String(32))
    roles: Mapped[list[str]]
    device_groups: Mapped[list[str] | None]
    binding_key: Mapped[bytes | None]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str] = mapped_column(String(200), default="")

    __table_args__ = (
        one_of("kind", TokenKind),
        UniqueConstraint("token_hash"),
        Index(None, "kind", "created_at", "id"),
        Index(None, "device_id", "kind"),
        Index(None, "family_id"),
        Index(None, "expires_at"),
    )
