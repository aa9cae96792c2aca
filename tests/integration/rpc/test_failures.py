"""A device whose training function fails is seen, with the reason, wherever an administrator looks."""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client import QflareClientError, TaskFailedError, TrainingTask, run
from qflare_client.admin.__main__ import main
from qflare_server.context import utc_now
from qflare_server.serving.maintenance import Maintenance
from qflare_server.serving.observability.database_metrics import DatabaseCollector
from qflare_server.storage.repository import device_failures
from qflare_server.storage.tables import DeviceFailure
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from tests.support.raw_device import RawDevice, reason_of
from tests.support.visitor import Visitor

Deploy = Callable[..., Any]
Trained = tuple[Mapping[str, Array], int, Mapping[str, float]]
SECRET = "patient 4711 has 38.5"
START = datetime(2020, 1, 1, tzinfo=UTC)
ROUNDS = training_pb2.RoundPolicy(quorum=1)


def notices_of(deployment: Any, session_id: str) -> list[training_pb2.Notice]:
    request = admin_pb2.GetTrainingSessionRequest(training_session_id=session_id)
    answer = deployment.admin.GetTrainingSession(request, metadata=deployment.metadata)
    return list(answer.notices)


def failed_counts(deployment: Any, session_id: str) -> list[int]:
    """Return how many devices failed, by round."""
    request = admin_pb2.ListRoundsRequest(training_session_id=session_id)
    rounds = deployment.admin.ListRounds(request, metadata=deployment.metadata).rounds
    return [row.failed_count for row in sorted(rounds, key=lambda row: row.round_number)]


def out_of_memory(_arrays: Mapping[str, Array], _task: TrainingTask) -> Trained:
    raise MemoryError(SECRET)


def explained(_arrays: Mapping[str, Array], _task: TrainingTask) -> Trained:
    raise TaskFailedError("the batch does not\nfit the GPU" + "!" * 300) from MemoryError(SECRET)


def nothing(_arrays: Mapping[str, Array], _task: TrainingTask) -> Trained:
    return None  # type: ignore[return-value]


def fail(deployment: Any, session_id: str, train: Callable[..., Trained]) -> str:
    """Let a device fail; return its id."""
    client = deployment.device("ward")
    with pytest.raises((MemoryError, QflareClientError)):
        run(client, train, training_session_id=session_id, patience_s=20.0)
    return str(client.device_id)


@pytest.mark.parametrize(
    ("train", "ending"),
    [
        (out_of_memory, "reported MemoryError"),
        (explained, "reported MemoryError: the batch does not fit the GPU" + "!" * 170),
        (nothing, "reported TrainingFunctionError"),
    ],
)
def test_a_failure_is_reported_by_its_class_and_deliberate_text_alone(
    deploy: Deploy, train: Callable[..., Trained], ending: str
) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ROUNDS)

    device_id = fail(deployment, session_id, train)

    (found,) = notices_of(deployment, session_id)
    assert found.code == "device_failed"
    assert found.text.endswith(ending)
    assert list(found.device_ids) == [device_id]
    assert SECRET not in str(found)


def test_a_failed_evaluation_is_reported(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=ROUNDS, evaluation=training_pb2.EvaluationPolicy(every_rounds=1)
    )

    def evaluate(_arrays: Mapping[str, Array], _task: TrainingTask) -> Any:
        raise KeyError(SECRET)

    with pytest.raises(KeyError):
        run(
            deployment.device("ward"),
            lambda arrays, _task: (arrays, 1, {}),
            evaluate=evaluate,
            training_session_id=session_id,
            patience_s=20.0,
        )

    (found,) = notices_of(deployment, session_id)
    assert "round 2" in found.text
    assert found.text.endswith("reported KeyError")


def test_every_surface_says_the_same(
    deploy: Deploy,
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")
    session_id = deployment.session(rounds=ROUNDS)
    watching = deployment.admin.WatchTrainingSession(
        admin_pb2.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=deployment.metadata,
    )
    next(watching)

    fail(deployment, session_id, out_of_memory)

    text = "reported MemoryError"
    (noticed,) = next(event for event in watching if text in str(event.notices)).notices
    watching.cancel()
    request = admin_pb2.GetAggregationStatusRequest(training_session_id=session_id)
    status = deployment.admin.GetAggregationStatus(request, metadata=deployment.metadata)
    assert [item.text for item in status.notices] == [noticed.text]
    assert status.round.failed_count == 1
    assert failed_counts(deployment, session_id) == [1]
    assert noticed == notices_of(deployment, session_id)[0]
    _check_command_line(deployment, tmp_path, capsys, session_id, noticed)
    _check_dashboard(deployment, session_id, noticed.text)
    _check_operations(deployment, noticed, caplog)


def _check_command_line(
    deployment: Any, tmp_path: Any, capsys: Any, session_id: str, noticed: training_pb2.Notice
) -> None:
    token = tmp_path / "token"
    token.write_text(deployment.admin_token)
    token.chmod(0o600)
    address = deployment.coordinator.address
    common = ["--address", address, "--token-file", str(token)]
    main([*common, "session", "show", session_id])
    shown = capsys.readouterr().out
    assert f"! {noticed.text}" in shown
    assert f"try: {noticed.remedy}" in shown
    main([*common, "session", "rounds", session_id])
    names, values = (line.split() for line in capsys.readouterr().out.strip().splitlines())
    assert values[names.index("failed")] == "1"


def _check_dashboard(deployment: Any, session_id: str, text: str) -> None:
    visitor = Visitor(deployment.coordinator.dashboard.url)
    visitor.log_in(deployment.issue_admin(Role.VIEWER))
    for path in ("/", f"/sessions/{session_id}"):
        assert text in visitor.get(path).text, path
    assert "Everything is in order" not in visitor.get("/").text
    assert '<td data-label="Failed" class="n">1</td>' in visitor.get(f"/sessions/{session_id}").text
    page = visitor.get(f"/sessions/{session_id}/rounds/1").text
    assert "<dt>Reported a failure</dt><dd>1</dd>" in page


def ignore(*, healthy: bool) -> None:
    """Take no notice of whether the database answers."""
    del healthy


def _check_operations(deployment: Any, noticed: training_pb2.Notice, caplog: Any) -> None:
    """The metrics name the reason, and the log says each notice once."""
    context = deployment.coordinator.parts.context
    families = {family.name: family for family in DatabaseCollector(context).collect()}
    samples = families["qflare_training_session_waits"].samples
    assert [(item.labels["reason"], item.value) for item in samples] == [("device_failed", 1)]
    use_cases = deployment.coordinator.use_cases
    maintenance = Maintenance(context, use_cases, AuditSequencer(context), "r", "a", ignore)
    with caplog.at_level(logging.WARNING):
        for _ in range(21):
            maintenance.tick()
    mine = [row for row in caplog.records if row.threadName == "MainThread"]
    said = [row for row in mine if noticed.text in row.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [{"kind": ""}, {"kind": "x" * 65}, {"text": "x" * 201}, {"text": "a\nb"}, {"round_number": -1}],
)
def test_a_report_that_is_no_kind_and_short_text_is_refused(
    deploy: Deploy, changes: dict[str, Any]
) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ROUNDS)
    device = RawDevice(deployment.device("a"), deployment.devices_stub)
    fields: dict[str, Any] = {"training_session_id": session_id, "kind": "X", **changes}

    with pytest.raises(grpc.RpcError) as refused:
        device.stub.ReportFailure(pb.ReportFailureRequest(**fields), metadata=device.metadata)

    assert reason_of(refused.value) == "INVALID_REQUEST"
    with deployment.coordinator.parts.context.database.read() as session:
        assert session.query(DeviceFailure).count() == 0


def test_old_failures_are_deleted_once_their_round_is_over(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ROUNDS)
    fail(deployment, session_id, out_of_memory)
    write, later = deployment.coordinator.parts.database.write, utc_now() + timedelta(days=60)

    assert write(lambda session: device_failures.delete_old(session, later, 1000)) == 0
    request = admin_pb2.CancelTrainingSessionRequest(training_session_id=session_id)
    deployment.admin.CancelTrainingSession(request, metadata=deployment.metadata)

    assert write(lambda session: device_failures.delete_old(session, START, 1000)) == 0
    assert write(lambda session: device_failures.delete_old(session, later, 1000)) == 1
    assert failed_counts(deployment, session_id) == [1]


def test_a_device_that_continues_reports_each_failure_and_takes_part_again(
    deploy: Deploy, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = deploy()
    session_id = deployment.session(total_rounds=1, rounds=ROUNDS)
    results: list[Any] = [None, ({"weight": "rubbish"}, 1, {})]

    def train(arrays: Mapping[str, Array], _task: TrainingTask) -> Any:
        return results.pop() if results else (arrays, 1, {})

    summary = run(
        deployment.device("ward"),
        train,
        training_session_id=session_id,
        patience_s=20.0,
        on_failure="continue",
    )

    assert (summary.failure_count, summary.update_count) == (2, 1)
    assert caplog.text.count("failed, the loop continues") == 2
    with deployment.coordinator.parts.context.database.read() as session:
        (row,) = session.query(DeviceFailure).all()
        assert (row.kind, row.report_count) == ("TrainingFunctionError", 2)
    assert failed_counts(deployment, session_id) == [1]


def test_results_that_cannot_be_sent_are_reported(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ROUNDS)

    fail(deployment, session_id, lambda _arrays, _task: ({}, 1, {}))

    (found,) = notices_of(deployment, session_id)
    assert found.text.endswith("reported TrainingFunctionError")


def test_failing_devices_end_a_session_for_real(
    deploy: Deploy, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy()
    policy = training_pb2.FailurePolicy(
        max_failures=0, action=training_pb2.FAILURE_ACTION_END_SESSION
    )
    session_id = deployment.session(rounds=ROUNDS, failures=policy)
    watching = deployment.admin.WatchTrainingSession(
        admin_pb2.WatchTrainingSessionRequest(training_session_id=session_id),
        metadata=deployment.metadata,
    )

    fail(deployment, session_id, out_of_memory)

    failed = training_pb2.TRAINING_SESSION_STATE_FAILED
    next(event for event in watching if event.training_session.state == failed)
    token = tmp_path / "token"
    token.write_text(deployment.admin_token)
    token.chmod(0o600)
    address = deployment.coordinator.address
    main(["--address", address, "--token-file", str(token), "session", "show", session_id])
    shown = capsys.readouterr().out
    assert "too many devices failed: at least 1 of 1, at most 0 may" in shown
