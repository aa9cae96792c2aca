"""Partial sharing: what stays on a device never travels, survives a restart, and binds the coordinator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client import Client, PrivacyError, RejectedError, TrainingFunctionError, run
from qflare_client.tasks import TrainingTask
from tests.integration.client.test_device import wait_for_training
from tests.support.raw_device import info_of

Deploy = Callable[..., Any]
ROUNDS = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
SHARED = {"head.weight": np.zeros(4, np.float32)}
NORMS = training_pb2.TransferPolicy(local_tensors=["bn*.*"])


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what is tested is the device."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


class Model:
    """A training function that counts its trainings in a tensor that stays, and shares another.

    Attributes:
        given: The names that each call was given.
    """

    def __init__(self, local: Any = None) -> None:
        self.given: list[set[str]] = []
        self.seen: list[float] = []
        self._local = local

    def __call__(
        self, arrays: dict[str, Array], _: TrainingTask
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        self.given.append(set(arrays))
        count = arrays.get("bn1.count", np.zeros(1, np.int64))
        self.seen.append(float(count[0]))
        local = count + 1 if self._local is None else self._local
        return {"head.weight": arrays["head.weight"] + 1, "bn1.count": local}, 5, {}


def test_local_tensors_stay_and_come_back_at_each_training(deployment: Any) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, total_rounds=3, transfer=NORMS)
    model = Model()
    with deployment.device("ward") as client:
        assert run(client, model, training_session_id=session_id).update_count == 3
        version = client.download(session_id)
        kept = client.local_tensors(session_id)

    assert model.given == [{"head.weight"}] + 2 * [{"head.weight", "bn1.count"}]
    assert model.seen == [0, 1, 2]
    assert set(version.arrays) == {"head.weight"}
    assert kept["bn1.count"].tolist() == [3]


def test_local_tensors_survive_a_restart_of_the_device(deployment: Any) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, total_rounds=4, transfer=NORMS)
    home = deployment.folder / "ward"
    with deployment.device("ward") as client:
        task = client.get_task(session_id)
        base = client.download_base(task)
        client.submit(task, base, *Model()(dict(base.arrays), task.config))
    model = Model()
    with Client(home=home) as client:
        run(client, model, training_session_id=session_id)
        assert client.local_tensors(session_id)["bn1.count"].tolist() == [4]

    assert model.seen == [1, 2, 3]


def test_evaluations_get_the_local_tensors(deployment: Any) -> None:
    session_id = deployment.session(
        SHARED,
        rounds=ROUNDS,
        total_rounds=2,
        transfer=NORMS,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1, quorum=1),
    )
    given: list[set[str]] = []

    def evaluate(arrays: dict[str, Array], _: TrainingTask) -> tuple[int, dict[str, float]]:
        given.append(set(arrays))
        return 5, {"accuracy": 0.5}

    with deployment.device("ward") as client:
        run(client, Model(), evaluate=evaluate, training_session_id=session_id)

    assert given
    assert given[-1] == {"head.weight", "bn1.count"}


def test_local_tensors_of_a_refused_update_do_not_take_effect(deployment: Any) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, total_rounds=9, transfer=NORMS)
    model = Model()
    with deployment.device("ward") as client:
        task = client.get_task(session_id)
        base = client.download_base(task)
        client.submit(task, base, *model(dict(base.arrays), task.config))
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        given = dict(base.arrays) | client.local_tensors(session_id)
        trained = model(given, task.config)
        deployment.admin.CancelTrainingSession(
            admin_pb2.CancelTrainingSessionRequest(training_session_id=session_id),
            metadata=deployment.metadata,
        )
        with pytest.raises(RejectedError):
            client.submit(task, base, *trained)

        assert client.local_tensors(session_id)["bn1.count"].tolist() == [1]


def test_local_tensors_take_effect_when_only_the_receipt_was_lost(deployment: Any) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, total_rounds=9, transfer=NORMS)
    home = Path(deployment.folder / "ward")
    with deployment.device("ward") as client:
        task = client.get_task(session_id)
        base = client.download_base(task)
        client.submit(task, base, *Model()(dict(base.arrays), task.config))
    (path,) = home.glob("local-*")
    path.rename(path.with_name(path.name + ".pending"))  # as a crash before the receipt leaves it

    with Client(home=home) as client:
        assert client.local_tensors(session_id)["bn1.count"].tolist() == [1]


def test_a_damaged_file_is_dropped(deployment: Any) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, total_rounds=1, transfer=NORMS)
    with deployment.device("ward") as client:
        run(client, Model(), training_session_id=session_id)
        (path,) = Path(deployment.folder / "ward").glob("local-*")
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
        assert client.local_tensors(session_id) == {}


def test_a_model_with_a_local_tensor_is_refused(deployment: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.session(SHARED | {"bn1.mean": np.zeros(2, np.float32)}, transfer=NORMS)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'bn1.mean' matches transfer.local_tensors" in str(caught.value.details())
    assert info_of(caught.value).reason == "INVALID_MANIFEST"


def test_the_devices_own_patterns_bind_the_coordinator(deployment: Any) -> None:
    weights = SHARED | {"bn1.mean": np.zeros(2, np.float32)}
    session_id = deployment.session(weights, rounds=ROUNDS)
    deployment.device("ward").close()
    model = Model()
    with (
        Client(home=deployment.folder / "ward", local_tensors=["bn1.*"]) as client,
        pytest.raises(PrivacyError, match=r"'bn1\.mean' is part of the version"),
    ):
        run(client, model, training_session_id=session_id)

    assert model.given == []


def test_local_tensors_that_cannot_be_kept_are_the_training_functions_fault(
    deployment: Any,
) -> None:
    session_id = deployment.session(SHARED, rounds=ROUNDS, transfer=NORMS)
    with (
        deployment.device("ward") as client,
        pytest.raises(TrainingFunctionError, match="local tensors"),
    ):
        run(client, Model(np.array(["x"], object)), training_session_id=session_id)
