"""Encoding of audit entries."""

from qflare.v1 import admin_service_pb2
from qflare_server.serving.rpc.encoding.values import _texts, timestamp
from qflare_server.storage.records import AuditLog


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
