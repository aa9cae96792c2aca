"""Two coordinators on one database: what one is told the other knows on its next call, or poll of a little later."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import coordinator_service_pb2 as device_calls
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    DeviceRevokedError,
    DeviceSuspendedError,
    TaskKind,
    TrainingTask,
    run,
)
from qflare_client.admin.__main__ import main as admin
from qflare_server.storage.epochs import MAX_AGE_S
from qflare_server.verification import verify_database

Deploy = Callable[..., Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))


def add_one(
    arrays: dict[str, Array], _config: TrainingTask
) -> tuple[dict[str, Array], int, dict[str, float]]:
    return {name: array + np.float32(1) for name, array in arrays.items()}, 10, {"accuracy": 0.5}


@pytest.fixture
def pair(deploy: Deploy) -> tuple[Any, Any]:
    """Return two coordinators on one database, with one identity."""
    return deploy(lease_s=1.0), deploy(lease_s=1.0)


@pytest.fixture
def at_second(pair: tuple[Any, Any]) -> Client:
    """Return a device that enrolled at the first coordinator and has called the second."""
    first, second = pair
    first.device("a").close()
    client = Client(home=first.folder / "a", address=second.coordinator.address)
    session_id = first.session(rounds=ONE_DEVICE)
    client.get_task(session_id)
    return client


def call(deployment: Any, method: str, secret: str = "", /, **fields: Any) -> Any:
    request = getattr(pb, f"{method}Request")(**fields)
    metadata = (("authorization", f"Bearer {secret or deployment.admin_token}"),)
    return getattr(deployment.admin, method)(request, metadata=metadata)


def test_a_device_revoked_at_one_is_refused_by_the_other_at_once(
    pair: tuple[Any, Any], at_second: Client
) -> None:
    call(pair[0], "RevokeDevice", device_id=at_second.device_id, reason="stolen")
    with at_second:
        with pytest.raises(DeviceRevokedError):
            at_second.heartbeat()
        with pytest.raises(DeviceRevokedError):
            at_second.get_task()


def test_polls_of_a_device_revoked_at_one_are_refused_by_the_other_within_the_bound(
    pair: tuple[Any, Any], at_second: Client
) -> None:
    """Nothing but polls is sent, so that nothing else tells the other coordinator."""
    call(pair[0], "RevokeDevice", device_id=at_second.device_id, reason="stolen")
    until = time.monotonic() + MAX_AGE_S
    with at_second:
        while time.monotonic() < until:  # each has no task for it, or refuses it
            with suppress(DeviceRevokedError):
                assert at_second.get_task().kind is TaskKind.WAIT
        with pytest.raises(DeviceRevokedError):
            at_second.get_task()


def test_a_suspension_and_its_end_are_known_at_once(
    pair: tuple[Any, Any], at_second: Client
) -> None:
    call(pair[0], "SuspendDevice", device_id=at_second.device_id)
    with at_second:
        with pytest.raises(DeviceSuspendedError):
            at_second.heartbeat()
        with pytest.raises(DeviceSuspendedError):
            at_second.get_task()
        call(pair[0], "ReinstateDevice", device_id=at_second.device_id)
        at_second.heartbeat()
        at_second.get_task()


def test_a_token_revoked_at_one_is_refused_by_the_other_at_once(pair: tuple[Any, Any]) -> None:
    first, second = pair
    issued = call(first, "IssueAdminToken", name="alice", roles=["viewer"]).token
    call(second, "ListDevices", issued.secret)
    call(first, "RevokeToken", token_id=issued.token.token_id)
    with pytest.raises(grpc.RpcError) as refused:
        call(second, "ListDevices", issued.secret)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_watch_ends_with_its_token(pair: tuple[Any, Any]) -> None:
    first, second = pair
    session_id = first.session(rounds=ONE_DEVICE)
    issued = call(first, "IssueAdminToken", name="alice", roles=["viewer"]).token
    watching = second.admin.WatchTrainingSession(
        pb.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=(("authorization", f"Bearer {issued.secret}"),),
        timeout=60,
    )
    next(watching)
    call(first, "RevokeToken", token_id=issued.token.token_id)
    call(first, "PauseTrainingSession", training_session_id=session_id)
    with pytest.raises(grpc.RpcError) as refused:
        next(watching)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_training_session_goes_on_where_the_other_coordinator_drains(
    pair: tuple[Any, Any],
) -> None:
    first, second = pair
    first.device("a").close()
    session_id = first.session(rounds=ONE_DEVICE, total_rounds=3)
    watching = second.admin.WatchTrainingSession(
        pb.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=second.metadata,
        timeout=60,
    )
    next(watching)

    first.coordinator.stop(0.5)
    with Client(home=first.folder / "a", address=second.coordinator.address) as client:
        run(client, add_one, training_session_id=session_id)

    published = [event for event in watching if event.HasField("global_model")]
    assert [event.global_model.version for event in published] == [1, 2, 3]


def test_a_watcher_at_one_sees_what_happens_at_the_other(pair: tuple[Any, Any]) -> None:
    first, second = pair
    client = first.device("a")
    session_id = first.session(rounds=ONE_DEVICE, total_rounds=1)
    watching = second.admin.WatchTrainingSession(
        pb.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=second.metadata,
        timeout=60,
    )
    next(watching)
    run(client, add_one, training_session_id=session_id)
    kinds = {event.kind for event in watching}
    assert pb.TRAINING_SESSION_EVENT_KIND_VERSION_PUBLISHED in kinds


def test_a_rule_changed_at_one_holds_at_both_and_verifies(
    pair: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    device = first.device("a")
    rounds = training_pb2.RoundPolicy(quorum=3, target=3, deadline=Duration(seconds=600))
    session_id = first.session(rounds=rounds, total_rounds=1)
    watching = first.admin.WatchTrainingSession(
        pb.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=first.metadata,
        timeout=60,
    )
    next(watching)
    token = tmp_path / "token"
    token.write_text(second.admin_token)
    token.chmod(0o600)
    command = ["--address", second.coordinator.address, "--token-file", str(token), "session"]

    admin([*command, "update", session_id, "--quorum", "1", "--target", "1", "--deadline-s", "300"])

    assert "5 min" in capsys.readouterr().out
    shown = call(first, "GetTrainingSession", training_session_id=session_id)
    changed = shown.training_session.config.rounds
    assert (changed.quorum, changed.target, changed.deadline.seconds) == (1, 1, 300)
    took = shown.round.deadline_time.seconds - shown.round.open_time.seconds
    assert took == 300
    run(device, add_one, training_session_id=session_id)
    assert [item.global_model.version for item in watching if item.HasField("global_model")] == [1]
    parts = first.coordinator.parts
    parts.use_cases.audit.head(fresh=True)
    assert verify_database(parts.context, parts.keys.root_key_ids).findings == ()


def test_each_says_that_both_serve(pair: tuple[Any, Any]) -> None:
    for deployment in pair:
        deployment.coordinator._housekeeping._announce()
    replicas = call(pair[0], "GetCoordinatorStatus").replicas
    assert len({replica.replica_id for replica in replicas}) == 2


def test_keys_of_both_are_the_same(pair: tuple[Any, Any]) -> None:
    bundles = [
        deployment.devices_stub.GetKeyset(device_calls.GetKeysetRequest()).bundle
        for deployment in pair
    ]
    assert bundles[0] == bundles[1]
