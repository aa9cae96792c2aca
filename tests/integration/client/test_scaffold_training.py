"""SCAFFOLD through a real coordinator: dissimilar devices reach the minimum that federated averaging misses."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import training_pb2
from qflare_client import Client, Scaffold, run
from qflare_client.tasks import TrainingTask
from tests.support.raw_device import info_of

Deploy = Callable[..., Any]
A = (1.0, 10.0)
B = (-3.0, 2.0)
MINIMUM = sum(a * b for a, b in zip(A, B, strict=True)) / sum(A)
STEPS = 8
RATE = 0.05
MODEL = {"w": np.zeros(1)}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what is tested are the numbers."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


def settings(strategy: str, rounds: int) -> dict[str, Any]:
    return {
        "rounds": training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=120)),
        "total_rounds": rounds,
        "strategy": training_pb2.StrategyConfig(
            name=strategy, uniform_weights=strategy == "fedavg"
        ),
        "device_training": training_pb2.DeviceTraining(local_epochs=STEPS, learning_rate=RATE),
    }


def stepped(device: int, weights: Array, correction: Array | float) -> None:
    for _ in range(STEPS):
        weights -= RATE * (A[device] * (weights - B[device]) + correction)


def with_controls(device: int) -> Any:
    def train(arrays: dict[str, Array], config: TrainingTask) -> Any:
        scaffold = Scaffold(arrays, config)
        weights = scaffold.weights
        stepped(device, weights["w"], scaffold.correction["w"])
        return scaffold.trained(weights, STEPS), 1, {}

    return train


def plain(device: int) -> Any:
    def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
        stepped(device, arrays["w"], 0.0)
        return arrays, 1, {}

    return train


def final_weight(deployment: Any, session_id: str, trains: list[Any], name: str) -> float:
    clients = [deployment.device(f"{name}-{number}") for number in range(len(trains))]

    def take_part(client: Client, train: Any) -> None:
        run(client, train, training_session_id=session_id)

    threads = [
        threading.Thread(target=take_part, args=pair) for pair in zip(clients, trains, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(clients[0].download(session_id).arrays["w"][0])


def test_scaffold_reaches_the_minimum_that_averaging_misses(deployment: Any) -> None:
    scaffold = deployment.session(Scaffold.initial(MODEL), **settings("scaffold", 40))
    fedavg = deployment.session(MODEL, **settings("fedavg", 40))

    assert final_weight(
        deployment, scaffold, [with_controls(0), with_controls(1)], "controlled"
    ) == pytest.approx(MINIMUM, abs=1e-4)
    assert abs(final_weight(deployment, fedavg, [plain(0), plain(1)], "plain") - MINIMUM) > 0.1


def test_a_model_without_control_variates_is_refused(deployment: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.session(MODEL, **settings("scaffold", 3))

    assert info_of(caught.value).reason == "INVALID_MANIFEST"
    assert "has no control variate 'scaffold.control.w'" in str(caught.value.details())


@pytest.mark.parametrize("field", ["update_encoding", "download_encoding"])
def test_lossy_encodings_are_refused(deployment: Any, field: str) -> None:
    transfer = training_pb2.TransferPolicy()
    setattr(transfer, field, training_pb2.ENCODING_FLOAT16)
    with pytest.raises(grpc.RpcError) as caught:
        deployment.session(Scaffold.initial(MODEL), **settings("scaffold", 3), transfer=transfer)

    assert info_of(caught.value).metadata["field"] == f"config.transfer.{field}"
