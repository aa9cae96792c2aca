"""Tables of the results of rounds: updates, versions, evaluations."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.states import UpdateOrigin, UpdateState
from qflare_server.storage.tables.types import Base, one_of

EVIDENCE_REASON: Final = "evidence: "
"""Prefix of `state_reason` of an update whose rows differ from what its device signed."""

LEFT_OUT_REASON: Final = "left out: "
"""Prefix of `state_reason` of an update that passed all screens but to which the strategy gave no weight."""


class ModelUpdate(Base):
    """One device's contribution to one round.

    `statement` is the exact bytes that the device signed, `signature` its signature; null for updates of embedding
    programs, whose `origin` says so. `acceptance_sequence` counts from 1 within the round; updates are folded in this
    order.

    The row of an update is written again only if the update is rejected, with `state` and the time in `aggregated_at`.
    Every other update is in the version of its round once the round has one (`repository.updates`).
    """

    __tablename__ = "model_updates"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    training_session_id: Mapped[str] = mapped_column(String(36))
    round_number: Mapped[int]
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    base_version: Mapped[int]
    payload_id: Mapped[str] = mapped_column(ForeignKey("payloads.id"))
    payload_digest: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    statement: Mapped[bytes | None]
    statement_digest: Mapped[str] = mapped_column(String(64))
    signature: Mapped[bytes | None]
    key_id: Mapped[str | None] = mapped_column(String(64))
    origin: Mapped[str] = mapped_column(String(16), default=UpdateOrigin.DEVICE.value)
    example_count: Mapped[int] = mapped_column(BigInteger)
    loss: Mapped[float | None]
    accuracy: Mapped[float | None]
    local_epochs: Mapped[int | None]
    training_time_s: Mapped[float | None]
    metrics: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    state_reason: Mapped[str] = mapped_column(String(500), default="")
    acceptance_sequence: Mapped[int] = mapped_column(BigInteger)
    validation_score: Mapped[float | None]
    accepted_at: Mapped[datetime]
    aggregated_at: Mapped[datetime | None]

    __table_args__ = (
        one_of("state", UpdateState),
        one_of("origin", UpdateOrigin),
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        CheckConstraint("example_count > 0", name="example_count"),
        UniqueConstraint(
            "training_session_id",
            "round_number",
            "acceptance_sequence",
            name="uq_model_updates_sequence",
        ),
        UniqueConstraint(
            "training_session_id",
            "round_number",
            "device_id",
            "base_version",
            name="uq_model_updates_contribution",
        ),
        Index(None, "device_id", "accepted_at"),
        Index(None, "payload_id"),
    )


class GlobalModel(Base):
    """One immutable version of a training session's model.

    `digest` identifies the version: the SHA-256 of `statement`, which `signature` signs. `strategy_state` maps the
    names of the optimizer's vectors to payload ids. The `download_` columns describe the payload that devices download,
    null if it is the version's own. `in_process_count` is null in versions made before the column existed.
    """

    __tablename__ = "global_models"

    training_session_id: Mapped[str] = mapped_column(
        ForeignKey("training_sessions.id"), primary_key=True
    )
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(64))
    parent_digest: Mapped[str] = mapped_column(String(64), default="")
    payload_id: Mapped[str] = mapped_column(ForeignKey("payloads.id"))
    payload_digest: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[bytes]
    layout_digest: Mapped[str] = mapped_column(String(64))
    statement: Mapped[bytes]
    signature: Mapped[bytes]
    model_type: Mapped[str] = mapped_column(String(100))
    architecture: Mapped[dict[str, Any]]
    base_version: Mapped[int]
    round_number: Mapped[int]
    participant_count: Mapped[int] = mapped_column(default=0)
    in_process_count: Mapped[int | None]
    example_count: Mapped[int] = mapped_column(BigInteger, default=0)
    aggregation_method: Mapped[str] = mapped_column(String(100))
    aggregation_parameters: Mapped[dict[str, Any]]
    strategy_state: Mapped[dict[str, Any]]
    contributors_digest: Mapped[str] = mapped_column(String(64), default="")
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    metrics: Mapped[dict[str, Any]]
    group_metrics: Mapped[dict[str, Any]]
    epsilon: Mapped[float | None]
    delta: Mapped[float | None]
    released: Mapped[bool] = mapped_column(default=False)
    rollback_version: Mapped[int | None]
    download_encoding: Mapped[int | None]
    download_payload_id: Mapped[str | None] = mapped_column(ForeignKey("payloads.id"))
    download_payload_digest: Mapped[str | None] = mapped_column(String(64))
    download_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    publish_duration_s: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[datetime]

    __table_args__ = (
        CheckConstraint("version >= 0", name="version"),
        UniqueConstraint("digest"),
        Index(None, "payload_id"),
        Index(None, "created_at"),
    )


class Unmasking(Base):
    """Answer of one helper for one round with secure aggregation.

    `answer` is the signed envelope, `payload_id` the sum of the masks, `position` the helper's place in the task.
    `refused` maps the ids of updates that the helper could not use to reasons. Rows are written with the version.
    """

    __tablename__ = "unmaskings"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    helper_id: Mapped[str] = mapped_column(String(64))
    counter: Mapped[int] = mapped_column(BigInteger)
    answer: Mapped[bytes]
    payload_id: Mapped[str] = mapped_column(ForeignKey("payloads.id"))
    refused: Mapped[dict[str, Any]]

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
        ),
        CheckConstraint("counter > 0", name="counter"),
        UniqueConstraint("helper_id", "counter"),
        Index(None, "payload_id"),
    )


class Evaluation(Base):
    """Metrics of one version, measured by one device on its held-out data.

    `statement` is the exact bytes that the device signed, `signature` its signature, `weight` the number of examples
    that the report counts as. All are null in rows from before evaluations were signed; such rows are ignored.
    """

    __tablename__ = "evaluations"

    training_session_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    example_count: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]]
    device_group: Mapped[str] = mapped_column(String(100), default="")
    reported_at: Mapped[datetime]
    statement: Mapped[bytes | None]
    statement_digest: Mapped[str | None] = mapped_column(String(64))
    signature: Mapped[bytes | None]
    key_id: Mapped[str | None] = mapped_column(String(64))
    weight: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        ForeignKeyConstraint(
            ["training_session_id", "version"],
            ["global_models.training_session_id", "global_models.version"],
        ),
        CheckConstraint("example_count > 0", name="example_count"),
        UniqueConstraint("statement_digest"),
    )
