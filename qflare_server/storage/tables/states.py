"""Enumerations stored in columns: life cycles, kinds of tokens, levels of risk."""

from enum import StrEnum
from typing import Final


class DeviceState(StrEnum):
    """Life cycle of a device."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    INACTIVE = "inactive"


class TrainingSessionState(StrEnum):
    """Life cycle of a training session."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED: Final = frozenset(
    {
        TrainingSessionState.COMPLETED.value,
        TrainingSessionState.CANCELLED.value,
        TrainingSessionState.FAILED.value,
    }
)
"""States in which a training session has ended."""


class RoundState(StrEnum):
    """Life cycle of a round."""

    OPEN = "open"
    CLOSED = "closed"
    PUBLISHED = "published"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UpdateOrigin(StrEnum):
    """Origin of an update."""

    DEVICE = "device"
    IN_PROCESS = "in_process"


class UpdateState(StrEnum):
    """Life cycle of an update."""

    PENDING = "pending"
    AGGREGATED = "aggregated"
    REJECTED = "rejected"


class TokenKind(StrEnum):
    """Kind of a token."""

    ENROLLMENT = "enrollment"
    ACCESS = "access"
    REFRESH = "refresh"
    ADMIN = "admin"


class RiskLevel(StrEnum):
    """Severity of an audit entry."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"
