"""Tasks in the pull style: one for each round, from the version before, until the session ends."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import training_pb2
from qflare_client import InvalidArgumentError, Receipt, TrainingFunctionError

Deploy = Callable[..., Any]
ROUNDS = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
MODEL = {"w": np.zeros(4, np.float32)}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what is tested is the device."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


def test_a_program_that_owns_its_loop_trains_every_round(deployment: Any) -> None:
    session_id = deployment.session(MODEL, rounds=ROUNDS, total_rounds=3)
    seen = []
    with deployment.device("ward") as client:
        for task in client.tasks(session_id):
            seen.append((task.round_number, task.config.base_version, task.arrays["w"].tolist()))
            task.arrays["w"] += 1
            assert isinstance(task.submit(task.arrays, 5, {"loss": 0.5}), Receipt)
            assert task.training_session_id == session_id
        version = client.download(session_id)

    assert seen == [(number + 1, number, 4 * [float(number)]) for number in range(3)]
    assert version.arrays["w"].tolist() == [3.0] * 4


def test_a_task_that_is_left_is_not_given_again(deployment: Any) -> None:
    two = training_pb2.RoundPolicy(quorum=1, target=1, deadline=Duration(seconds=60))
    session_id = deployment.session(MODEL, rounds=two, total_rounds=2)
    with deployment.device("slow") as slow, deployment.device("fast") as fast:
        given = []
        for task in slow.tasks(session_id):
            given.append(task.round_number)
            (other,) = [next(iter(fast.tasks(session_id)))]
            assert other.submit(other.arrays, 1) is not None
            assert task.submit(task.arrays, 1) is None  # the round has all its updates

    assert given == [1, 2]


def test_a_failed_task_is_reported(deployment: Any) -> None:
    session_id = deployment.session(MODEL, rounds=ROUNDS, total_rounds=1)
    with deployment.device("ward") as client:
        for task in client.tasks(session_id):
            with pytest.raises(TrainingFunctionError):
                task.submit({}, 1)
            task.fail("ValueError", "no tensors")
            assert task.submit(task.arrays, 1) is not None
            break


def test_stop_and_close_end_the_iteration(deployment: Any) -> None:
    session_id = deployment.session(MODEL, rounds=ROUNDS, total_rounds=2)
    stop = threading.Event()
    with deployment.device("ward") as client:
        tasks = client.tasks(session_id, stop=stop)
        assert next(tasks).round_number == 1
        stop.set()
        assert list(tasks) == []
        more = client.tasks(session_id)
        client.close()
        assert list(more) == []


def test_arguments_are_checked_before_the_first_task(deployment: Any) -> None:
    with deployment.device("ward") as client, pytest.raises(InvalidArgumentError):
        client.tasks(patience_s=-1)
