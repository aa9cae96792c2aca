"""Encoding of audit entries."""

from collections.abc import Mapping

from qflare.v1 import admin_service_pb2
from qflare_server.serving.rpc.encoding.values import _texts, timestamp
from qflare_server.storage.records import AuditLog
from qflare_server.storage.repository.audit import device_of


def audit_entry(row: AuditLog, names: Mapping[str, str]) -> admin_service_pb2.AuditEntry:
    """Encode an audit entry, with the present names of its devices."""
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
        actor_name=names.get(device_of(row.actor), ""),
        subject_name=names.get(device_of(row.subject), ""),
    )
