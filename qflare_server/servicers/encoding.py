"""From rows to messages and back: no rule, no SQL, no error handling."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.v1 import (
    admin_service_pb2,
    coordinator_service_pb2,
    device_pb2,
    security_pb2,
    tensor_pb2,
    training_pb2,
)
from qflare_server.storage.repository.updates import Accepted
from qflare_server.storage.tables import (
    AuditLog,
    Device,
    GlobalModel,
    ModelUpdate,
    Round,
    TrainingSession,
    UserToken,
)
from qflare_server.training.config import of_session
from qflare_server.use_cases.access.tokens import Issued
from qflare_server.use_cases.versions.download import Delivery

Message = TypeVar("Message")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
SECONDS_OF_DAY: Final = 86_400


def timestamp(at: datetime | None) -> Timestamp | None:
    """Return a time, None for none."""
    if at is None:
        return None
    since = (
        at - EPOCH
    )  # Timestamp.FromDatetime takes three times as long, and lists are full of times
    return Timestamp(
        seconds=since.days * SECONDS_OF_DAY + since.seconds, nanos=since.microseconds * 1000
    )


def moment(message: Any, field: str) -> datetime | None:
    """Return the time in a field, None if it is absent."""
    if not message.HasField(field):
        return None
    found: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return found


def duration(seconds: float | None) -> Duration | None:
    """Return a duration, None for none."""
    if seconds is None:
        return None
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds(message: Any, field: str) -> float | None:
    """Return the seconds of a duration field, None if it is absent."""
    if not message.HasField(field):
        return None
    return float(getattr(message, field).ToNanoseconds() / 1e9)


def state_name(prefix: str, number: int, names: Any) -> str:
    """Return the stored word of an enum value: FOO_STATE_OPEN becomes open, the unspecified one empty."""
    word = names.Name(number).removeprefix(prefix).lower()
    return "" if word == "unspecified" else str(word)


def device(row: Device) -> device_pb2.Device:
    """Encode a device."""
    message = device_pb2.Device(
        device_id=row.id,
        state=device_state(row.state),
        state_reason=row.state_reason,
        signature_key_id=row.signature_key_id or "",
        kem_key_id=row.kem_key_id or "",
        key_rotation_count=row.key_rotation_count,
        register_time=timestamp(row.registered_at),
        last_seen_time=timestamp(row.last_seen_at),
    )
    profile = (
        message.profile
    )  # filled in place: a message handed to a constructor is made and then copied
    profile.device_type = row.device_type
    profile.hardware_info.update(_texts(row.hardware_info))
    profile.network_info.update(_texts(row.network_info))
    profile.capabilities.update(_numbers(row.capabilities))
    defaults = profile.training_defaults
    defaults.local_epochs = row.local_epochs
    defaults.batch_size = row.batch_size
    defaults.learning_rate = row.learning_rate
    return message


def _texts(entries: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in entries.items()
    }


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in entries.items() if isinstance(value, (int, float))}


def training_session(row: TrainingSession) -> training_pb2.TrainingSession:
    """Encode a training session."""
    return training_pb2.TrainingSession(
        training_session_id=row.id,
        name=row.name,
        model_type=row.model_type,
        state=training_pb2.TrainingSessionState.Value(
            f"TRAINING_SESSION_STATE_{row.state.upper()}"
        ),
        state_reason=row.state_reason,
        config=of_session(row.id, row.config),
        current_round=row.current_round,
        current_version=row.current_version,
        best_accuracy=row.best_accuracy,
        best_version=row.best_version,
        released_version=row.released_version,
        epsilon_spent=row.epsilon_spent,
        create_time=timestamp(row.created_at),
        start_time=timestamp(row.started_at),
        end_time=timestamp(row.ended_at),
    )


def training_round(row: Round | None) -> training_pb2.Round | None:
    """Encode a round, None for none."""
    if row is None:
        return None
    took = None
    if row.published_at is not None and row.closed_at is not None:
        took = (row.published_at - row.closed_at).total_seconds()
    return training_pb2.Round(
        training_session_id=row.training_session_id,
        round_number=row.number,
        state=training_pb2.RoundState.Value(f"ROUND_STATE_{row.state.upper()}"),
        state_reason=row.state_reason,
        base_version=row.base_version,
        version=row.version,
        selected_count=max(0, row.selected_count),
        accepted_count=row.accepted_count,
        rejected_count=row.rejected_count,
        example_count=row.example_count,
        open_time=timestamp(row.opened_at),
        deadline_time=timestamp(row.deadline_at),
        close_time=timestamp(row.closed_at),
        publish_time=timestamp(row.published_at),
        publish_duration=duration(took),
    )


def global_model(row: GlobalModel, *, with_manifest: bool = False) -> training_pb2.GlobalModel:
    """Encode a version."""
    message = training_pb2.GlobalModel(
        training_session_id=row.training_session_id,
        version=row.version,
        digest=row.digest,
        payload_digest=row.payload_digest,
        size_bytes=row.size_bytes,
        layout_digest=row.layout_digest,
        model_type=row.model_type,
        base_version=row.base_version,
        round_number=row.round_number,
        participant_count=row.participant_count,
        example_count=row.example_count,
        strategy=training_pb2.StrategyConfig(
            name=row.aggregation_method, parameters=row.aggregation_parameters
        ),
        contributors_digest=row.contributors_digest,
        metrics=_numbers(row.metrics),
        released=row.released,
        rollback_version=row.rollback_version,
        epsilon=row.epsilon,
        delta=row.delta,
        publish_duration=duration(row.publish_duration_s),
        create_time=timestamp(row.created_at),
        architecture=_texts(row.architecture),
        download=_download(row),
    )
    if with_manifest:
        message.manifest.CopyFrom(tensor_pb2.Manifest.FromString(row.manifest))
    return message


def _download(row: GlobalModel) -> training_pb2.EncodedPayload | None:
    if row.download_encoding is None:
        return None
    return training_pb2.EncodedPayload(
        encoding=training_pb2.Encoding.ValueType(row.download_encoding),
        size_bytes=row.download_size_bytes or 0,
        payload_digest=row.download_payload_digest or "",
    )


def model_update(row: ModelUpdate) -> training_pb2.ModelUpdate:
    """Encode an update."""
    return training_pb2.ModelUpdate(
        update_id=row.id,
        training_session_id=row.training_session_id,
        round_number=row.round_number,
        device_id=row.device_id,
        base_version=row.base_version,
        payload_digest=row.payload_digest,
        size_bytes=row.size_bytes,
        example_count=row.example_count,
        metrics=_numbers(row.metrics),
        state=training_pb2.UpdateState.Value(f"UPDATE_STATE_{row.state.upper()}"),
        state_reason=row.state_reason,
        acceptance_sequence=row.acceptance_sequence,
        validation_score=row.validation_score,
        accept_time=timestamp(row.accepted_at),
    )


def receipt(accepted: Accepted) -> coordinator_service_pb2.SubmitUpdateResponse:
    """Encode a receipt."""
    return coordinator_service_pb2.SubmitUpdateResponse(
        update_id=accepted.update_id,
        training_session_id=accepted.training_session_id,
        round_number=accepted.round_number,
        acceptance_sequence=accepted.acceptance_sequence,
        accept_time=timestamp(accepted.accepted_at),
    )


def envelope(payload: bytes, signature: bytes) -> security_pb2.SignedEnvelope:
    """Decode a stored envelope; the payload beside it is what the envelope holds."""
    message = security_pb2.SignedEnvelope.FromString(signature)
    message.payload = payload
    return message


def model_header(
    delivery: Delivery, sealed: security_pb2.SealedPayloadHeader | None = None
) -> coordinator_service_pb2.GlobalModelHeader:
    """Encode what comes before the bytes of a version as they are kept."""
    return coordinator_service_pb2.GlobalModelHeader(
        global_model=global_model(delivery.model, with_manifest=True),
        statement=envelope(delivery.model.statement, delivery.model.signature),
        links=[envelope(payload, signature) for payload, signature in delivery.links],
        chunk_digests=delivery.payload.chunk_digests,
        encoding=training_pb2.Encoding.ValueType(delivery.encoding),
        sealed=sealed,
    )


def opened_model_header(delivery: Delivery) -> coordinator_service_pb2.GlobalModelHeader:
    """Encode what comes before what is in a version, where the coordinator has opened it if it is sealed."""
    header = model_header(delivery)
    if delivery.payload.seal is not None:
        header.chunk_digests = delivery.payload.seal.content_digests
    return header


def in_messages(
    make: Callable[[], Message], first: Message, chunks: Iterator[tuple[int, bytes]]
) -> Iterator[Message]:
    """Yield a stream's messages: the first chunk travels with the first message.

    The fields are set in place: a chunk message handed to a constructor is copied once more.
    """
    message: Any = first
    sent = False
    for index, data in chunks:
        message.chunk.index = index
        message.chunk.data = data
        yield message
        message, sent = make(), True
    if not sent:
        yield message


def token(row: UserToken) -> admin_service_pb2.Token:
    """Encode a token without its secret."""
    return admin_service_pb2.Token(
        token_id=row.id,
        kind=admin_service_pb2.TokenKind.Value(f"TOKEN_KIND_{row.kind.upper()}"),
        subject=row.subject,
        roles=row.roles,
        create_time=timestamp(row.created_at),
        expire_time=timestamp(row.expires_at),
        use_time=timestamp(row.used_at),
        last_use_time=timestamp(row.last_used_at),
        revoke_time=timestamp(row.revoked_at),
        revoke_reason=row.revoked_reason,
    )


def issued_token(issued: Issued) -> admin_service_pb2.IssuedToken:
    """Encode a new token with its secret."""
    return admin_service_pb2.IssuedToken(token=token(issued.token), secret=issued.secret)


def audit_entry(row: AuditLog) -> admin_service_pb2.AuditEntry:
    """Encode an audit entry."""
    return admin_service_pb2.AuditEntry(
        audit_id=row.id,
        leaf_index=row.leaf_index,
        event_type=row.event_type,
        actor=row.actor,
        subject=row.subject,
        peer_address=row.peer_address,
        authentication_method=row.authentication_method,
        risk_level=admin_service_pb2.RiskLevel.Value(f"RISK_LEVEL_{row.risk_level.upper()}"),
        details=_texts(row.details),
        create_time=timestamp(row.created_at),
    )


def conditions(
    filters: Iterable[training_pb2.CapabilityFilter],
) -> tuple[tuple[str, str, float], ...]:
    """Decode conditions on capabilities."""
    return tuple(
        (
            item.capability,
            state_name("COMPARISON_", item.comparison, training_pb2.Comparison) or "at_least",
            item.value,
        )
        for item in filters
    )


def device_state(state: str) -> device_pb2.DeviceState.ValueType:
    """Encode the state of a device."""
    return device_pb2.DeviceState.Value(f"DEVICE_STATE_{state.upper()}")
