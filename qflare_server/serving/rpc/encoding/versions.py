"""Encoding of global models, updates and receipts."""

from collections.abc import Mapping

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import coordinator_service_pb2, security_pb2, tensor_pb2, training_pb2
from qflare_server.serving.rpc.encoding import values
from qflare_server.serving.rpc.encoding.values import (
    _numbers,
    _texts,
    duration,
    envelope,
    timestamp,
)
from qflare_server.storage.records import GlobalModel, ModelUpdate
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.repository.views import VersionMetrics
from qflare_server.storage.tables import UpdateOrigin
from qflare_server.use_cases.versions.download import Delivery


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
        in_process_count=row.in_process_count,
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
        architecture=_texts(row.architecture) if with_manifest else None,
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


def model_update(row: ModelUpdate, names: Mapping[str, str]) -> training_pb2.ModelUpdate:
    """Encode an update, with the present name of its device."""
    return training_pb2.ModelUpdate(
        update_id=row.id,
        training_session_id=row.training_session_id,
        round_number=row.round_number,
        device_id=row.device_id,
        device_name=names.get(row.device_id, ""),
        base_version=row.base_version,
        payload_digest=row.payload_digest,
        size_bytes=row.size_bytes,
        example_count=row.example_count,
        metrics=_numbers(row.metrics),
        state=training_pb2.UpdateState.Value(f"UPDATE_STATE_{row.state.upper()}"),
        state_reason=row.state_reason,
        acceptance_sequence=row.acceptance_sequence,
        in_process=row.origin == UpdateOrigin.IN_PROCESS.value,
        validation_score=row.validation_score,
        accept_time=timestamp(row.accepted_at),
    )


def receipt(accepted: UpdateReceipt) -> coordinator_service_pb2.SubmitUpdateResponse:
    """Encode a receipt."""
    return coordinator_service_pb2.SubmitUpdateResponse(
        update_id=accepted.update_id,
        training_session_id=accepted.training_session_id,
        round_number=accepted.round_number,
        acceptance_sequence=accepted.acceptance_sequence,
        accept_time=timestamp(accepted.accepted_at),
    )


def model_header(
    delivery: Delivery, sealed: security_pb2.SealedPayloadHeader | None = None
) -> coordinator_service_pb2.GlobalModelHeader:
    """Encode the header of a version's stored bytes."""
    return coordinator_service_pb2.GlobalModelHeader(
        global_model=global_model(delivery.model, with_manifest=True),
        statement=envelope(delivery.model.statement, delivery.model.signature),
        links=[envelope(payload, signature) for payload, signature in delivery.links],
        chunk_digests=delivery.payload.chunk_digests,
        encoding=training_pb2.Encoding.ValueType(delivery.encoding),
        sealed=sealed,
    )


def opened_model_header(delivery: Delivery) -> coordinator_service_pb2.GlobalModelHeader:
    """Encode the header of a version's plaintext; the coordinator decrypts sealed versions."""
    header = model_header(delivery)
    if delivery.payload.seal is not None:
        header.chunk_digests = delivery.payload.seal.content_digests
    return header


def version_metrics(row: VersionMetrics) -> pb.VersionMetrics:
    """Encode the metrics of a version."""
    return pb.VersionMetrics(
        version=row.version,
        round_number=row.round_number,
        create_time=values.timestamp(row.created_at),
        metrics=row.metrics,
        group_metrics={
            group: pb.MetricValues(values=values) for group, values in row.group_metrics.items()
        },
        participant_count=row.participant_count,
        example_count=row.example_count,
        epsilon=row.epsilon,
        released=row.released,
    )
