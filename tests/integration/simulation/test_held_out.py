"""Virtual devices measure versions on what they hold out, and are of kinds that selection goes by."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_client import TrainingTask
from qflare_server.cli.main import main as server
from qflare_simulation import (
    History,
    SimulationError,
    TrainingFailedError,
    ready,
    simulate,
    train,
)

Arrays = dict[str, NDArray[Any]]
Metrics = Mapping[str, float]
MODEL = {"weight": np.zeros(2, np.float32)}


def step(arrays: Arrays, task: TrainingTask, data: int) -> tuple[Arrays, int, Metrics]:
    """Move by one."""
    del task, data
    return {"weight": arrays["weight"] + np.float32(1)}, 10, {"loss": 1.0}


def distance(arrays: Arrays, task: TrainingTask, data: float) -> tuple[int, Metrics]:
    """Return how far a version is from the number that a device holds out."""
    del task
    return 10, {"loss": abs(float(arrays["weight"][0]) - data)}


def rows(done: History, source: str) -> list[dict[str, Any]]:
    return [row for row in done.history("metrics") if row["source"] == source]


def test_devices_measure_every_version_and_their_mean_is_the_version_s() -> None:
    done = simulate(
        step,
        range(4),
        {
            "total_rounds": 3,
            "rounds.quorum": 3,
            "rounds.target": 4,
            "evaluation.every_rounds": 1,
            "objective.metric": "loss",
            "simulation": {"workers": -1},
        },
        model=MODEL,
        evaluate=distance,
        held_out=[1.0, 2.0, 3.0, None],
    )

    measured = {
        (row["version"], row["device"][-1]): row["value"] for row in rows(done, "evaluation")
    }
    assert measured == {
        (version, str(device)): abs(version - (device + 1))
        for version in (1, 2, 3)
        for device in (0, 1, 2)
    }
    means = dict(done.metrics()["loss"])
    assert means == {
        version: pytest.approx(np.mean([abs(version - held) for held in (1, 2, 3)]))
        for version in (1, 2, 3)
    }
    assert done.best is not None
    assert (done.best.version, done.best.data) == (2, "held out")
    assert not rows(done, "test")
    assert "best version 2: loss 0.6667 (held out)" in str(done)


def test_early_stop_goes_by_what_devices_hold_out() -> None:
    done = simulate(
        step,
        range(3),
        {
            "total_rounds": 30,
            "rounds.quorum": 3,
            "evaluation.every_rounds": 1,
            "early_stop.metric": "loss",
            "early_stop.patience_rounds": 2,
            "simulation": {"workers": -1},
        },
        model=MODEL,
        evaluate=distance,
        held_out=[2.0, 2.0, 2.0],
    )

    assert done.state == "completed"
    assert 3 < done.version < 7, done
    assert done.best is not None
    assert done.best.version == 2


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> History:
    data, evaluate = ready("digits", devices=12, partition="dirichlet", alpha=0.5, held_out=0.25)
    assert data.held_out is not None
    for device in range(12):
        held = data.held_out[device]
        assert held is None or 0 < len(held.labels) <= len(data[device].labels)
    return simulate(
        train,
        data,
        {
            "total_rounds": 3,
            "rounds.quorum": 12,
            "evaluation.every_rounds": 1,
            "device_training.learning_rate": 0.1,
            "simulation": {"workers": 2, "held_out": 0.25},
        },
        evaluate=evaluate,
        folder=tmp_path_factory.mktemp("digits") / "kept",
    )


def test_test_data_and_held_out_data_are_measured_side_by_side(digits: History) -> None:
    series = digits.metrics()

    assert [version for version, _ in series["test_accuracy"]] == [0, 1, 2, 3]
    assert [version for version, _ in series["accuracy"]] == [1, 2, 3]
    assert digits.best is not None
    assert digits.best.value == max(value for _, value in series["accuracy"])


def test_signed_evaluations_of_virtual_devices_verify(
    digits: History, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert digits.folder is not None
    monkeypatch.setattr(os, "environ", {"QFLARE_REQUIRE_SIGNATURES": "false"})

    code = server(["--data-dir", str(digits.folder), "audit", "verify"])

    assert code == 0, capfd.readouterr()
    assert not (digits.folder / "devices").exists()


def test_without_federated_evaluation_test_data_decide_the_best_version() -> None:
    def measure(arrays: Arrays, task: TrainingTask, data: Any) -> tuple[int, Metrics]:
        return distance(arrays, task, data)

    done = simulate(
        step,
        [1, 2],
        {"total_rounds": 4, "rounds.quorum": 2, "objective.metric": "loss"},
        model=MODEL,
        evaluate=measure,
        test=3.0,
    )

    assert done.best is not None
    assert (done.best.version, done.best.data) == (3, "test data")


def test_evaluations_that_fail_stop_with_the_traceback() -> None:
    def broken(arrays: Arrays, task: TrainingTask, data: Any) -> tuple[int, Metrics]:
        raise ValueError(f"no column {data} for {sorted(arrays)} of {task.base_version}")

    with pytest.raises(TrainingFailedError, match="no column 7"):
        simulate(
            step,
            [1, 2],
            {"rounds.quorum": 2, "evaluation.every_rounds": 1, "simulation": {"workers": -1}},
            model=MODEL,
            evaluate=broken,
            held_out=[7, 7],
        )


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"evaluation.every_rounds": 1}, {}, "want an evaluation function"),
        ({"evaluation.every_rounds": 1}, {"evaluate": distance}, "hold out nothing"),
        (
            {"evaluation.every_rounds": 1},
            {"evaluate": distance, "held_out": [1]},
            "got 1, want one for each of 2",
        ),
        ({"simulation": {"held_out": 0.2}}, {}, "divides the examples of a data set"),
        ({"groups": ["b"], "simulation": {"kinds": [{"share": 2}]}}, {}, "want a number above 0"),
        ({"simulation": {"kinds": [{"speed": 2}]}}, {}, "no setting simulation.kinds.speed"),
        (
            {"simulation": {"kinds": [{"share": 0.6}, {"share": 0.6}]}},
            {},
            r"add up to 1\.2, want at most 1",
        ),
        ({"simulation": {"kinds": [{"groups": ["\n"]}]}}, {}, "simulation.kinds: "),
    ],
)
def test_what_cannot_be_measured_or_dealt_is_refused(
    settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    virtual = {"workers": -1} | settings.get("simulation", {})
    with pytest.raises(SimulationError, match=message):
        simulate(step, [1, 2], settings | {"simulation": virtual}, model=MODEL, **arguments)


KINDS = [
    {"share": 0.4, "device_type": "phone", "groups": ["eu"], "capabilities": {"ram_mib": 2048}},
    {
        "share": 0.4,
        "device_type": "server",
        "groups": ["eu", "us"],
        "capabilities": {"ram_mib": 65536},
    },
]


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"selection.device_types": ["phone"]}, {"phone"}),
        ({"groups": ["eu"]}, {"phone", "server"}),
        (
            {
                "groups": ["us", "eu"],
                "selection.capabilities": [{"capability": "ram_mib", "value": 4096}],
            },
            {"server"},
        ),
    ],
)
def test_selection_goes_by_the_kinds_of_devices(settings: dict[str, Any], types: set[str]) -> None:
    def tell(arrays: Arrays, task: TrainingTask, data: int) -> tuple[Arrays, int, Metrics]:
        del task
        return arrays, 1, {"device": data}

    done = simulate(
        tell,
        range(20),
        {
            "total_rounds": 1,
            "rounds.quorum": 4,
            "rounds.target": 20,
            "rounds.deadline": "100s",
            **settings,
            "simulation": {"workers": -1, "kinds": KINDS},
        },
        model=MODEL,
    )

    kinds = done.config.device_kinds()
    answered = {kinds[int(row["device"][-7:])].device_type for row in done.history("updates")}
    assert answered == types
    assert [kind.device_type for kind in kinds].count("phone") == 8
    assert len(done.history("updates")) == sum(kind.device_type in types for kind in kinds)
