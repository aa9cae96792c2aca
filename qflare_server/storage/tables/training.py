"""Tables of training sessions, their rounds, and the devices selected for each round."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    String,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.states import RoundState, TrainingSessionState
from qflare_server.storage.tables.types import Base, one_of

QUERY_MODEL_TYPE: Final = "qflare/analytics"
"""Value of `model_type` of queries of federated analytics, which no other training session has."""


class TrainingSession(Base):
    """A model trained over many rounds.

    `current_version` is -1 before the initial model is uploaded, `current_round` 0 before the start. `best_value` is
    the objective's metric of `best_version`, both null until one is known. `privacy_state` is the state of the privacy
    accountant; null without differential privacy.
    """

    __tablename__ = "training_sessions"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    model_type: Mapped[str] = mapped_column(String(100))
    architecture: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    state_reason: Mapped[str] = mapped_column(String(500), default="")
    config: Mapped[dict[str, Any]]
    current_round: Mapped[int] = mapped_column(default=0)
    current_version: Mapped[int] = mapped_column(default=-1)
    best_value: Mapped[float | None]
    best_version: Mapped[int | None]
    released_version: Mapped[int | None]
    epsilon_spent: Mapped[float | None]
    privacy_state: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        one_of("state", TrainingSessionState),
        CheckConstraint("current_version >= -1", name="current_version"),
        Index(None, "state", "created_at", "id"),
        Index(None, "created_at", "id"),
    )


class TrainingSessionGroup(Base):
    """A group that a training session is restricted to; a training session without groups is open to all devices."""

    __tablename__ = "training_session_groups"

    training_session_id: Mapped[str] = mapped_column(
        ForeignKey("training_sessions.id"), primary_key=True
    )
    group_name: Mapped[str] = mapped_column(String(63), primary_key=True)


class ReplacedConfig(Base):
    """A configuration that a training session had until an administrator changed the rule of its rounds.

    `last_round` is the number of the last round that was opened under it, 0 for none.
    """

    __tablename__ = "replaced_configs"

    training_session_id: Mapped[str] = mapped_column(
        ForeignKey("training_sessions.id"), primary_key=True
    )
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    config: Mapped[dict[str, Any]]
    last_round: Mapped[int]
    replaced_at: Mapped[datetime]


class Round(Base):
    """One collection of updates against one base version.

    `task` is the signed task for the selected devices; null for the training session of an embedding program. Accepting
    an update locks the round's row; `accepted_count` is also the last acceptance sequence number. `selected_count` is 0
    if every active device may take part, and -1 if no device was eligible. `pruned_at` is set when the payloads of all
    updates were pruned.
    """

    __tablename__ = "rounds"

    training_session_id: Mapped[str] = mapped_column(
        ForeignKey("training_sessions.id"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    state_reason: Mapped[str] = mapped_column(String(500), default="")
    base_version: Mapped[int]
    version: Mapped[int | None]
    quorum: Mapped[int]
    target: Mapped[int]
    selected_count: Mapped[int] = mapped_column(default=0)
    accepted_count: Mapped[int] = mapped_column(default=0)
    rejected_count: Mapped[int] = mapped_column(default=0)
    late_count: Mapped[int] = mapped_column(default=0)
    failed_count: Mapped[int] = mapped_column(default=0)
    example_count: Mapped[int] = mapped_column(BigInteger, default=0)
    nonce: Mapped[str] = mapped_column(String(64))
    task: Mapped[bytes | None]
    opened_at: Mapped[datetime]
    deadline_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    published_at: Mapped[datetime | None]
    pruned_at: Mapped[datetime | None]

    __table_args__ = (
        one_of("state", RoundState),
        Index(None, "state", "deadline_at"),
        Index(None, "published_at"),
        Index(
            "ix_rounds_unpruned",
            "training_session_id",
            "number",
            sqlite_where=text("pruned_at IS NULL"),
            postgresql_where=text("pruned_at IS NULL"),
        ),
    )


class RoundDevice(Base):
    """A device that was selected for a round."""

    __tablename__ = "round_devices"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        Index(None, "device_id", "training_session_id"),
    )


class LateUpdate(Base):
    """A device whose update for a round was refused because the round had closed; `Round.late_count` counts them."""

    __tablename__ = "late_updates"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    refused_at: Mapped[datetime]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
    )


class DeviceFailure(Base):
    """The latest failure that a device has reported of its work on a round; `Round.failed_count` counts the devices."""

    __tablename__ = "device_failures"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    text: Mapped[str] = mapped_column(String(200))
    report_count: Mapped[int]
    reported_at: Mapped[datetime]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
    )
