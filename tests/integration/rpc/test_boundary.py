"""One test for each status that a call can end with, and what never crosses the wire."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import text

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1.training_pb2 import TrainingConfig
from qflare_server import errors
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.raw_device import RawDevice, info_of, reason_of
from tests.support.use_cases import with_quorum

Code = grpc.StatusCode
WEIGHTS = {"w": np.zeros(4, np.float32)}


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


def refused(call: Callable[[], object], code: grpc.StatusCode, reason: str) -> Any:
    """Make a call that has to fail in this way."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
    assert info_of(caught.value).domain == "qflare"
    return caught.value


def get(deployment: Deployment, session_id: str, token: str | None = None) -> object:
    """Get a training session."""
    metadata = deployment.metadata if token is None else (("authorization", f"Bearer {token}"),)
    request = admin_pb2.GetTrainingSessionRequest(training_session_id=session_id)
    return deployment.admin.GetTrainingSession(request, metadata=metadata, timeout=20)


def test_an_unknown_training_session_is_not_found(deployment: Deployment) -> None:
    refused(lambda: get(deployment, "none"), Code.NOT_FOUND, "TRAINING_SESSION_NOT_FOUND")


@pytest.mark.parametrize("token", ["", "qfa1.x", "x" * 5000])
def test_a_wrong_credential_is_unauthenticated(deployment: Deployment, token: str) -> None:
    refused(lambda: get(deployment, "none", token), Code.UNAUTHENTICATED, "UNAUTHENTICATED")


@pytest.mark.parametrize(
    ("size", "code"),
    [(15_500, Code.UNAUTHENTICATED), (17_000, Code.RESOURCE_EXHAUSTED)],
)
def test_large_metadata_is_answered_alike_each_time(
    deployment: Deployment, size: int, code: grpc.StatusCode
) -> None:
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as caught:
            get(deployment, "none", "x" * size)
        assert caught.value.code() is code


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer  "])
def test_the_scheme_of_a_credential_is_written_in_any_case(
    deployment: Deployment, scheme: str
) -> None:
    metadata = (("authorization", scheme + deployment.admin_token),)

    deployment.admin.ListDevices(admin_pb2.ListDevicesRequest(), metadata=metadata, timeout=20)


@pytest.mark.parametrize("value", ["Basic {}", "Bearer", "Bearer{}", " Bearer {}", "{}"])
def test_a_credential_of_another_scheme_is_unauthenticated(
    deployment: Deployment, value: str
) -> None:
    metadata = (("authorization", value.format(deployment.admin_token)),)
    refused(
        lambda: deployment.admin.ListDevices(
            admin_pb2.ListDevicesRequest(), metadata=metadata, timeout=20
        ),
        Code.UNAUTHENTICATED,
        "UNAUTHENTICATED",
    )


def test_a_role_that_may_not_is_denied(deployment: Deployment) -> None:
    viewer = (("authorization", f"Bearer {deployment.issue_admin(Role.VIEWER)}"),)

    refused(
        lambda: deployment.admin.ListAuditEntries(
            admin_pb2.ListAuditEntriesRequest(), metadata=viewer
        ),
        Code.PERMISSION_DENIED,
        "PERMISSION_DENIED",
    )


def test_a_device_may_not_administer(deployment: Deployment) -> None:
    device = RawDevice(deployment.device("raw"), deployment.devices_stub)

    refused(
        lambda: deployment.admin.ListDevices(
            admin_pb2.ListDevicesRequest(), metadata=device.metadata
        ),
        Code.PERMISSION_DENIED,
        "PERMISSION_DENIED",
    )


def test_a_start_without_an_initial_model_is_a_failed_precondition(deployment: Deployment) -> None:
    created = deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(name="test", config=with_quorum(TrainingConfig())),
        metadata=deployment.metadata,
    )
    session_id = created.training_session.training_session_id

    refused(
        lambda: deployment.admin.StartTrainingSession(
            admin_pb2.StartTrainingSessionRequest(training_session_id=session_id),
            metadata=deployment.metadata,
        ),
        Code.FAILED_PRECONDITION,
        "WRONG_STATE",
    )


def test_an_unknown_version_is_not_found(deployment: Deployment) -> None:
    session_id = deployment.session(WEIGHTS)
    request = admin_pb2.DownloadGlobalModelRequest(training_session_id=session_id, version=9)

    refused(
        lambda: list(deployment.admin.DownloadGlobalModel(request, metadata=deployment.metadata)),
        Code.NOT_FOUND,
        "GLOBAL_MODEL_NOT_FOUND",
    )


def test_a_strategy_that_contradicts_itself_is_refused(deployment: Deployment) -> None:
    refused(
        lambda: deployment.session(
            WEIGHTS, strategy={"name": "krum", "parameters": {"byzantine_count": 2}}
        ),
        Code.INVALID_ARGUMENT,
        "STRATEGY_REFUSED",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConflictError(), Code.ABORTED),
        (errors.StoreUnavailableError(), Code.UNAVAILABLE),
        (errors.StorageFullError(), Code.RESOURCE_EXHAUSTED),
        (errors.AlreadyExistsError(), Code.ALREADY_EXISTS),
        (errors.DisconnectedError(), Code.CANCELLED),
        (errors.StalledError(), Code.DEADLINE_EXCEEDED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_from_below_get_their_status(
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    error: errors.QflareError,
    code: grpc.StatusCode,
) -> None:
    def fail(_identity: str) -> None:
        raise error

    monkeypatch.setattr(deployment.coordinator.use_cases.training, "progress", fail)

    refused(lambda: get(deployment, "x"), code, error.reason)


def test_an_unknown_error_shows_a_fixed_text_and_a_request_id(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_identity: str) -> None:
        raise RuntimeError("the secret of the database")

    monkeypatch.setattr(deployment.coordinator.use_cases.training, "progress", fail)

    error = refused(lambda: get(deployment, "x"), Code.INTERNAL, "INTERNAL")

    assert error.details() == "internal error"
    assert "secret" not in str(error.trailing_metadata())


def test_errors_in_the_middle_of_a_download_get_their_status(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = deployment.session(WEIGHTS)

    def fail(*_arguments: object) -> Iterator[tuple[int, bytes]]:
        yield 0, b""
        raise errors.PayloadPrunedError

    monkeypatch.setattr(deployment.coordinator.use_cases.deliveries, "chunks", fail)
    request = admin_pb2.DownloadGlobalModelRequest(training_session_id=session_id)

    refused(
        lambda: list(deployment.admin.DownloadGlobalModel(request, metadata=deployment.metadata)),
        Code.NOT_FOUND,
        "PAYLOAD_PRUNED",
    )


def test_a_draining_coordinator_takes_no_new_work(deployment: Deployment) -> None:
    deployment.coordinator.draining.set()

    refused(lambda: get(deployment, "x"), Code.UNAVAILABLE, "DRAINING")


def test_calls_recover_when_the_database_comes_back(
    deploy: Callable[..., Deployment], database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        deployment = deploy(database_timeout_s=0.2)
        database = deployment.coordinator.parts.database
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            writing = database.engine.execution_options(qflare_write=True)
            with writing.begin():
                held.set()
                release.wait(20)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(10)
        try:
            refused(lambda: deployment.session(WEIGHTS), Code.UNAVAILABLE, "STORE_UNAVAILABLE")
        finally:
            release.set()
            holder.join()
    else:
        deployment = deploy()
        with deployment.coordinator.parts.database.engine.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )

    assert deployment.session(WEIGHTS)


def test_an_initial_model_that_stalls_is_ended(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(stall_timeout_s=0.5)
    done = threading.Event()

    def silent() -> Iterator[admin_pb2.UploadInitialModelRequest]:
        done.wait(20)
        yield from ()

    def call() -> object:
        return deployment.admin.UploadInitialModel(
            silent(), metadata=deployment.metadata, timeout=20
        )

    try:
        refused(call, Code.DEADLINE_EXCEEDED, "STALLED")
    finally:
        done.set()


def open_without_message(
    deployment: Deployment, method: str, done: threading.Event, **options: Any
) -> Any:
    """Begin a call that has one message, and do not send it before `done`."""
    make: Any = deployment.channel.stream_unary(f"/qflare.v1.{method}")

    def silent() -> Iterator[bytes]:
        done.wait(20)
        yield from ()

    return make.future(silent(), timeout=20, **options)


def test_callers_that_never_send_their_message_do_not_keep_the_threads(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(stall_timeout_s=0.5, rpc_threads=4, max_uploads=2, max_watchers=1)
    session_id = deployment.session(WEIGHTS)
    done = threading.Event()
    held = [
        open_without_message(deployment, "CoordinatorService/GetKeyset", done) for _ in range(8)
    ]
    try:
        assert [call.code() for call in held] == [Code.DEADLINE_EXCEEDED] * 8
        assert get(deployment, session_id)
    finally:
        done.set()


def test_a_call_without_its_message_is_an_invalid_argument(deployment: Deployment) -> None:
    done = threading.Event()
    done.set()

    call = open_without_message(
        deployment, "AdminService/ListDevices", done, metadata=deployment.metadata
    )

    refused(call.result, Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_a_caller_without_a_credential_is_refused_before_its_message(
    deployment: Deployment,
) -> None:
    done = threading.Event()
    try:
        call = open_without_message(deployment, "AdminService/ListDevices", done)
        refused(call.result, Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    finally:
        done.set()


def test_secrets_stay_out_of_the_log(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    device = RawDevice(deployment.device("raw"), deployment.devices_stub)
    token = dict(device.metadata)["authorization"].removeprefix("Bearer ")
    get_task = pb.GetTaskRequest()
    device.stub.GetTask(get_task, metadata=device.metadata)

    assert "GetTask" in caplog.text
    assert token not in caplog.text
    assert deployment.admin_token not in caplog.text
