"""A whole training session in one process: a coordinator, an administrator and devices, from Python alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_client import AuthenticationError, Client, InvalidRequestError, enroll, run
from qflare_client.admin.administrator import Administrator
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
