"""What administrators do with running training sessions, on a real coordinator with real devices."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2, training_pb2
from qflare_client import Client, NotSelectedError, Task, TaskKind, TrainingTask, run
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.tables import DeviceState

Deploy = Callable[..., Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))


def add_one(
    arrays: dict[str, Array], _config: TrainingTask
) -> tuple[dict[str, Array], int, dict[str, float]]:
    return {name: array + np.float32(1) for name, array in arrays.items()}, 10, {"accuracy": 0.5}


def follow(deployment: Any, session_id: str, **request: Any) -> Iterator[Any]:
    wanted = pb.WatchTrainingSessionRequest(training_session_id=session_id, **request)
    return iter(
        deployment.admin.WatchTrainingSession(wanted, metadata=deployment.metadata, timeout=60)
    )


def kinds(events: list[Any]) -> list[str]:
    prefix = "TRAINING_SESSION_EVENT_KIND_"
    names = [pb.TrainingSessionEventKind.Name(event.kind) for event in events]
    return [name.removeprefix(prefix) for name in names if not name.endswith("KEEPALIVE")]


def call(deployment: Any, name: str, **fields: Any) -> Any:
    request = getattr(pb, f"{name}Request")(**fields)
    return getattr(deployment.admin, name)(request, metadata=deployment.metadata)


def test_a_watcher_sees_every_round_of_a_training_session(deploy: Deploy) -> None:
    deployment = deploy(watch_poll_s=0.05)
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=2)
    events = follow(deployment, session_id)
    first = next(events)

    run(deployment.device("a"), add_one, training_session_id=session_id)

    seen = kinds([first, *events])
    assert seen[0] == "SNAPSHOT"
    assert seen.count("VERSION_PUBLISHED") == 2
    assert seen.count("ROUND_OPENED") == 1
    assert seen[-1] == "STATE_CHANGED"


def test_a_watcher_that_comes_back_hears_of_the_rounds_it_missed(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=3)
    run(deployment.device("a"), add_one, training_session_id=session_id)

    events = list(follow(deployment, session_id, known_round_number=1))

    published = [event for event in events if event.global_model.version and event.round.version]
    assert [event.global_model.version for event in published[-2:]] == [2, 3]


def test_a_watch_ends_in_time(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE)
    events = list(follow(deployment, session_id, duration=Duration(nanos=200_000_000)))
    assert kinds(events) == ["SNAPSHOT"]


def test_watchers_have_places_of_their_own(deploy: Deploy) -> None:
    deployment = deploy(max_watchers=1)
    session_id = deployment.session(rounds=ONE_DEVICE)
    held = follow(deployment, session_id)
    next(held)

    with pytest.raises(grpc.RpcError) as refused:
        next(follow(deployment, session_id))

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert deployment.device("a").download(session_id).version == 0


def test_a_watch_ends_when_the_coordinator_drains(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE)
    events = follow(deployment, session_id)
    next(events)

    deployment.coordinator.use_cases.watching.close()

    with pytest.raises(grpc.RpcError) as ended:
        next(events)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_rollback_is_a_version_with_the_content_of_the_older_one(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=3)
    stop_after(client, session_id, 2)

    made = call(
        deployment, "RollbackGlobalModel", training_session_id=session_id, version=1, reason="worse"
    )

    old = call(deployment, "DescribeGlobalModel", training_session_id=session_id, version=1)
    assert made.global_model.version == 3
    assert made.global_model.rollback_version == 1
    assert made.global_model.payload_digest == old.global_model.payload_digest
    assert made.round.base_version == 3
    rounds = call(deployment, "ListRounds", training_session_id=session_id).rounds
    assert [item.state for item in rounds[:2]] == [
        training_pb2.ROUND_STATE_OPEN,
        training_pb2.ROUND_STATE_CANCELLED,
    ]
    run(client, add_one, training_session_id=session_id)
    np.testing.assert_array_equal(client.download(session_id).arrays["w"], np.full(4, 2))


def stop_after(client: Client, session_id: str, count: int) -> None:
    """Take part in so many rounds."""
    for number in range(1, count + 1):
        task = client.get_task(session_id, trains_only=True)
        while task.round_number != number:
            task = client.get_task(session_id, trains_only=True)
        base = client.download_base(task)
        client.submit(task, base, *add_one(base.arrays, task.config))
    while client.get_task(session_id, trains_only=True).round_number != count + 1:
        pass


def test_the_latest_version_is_not_rolled_back_to(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE)
    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, "RollbackGlobalModel", training_session_id=session_id, version=0)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_devices_measure_versions_and_the_gate_releases_them(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=3,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1, group_by="device_type"),
        release=training_pb2.ReleasePolicy(
            bounds=[training_pb2.MetricBound(metric="accuracy", min_value=0.8)]
        ),
    )

    def evaluate(arrays: dict[str, Array], _config: TrainingTask) -> tuple[int, dict[str, float]]:
        return 5, {"accuracy": 0.3 * float(arrays["w"][0])}

    client = deployment.device("a", device_type="phone")
    summary = run(client, add_one, evaluate=evaluate, training_session_id=session_id)

    assert summary.evaluation_count == 3
    page = call(deployment, "ListMetrics", training_session_id=session_id)
    assert [item.released for item in page.metrics] == [False, False, False, True]
    assert page.metrics[3].metrics["accuracy"] == pytest.approx(0.9)
    assert page.metrics[3].group_metrics["phone"].values["accuracy"] == pytest.approx(0.9)
    session = call(deployment, "GetTrainingSession", training_session_id=session_id)
    assert session.training_session.released_version == 3
    assert session.training_session.best.version == 3


def test_an_administrator_may_release_what_the_gate_does_not(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        release=training_pb2.ReleasePolicy(
            bounds=[training_pb2.MetricBound(metric="accuracy", min_value=0.8)]
        ),
    )
    answer = call(deployment, "ReleaseGlobalModel", training_session_id=session_id, version=0)
    assert answer.global_model.released
    owner = call(deployment, "GetTrainingSession", training_session_id=session_id)
    assert owner.training_session.released_version == 0


def test_training_ends_early_when_the_target_is_reached(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=50,
        early_stop=training_pb2.EarlyStopPolicy(metric="accuracy", target=0.5),
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
    )
    client = deployment.device("a")
    summary = run(
        client,
        add_one,
        evaluate=lambda *_: (10, {"accuracy": 0.5}),
        training_session_id=session_id,
    )
    assert summary.update_count == 2  # the version of the first round is measured in the second
    owner = call(deployment, "GetTrainingSession", training_session_id=session_id).training_session
    assert owner.state == training_pb2.TRAINING_SESSION_STATE_COMPLETED
    assert "target" in owner.state_reason


def test_a_device_whose_updates_are_rejected_is_quarantined(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60)),
        total_rounds=5,
        safeguards=training_pb2.SafeguardPolicy(max_norm=100.0, quarantine_rejections=1),
    )
    good, good_too, bad = (deployment.device(name) for name in ("a", "b", "c"))
    for client, step in ((good, 1.0), (bad, 1e6)):
        task = client.get_task(session_id)
        base = client.download_base(task)
        arrays = {"w": base.arrays["w"] + np.float32(step)}
        client.submit(task, base, arrays, 10)
    while good_too.get_task(session_id).round_number != 2:
        pass

    page = call(deployment, "ListDevices", state=device_pb2.DEVICE_STATE_QUARANTINED)

    assert len(page.devices) == 1
    assert "rejected" in page.devices[0].state_reason
    call(deployment, "ReinstateDevice", device_id=page.devices[0].device_id)
    assert not call(deployment, "ListDevices", state=device_pb2.DEVICE_STATE_QUARANTINED).devices


def test_a_reinstated_device_begins_anew(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60)),
        total_rounds=9,
        safeguards=training_pb2.SafeguardPolicy(max_norm=100.0, quarantine_rejections=2),
    )
    good, bad = deployment.device("a"), deployment.device("b")
    states = []
    for number in range(1, 4):
        for client, step in ((good, 1.0), (bad, 1e6)):
            submit(client, session_id, number, step)
        wait_for_round(good, session_id, number + 1)
        state = call(deployment, "GetDevice", device_id=bad.device_id).device.state
        states.append(state)
        if state == device_pb2.DEVICE_STATE_QUARANTINED:
            assert bad.get_task(session_id).kind is TaskKind.WAIT
            call(deployment, "ReinstateDevice", device_id=bad.device_id)
    assert states == [
        device_pb2.DEVICE_STATE_ACTIVE,
        device_pb2.DEVICE_STATE_QUARANTINED,
        device_pb2.DEVICE_STATE_ACTIVE,
    ]


def submit(client: Client, session_id: str, number: int, step: float) -> None:
    """Contribute to a round."""
    task = wait_for_round(client, session_id, number)
    base = client.download_base(task)
    client.submit(task, base, {"w": base.arrays["w"] + np.float32(step)}, 10)


def wait_for_round(client: Client, session_id: str, number: int) -> Task:
    """Poll until a round is there to contribute to."""
    task = client.get_task(session_id)
    while task.round_number != number:
        task = client.get_task(session_id)
    return task


def test_a_quarantined_device_measures_nothing(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=2,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
    )
    client = deployment.device("a")
    submit(client, session_id, 1, 1.0)
    while (task := client.get_task(session_id)).kind is not TaskKind.EVALUATE:
        pass
    deployment.coordinator.use_cases.devices._move(
        Caller(), client.device_id, DeviceState.QUARANTINED, "test"
    )
    with pytest.raises(NotSelectedError):
        client.report_evaluation(task, 10, {"accuracy": 1.0})
    assert client.get_task(session_id).kind is TaskKind.WAIT


def test_a_rule_that_has_no_effect_warns_where_the_session_is_created_and_shown(
    deploy: Deploy,
) -> None:
    deployment = deploy()
    wanted = training_pb2.TrainingConfig(
        strategy=training_pb2.StrategyConfig(name="trimmed_mean"),
        rounds=training_pb2.RoundPolicy(quorum=3),
    )

    request = pb.CreateTrainingSessionRequest(name="trimmed", config=wanted)
    created = deployment.admin.CreateTrainingSession(request, metadata=deployment.metadata)
    session_id = created.training_session.training_session_id
    shown = call(deployment, "GetTrainingSession", training_session_id=session_id)

    assert list(created.training_session.warnings) == list(shown.training_session.warnings)
    assert "trims nothing of fewer than 10 updates" in created.training_session.warnings[0]
