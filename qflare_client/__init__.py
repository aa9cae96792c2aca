"""QFLARE device SDK: enroll a device, train on local data, and send signed updates.

    from pathlib import Path

    from qflare_client import Client, enroll, run

    def train(arrays, config):
        for array in arrays.values():
            array += 1.0                                       # stands for training
        return arrays, 100, {"loss": 0.25}

    if __name__ == "__main__":
        enroll(Path("bundle.json"), home=Path("device"))       # leaves an enrolled device as it is
        with Client(home=Path("device")) as client:
            run(client, train)

Everything public is a name of this package; its modules are private. The error hierarchy is in `qflare_client.errors`.
"""

from qflare.analytics.queries import Query
from qflare.crypto.signing import Algorithm
from qflare_client.access.enrollment import enroll
from qflare_client.analytics import Analytics
from qflare_client.client import Client
from qflare_client.errors import (
    AlgorithmNotAcceptedError,
    AuthenticationError,
    BusyError,
    CoordinatorFaultError,
    CorruptModelError,
    DeadlineExceededError,
    DeviceRevokedError,
    DeviceSuspendedError,
    DuplicateUpdateError,
    FailedPreconditionError,
    ForkedError,
    InsufficientTaskError,
    InvalidArgumentError,
    InvalidEnrollmentTokenError,
    InvalidEvidenceError,
    InvalidRequestError,
    InvalidStatementError,
    KeyStoreError,
    KeyStoreLockedError,
    NotEnrolledError,
    NotFoundError,
    NotSelectedError,
    PermissionDeniedError,
    PrivacyBudgetExceededError,
    PrivacyError,
    ProxyRefusedError,
    QflareClientError,
    RejectedError,
    RepeatedTaskError,
    RewrittenLogError,
    RolledBackModelError,
    RoundNotOpenError,
    SealingMismatchError,
    SealKeyNotAcceptedError,
    StaleBaseVersionError,
    TaskFailedError,
    TlsError,
    TrainingFunctionError,
    UnavailableError,
    UnsupportedTaskError,
    UntrustedKeysetError,
    VerificationError,
    WrongPassphraseError,
)
from qflare_client.loop import RunSummary, run
from qflare_client.models.download import GlobalModel, ProgressHook
from qflare_client.models.lineage import Version
from qflare_client.models.relay import SignedUpdate
from qflare_client.models.scaffold import Scaffold
from qflare_client.models.upload import Receipt
from qflare_client.privacy import LocalPrivacy
from qflare_client.pulling import PulledTask
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.tls import Tls
from qflare_client.secure_aggregation import SecureAggregation
from qflare_client.tasks import (
    AnalyticsTask,
    Heartbeat,
    Task,
    TaskKind,
    TrainingDefaults,
    TrainingTask,
    proximal_gradient,
)
from qflare_client.trust.audit_head import AuditHead
from qflare_client.trust.evidence import Evidence, UpdateEvidence

__all__ = [
    "Algorithm",
    "AlgorithmNotAcceptedError",
    "Analytics",
    "AnalyticsTask",
    "AuditHead",
    "AuthenticationError",
    "BusyError",
    "Client",
    "CoordinatorFaultError",
    "CorruptModelError",
    "DeadlineExceededError",
    "DeviceRevokedError",
    "DeviceSuspendedError",
    "DuplicateUpdateError",
    "Evidence",
    "FailedPreconditionError",
    "ForkedError",
    "GlobalModel",
    "Heartbeat",
    "InsufficientTaskError",
    "InvalidArgumentError",
    "InvalidEnrollmentTokenError",
    "InvalidEvidenceError",
    "InvalidRequestError",
    "InvalidStatementError",
    "KeyStoreError",
    "KeyStoreLockedError",
    "LocalPrivacy",
    "NotEnrolledError",
    "NotFoundError",
    "NotSelectedError",
    "PermissionDeniedError",
    "PrivacyBudgetExceededError",
    "PrivacyError",
    "ProgressHook",
    "ProxyRefusedError",
    "PulledTask",
    "QflareClientError",
    "Query",
    "Receipt",
    "RejectedError",
    "RepeatedTaskError",
    "RetryPolicy",
    "RewrittenLogError",
    "RolledBackModelError",
    "RoundNotOpenError",
    "RunSummary",
    "Scaffold",
    "SealKeyNotAcceptedError",
    "SealingMismatchError",
    "SecureAggregation",
    "SignedUpdate",
    "StaleBaseVersionError",
    "Task",
    "TaskFailedError",
    "TaskKind",
    "Tls",
    "TlsError",
    "TrainingDefaults",
    "TrainingFunctionError",
    "TrainingTask",
    "UnavailableError",
    "UnsupportedTaskError",
    "UntrustedKeysetError",
    "UpdateEvidence",
    "VerificationError",
    "Version",
    "WrongPassphraseError",
    "enroll",
    "proximal_gradient",
    "run",
]
