"""Local privacy against a coordinator that wants fresh noise over the same change, again and again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    LocalPrivacy,
    PrivacyBudgetExceededError,
    PrivacyError,
    QflareClientError,
    RejectedError,
    RepeatedTaskError,
    RetryPolicy,
    TaskKind,
    UnavailableError,
    enroll,
    run,
)
from qflare_client.privacy import gaussian_epsilon
from tests.integration.client.conftest import RefusalError
from tests.integration.client.test_device import wait_for_training

Deploy = Callable[..., Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
PRIVACY = LocalPrivacy(clip_norm=1.0, noise_multiplier=1.0)
ATTEMPTS = 12


class Dishonest:
    """A coordinator that gives its first task for ever, notes what it is sent, and answers as it likes.

    Attributes:
        seen: The payload of every update that came, whole or in part.
    """

    def __init__(self, deployment: Any, between: Any) -> None:
        self.deployment = deployment
        self.relay = between
        self.seen: list[bytes] = []
        self._task: messages.GetTaskResponse | None = None
        between.on_answer["GetTask"] = self._same_task
        between.on_request["SubmitUpdate"] = self._note

    def answer(self, error: Exception) -> None:
        def refuse(_: Any) -> Any:
            raise error

        self.relay.on_answer["SubmitUpdate"] = refuse
        self.relay.on_answer["GetUpload"] = lambda answer: type(answer)()

    def _same_task(self, answer: messages.GetTaskResponse) -> messages.GetTaskResponse:
        if self._task is None and answer.kind == messages.TASK_KIND_TRAIN:
            self._task = answer
        return self._task or answer

    def _note(self, request: Any) -> Any:
        self.seen.append(request.chunk.data)
        return request


@pytest.fixture
def dishonest(deploy: Deploy, relay: Callable[[str], Any], tmp_path: Path) -> Dishonest:
    deployment = deploy()
    enroll(deployment.bundle(), home=tmp_path / "device")
    return Dishonest(deployment, relay(deployment.coordinator.address))


def client_of(dishonest: Dishonest, folder: Path, **settings: Any) -> Client:
    return Client(
        home=folder / "device",
        address=dishonest.relay.address,
        retry=RetryPolicy(total_time_s=0),
        **settings,
    )


def release(client: Client, session_id: str, privacy: LocalPrivacy = PRIVACY) -> None:
    task = wait_for_training(client, session_id)
    base = client.download_base(task)
    client.submit(task, base, {"w": base.arrays["w"] + 1}, 3, privacy=privacy)


@pytest.mark.parametrize("keep_updates", [True, False])
@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("away"),
        RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "ROUND_NOT_OPEN"),
        RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SIGNATURE"),
        RefusalError(grpc.StatusCode.PERMISSION_DENIED, "DEVICE_SUSPENDED"),
        RefusalError(grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
    ids=str,
)
def test_a_task_that_comes_again_gets_the_same_bytes_or_nothing(
    dishonest: Dishonest, tmp_path: Path, error: Exception, restarts: bool, keep_updates: bool
) -> None:
    session_id = dishonest.deployment.session({"w": np.zeros(64, np.float32)}, rounds=ONE_DEVICE)
    dishonest.answer(error)
    settings = {"keep_updates": keep_updates}

    client = client_of(dishonest, tmp_path, **settings)
    for _ in range(ATTEMPTS):
        with pytest.raises(QflareClientError):
            release(client, session_id)
        if restarts:
            client.close()
            client = client_of(dishonest, tmp_path, **settings)
    client.close()

    assert dishonest.seen
    assert len(set(dishonest.seen)) == 1


def test_a_loop_gives_a_repeated_task_no_fresh_noise(dishonest: Dishonest, tmp_path: Path) -> None:
    session_id = dishonest.deployment.session({"w": np.zeros(64, np.float32)}, rounds=ONE_DEVICE)
    dishonest.answer(RefusalError(grpc.StatusCode.FAILED_PRECONDITION, "ROUND_NOT_OPEN"))
    stop = threading.Event()
    asked = iter(range(4))
    trained: list[int] = []
    same_task = dishonest.relay.on_answer["GetTask"]

    def count(answer: Any) -> Any:
        if next(asked, None) is None:
            stop.set()
        return same_task(answer)

    def train(arrays: dict[str, Array], _: object) -> Any:
        trained.append(1)
        return {"w": arrays["w"] + 1}, 3, {}

    dishonest.relay.on_answer["GetTask"] = count
    with client_of(dishonest, tmp_path) as client:
        summary = run(client, train, stop=stop, training_session_id=session_id, privacy=PRIVACY)

    assert (summary.update_count, len(trained)) == (0, 1)
    assert len(set(dishonest.seen)) == 1


def test_a_budget_stops_the_loop(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        {"w": np.zeros(64, np.float32)}, rounds=ONE_DEVICE, total_rounds=50
    )
    three = gaussian_epsilon(np.sqrt(3) * 2.0 / 4.0, 1e-5)
    privacy = LocalPrivacy(1.0, 4.0, max_epsilon=three * 1.0001, delta=1e-5)
    trained: list[int] = []

    def train(arrays: dict[str, Array], _: object) -> Any:
        trained.append(1)
        return {"w": arrays["w"] + 1}, 3, {}

    with pytest.raises(PrivacyBudgetExceededError, match="over 4 releases"):
        run(client, train, training_session_id=session_id, privacy=privacy)

    assert len(trained) == 3
    assert client.privacy_epsilon() == pytest.approx(three)


def test_a_budget_is_that_of_all_training_sessions_and_restarts(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy()
    enroll(deployment.bundle(), home=tmp_path / "device")
    privacy = LocalPrivacy(1.0, 4.0, max_epsilon=gaussian_epsilon(np.sqrt(2) / 2.0, 1e-5) * 1.0001)
    for number in range(3):
        session_id = deployment.session({"w": np.zeros(64, np.float32)}, rounds=ONE_DEVICE)
        with Client(home=tmp_path / "device") as client:
            if number < 2:
                release(client, session_id, privacy)
                continue
            with pytest.raises(PrivacyBudgetExceededError):
                release(client, session_id, privacy)


def test_an_update_without_noise_leaves_no_budget(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=9)
    release(client, session_id, LocalPrivacy(1.0))

    assert client.privacy_epsilon() == float("inf")
    with pytest.raises(PrivacyBudgetExceededError):
        release(client, session_id, LocalPrivacy(1.0, 4.0, max_epsilon=100.0))


def test_an_update_that_cannot_be_sent_costs_nothing(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE)
    task = wait_for_training(client, session_id)
    base = client.download_base(task)

    for arrays in ({"other": base.arrays["w"]}, {"w": base.arrays["w"] * np.float32(np.nan)}):
        with pytest.raises(QflareClientError):
            client.submit(task, base, arrays, 3, privacy=PRIVACY)

    assert client.privacy_epsilon() == 0.0
    client.submit(task, base, base.arrays, 3, privacy=PRIVACY)


def test_a_check_before_training_says_what_a_release_would(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60))
    )
    task = wait_for_training(client, session_id)
    base = client.download_base(task)
    client.require_release(task, PRIVACY)
    client.submit(task, base, base.arrays, 3, privacy=PRIVACY)

    with pytest.raises(RepeatedTaskError):
        client.require_release(task, PRIVACY)
    assert issubclass(RepeatedTaskError, PrivacyError)
    assert not issubclass(RepeatedTaskError, RejectedError)
    assert task.kind is TaskKind.TRAIN
