"""What one enrolled device can leave in the database for good: every method of devices, called again and again."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import func, select

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import device_pb2, security_pb2, training_pb2
from qflare_client import Client, QflareClientError
from qflare_client.rpc.retry import RetryPolicy
from qflare_server.storage.tables import Base
from qflare_server.use_cases.access.login import MAX_TOKENS_OF_DEVICE
from tests.support.raw_device import Draft, RawDevice

Deploy = Callable[..., Any]
PER_HOUR: Final = 4
CALLS: Final = 40
RECORDS: Final = 3 * PER_HOUR + 12
"""Rows of one table that one device may add: with each login a token of either kind and an audit entry, and what is
bounded otherwise: unfinished uploads, recorded refusals, one update for the round."""
DERIVED: Final = {"audit_nodes"}
"""Hashes over the audit log, which are added for earlier entries as well."""
ROUNDS: Final = training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=600))
COORDINATOR: Final = pb.DESCRIPTOR.services_by_name["CoordinatorService"]
LARGE: Final = {"w": np.zeros(2**17, np.float32)}
"""More than is stored with its row, so that an upload of it can be unfinished."""
SMALL: Final = {"w": np.zeros(4, np.float32)}


class Assault:
    """One device that calls a method `CALLS` times, each time with something else that the coordinator may take."""

    def __init__(self, device: RawDevice, session_id: str) -> None:
        self._device = device
        self._stub = device.stub
        self._session_id = session_id
        self._task = device.task(session_id)

    def __call__(self, method: str, number: int) -> None:
        """Call a method by its short name; a refusal is an answer too."""
        call = getattr(self, f"_{method}", None)
        if call is None:
            pytest.fail(f"{method} has no call here: say what a device can make of it")
        with contextlib.suppress(grpc.RpcError, QflareClientError):
            call(number)

    def _send(self, method: str, request: Any) -> Any:
        call = getattr(self._stub, method)
        return call(request, metadata=self._device.metadata, timeout=20)

    def _GetKeyset(self, _number: int) -> None:
        self._send("GetKeyset", pb.GetKeysetRequest())

    def _BeginRegistration(self, number: int) -> None:
        session_key = self._device.client._trust.session_key().key_id
        sealed = security_pb2.SealedEnrollment(
            realm=self._device.identity.realm,
            server_kem_key_id=session_key,
            sealed_request=bytes(1200) + b"%d" % number,
        )
        self._send("BeginRegistration", pb.BeginRegistrationRequest(enrollment=sealed))

    def _Register(self, number: int) -> None:
        confirmation = security_pb2.EnrollmentConfirmation(
            sealed_state=bytes(100) + b"%d" % number, confirmation=bytes(32)
        )
        self._send("Register", pb.RegisterRequest(confirmation=confirmation))

    def _BeginAuthentication(self, _number: int) -> None:
        self._device.client._login._attempt(self._device.identity)

    def _Authenticate(self, _number: int) -> None:
        self._device.client._login._attempt(self._device.identity)

    def _RefreshToken(self, _number: int) -> None:
        login = self._device.client._login
        assert login._session is not None
        login._session = login._refreshed(login._session) or login._session

    def _RotateKeys(self, _number: int) -> None:
        self._device.client.rotate_keys()

    def _GetTask(self, number: int) -> None:
        self._device.task(self._session_id if number % 2 else "")

    def _GetGlobalModel(self, _number: int) -> None:
        request = pb.GetGlobalModelRequest(training_session_id=self._session_id)
        list(self._send("GetGlobalModel", request))

    def _SubmitUpdate(self, number: int) -> None:
        self._device.submit(self._spoiled(number, LARGE))

    def _SubmitUpdates(self, number: int) -> None:
        drafts = [self._spoiled(number + step, SMALL) for step in range(4)]
        updates = [
            pb.SmallUpdate(header=self._device.header(draft), payload=draft.payload)
            for draft in drafts
        ]
        self._send("SubmitUpdates", pb.SubmitUpdatesRequest(updates=updates))

    def _spoiled(self, number: int, arrays: dict[str, Any]) -> Draft:
        """Return one of three kinds of updates, the first of which can be accepted once."""
        draft = self._device.draft(self._task, arrays)
        if number % 3 == 0:
            draft.statement.example_count = number + 1
        elif number % 3 == 1:
            draft.payload = draft.payload[: len(draft.payload) // 2]
        else:
            draft.statement.task_nonce = f"{number:064x}"
        return draft

    def _GetUpload(self, _number: int) -> None:
        update_id = self._device.draft(self._task, LARGE).statement.update_id
        self._send("GetUpload", pb.GetUploadRequest(update_id=update_id))

    def _ReportEvaluation(self, number: int) -> None:
        statement = security_pb2.EvaluationStatement(
            realm=self._device.identity.realm,
            training_session_id=self._session_id,
            version=number,
            device_id=self._device.identity.device_id,
            key_id=self._device.identity.keys.signing.public.key_id,
            example_count=number + 1,
            metrics={"loss": float(number)},
        )
        key = self._device.identity.keys.signing
        signed = sign_envelope(key, SigningContext.EVALUATION, statement)
        self._send("ReportEvaluation", pb.ReportEvaluationRequest(statement=signed))

    def _ReportFailure(self, number: int) -> None:
        request = pb.ReportFailureRequest(
            training_session_id=self._session_id, round_number=1 + number % 2, kind=f"Kind{number}"
        )
        self._send("ReportFailure", request)

    def _SecureAggregationStep(self, number: int) -> None:
        key = self._device.identity.keys.signing
        statement = security_pb2.NeighborAdvertisement(
            realm="qflare",
            training_session_id=self._session_id,
            round_number=1,
            task_digest=f"{number:064x}",
            device_id=self._device.identity.device_id,
            key_id=key.public.key_id,
            channel_key=self._device.identity.keys.kem.public.to_proto(),
            mask_key=self._device.identity.keys.kem.public.to_proto(),
            self_seed_digest="0" * 64,
            nonce=bytes(32),
        )
        signed = sign_envelope(key, SigningContext.NEIGHBOR_ADVERTISEMENT, statement)
        request = pb.SecureAggregationStepRequest(advertisement=signed)
        self._send("SecureAggregationStep", request)

    def _Heartbeat(self, number: int) -> None:
        profile = device_pb2.DeviceProfile(device_type=f"type-{number}")
        self._send("Heartbeat", pb.HeartbeatRequest(profile=profile))

    def _GetLineage(self, _number: int) -> None:
        self._send("GetLineage", pb.GetLineageRequest(training_session_id=self._session_id))

    def _FindTrainingSession(self, _number: int) -> None:
        request = pb.FindTrainingSessionRequest(reference=self._session_id[:8])
        self._send("FindTrainingSession", request)

    def _GetContributionProof(self, _number: int) -> None:
        update_id = self._device.draft(self._task, LARGE).statement.update_id
        self._send("GetContributionProof", pb.GetContributionProofRequest(update_id=update_id))

    def _GetAuditHead(self, _number: int) -> None:
        self._send("GetAuditHead", pb.GetAuditHeadRequest())


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy(max_device_records_per_hour=PER_HOUR)


def impatient(deployment: Any, name: str) -> Client:
    """Enroll a device whose client makes one attempt of a call."""
    deployment.device(name).close()
    return Client(home=deployment.folder / name, retry=RetryPolicy(total_time_s=0))


def rows(deployment: Any) -> dict[str, int]:
    """Return the count of rows of every table."""
    with deployment.coordinator.parts.database.read() as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
            if table.name not in DERIVED
        }


def file_count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("method", [method.name for method in COORDINATOR.methods])
def test_rows_and_files_of_one_device_are_bounded(deployment: Any, method: str) -> None:
    arrays = SMALL if method == "SubmitUpdates" else LARGE
    session_id = deployment.session(arrays, rounds=ROUNDS, total_rounds=2)
    folder = deployment.coordinator.config.data_dir
    with impatient(deployment, "greedy") as client:
        assault = Assault(RawDevice(client, deployment.devices_stub), session_id)
        before, files = rows(deployment), file_count(folder)

        for number in range(CALLS):
            assault(method, number)

    after = rows(deployment)
    added = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert max(added.values(), default=0) <= RECORDS, added
    assert file_count(folder) <= files + 4


def test_tokens_of_one_device_are_bounded_without_a_budget(deploy: Deploy) -> None:
    deployment = deploy(max_device_records_per_hour=0)
    client = deployment.device("greedy")
    client.get_task()
    first = client._login._session

    for _ in range(MAX_TOKENS_OF_DEVICE // 2 + 8):
        client._login._attempt(client._login.identity)

    assert rows(deployment)["user_tokens"] <= MAX_TOKENS_OF_DEVICE + 3
    assert first is not None
    assert client._login._session is first
    client.get_task()  # the oldest token has gone: the device logs in anew


def test_a_heartbeat_that_says_nothing_new_writes_nothing(deployment: Any) -> None:
    device = RawDevice(deployment.device("steady"), deployment.devices_stub)
    request = pb.HeartbeatRequest(profile=device_pb2.DeviceProfile(device_type="phone"))
    device.stub.Heartbeat(request, metadata=device.metadata)
    before = rows(deployment)

    for _ in range(CALLS):
        device.stub.Heartbeat(request, metadata=device.metadata)

    assert rows(deployment)["audit_log"] == before["audit_log"]
