"""Encoding of the coordinator's status."""

from datetime import datetime

from qflare.v1 import admin_service_pb2 as pb
from qflare_server.serving.rpc.encoding import values
from qflare_server.storage.records import Replica
from qflare_server.storage.repository.views import Backlog
from qflare_server.use_cases.status import DatabaseHealth, Report


def coordinator_status(report: Report) -> pb.GetCoordinatorStatusResponse:
    """Encode the coordinator's status."""
    return pb.GetCoordinatorStatusResponse(
        server_time=values.timestamp(report.at),
        replicas=[_replica(row) for row in report.replicas],
        database=_database(report.database),
        queues=_queues(report.queues, report.at),
        storage=_storage(report),
        device_counts=report.device_counts,
        training_session_counts=report.session_counts,
        upload_retention=values.duration(report.upload_retention_s),
        keyset_expire_time=values.timestamp(
            None if report.keyset is None else report.keyset.expires_at
        ),
        keyset_version=0 if report.keyset is None else report.keyset.version,
    )


def _replica(row: Replica) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        replica_id=row.id,
        address=row.address,
        version=row.version,
        start_time=values.timestamp(row.started_at),
        last_seen_time=values.timestamp(row.seen_at),
    )


def _database(health: DatabaseHealth) -> pb.DatabaseStatus:
    return pb.DatabaseStatus(
        dialect=health.dialect,
        schema_revision=health.schema_revision,
        latency=values.duration(health.latency_s),
        pool_size=health.pool_size,
        pool_in_use_count=health.pool_in_use_count,
    )


def _queues(waiting: Backlog, at: datetime) -> pb.QueueStatus:
    closed_at = waiting.oldest_closed_at
    age = None if closed_at is None else max(0.0, (at - closed_at).total_seconds())
    return pb.QueueStatus(
        open_round_count=waiting.open_round_count,
        closed_round_count=waiting.closed_round_count,
        pending_update_count=waiting.pending_update_count,
        unfinished_upload_count=waiting.unfinished_upload_count,
        unsequenced_audit_count=waiting.unsequenced_audit_count,
        oldest_closed_round_age=values.duration(age),
    )


def _storage(report: Report) -> pb.StorageStatus:
    return pb.StorageStatus(
        database_bytes=report.stored.database_bytes,
        payload_store_bytes=report.payload_store_bytes,
        payload_bytes=report.stored.payload_bytes,
        payload_count=report.stored.payload_count,
        pruned_payload_count=report.stored.pruned_count,
        free_bytes=report.free_bytes,
    )
