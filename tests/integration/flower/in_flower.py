"""What a Flower app meets on a device; run in the environments of flwr by test_flower_behavior.py."""

import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from qflare_client import InvalidArgumentError, TaskFailedError, TrainingFunctionError, TrainingTask
from qflare_client.flower import FlowerDevice, flower_device
from qflare_client.flower.state import decode, encode

TASK = TrainingTask("6b1f", 3, 2, 1, 32, 0.5, {"warm": 2.0, "mu": 0.25}, {"mode": "fast"})
ARRAYS = {str(index): np.full(2, float(index)) for index in range(12)}


def answering(records: dict[str, object]) -> FlowerDevice:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator] # flwr is not installed here
    def train(message: Message, _: Context) -> Message:
        return Message(RecordDict(records), reply_to=message)

    return flower_device(app)


def test_an_app_gets_arrays_in_the_order_of_their_numbers_and_settings_as_it_knows_them() -> None:
    app = ClientApp()
    seen: dict[str, object] = {}

    @app.train()  # type: ignore[untyped-decorator] # flwr is not installed here
    def train(message: Message, context: Context) -> Message:
        seen.update(message.content["config"])
        assert [a[0] for a in message.content["arrays"].to_numpy_ndarrays()] == list(range(12))
        assert context.node_config["partition-id"] == 4
        assert context.run_config == {"lr": 0.1}
        metrics = MetricRecord({"num-examples": 7, "loss": 0.5, "many": [1.0, 2.5]})
        reply = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(reply), reply_to=message)

    device = flower_device(app, node_config={"partition-id": 4}, run_config={"lr": 0.1})
    shuffled = {name: ARRAYS[name] for name in sorted(ARRAYS)}
    arrays, count, metrics = device.train(shuffled, TASK)

    assert (count, metrics) == (7, {"loss": 0.5, "many.0": 1.0, "many.1": 2.5})
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert isinstance(seen["warm"], int)
    assert {
        "server-round": 3,
        "lr": 0.5,
        "warm": 2,
        "mu": 0.25,
        "mode": "fast",
    }.items() <= seen.items()


class Client(NumPyClient):  # type: ignore[misc] # flwr is not installed here
    def fit(self, parameters: list[Any], _: Any) -> tuple[list[Any], int, dict[str, Any]]:
        return [array + 1 for array in parameters], 5, {"loss": 0.25, "note": "text"}

    def evaluate(self, *_: Any) -> tuple[float, int, dict[str, Any]]:
        return 0.75, 6, {"accuracy": 0.5}


def test_a_numpy_client_trains_and_evaluates(caplog: pytest.LogCaptureFixture) -> None:
    device = flower_device(ClientApp(lambda _: Client().to_client()))

    with caplog.at_level(logging.WARNING):
        arrays, count, metrics = device.train({"b": np.zeros(2), "a": np.ones(1)}, TASK)
        device.train({"b": np.zeros(2), "a": np.ones(1)}, TASK)

    assert (arrays["b"].tolist(), arrays["a"].tolist()) == ([1, 1], [2])
    assert (count, metrics) == (5, {"loss": 0.25})
    said = [r.message for r in caplog.records if "not carried over" in r.message]
    assert said == ["not carried over from the Flower app: metric 'note' is no number but str"]
    assert device.evaluate({"b": np.zeros(2)}, TASK) == (6, {"loss": 0.75, "accuracy": 0.5})


def test_a_numpy_client_that_cannot_evaluate_says_so() -> None:
    class Trains(NumPyClient):  # type: ignore[misc]
        def fit(self, parameters: list[Any], _: Any) -> tuple[list[Any], int, dict[str, Any]]:
            return parameters, 5, {}

    device = flower_device(ClientApp(lambda _: Trains().to_client()))

    with pytest.raises(TaskFailedError, match="no evaluate"):
        device.evaluate({"b": np.zeros(2)}, TASK)


def test_bfloat16_is_passed_as_float32() -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator] # flwr is not installed here
    def train(message: Message, _: Context) -> Message:
        assert message.content["arrays"]["w"].dtype == "float32"
        reply = {"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(reply), reply_to=message)

    arrays, *_ = flower_device(app).train({"w": np.ones(2, ml_dtypes.bfloat16)}, TASK)

    assert arrays["w"].tolist() == [1, 1]


GOOD = ArrayRecord([np.zeros(1)])
FOREIGN = ArrayRecord({"w": Array("float32", (1,), "own.format", b"1234")})
COMPLEX = ArrayRecord([np.zeros(1, np.complex128)])
COUNT = MetricRecord({"num-examples": 1})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"metrics": COUNT}, "want one array record, got none"),
        ({"a": GOOD, "b": GOOD, "metrics": COUNT}, "want one array record, got 'a', 'b'"),
        ({"arrays": GOOD}, "want one metric record, got none"),
        ({"arrays": GOOD, "metrics": MetricRecord({"loss": 1})}, "'num-examples': want a count"),
        ({"arrays": GOOD, "metrics": MetricRecord({"num-examples": 0.5})}, "want a count, got 0.5"),
        ({"arrays": FOREIGN, "metrics": COUNT}, "serialized as 'own.format'"),
        ({"arrays": COMPLEX, "metrics": COUNT}, "the session cannot carry it"),
        ({"arrays": ArrayRecord([np.zeros(1)] * 2), "metrics": COUNT}, "got 2 arrays, want 1"),
    ],
)
def test_what_a_session_cannot_carry_is_an_error(records: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingFunctionError, match=message):
        answering(records).train({"w": np.zeros(1)}, TASK)


def test_an_error_of_the_app_is_reported_without_its_text() -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator] # flwr is not installed here
    def train(message: Message, _: Context) -> Message:
        return Message(Error(code=7, reason="patient 12"), reply_to=message)

    with pytest.raises(TaskFailedError) as caught:
        flower_device(app).train({"w": np.zeros(1)}, TASK)

    assert "7" in caught.value.text
    assert "patient" not in caught.value.text


def test_the_state_is_kept_across_restarts_by_session_and_under_the_passphrase(
    tmp_path: Path,
) -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator] # flwr is not installed here
    def train(message: Message, context: Context) -> Message:
        count = context.state.get("count", MetricRecord({"calls": 0}))
        context.state["count"] = MetricRecord({"calls": count["calls"] + 1})
        context.state["head"] = ArrayRecord({"w": Array(np.arange(3.0) + count["calls"])})
        reply = {"arrays": GOOD, "m": MetricRecord({"num-examples": count["calls"] + 1})}
        return Message(RecordDict(reply), reply_to=message)

    def count_of(task: TrainingTask, passphrase: str = "open sesame") -> int:
        device = flower_device(app, home=tmp_path / "home", passphrase=passphrase)
        return device.train({"w": np.zeros(1)}, task)[1]

    other = TrainingTask("77aa", 1, 0, 1, 32, 0.5)
    assert [count_of(TASK), count_of(TASK), count_of(other), count_of(TASK)] == [1, 2, 1, 3]
    (kept, _) = sorted((tmp_path / "home/flower").glob("state-*"))
    assert kept.stat().st_mode & 0o077 == 0
    assert b"calls" not in kept.read_bytes()
    with pytest.raises(Exception, match="passphrase"):
        count_of(TASK, "open barley")


def test_every_kind_of_record_is_restored() -> None:
    state = RecordDict(
        {
            "z": ArrayRecord(
                {"w": Array(np.arange(6, dtype=np.float16).reshape(2, 3)), "n": Array(np.array(7))}
            ),
            "m": MetricRecord({"a": 1, "b": 0.1, "c": [1, 2], "d": [0.5, 1.5]}),
            "c": ConfigRecord(
                {"t": "text", "b": b"\x00\xff", "f": True, "l": ["x", "y"], "s": [b"1"]}
            ),
            "empty": ArrayRecord(),
        }
    )

    restored = decode(encode(state))

    assert list(restored) == list(state)
    assert restored == state


def test_functions_that_are_never_called_are_named() -> None:
    app = ClientApp()
    for register in (app.train("warm_up"), app.query()):
        register(lambda message, _: message)

    device = flower_device(app)

    assert not device.evaluates
    assert [sentence.split("'")[1] for sentence in device.ignored] == [
        "train.warm_up",
        "query.default",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [({"typo": 1}, "has no 'typo', it has: lr"), ({"lr": [1]}, "got list")],
)
def test_an_override_that_the_app_does_not_have_is_refused(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nclientapp = "a:b"\n[tool.flwr.app.config]\nlr = 0.1\n'
    )

    with pytest.raises(InvalidArgumentError, match=message):
        flower_device(tmp_path, run_config=config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "pyproject.toml: "),
        ("[project]\nname = 'x'", "no table tool.flwr.app"),
        ("[tool.flwr.app.components]\nclientapp = 'x'", "want module:attribute"),
        ("[tool.flwr.app.components]\nclientapp = 'json:loads'", "want a flwr.clientapp.ClientApp"),
    ],
)
def test_a_folder_that_is_no_app_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(text)

    with pytest.raises(InvalidArgumentError, match=message):
        flower_device(tmp_path)
