from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.tensors.encodings import Encoding
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import UnsupportedTaskError
from qflare_client.tasks import Heartbeat, Task, TaskKind, TrainingDefaults, proximal_gradient


def train_answer(**settings: Any) -> messages.GetTaskResponse:
    return messages.GetTaskResponse(
        kind=messages.TASK_KIND_TRAIN,
        poll_delay=Duration(nanos=250_000_000),
        training_session_id="s",
        round_number=3,
        base_version=2,
        base_digest="d",
        deadline_time=Timestamp(seconds=60),
        device_training=training_pb2.DeviceTraining(**settings),
    )


def read(answer: messages.GetTaskResponse) -> Task:
    statement = security_pb2.TaskStatement(task_nonce="n")
    return Task.from_proto(answer, statement, TrainingDefaults(2, 64, 0.5))


def test_a_task_to_train_is_read() -> None:
    task = read(train_answer(local_epochs=5, batch_size=8, learning_rate=0.1))

    assert task.kind is TaskKind.TRAIN
    assert task.poll_delay_s == 0.25
    assert task.deadline == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
    assert task.nonce == "n"
    assert (task.config.local_epochs, task.config.batch_size) == (5, 8)
    assert task.config.learning_rate == 0.1


def test_a_wait_of_ten_years_is_an_hour() -> None:
    answer = messages.GetTaskResponse(
        kind=messages.TASK_KIND_WAIT, poll_delay=Duration(seconds=315_360_000)
    )

    assert read(answer).poll_delay_s == 3600.0


def test_a_state_that_this_sdk_does_not_know_is_unknown() -> None:
    answer = messages.HeartbeatResponse(state=77)  # type: ignore[arg-type]  # as it came

    assert Heartbeat.from_proto(answer).device_state == "unknown"


def test_open_settings_are_the_devices_own() -> None:
    config = read(train_answer()).config

    assert (config.local_epochs, config.batch_size, config.learning_rate) == (2, 64, 0.5)


@pytest.mark.parametrize("kind", [0, 99])
def test_an_unknown_kind_says_what_to_upgrade(kind: int) -> None:
    with pytest.raises(UnsupportedTaskError, match="upgrade qflare"):
        read(messages.GetTaskResponse(kind=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "encoding"),
    [(0, Encoding.FULL_PRECISION), (1, Encoding.FULL_PRECISION), (3, Encoding.BFLOAT16)],
)
def test_a_task_says_how_its_version_comes(number: int, encoding: Encoding) -> None:
    answer = train_answer()
    answer.transfer.download_encoding = number  # type: ignore[assignment]  # as it came

    assert read(answer).download_encoding is encoding


def test_an_unknown_way_is_not_taken_for_full_precision() -> None:
    answer = train_answer()
    answer.transfer.download_encoding = 77  # type: ignore[assignment]  # as it came

    with pytest.raises(UnsupportedTaskError, match="download encoding: got number 77"):
        _ = read(answer).download_encoding


def test_without_proximal_mu_there_is_no_proximal_term() -> None:
    assert read(train_answer()).config.proximal_mu == 0.0


def test_proximal_mu_is_a_parameter() -> None:
    answer = train_answer()
    answer.device_training.parameters["proximal_mu"] = 0.01

    assert read(answer).config.proximal_mu == 0.01


def test_proximal_gradient_pulls_towards_the_base() -> None:
    weights = {"w": np.array([1.0, 3.0], np.float32), "count": np.array(3)}
    base = {"w": np.array([1.0, 1.0], np.float32), "count": np.array(1)}

    gradient = proximal_gradient(weights, base, 0.5)

    assert gradient.keys() == {"w"}
    assert gradient["w"].dtype == np.float32
    np.testing.assert_array_equal(gradient["w"], [0.0, 1.0])
