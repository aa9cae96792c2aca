"""Calls that change something may be repeated: with a request id, each is made once and answered alike."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Final

import grpc
import numpy as np
import pytest

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1.training_pb2 import TrainingConfig
from qflare_client import TaskKind
from qflare_server.context import utc_now
from qflare_server.storage.repository import idempotent_calls
from qflare_server.storage.tables import AuditLog, GlobalModel, TrainingSession
from tests.integration.conftest import Deployment
from tests.support.raw_device import reason_of
from tests.support.use_cases import with_quorum

Deploy = Callable[..., Deployment]
METHODS: Final = pb.DESCRIPTOR.services_by_name["AdminService"].methods
READING: Final = ("Get", "List", "Describe", "Watch", "Download", "Export")
CHANGING: Final = [
    method.name
    for method in METHODS
    if not method.name.startswith(READING) and not method.client_streaming
]
WITH_SECRETS: Final = {"IssueEnrollmentTokens", "IssueAdminToken"}
QUORUM: Final[dict[str, Any]] = {"rounds": {"quorum": 1}}
ANOTHER_BODY: Final[dict[str, dict[str, Any]]] = {
    "CreateTrainingSession": {"name": "another"},
    "StartTrainingSession": {"training_session_id": "another"},
    "PauseTrainingSession": {"training_session_id": "another"},
    "ResumeTrainingSession": {"training_session_id": "another"},
    "UpdateTrainingSession": {"training_session_id": "another"},
    "IssueEnrollmentTokens": {"label": "another"},
    "IssueAdminToken": {"name": "another"},
}


def call(deployment: Deployment, method: str, **fields: Any) -> Any:
    """Make a call as the administrator."""
    request = getattr(pb, f"{method}Request")(**fields)
    return getattr(deployment.admin, method)(request, metadata=deployment.metadata)


def change_count(deployment: Deployment) -> int:
    """Return the number of events of administrators in the audit log."""
    with deployment.coordinator.parts.context.database.read() as session:
        return session.query(AuditLog).filter(AuditLog.actor.startswith("admin:")).count()


def row_count(deployment: Deployment, table: type) -> int:
    """Return the number of rows of a table."""
    with deployment.coordinator.parts.context.database.read() as session:
        return session.query(table).count()


def publish_a_version(deployment: Deployment, session_id: str) -> None:
    """Let a new device contribute to the open round, whose quorum is one."""
    device = deployment.device("trainer")
    while (task := device.get_task(session_id)).kind is not TaskKind.TRAIN:
        threading.Event().wait(task.poll_delay_s)
    base = device.download_base(task)
    device.submit(task, base, {"w": base.arrays["w"] + np.float32(1)}, 10)
    while (
        call(
            deployment, "GetTrainingSession", training_session_id=session_id
        ).training_session.current_version
        < 1
    ):
        threading.Event().wait(0.05)


def steps(deployment: Deployment) -> list[tuple[str, dict[str, Any]]]:
    """Return calls of every method that changes something, in an order in which each does."""
    waiting = deployment.session(start=False)
    trained = deployment.session(total_rounds=5, rounds={"quorum": 1, "target": 1})
    publish_a_version(deployment, trained)
    device = {"device_id": deployment.device("subject").device_id, "reason": "test"}
    token = call(deployment, "IssueAdminToken", name="bob", roles=["viewer"]).token.token
    return [
        ("CreateTrainingSession", {"name": "first", "config": {"total_rounds": 3, **QUORUM}}),
        ("StartTrainingSession", {"training_session_id": waiting}),
        ("PauseTrainingSession", {"training_session_id": waiting}),
        ("ResumeTrainingSession", {"training_session_id": waiting}),
        ("UpdateTrainingSession", {"training_session_id": waiting, "target": 7}),
        ("CancelTrainingSession", {"training_session_id": waiting, "reason": "test"}),
        ("ReleaseGlobalModel", {"training_session_id": trained, "version": 1, "reason": "test"}),
        ("RollbackGlobalModel", {"training_session_id": trained, "version": 0, "reason": "test"}),
        ("RenameDevice", {**device, "name": "ward-3"}),
        ("SuspendDevice", device),
        ("ReinstateDevice", device),
        ("SetDeviceGroups", {**device, "groups": ["ward-3"]}),
        ("ConfirmDeviceProfile", {**device, "device_type": "phone"}),
        ("RevokeDevice", device),
        ("IssueEnrollmentTokens", {"token_count": 2, "label": "ward"}),
        ("IssueAdminToken", {"name": "carol", "roles": ["viewer"]}),
        ("RevokeToken", {"token_id": token.token_id, "reason": "test"}),
    ]


def test_every_method_that_changes_something_has_a_request_id() -> None:
    inputs = {method.name: method.input_type for method in METHODS}
    assert [name for name in CHANGING if "request_id" not in inputs[name].fields_by_name] == []
    streams = [method.name for method in METHODS if method.client_streaming]
    assert streams == ["UploadInitialModel"], "repeated by content"


def test_every_call_with_a_request_id_is_made_once(deploy: Deploy) -> None:
    deployment = deploy()
    made = steps(deployment)
    assert {method for method, _ in made} == set(CHANGING)

    for number, (method, fields) in enumerate(made):
        named = {**fields, "request_id": f"call-{number}"}
        first = call(deployment, method, **named)
        known = change_count(deployment)

        if method in WITH_SECRETS:
            with pytest.raises(grpc.RpcError) as refused:
                call(deployment, method, **named)
            assert reason_of(refused.value) == "ALREADY_EXISTS", method
        else:
            assert call(deployment, method, **named) == first, method

        with pytest.raises(grpc.RpcError) as refused:
            call(deployment, method, **{**named, **ANOTHER_BODY.get(method, {"reason": "other"})})
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS, method
        assert reason_of(refused.value) == "REQUEST_ID_REUSED", method
        assert change_count(deployment) == known, method


def test_steps_that_are_done_already_have_no_effect(deploy: Deploy) -> None:
    deployment = deploy()

    for method, fields in steps(deployment):
        call(deployment, method, **fields)
        known = change_count(deployment)
        if method in {"CreateTrainingSession", "ConfirmDeviceProfile", *WITH_SECRETS}:
            continue  # another one is made, or the confirmation is renewed
        call(deployment, method, **fields)
        assert change_count(deployment) == known, method


def test_a_rollback_is_made_once_though_training_went_on(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(total_rounds=5, rounds={"quorum": 1, "target": 1})
    publish_a_version(deployment, session_id)
    wanted = {"training_session_id": session_id, "version": 0, "request_id": "once"}
    first = call(deployment, "RollbackGlobalModel", **wanted)
    call(deployment, "RollbackGlobalModel", training_session_id=session_id, version=1)

    again = call(deployment, "RollbackGlobalModel", **wanted)

    assert again == first
    assert row_count(deployment, GlobalModel) == 4


def test_equal_calls_at_once_are_made_once(deploy: Deploy) -> None:
    deployment = deploy()

    with ThreadPoolExecutor(8) as executor:
        answers = list(
            executor.map(
                lambda _: call(
                    deployment,
                    "CreateTrainingSession",
                    name="test",
                    config=QUORUM,
                    request_id="at once",
                ),
                range(8),
            )
        )

    assert all(answer == answers[0] for answer in answers)
    assert row_count(deployment, TrainingSession) == 1


def test_request_ids_of_two_administrators_are_apart(deploy: Deploy) -> None:
    deployment = deploy()
    other = call(deployment, "IssueAdminToken", name="bob", roles=["admin"]).token.secret
    request = pb.CreateTrainingSessionRequest(
        name="test", request_id="same", config=with_quorum(TrainingConfig())
    )
    first = deployment.admin.CreateTrainingSession(request, metadata=deployment.metadata)

    second = deployment.admin.CreateTrainingSession(
        request, metadata=(("authorization", f"Bearer {other}"),)
    )

    assert second.training_session.training_session_id != first.training_session.training_session_id


def test_calls_are_forgotten_in_time_and_by_number(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy()
    database = deployment.coordinator.parts.context.database
    for number in range(5):
        call(
            deployment,
            "CreateTrainingSession",
            name="test",
            config=QUORUM,
            request_id=f"call-{number}",
        )

    monkeypatch.setattr(idempotent_calls, "MAX_KEPT", 3)
    database.write(
        lambda session: idempotent_calls.delete_old(session, utc_now() - timedelta(days=1))
    )
    for number in (4, 0):
        call(
            deployment,
            "CreateTrainingSession",
            name="test",
            config=QUORUM,
            request_id=f"call-{number}",
        )
    kept_then = row_count(deployment, TrainingSession)
    database.write(
        lambda session: idempotent_calls.delete_old(session, utc_now() + timedelta(days=1))
    )
    call(deployment, "CreateTrainingSession", name="test", config=QUORUM, request_id="call-4")

    assert kept_then == 6, "the newest is known, the oldest is not"
    assert row_count(deployment, TrainingSession) == 7
