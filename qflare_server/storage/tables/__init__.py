"""Mapped classes of the database tables.

Every constraint and index is named, states have CHECK constraints, times are UTC. Rows of `GlobalModel`, `Payload` and
`AuditLog` are immutable, except for evaluation results, release and pruning. Queries are in `storage.repository`.
"""

from qflare_server.storage.tables.audit import AuditHead, AuditLog, AuditNode, TrustDocument
from qflare_server.storage.tables.devices import Device, DeviceGroup, DeviceKey, UserToken
from qflare_server.storage.tables.neighbors import GroupStage, NeighborGroup, NeighborMember
from qflare_server.storage.tables.payloads import Payload, PayloadChunk, PayloadPlace, Upload
from qflare_server.storage.tables.replicas import (
    Epoch,
    IdempotentCall,
    Lease,
    Replica,
    UsedNonce,
    WebhookCursor,
)
from qflare_server.storage.tables.results import (
    EVIDENCE_REASON,
    LEFT_OUT_REASON,
    Evaluation,
    GlobalModel,
    ModelUpdate,
    Unmasking,
)
from qflare_server.storage.tables.states import (
    ENDED,
    DeviceState,
    RiskLevel,
    RoundState,
    TokenKind,
    TrainingSessionState,
    UpdateOrigin,
    UpdateState,
)
from qflare_server.storage.tables.training import (
    QUERY_MODEL_TYPE,
    DeviceFailure,
    LateUpdate,
    ReplacedConfig,
    Round,
    RoundDevice,
    TrainingSession,
    TrainingSessionGroup,
)
from qflare_server.storage.tables.types import (
    ACTOR_CHARACTERS,
    BIG_ID,
    NAMING,
    Base,
    UtcDateTime,
    one_of,
)

__all__ = [
    "ACTOR_CHARACTERS",
    "BIG_ID",
    "ENDED",
    "EVIDENCE_REASON",
    "LEFT_OUT_REASON",
    "NAMING",
    "QUERY_MODEL_TYPE",
    "AuditHead",
    "AuditLog",
    "AuditNode",
    "Base",
    "Device",
    "DeviceFailure",
    "DeviceGroup",
    "DeviceKey",
    "DeviceState",
    "Epoch",
    "Evaluation",
    "GlobalModel",
    "GroupStage",
    "IdempotentCall",
    "LateUpdate",
    "Lease",
    "ModelUpdate",
    "NeighborGroup",
    "NeighborMember",
    "Payload",
    "PayloadChunk",
    "PayloadPlace",
    "ReplacedConfig",
    "Replica",
    "RiskLevel",
    "Round",
    "RoundDevice",
    "RoundState",
    "TokenKind",
    "TrainingSession",
    "TrainingSessionGroup",
    "TrainingSessionState",
    "TrustDocument",
    "Unmasking",
    "UpdateOrigin",
    "UpdateState",
    "Upload",
    "UsedNonce",
    "UserToken",
    "UtcDateTime",
    "WebhookCursor",
    "one_of",
]
