"""Top-k updates with error feedback, through real gRPC, on both databases."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qflare.tensors import Array
from qflare.v1 import training_pb2
from qflare_client import Client, Task, TaskKind, TrainingTask, run
from tests.integration.conftest import Deployment

Deploy = Callable[..., Deployment]
SIZE = 8
ROUNDS = 6
STEP = np.array([1.0, 0.5, 0.25, 0.125, 0.5, 0.25, 0.125, 1.0], np.float32)


def session(deployment: Deployment, rounds: int = ROUNDS, **settings: Any) -> str:
    transfer = training_pb2.TransferPolicy(
        update_kind=training_pb2.UPDATE_KIND_DELTA,
        update_encoding=training_pb2.ENCODING_TOP_K,
        top_k_fraction=0.25,
        **settings,
    )
    return deployment.session(
        {"w": np.zeros(SIZE, np.float32)},
        rounds=training_pb2.RoundPolicy(quorum=1),
        total_rounds=rounds,
        transfer=transfer,
    )


def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
    return {"w": arrays["w"] + STEP}, 1, {}


def next_task(client: Client, session_id: str) -> Task:
    while (task := client.get_task(session_id)).kind is TaskKind.WAIT:
        threading.Event().wait(0.02)
    return task


def take_part(client: Client, session_id: str) -> None:
    task = next_task(client, session_id)
    base = client.download_base(task)
    client.submit(task, base, train(base.arrays, task.config)[0], 1)


def model(client: Client, session_id: str, version: int) -> Array:
    return client.download(session_id, version).arrays["w"]


def residual(client: Client, session_id: str) -> Array:
    base = client.download(session_id)
    assert client._feedback is not None
    return client._feedback.residual(session_id, base.manifest)["w"]


@pytest.mark.parametrize("download", [training_pb2.ENCODING_NONE, training_pb2.ENCODING_FLOAT16])
def test_a_model_and_the_residual_are_the_sum_of_the_deltas(deploy: Deploy, download: Any) -> None:
    deployment = deploy()
    session_id = session(deployment, ROUNDS + 1, download_encoding=download)
    for number in range(ROUNDS):
        if number == 0:
            deployment.device("a").close()
        with Client(home=deployment.folder / "a") as client:  # a restart before every round
            take_part(client, session_id)
    with Client(home=deployment.folder / "a") as client:
        task = next_task(client, session_id)
        got = model(client, session_id, task.base_version) + residual(client, session_id)

    assert task.base_version == ROUNDS
    np.testing.assert_array_equal(got, ROUNDS * STEP)


def test_without_feedback_small_changes_are_lost(deploy: Deploy) -> None:
    deployment = deploy()
    deployment.device("a").close()
    session_id = session(deployment)

    with Client(home=deployment.folder / "a", error_feedback=False) as client:
        run(client, train, training_session_id=session_id)
        got = model(client, session_id, ROUNDS)

    assert set(got) == {0.0, float(ROUNDS)}
    assert not list((deployment.folder / "a").glob("residual*"))


def test_with_feedback_every_element_moves_and_the_residual_goes_with_the_session(
    deploy: Deploy,
) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, 20)

    run(client, train, training_session_id=session_id)

    assert (model(client, session_id, 20) > 0).all()
    assert not list((deployment.folder / "a").glob("residual*"))


def test_an_update_that_is_refused_leaves_the_residual_as_it_was(deploy: Deploy) -> None:
    deployment = deploy()
    client, other = deployment.device("a"), deployment.device("b")
    session_id = session(deployment)
    take_part(client, session_id)
    before = residual(client, session_id).copy()
    task = next_task(client, session_id)
    base = client.download_base(task)
    take_part(other, session_id)

    with pytest.raises(Exception, match=r"closed|base"):
        client.submit(task, base, {"w": base.arrays["w"] + STEP}, 1)

    np.testing.assert_array_equal(residual(client, session_id), before)
