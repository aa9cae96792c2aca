"""A whole training session in one process: a coordinator, an administrator and devices, from Python alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_client import (
    Analytics,
    AuthenticationError,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidRequestError,
    enroll,
    run,
)
from qflare_client.admin.administrator import Administrator
from qflare_client.admin.queries import Protection, QueryResult, Question
from qflare_client.errors import DeadlineExceededError
from qflare_server.serving.local import LocalCoordinator

WEIGHTS: dict[str, Any] = {"w": np.zeros(4, np.float32), "steps": np.zeros((), np.int64)}
SETTINGS = {"rounds.quorum": 2, "rounds": {"target": 2}, "total_rounds": 3, "groups": []}


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[LocalCoordinator]:
    with LocalCoordinator(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def admin(coordinator: LocalCoordinator) -> Iterator[Administrator]:
    with Administrator(coordinator.address, coordinator.token) as opened:
        yield opened


def train(arrays: dict[str, Any], _task: object) -> tuple[dict[str, Any], int, dict[str, float]]:
    arrays["w"] += 1.0
    return arrays, 10, {"loss": 0.5}


def take_part(coordinator: LocalCoordinator, home: Path) -> int:
    enroll(coordinator.bundle(), home=home)
    with Client(home=home) as client:
        session_id = client.get_task().training_session_id
        return run(client, train, training_session_id=session_id).update_count


def test_a_session_is_trained_in_one_process(
    coordinator: LocalCoordinator, admin: Administrator, tmp_path: Path
) -> None:
    session = admin.create_session("wards", SETTINGS, model=WEIGHTS, start=True)

    with ThreadPoolExecutor(2) as executor:
        homes = [tmp_path / "one", tmp_path / "two"]
        counts = list(executor.map(lambda home: take_part(coordinator, home), homes))
    ended = admin.wait(session.training_session_id, timeout_s=30)

    session_id = session.training_session_id
    assert counts == [3, 3]
    assert ended.state == training_pb2.TRAINING_SESSION_STATE_COMPLETED
    np.testing.assert_array_equal(admin.download(session_id)["w"], np.full(4, 3, np.float32))
    np.testing.assert_array_equal(admin.download(session_id, 1)["w"], np.ones(4, np.float32))
    assert admin.metrics(session_id)["train_loss"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [row.version for row in admin.versions(session_id)] in ([0, 1, 2, 3], [3, 2, 1, 0])
    assert len(admin.rounds(session_id)) == 3
    assert len(admin.updates(session_id, 1)) == 2
    assert len(admin.devices()) == 2
    assert [row.name for row in admin.sessions()] == ["wards"]


def test_what_is_refused_names_the_reason_and_creates_nothing(
    admin: Administrator, tmp_path: Path
) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"there is no setting rounds\.quorm; want rounds"
    ):
        admin.create_session("x", {"rounds.quorm": 3})
    with pytest.raises(InvalidRequestError):
        admin.create_session("x", SETTINGS | {"rounds.quorum": -3}, model=WEIGHTS)
    with pytest.raises(InvalidRequestError):
        admin.create_session("x", SETTINGS, model={"w": np.ones(3, np.int32)})
    with pytest.raises(InvalidRequestError):
        admin.create_session("x", SETTINGS, model={"w": np.array(["text"])})
    with pytest.raises(FileNotFoundError):
        admin.create_session("x", SETTINGS, model=tmp_path / "absent.safetensors")

    assert admin.sessions() == []


def test_validation_returns_every_default(admin: Administrator) -> None:
    checked = admin.validate_session(SETTINGS, model=WEIGHTS)

    assert checked.config.strategy.name == "fedavg"
    assert checked.config.rounds.deadline.seconds == 600
    assert admin.sessions() == []


def test_a_wait_ends_in_time(admin: Administrator) -> None:
    session = admin.create_session("wards", SETTINGS, model=WEIGHTS, start=True)

    with pytest.raises(DeadlineExceededError):
        admin.wait(session.training_session_id, timeout_s=0.3)

    admin.cancel(session.training_session_id, "tested")
    state = admin.wait(session.training_session_id, timeout_s=30).state
    assert state == training_pb2.TRAINING_SESSION_STATE_CANCELLED


def test_the_token_ends_with_the_coordinator(tmp_path: Path) -> None:
    with LocalCoordinator(tmp_path / "data") as first:
        old = first.token
    with (
        LocalCoordinator(tmp_path / "data") as again,
        Administrator(again.address, old) as admin,
        pytest.raises(AuthenticationError),
    ):
        admin.sessions()


def test_a_query_is_asked_answered_and_refined(
    coordinator: LocalCoordinator, admin: Administrator, tmp_path: Path
) -> None:
    policy = Analytics(
        {"age": ["histogram", "quantiles"]},
        min_cohort=2,
        max_epsilon=600,
        max_examples=100,
        allow_unmasked=True,
    )
    ages = np.concatenate([np.full(20, 12.0), np.linspace(55, 58, 80)])
    with ExitStack() as stack:
        clients = []
        for name in ("one", "two"):
            enroll(coordinator.bundle(), home=tmp_path / name)
            opened = Client(home=tmp_path / name, analytics=policy)
            clients.append(stack.enter_context(opened))

        def answered(session: training_pb2.TrainingSession) -> QueryResult:
            query_id = session.training_session_id
            for client in clients:
                client.answer(client.get_task(query_id, answers_queries=True), ages)
            admin.wait(query_id, timeout_s=30)
            return admin.query_result(session.name)

        question = Question("age", "histogram", upper=100.0, bins=10, max_examples=100)
        protection = Protection(min_cohort=2, epsilon=600.0)
        session = admin.create_query("ages", question, protection, request_id="once")
        again = admin.create_query("ages", question, protection, request_id="once")
        assert again.training_session_id == session.training_session_id
        with pytest.raises(FailedPreconditionError, match="no result yet"):
            admin.query_result("ages")
        found = answered(session)
        assert [row[2] for row in found.result.rows][1:-1] == pytest.approx(
            2 * np.histogram(ages, 10, (0, 100))[0], abs=6 * found.result.error
        )
        assert (found.query.kind, found.version.participant_count) == ("histogram", 2)
        refined = admin.refine_query("ages", "median", 0.6, epsilon=600.0, bins=5)
        assert (refined.config.analytics.lower, refined.config.analytics.upper) == (50, 60)
        ((quantile, value),) = answered(refined).result.rows
        assert quantile == 0.6
        assert value == pytest.approx(56.5, abs=1.5)
    admin.create_session("model", SETTINGS)
    assert [item.name for item in admin.queries()] == ["median", "ages"]
    with pytest.raises(InvalidRequestError, match="trains a model"):
        admin.query_result("model")


@pytest.mark.parametrize(
    ("question", "protection", "told"),
    [
        (Question("age", "mode"), Protection(2, 1.0), "kind"),
        (Question("age", "count"), Protection(1, 1.0), "min_cohort"),
        (Question("age", "count", bins=10_001), Protection(2, 1.0), "bins"),
        (Question("age", "sum", upper=float("nan")), Protection(2, 1.0), "upper"),
        (Question("age", "count"), Protection(2, 1.0, deadline_s=-1.0), "deadline_s"),
        (Question("age", "count"), Protection(2, 0.0), "epsilon_budget"),
        (Question("age", "sum"), Protection(2, 1.0), "upper"),
        (Question("age", "count"), Protection(2, 1.0, helpers=["0" * 64]), "helper"),
        (Question("age", "count"), Protection(2, 1.0, helpers=["a"], neighbors=True), "helpers"),
        (Question("age", "count"), Protection(2, 1.0, group_size=3), "neighbors"),
        (Question("age", "count"), Protection(2, 1.0, step_timeout_s=3.0), "neighbors"),
        (Question("age", "count"), Protection(5, 1.0, min_answers=4), "min_answers"),
        (Question("age", "count"), Protection(5, 1.0, neighbors=True, group_size=4), "group_size"),
        (
            Question("age", "count"),
            Protection(5, 1.0, neighbors=True, corrupt_fraction=2.0),
            "corr",
        ),
        (
            Question("age", "count"),
            Protection(5, 1.0, neighbors=True, corrupt_fraction=0.9),
            "group_size",
        ),
    ],
)
def test_a_wrong_query_is_refused_with_its_reason(
    admin: Administrator, question: Question, protection: Protection, told: str
) -> None:
    with pytest.raises((InvalidArgumentError, InvalidRequestError), match=told):
        admin.create_query("ages", question, protection)
    assert admin.queries() == []
