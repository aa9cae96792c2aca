"""Role-based access control: one table that lists every method of both services.

A method without a row cannot be called, and a test fails on it. Roles have no permissions beyond this table.
"""

from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """Role of a caller."""

    ANYONE = "anyone"
    DEVICE = "device"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    AUDITOR = "auditor"


ADMINISTRATIVE: Final = frozenset({Role.VIEWER, Role.OPERATOR, Role.ADMIN, Role.AUDITOR})
_ANYONE: Final = frozenset({Role.ANYONE})
_DEVICE: Final = frozenset({Role.DEVICE})
_READ: Final = ADMINISTRATIVE
_OPERATE: Final = frozenset({Role.OPERATOR, Role.ADMIN})
_ADMINISTER: Final = frozenset({Role.ADMIN})
_AUDIT: Final = frozenset({Role.AUDITOR, Role.ADMIN})
_VERIFY: Final = _DEVICE | _READ

_COORDINATOR: Final = "/qflare.v1.CoordinatorService/"
_ADMIN: Final = "/qflare.v1.AdminService/"

ACCESS: Final[dict[str, frozenset[Role]]] = {
    _COORDINATOR + "GetKeyset": _ANYONE,
    _COORDINATOR + "BeginRegistration": _ANYONE,
    _COORDINATOR + "Register": _ANYONE,
    _COORDINATOR + "BeginAuthentication": _ANYONE,
    _COORDINATOR + "Authenticate": _ANYONE,
    _COORDINATOR + "RefreshToken": _ANYONE,
    _COORDINATOR + "RotateKeys": _DEVICE,
    _COORDINATOR + "GetTask": _DEVICE,
    _COORDINATOR + "GetGlobalModel": _VERIFY,
    _COORDINATOR + "SubmitUpdate": _DEVICE,
    _COORDINATOR + "SubmitUpdates": _DEVICE,
    _COORDINATOR + "GetUpload": _DEVICE,
    _COORDINATOR + "ReportEvaluation": _DEVICE,
    _COORDINATOR + "ReportFailure": _DEVICE,
    _COORDINATOR + "SecureAggregationStep": _DEVICE,
    _COORDINATOR + "Heartbeat": _DEVICE,
    _COORDINATOR + "FindTrainingSession": _DEVICE,
    _COORDINATOR + "GetLineage": _VERIFY,
    _COORDINATOR + "GetContributionProof": _VERIFY,
    _COORDINATOR + "GetAuditHead": _VERIFY,
    _ADMIN + "CreateTrainingSession": _OPERATE,
    _ADMIN + "UploadInitialModel": _OPERATE,
    _ADMIN + "StartTrainingSession": _OPERATE,
    _ADMIN + "PauseTrainingSession": _OPERATE,
    _ADMIN + "ResumeTrainingSession": _OPERATE,
    _ADMIN + "UpdateTrainingSession": _OPERATE,
    _ADMIN + "CancelTrainingSession": _OPERATE,
    _ADMIN + "GetTrainingSession": _READ,
    _ADMIN + "ListTrainingSessions": _READ,
    _ADMIN + "WatchTrainingSession": _READ,
    _ADMIN + "ListRounds": _READ,
    _ADMIN + "ListGlobalModels": _READ,
    _ADMIN + "DescribeGlobalModel": _READ,
    _ADMIN + "ListMetrics": _READ,
    _ADMIN + "RollbackGlobalModel": _OPERATE,
    _ADMIN + "ReleaseGlobalModel": _OPERATE,
    _ADMIN + "DownloadGlobalModel": _READ,
    _ADMIN + "ListUpdates": _READ,
    _ADMIN + "GetAggregationStatus": _READ,
    _ADMIN + "GetDevice": _READ,
    _ADMIN + "ListDevices": _READ,
    _ADMIN + "RenameDevice": _OPERATE,
    _ADMIN + "SuspendDevice": _OPERATE,
    _ADMIN + "ReinstateDevice": _OPERATE,
    _ADMIN + "RevokeDevice": _ADMINISTER,
    _ADMIN + "SetDeviceGroups": _OPERATE,
    _ADMIN + "ConfirmDeviceProfile": _OPERATE,
    _ADMIN + "IssueEnrollmentTokens": _OPERATE,
    _ADMIN + "IssueAdminToken": _ADMINISTER,
    _ADMIN + "ListTokens": _ADMINISTER,
    _ADMIN + "RevokeToken": _ADMINISTER,
    _ADMIN + "ListAuditEntries": _AUDIT,
    _ADMIN + "GetAuditProof": _AUDIT,
    _ADMIN + "ExportVerificationBundle": _AUDIT,
    _ADMIN + "ExportAuditEntries": _AUDIT,
    _ADMIN + "GetCoordinatorStatus": _READ,
}
