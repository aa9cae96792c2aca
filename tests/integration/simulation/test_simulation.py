"""Simulations run the coordinator's own code: what they say is what its database says, and it repeats."""

import csv
import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from qflare_client import TrainingTask
from qflare_server.cli.main import main as server
from qflare_simulation import (
    COLUMNS,
    History,
    SimulationError,
    TrainingFailedError,
    compare,
    ready,
    simulate,
    train,
)

Arrays = dict[str, NDArray[Any]]
MODEL = {"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}


def add_own(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Add the device's number to every element."""
    del task
    return {name: array + np.float32(data) for name, array in arrays.items()}, data, {"own": data}


def add_noise(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Add numbers of numpy's global generator, as training functions do that shuffle."""
    del task, data
    drawn = {
        name: array + np.random.standard_normal(array.shape).astype(np.float32)  # noqa: NPY002
        for name, array in arrays.items()
    }
    return drawn, 1, {"loss": float(np.random.uniform())}  # noqa: NPY002


def test_rounds_average_what_the_devices_send() -> None:
    done = simulate(
        add_own,
        [1, 2, 3],
        {"total_rounds": 2, "rounds.quorum": 3, "simulation": {"workers": -1}},
        model=MODEL,
    )

    step = (1 * 1 + 2 * 2 + 3 * 3) / 6  # weighted by examples
    assert done.state == "completed"
    assert [row["accepted"] for row in done.history("rounds")] == [3, 3]
    np.testing.assert_allclose(done.model["bias"], 2 * step, rtol=1e-6)
    np.testing.assert_allclose(done.final()["train_own"], step, rtol=1e-6)


SETTINGS: dict[str, dict[str, Any]] = {
    "drawn devices": {"selection.fraction": 0.5, "rounds.quorum": 4},
    "buffered": {"strategy.name": "fedbuff", "rounds.quorum": 4},
    "private": {
        "rounds.quorum": 4,
        "selection.fraction": 0.5,
        "privacy.noise_multiplier": 1.0,
        "privacy.epsilon_budget": 1000.0,
        "privacy.clip_norm": 1.0,
        "privacy.delta": 1e-5,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_seeds_repeat_to_the_byte_on_any_number_of_processes(name: str) -> None:
    def run(workers: int, seed: int = 5) -> History:
        table = {
            "workers": workers,
            "seed": seed,
            "duration_spread": 0.7,
            "straggler_share": 0.2,
            "drop_out": 0.1,
        }
        settings = {"total_rounds": 2, **SETTINGS[name], "simulation": table}
        return simulate(add_noise, range(16), settings, model=MODEL)

    first, again, other = run(-1), run(2), run(-1, seed=6)

    assert first.version == 2, first
    assert {key: array.tobytes() for key, array in first.model.items()} == {
        key: array.tobytes() for key, array in again.model.items()
    }
    assert first.tables == again.tables
    assert dataclasses.asdict(first)["counts"] == dataclasses.asdict(again)["counts"]
    assert first.model["weight"].tobytes() != other.model["weight"].tobytes()


def test_virtual_time_costs_nothing_and_counts_late_and_lost_devices() -> None:
    done = simulate(
        add_own,
        range(1, 41),
        {
            "total_rounds": 4,
            "rounds.quorum": 10,
            "rounds.target": 20,
            "rounds.deadline": "7200s",
            "simulation": {
                "workers": -1,
                "duration_s": 3600,
                "duration_spread": 0.1,
                "straggler_share": 0.3,
                "straggler_factor": 1.8,
                "drop_out": 0.2,
            },
        },
        model=MODEL,
    )

    assert done.state == "completed"
    assert done.virtual_s > 4 * 3000
    counts = [dict(count) for count in done.counts.values()]
    assert sum(count["lost"] for count in counts) > 10
    assert sum(count["late"] for count in counts) == sum(
        row["late"] for row in done.history("rounds")
    )
    for row, times in zip(done.history("rounds"), done.history("timings"), strict=True):
        assert 10 <= row["accepted"] <= 20
        assert times["opened_s"] < times["first_update_s"] <= times["last_update_s"]
        assert times["last_update_s"] <= times["closed_s"] <= times["deadline_s"]


def fail_on_odd(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Raise on every second device."""
    if data % 2:
        raise MemoryError("no room for the batch")
    return add_own(arrays, task, data)


def test_failures_are_reported_and_counted() -> None:
    done = simulate(
        fail_on_odd,
        range(1, 11),
        {"total_rounds": 2, "rounds.quorum": 5, "simulation": {"workers": -1}},
        model=MODEL,
    )

    assert [row["failed"] for row in done.history("rounds")] == [5, 5]
    assert {count["failed"] for count in done.counts.values()} == {5}


def test_too_many_failures_stop_with_the_traceback() -> None:
    def rubbish(arrays: Arrays, task: TrainingTask, data: int) -> Any:
        del task, data
        return {"weight": arrays["weight"]}, 1, {}

    with pytest.raises(TrainingFailedError, match=r"3 of 4 trainings of round 1 failed") as failed:
        simulate(rubbish, range(4), {"rounds.quorum": 4}, model=MODEL)

    assert "bias" in str(failed.value)


def test_a_session_that_cannot_advance_ends() -> None:
    with pytest.raises(SimulationError, match="no device answered in 100 rounds"):
        simulate(
            add_own,
            [1, 2],
            {"rounds.quorum": 2, "simulation": {"workers": -1, "drop_out": 1.0}},
            model=MODEL,
        )


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"secure_aggregation.helpers": ["0" * 64]}, MODEL, "secure_aggregation.mode: got none"),
        ({"strategy.name": "none"}, MODEL, "the coordinator refuses"),
        ({}, {}, "model: got none"),
        ({"rounds.quorum": 1}, {"a": np.zeros(3, np.int64)}, "no floating tensor"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    settings: dict[str, Any], model: Arrays, message: str
) -> None:
    with pytest.raises(SimulationError, match=message):
        simulate(add_own, [1, 2], settings | {"simulation": {"workers": -1}}, model=model)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> History:
    data, evaluate = ready("digits", devices=20, partition="dirichlet", alpha=0.5)
    return simulate(
        train,
        data,
        {
            "total_rounds": 5,
            "rounds.quorum": 10,
            "device_training.learning_rate": 0.1,
            "simulation": {"workers": 2, "name": "even"},
        },
        evaluate=evaluate,
        folder=tmp_path_factory.mktemp("digits") / "kept",
    )


def test_digits_are_learned(digits: History) -> None:
    accuracy = digits.metrics()["test_accuracy"]

    assert [version for version, _ in accuracy] == [0, 1, 2, 3, 4, 5]
    assert accuracy[0][1] < 0.2
    assert accuracy[-1][1] > 0.8
    assert "published" in str(digits)


def test_the_database_of_a_simulation_verifies(
    digits: History, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert digits.folder is not None
    monkeypatch.setattr(os, "environ", {"QFLARE_REQUIRE_SIGNATURES": "false"})

    code = server(["--data-dir", str(digits.folder), "audit", "verify"])

    assert code == 0, capfd.readouterr()


def test_a_kept_folder_is_not_simulated_in_again(digits: History) -> None:
    with pytest.raises(SimulationError, match="holds a coordinator already"):
        simulate(add_own, [1, 2], {}, model=MODEL, folder=digits.folder)


def test_every_table_has_its_documented_columns(digits: History) -> None:
    for table, columns in COLUMNS.items():
        assert digits.to_arrow(table).column_names == list(columns)
        frame = digits.to_pandas(table)
        assert list(frame.columns) == list(columns)
        assert len(frame) == len(digits.history(table))
    with pytest.raises(SimulationError, match="want one of rounds"):
        digits.history("round")


def test_tables_are_written(digits: History, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")

    digits.export(tmp_path / "csv")
    digits.export(tmp_path / "parquet", "parquet")

    with (tmp_path / "csv" / "updates.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["device"] for row in written] == [
        row["device"] for row in digits.history("updates")
    ]
    assert pq.read_table(tmp_path / "parquet" / "updates.parquet").num_rows == len(written)
    with pytest.raises(SimulationError, match="want csv or parquet"):
        digits.export(tmp_path, "xml")


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Return the scalars of event files by name and step, after the checksums of every record."""
    found: dict[tuple[str, int], float] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            record = data[12 : 12 + length]
            checks = struct.unpack("<I", data[8:12]) + struct.unpack(
                "<I", data[12 + length : 16 + length]
            )
            assert checks == (masked_crc32c(data[:8]), masked_crc32c(record))
            event = Event.FromString(record)
            found |= {(item.tag, event.step): item.simple_value for item in event.summary.value}
            data = data[16 + length :]
    return found


def test_curves_and_exports_are_written(digits: History, tmp_path: Path) -> None:
    digits.plot(tmp_path / "curves.png")
    digits.tensorboard(tmp_path / "events")
    digits.save_model(tmp_path / "model.safetensors")
    other = dataclasses.replace(digits, config=dataclasses.replace(digits.config, name="other"))
    compare([digits, other], tmp_path / "both.svg")

    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert scalars(tmp_path / "events") == {
        (name, version): pytest.approx(value)
        for name, values in digits.metrics().items()
        for version, value in values
    }
    assert (tmp_path / "model.safetensors").stat().st_size > 2600
    assert "other" in (tmp_path / "both.svg").read_text()
    with pytest.raises(SimulationError, match="the same"):
        compare([digits, digits], tmp_path / "both.svg")
    with pytest.raises(SimulationError, match="want one of"):
        compare([digits], tmp_path / "both.svg", "f1")
    with pytest.raises(SimulationError, match=r"want \.png or \.svg"):
        compare([digits], tmp_path / "both.gif")
