"""Database rows as frozen values, usable outside the transaction that read them.

The fields are the columns of the table of the same name, documented in `tables`, or derived from other tables where
their record says so. Mappings must not be modified.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Executable, Select, Table, select
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2

Json = Mapping[str, Any]


class TrainingSession(NamedTuple):
    """One model being trained over many rounds, with its configuration as a message."""

    id: str
    name: str
    model_type: str
    architecture: Json
    state: str
    state_reason: str
    config: training_pb2.TrainingConfig
    """Shared by all readers: must not be modified."""
    current_round: int
    current_version: int
    best_value: float | None
    best_version: int | None
    released_version: int | None
    epsilon_spent: float | None
    privacy_state: Json | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    def __repr__(self) -> str:
        return f"TrainingSession(id={self.id!r}, state={self.state!r})"


class Round(NamedTuple):
    """One collection of updates against one base version."""

    training_session_id: str
    number: int
    state: str
    state_reason: str
    base_version: int
    version: int | None
    quorum: int
    target: int
    selected_count: int
    accepted_count: int
    rejected_count: int
    late_count: int
    failed_count: int
    example_count: int
    nonce: str
    task: bytes | None
    opened_at: datetime
    deadline_at: datetime
    closed_at: datetime | None
    published_at: datetime | None
    pruned_at: datetime | None


class GlobalModel(NamedTuple):
    """One version of a training session's model."""

    training_session_id: str
    version: int
    digest: str
    parent_digest: str
    payload_id: str
    payload_digest: str
    size_bytes: int
    manifest: bytes
    layout_digest: str
    statement: bytes
    signature: bytes
    model_type: str
    architecture: Json
    base_version: int
    round_number: int
    participant_count: int
    in_process_count: int | None
    example_count: int
    aggregation_method: str
    aggregation_parameters: Json
    strategy_state: Json
    contributors_digest: str
    accuracy: float | None
    loss: float | None
    metrics: Json
    group_metrics: Json
    epsilon: float | None
    delta: float | None
    released: bool
    rollback_version: int | None
    download_encoding: int | None
    download_payload_id: str | None
    download_payload_digest: str | None
    download_size_bytes: int | None
    publish_duration_s: float
    created_at: datetime


@dataclass(frozen=True)
class Replacement:
    """A signature, in its serialized envelope, that takes the place of an earlier one of a round or a version."""

    training_session_id: str
    number: int
    earlier: bytes
    renewed: bytes


class ModelUpdate(NamedTuple):
    """One device's contribution to one round.

    `state`, `aggregated_version` and `aggregated_at` follow from the row of its round (`repository.updates`).
    """

    id: str
    training_session_id: str
    round_number: int
    device_id: str
    base_version: int
    payload_id: str
    payload_digest: str
    size_bytes: int
    statement: bytes | None
    statement_digest: str
    signature: bytes | None
    key_id: str | None
    origin: str
    example_count: int
    loss: float | None
    accuracy: float | None
    local_epochs: int | None
    training_time_s: float | None
    metrics: Json
    state: str
    state_reason: str
    acceptance_sequence: int
    validation_score: float | None
    aggregated_version: int | None
    accepted_at: datetime
    aggregated_at: datetime | None


class Evaluation(NamedTuple):
    """One device's metrics of one version."""

    training_session_id: str
    version: int
    device_id: str
    example_count: int
    metrics: Json
    device_group: str
    reported_at: datetime
    statement: bytes | None
    statement_digest: str | None
    signature: bytes | None
    key_id: str | None
    weight: int | None


class Device(NamedTuple):
    """One enrolled participant."""

    id: str
    name: str
    state: str
    state_reason: str
    device_type: str
    hardware_info: Json
    network_info: Json
    capabilities: Json
    local_epochs: int
    batch_size: int
    learning_rate: float
    signature_algorithm: int | None
    signature_public_key: bytes | None
    signature_key_id: str | None
    kem_public_key: bytes | None
    kem_key_id: str | None
    key_rotation_count: int
    registered_at: datetime
    last_seen_at: datetime | None
    confirmed_at: datetime | None
    reported_type: str | None
    reported_capabilities: Json | None


class DeviceKey(NamedTuple):
    """A signature key that a device has or has had."""

    key_id: str
    device_id: str
    sequence: int
    algorithm: int
    public_key: bytes
    kem_public_key: bytes | None
    statement: bytes | None
    created_at: datetime
    retired_at: datetime | None
    retired_reason: str


class UserToken(NamedTuple):
    """A credential; its secret is not stored."""

    id: str
    token_hash: str
    kind: str
    subject: str
    device_id: str | None
    device_groups: Sequence[str] | None
    family_id: str | None
    roles: Sequence[str]
    binding_key: bytes | None
    created_at: datetime
    expires_at: datetime | None
    used_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str

    def __repr__(self) -> str:
        return f"UserToken(id={self.id!r}, kind={self.kind!r})"


class Payload(NamedTuple):
    """Payload of a model, an update or an optimizer's state; bytes stored in the row are left out."""

    id: str
    size_bytes: int
    digest: str
    chunk_digests: bytes
    location: str
    store: str | None
    chunks_id: str | None
    sealed_header: bytes | None
    sealed_key: bytes | None
    content_digests: bytes | None
    created_at: datetime
    pruned_at: datetime | None

    def __repr__(self) -> str:
        return f"Payload(id={self.id!r}, location={self.location!r})"


class AuditLog(NamedTuple):
    """One entry of the audit log."""

    id: int
    leaf_index: int | None
    leaf_hash: bytes | None
    event_type: str
    actor: str
    subject: str
    peer_address: str
    authentication_method: str
    risk_level: str
    details: Json
    salt: bytes
    created_at: datetime


class AuditHead(NamedTuple):
    """A signed tree head of the audit tree."""

    size: int
    root: bytes
    statement: bytes
    signature: bytes
    created_at: datetime


class Replica(NamedTuple):
    """A running coordinator process on this database."""

    id: str
    address: str
    version: str
    payload_store: str
    started_at: datetime
    seen_at: datetime


R = TypeVar("R", bound=NamedTuple)


class Rows(Generic[R]):
    """Reads whole rows of a table as frozen values.

    Args:
        record: Its fields are names of columns.
        table: Where the rows are.
        derived: Expressions by the names of fields that are not the table's columns; the caller joins what they need.

    Attributes:
        columns: One for each field of the record.
        select: Selects every row; callers add conditions and order.
    """

    def __init__(
        self,
        record: type[R],
        table: Table,
        derived: Mapping[str, ColumnElement[Any]] = MappingProxyType({}),
    ) -> None:
        self._record = record
        self.columns: Final = [
            derived[name].label(name) if name in derived else table.c[name]
            for name in record._fields
        ]
        self.select: Final[Select[Any]] = select(*self.columns)

    def all(
        self, session: Session, query: Executable, parameters: Mapping[str, Any] | None = None
    ) -> list[R]:
        """Return the rows of a query derived from `select`."""
        return [self._record._make(row) for row in session.connection().execute(query, parameters)]

    def one(
        self, session: Session, query: Executable, parameters: Mapping[str, Any] | None = None
    ) -> R | None:
        """Return the only row of such a query, None if there is none."""
        row = session.connection().execute(query, parameters).one_or_none()
        return None if row is None else self._record._make(row)

    def from_values(self, values: Sequence[Any]) -> R:
        """Return a record built from the values of `columns`."""
        return self._record._make(values)
