"""No answer is longer than a gRPC peer takes, whatever the names, metrics, profiles and statements that it shows."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from sqlalchemy import insert, select, update

from qflare.tensors import DType, Manifest, TensorSpec
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as device_pb2
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import TaskKind
from qflare_server.errors import InvalidManifestError
from qflare_server.keys import trust_documents
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import rotate_root
from qflare_server.keys.trust_documents import Trust
from qflare_server.storage import tables
from qflare_server.training import config as training_config
from qflare_server.training.config import require_trainable
from qflare_server.use_cases.access.tokens import MAX_TOKENS
from qflare_server.use_cases.training_sessions.administration import MAX_ARCHITECTURE_BYTES
from tests.integration.conftest import CHEAP, Deployment

MOST_BYTES: Final = 4 * 2**20
WIDE: Final = "\N{MATHEMATICAL SCRIPT SMALL A}"
"""A printable character of four bytes."""
ROWS: Final = 12
METRICS: Final = {f"{number:03}{WIDE * 97}": 0.1 for number in range(64)}
ENTRIES: Final = {f"{number:03}{WIDE * 253}": WIDE * 256 for number in range(64)}
NUMBERS: Final = dict.fromkeys(ENTRIES, 0.1)
ARCHITECTURE: Final = {f"{number:03}": WIDE * 4096 for number in range(30)}

FIXED: Final = {
    "BeginRegistrationResponse": "keys, nonces and a state sealed by the coordinator",
    "RegisterResponse": "one receipt of the coordinator",
    "BeginAuthenticationResponse": "keys, nonces and a state sealed by the coordinator",
    "AuthenticateResponse": "one token grant",
    "RefreshTokenResponse": "one token grant",
    "GetContributionProofResponse": "one statement, and digests by the height of a tree",
    "GetAuditHeadResponse": "one statement, and digests by the height of a tree",
    "GetUploadResponse": "one receipt",
    "SubmitUpdateResponse": "one receipt",
    "SubmitUpdatesResponse": "256 receipts, or refusals of at most a kilobyte",
}
"""Answers with bytes or repeated fields that no caller and no administrator can make longer."""


def is_unbounded(kind: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a message holds something whose size its type does not bound."""
    if kind.full_name in seen:
        return False
    return any(
        field.is_repeated
        or field.type == FieldDescriptor.TYPE_BYTES
        or (field.message_type and is_unbounded(field.message_type, seen | {kind.full_name}))
        for field in kind.fields
    )


class Filled:
    """A coordinator whose database holds the largest rows that there can be."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.database = deployment.coordinator.parts.context.database
        self.device = deployment.device("filled")
        self.session_id = deployment.session(total_rounds=3, rounds={"quorum": 1, "target": 1})
        task = self.device.get_task(self.session_id)
        assert task.kind is TaskKind.TRAIN
        base = self.device.download_base(task)
        self.device.submit(task, base, {"w": base.arrays["w"] + np.float32(1)}, 10)
        while self.session_version() < 1:
            deployment.coordinator.parts.context.wake()
        self._fill()

    def session_version(self) -> int:
        """Return the latest version of the training session."""
        request = admin_pb2.GetTrainingSessionRequest(training_session_id=self.session_id)
        answer = self.deployment.admin.GetTrainingSession(
            request, metadata=self.deployment.metadata
        )
        return answer.training_session.current_version

    def _fill(self) -> None:
        profile = {"hardware_info": ENTRIES, "network_info": ENTRIES, "capabilities": NUMBERS}
        self._copy(
            tables.Device,
            lambda number: {
                "id": f"{number:03}{WIDE * 252}",
                "name": f"{number:03}{WIDE * 61}",
                "state_reason": WIDE * 500,
                "device_type": WIDE * 100,
                "reported_type": WIDE * 100,
                "reported_capabilities": NUMBERS,
                "signature_key_id": f"{number:064}",
                **profile,
            },
        )
        self._copy(
            tables.TrainingSession,
            lambda number: {
                "id": f"{number:036}",
                "name": WIDE * 200,
                "model_type": WIDE * 100,
                "state_reason": WIDE * 500,
                "config": {
                    "device_training": {"labels": {"a": "b" * 16_000}},
                    "strategy": {"name": WIDE * 100, "parameters": NUMBERS},
                    "selection": {"device_types": [WIDE * 100] * 64},
                },
            },
            count=60,
        )
        self._copy(
            tables.UserToken,
            lambda number: {
                "id": f"{number:032}",
                "token_hash": f"{number:064}",
                "subject": WIDE * 255,
                "revoked_reason": WIDE * 200,
                "device_groups": ["g" * 63] * 32,
            },
            count=800,
        )
        self._copy(
            tables.AuditLog,
            lambda number: {
                "id": 10_000 + number,
                "leaf_index": None,
                "leaf_hash": None,
                "actor": "device:" + WIDE * 255,
                "subject": "device:" + WIDE * 255,
                "details": ENTRIES,
            },
            count=40,
        )
        self._copy(
            tables.Round,
            lambda number: {"number": 100 + number, "state_reason": WIDE * 500},
            count=1200,
        )
        groups = {f"{number:03}{WIDE * 97}": METRICS for number in range(100)}
        self._copy(
            tables.GlobalModel,
            lambda number: {
                "version": 2 + number,
                "digest": f"{number:064}",
                "architecture": ARCHITECTURE,
                "metrics": {f"{prefix}{name}": 0.1 for name in METRICS for prefix in "ab"},
                "group_metrics": groups if number < 4 else {},
                "statement": b"s" * 65_536,
            },
        )
        self._copy(
            tables.ModelUpdate,
            lambda number: {
                "id": f"{number:036}",
                "round_number": 1,
                "state": "rejected",
                "state_reason": WIDE * 500,
                "device_id": f"{number % ROWS:03}{WIDE * 252}",
                "acceptance_sequence": 100 + number,
                "metrics": METRICS,
            },
            count=ROWS * 8,
        )
        self.database.write(
            lambda session: session.execute(
                update(tables.TrainingSession)
                .where(tables.TrainingSession.id == self.session_id)
                .values(current_version=1 + ROWS, architecture=ARCHITECTURE)
            )
        )

    def _copy(
        self,
        kind: type[tables.Base],
        changed: Callable[[int], Mapping[str, Any]],
        count: int = ROWS,
    ) -> None:
        """Insert copies of a table's first row, each changed."""
        table = kind.__table__

        def work(session: Any) -> None:
            row = session.execute(select(table).limit(1)).mappings().one()
            numbers = itertools.count()
            while batch := [
                {**row, **changed(n)} for n in itertools.islice(numbers, 100) if n < count
            ]:
                if kind is tables.ModelUpdate:
                    for number, values in enumerate(batch):
                        values["base_version"] = 0 - number // ROWS - values["acceptance_sequence"]
                session.execute(insert(table), batch)

        self.database.write(work)

    def call(self, method: str, request: Message) -> Any:
        """Make a call as the administrator; gRPC refuses a longer answer than `MOST_BYTES`."""
        call = getattr(self.deployment.admin, method)
        return call(request, metadata=self.deployment.metadata)

    def listed(self, method: str, field: str, **wanted: Any) -> list[Any]:
        """Return all entries of a list, page after page."""
        request = getattr(admin_pb2, f"{method}Request")(page_size=1000, **wanted)
        entries: list[Any] = []
        while True:
            page = self.call(method, request)
            assert getattr(page, field)
            assert page.ByteSize() <= MOST_BYTES
            entries += getattr(page, field)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return entries


@pytest.fixture
def filled(deploy: Callable[..., Deployment]) -> Filled:
    """Return a coordinator with the largest rows, whose bound on received messages is the least."""
    return Filled(deploy(max_message_bytes=2**20 + 4096))


def check_lists(filled: Filled) -> None:
    session = {"training_session_id": filled.session_id}
    lists: dict[str, tuple[str, str, dict[str, Any], int]] = {
        "ListDevices": ("devices", "device_id", {}, ROWS + 1),
        "ListTrainingSessions": ("training_sessions", "training_session_id", {}, 61),
        "ListTokens": ("tokens", "token_id", {}, 800),
        "ListAuditEntries": ("entries", "audit_id", {}, 40),
        "ListRounds": ("rounds", "round_number", session, 1202),
        "ListGlobalModels": ("global_models", "version", session, ROWS + 2),
        "ListMetrics": ("metrics", "version", session, ROWS + 2),
        "ListUpdates": ("updates", "update_id", {**session, "round_number": 1}, ROWS * 8 + 1),
    }
    for method, (field, key, wanted, least) in lists.items():
        found = [getattr(entry, key) for entry in filled.listed(method, field, **wanted)]
        assert len(found) == len(set(found)), method
        assert len(found) >= least, method


def check_single_answers(filled: Filled) -> None:
    session = {"training_session_id": filled.session_id}
    device_id = f"{0:03}{WIDE * 252}"
    filled.call("GetDevice", admin_pb2.GetDeviceRequest(device_id=device_id))
    filled.call("GetCoordinatorStatus", admin_pb2.GetCoordinatorStatusRequest())
    filled.call("GetAggregationStatus", admin_pb2.GetAggregationStatusRequest(**session))
    request = admin_pb2.IssueEnrollmentTokensRequest(
        token_count=MAX_TOKENS, label=WIDE * 200, groups=[f"{n:02}{'g' * 61}" for n in range(32)]
    )
    assert len(filled.call("IssueEnrollmentTokens", request).tokens) == MAX_TOKENS
    reason = WIDE * 500
    for method in ("SuspendDevice", "ReinstateDevice", "RevokeDevice"):
        wanted = getattr(admin_pb2, f"{method}Request")(device_id=device_id, reason=reason)
        filled.call(method, wanted)
    filled.call("RenameDevice", admin_pb2.RenameDeviceRequest(device_id=device_id, name=WIDE * 64))


def check_exports(filled: Filled) -> None:
    parts = filled.call("ExportAuditEntries", admin_pb2.ExportAuditEntriesRequest())
    assert sum(len(part.entries) for part in parts) >= 40
    request = admin_pb2.ExportVerificationBundleRequest(training_session_id=filled.session_id)
    parts = list(filled.call("ExportVerificationBundle", request))
    whole = verification_pb2.VerificationBundle.FromString(
        b"".join(part.bundle.SerializeToString() for part in parts)
    )
    assert len(whole.statements) == ROWS + 2
    assert max(part.ByteSize() for part in parts) <= MOST_BYTES


def test_answers_about_the_largest_rows_come(filled: Filled) -> None:
    for check in (check_lists, check_single_answers, check_exports):
        check(filled)


def largest_manifest() -> Manifest:
    """Return a layout just under the bound on layouts and digests."""
    specs = (
        TensorSpec(f"{number:04}{'n' * 252}", DType.FLOAT32, (1,) * 32) for number in range(7700)
    )
    return Manifest(tuple(specs))


@pytest.mark.parametrize("validate_only", [True, False])
def test_a_description_that_is_too_large_is_refused(
    deploy: Callable[..., Deployment], validate_only: bool
) -> None:
    deployment = deploy()
    request = admin_pb2.CreateTrainingSessionRequest(
        name="test",
        architecture={f"{n:03}": "a" * 4096 for n in range(MAX_ARCHITECTURE_BYTES // 4096)},
        config=training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=1)),
        validate_only=validate_only,
    )

    with pytest.raises(grpc.RpcError) as refused:
        deployment.admin.CreateTrainingSession(request, metadata=deployment.metadata)

    assert "architecture" in (refused.value.details() or "")


def test_a_download_begins_with_all_that_a_version_has(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(max_message_bytes=MOST_BYTES, max_tensors=10_000)
    arrays = {spec.name: np.zeros(spec.shape, np.float32) for spec in largest_manifest().tensors}
    created = deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(
            name="test",
            architecture={f"{n:03}": "a" * 4096 for n in range(60)},
            config=training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=1)),
        ),
        metadata=deployment.metadata,
    )
    session_id = created.training_session.training_session_id

    deployment.upload(session_id, arrays)

    request = admin_pb2.DownloadGlobalModelRequest(training_session_id=session_id)
    messages: Iterator[Any] = deployment.admin.DownloadGlobalModel(
        request, metadata=deployment.metadata
    )
    first, *others = messages
    assert 2 * 2**20 < first.ByteSize() <= MOST_BYTES
    assert not first.HasField("chunk")
    assert len(others) == 1
    described = deployment.admin.DescribeGlobalModel(
        admin_pb2.DescribeGlobalModelRequest(training_session_id=session_id),
        metadata=deployment.metadata,
    )
    assert len(described.global_model.manifest.tensors) == len(arrays)


def test_a_layout_that_no_header_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_config.complete(
        training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=1))
    )
    manifest = largest_manifest()
    require_trainable(config, manifest, 2**40)

    monkeypatch.setattr(training_config, "MAX_DESCRIPTION_BYTES", manifest.to_proto().ByteSize())
    with pytest.raises(InvalidManifestError, match="layout and digests"):
        require_trainable(config, manifest, 2**40)


def test_the_parts_of_a_header_fit_together() -> None:
    others = (
        2 * 80_000 + 64 * 1100 + 128 * 420 + 300_000
    )  # statements, parameters, metrics, sealing
    links = 2**19 + 80_000
    largest = training_config.MAX_DESCRIPTION_BYTES + MAX_ARCHITECTURE_BYTES + links + others
    assert largest <= MOST_BYTES


def test_root_documents_come_in_parts() -> None:
    roots = tuple(
        security_pb2.SignedEnvelope(payload=bytes([number]) * 65_536) for number in range(200)
    )
    trust = Trust(
        roots,
        security_pb2.RootDocument(version=200),
        security_pb2.SignedEnvelope(),
        security_pb2.Keyset(),
    )
    received: list[security_pb2.SignedEnvelope] = []

    while len(received) < len(roots):
        part = trust.part(len(received))
        assert part.roots
        assert part.ByteSize() <= MOST_BYTES
        received += part.roots

    assert tuple(received) == roots


def test_a_device_follows_roots_that_come_in_several_answers(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy()
    for _ in range(3):
        rotate_root(
            KeyFolder(deployment.config.data_dir / "keys", cost=CHEAP),
            deployment.coordinator.parts.database,
            deployment.coordinator.parts.context.clock(),
        )
    monkeypatch.setattr(trust_documents, "MAX_ROOTS_BYTES", 1)
    deployment.close()
    again = deploy()
    assert len(again.devices_stub.GetKeyset(device_pb2.GetKeysetRequest()).bundle.roots) == 1

    late = again.device("late")

    assert len(late._trust.bundle.roots) == 4  # what the device keeps


def test_every_answer_of_no_fixed_size_is_filled_here() -> None:
    filled_here = {
        *(method for method in dir(admin_pb2) if method.startswith("List")),
        "ExportAuditEntriesResponse",
        "ExportVerificationBundleResponse",
        "GetDeviceResponse",
        "RenameDeviceResponse",
        "SuspendDeviceResponse",
        "ReinstateDeviceResponse",
        "RevokeDeviceResponse",
        "GetAggregationStatusResponse",
        "GetCoordinatorStatusResponse",
        "GetKeysetResponse",
        "IssueEnrollmentTokensResponse",
        "DownloadGlobalModelResponse",
        "DescribeGlobalModelResponse",
    }
    same_as = {
        "CreateTrainingSessionResponse": "ListTrainingSessions",
        "StartTrainingSessionResponse": "ListTrainingSessions",
        "PauseTrainingSessionResponse": "ListTrainingSessions",
        "ResumeTrainingSessionResponse": "ListTrainingSessions",
        "UpdateTrainingSessionResponse": "ListTrainingSessions",
        "CancelTrainingSessionResponse": "ListTrainingSessions",
        "GetTrainingSessionResponse": "ListTrainingSessions",
        "WatchTrainingSessionResponse": "ListTrainingSessions and ListGlobalModels",
        "UploadInitialModelResponse": "ListGlobalModels",
        "RollbackGlobalModelResponse": "ListGlobalModels",
        "ReleaseGlobalModelResponse": "ListGlobalModels",
        "SetDeviceGroupsResponse": "GetDevice",
        "ConfirmDeviceProfileResponse": "GetDevice",
        "IssueAdminTokenResponse": "IssueEnrollmentTokens",
        "RevokeTokenResponse": "ListTokens",
        "GetAuditProofResponse": "ListAuditEntries, and digests by the height of a tree",
        "GetTaskResponse": "a part of a training session's configuration",
        "GetGlobalModelResponse": "DownloadGlobalModel",
        "GetLineageResponse": "test_downloads",
    }
    kinds = {
        method.output_type.name
        for module, service in ((admin_pb2, "AdminService"), (device_pb2, "CoordinatorService"))
        for method in module.DESCRIPTOR.services_by_name[service].methods
        if is_unbounded(method.output_type)
    }
    assert kinds - filled_here - same_as.keys() - FIXED.keys() == set()
