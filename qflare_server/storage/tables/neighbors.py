"""Tables of secure aggregation with neighbors: groups of a round, and their members."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.types import Base, one_of


class GroupStage(StrEnum):
    """What a group waits for."""

    SHARE = "share"
    TRAIN = "train"
    CONFIRM = "confirm"
    REVEAL = "reveal"
    OPENED = "opened"
    ABORTED = "aborted"


class NeighborGroup(Base):
    """A group of a round; its rows are written when the roster is fixed, and from then on its members never change.

    `sharers_digest` is null until the members that sent shares are fixed, `survivors_digest` until the updates are.
    """

    __tablename__ = "neighbor_groups"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[str] = mapped_column(String(16))
    stage_reason: Mapped[str] = mapped_column(String(500), default="")
    roster_digest: Mapped[str] = mapped_column(String(64))
    sharers_digest: Mapped[str | None] = mapped_column(String(64))
    survivors_digest: Mapped[str | None] = mapped_column(String(64))
    deadline_at: Mapped[datetime]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        one_of("stage", GroupStage),
        CheckConstraint("number > 0", name="number"),
    )


class NeighborMember(Base):
    """What a device has contributed to the steps of a round.

    `group_number` is null until the roster is fixed. `advertisement`, `confirmation` and `reveal` are signed envelopes,
    `shares` is a SharedSecrets message, and `shares_digest` that of its signed part. `is_sharer` and `update_digest`
    are set when these sets are fixed. After the round, what was sent is deleted; of a member of a group in a version,
    `transcript` keeps its part, a NeighborTranscript with this member alone and the boxes that it sent.
    """

    __tablename__ = "neighbor_members"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    advertisement_digest: Mapped[str] = mapped_column(String(64))
    group_number: Mapped[int | None]
    is_sharer: Mapped[bool] = mapped_column(default=False)
    update_digest: Mapped[str | None] = mapped_column(String(64))
    shares_digest: Mapped[str | None] = mapped_column(String(64))
    advertisement: Mapped[bytes | None]
    shares: Mapped[bytes | None]
    confirmation: Mapped[bytes | None]
    reveal: Mapped[bytes | None]
    transcript: Mapped[bytes | None]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        UniqueConstraint("advertisement_digest"),
        Index(None, "device_id"),
    )
