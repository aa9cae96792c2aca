"""What virtual devices keep between rounds, with the code of the device SDK: it follows accepted updates alone."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_client import LocalPrivacy, Scaffold, TrainingTask
from qflare_client.privacy import gaussian_epsilon
from qflare_simulation import History, SimulationError, ready, simulate, train
from qflare_simulation.memory import DeviceMemory, HomeFolder, ShippedHome

Arrays = dict[str, NDArray[Any]]
Metrics = Mapping[str, float]
MODEL = {"weight": np.zeros(4, np.float32)}


def count_own(arrays: Arrays, task: TrainingTask, data: int) -> tuple[Arrays, int, Metrics]:
    """Count the trainings of a device in a tensor that stays on it."""
    del task, data
    seen = arrays.get("own.count", np.zeros(1, np.float32))
    trained = {"weight": arrays["weight"] + np.float32(1), "own.count": seen + np.float32(1)}
    return trained, 1, {"seen": float(seen[0])}


def test_local_tensors_follow_accepted_updates_alone() -> None:
    done = simulate(
        count_own,
        range(12),
        {
            "total_rounds": 5,
            "rounds.quorum": 4,
            "rounds.target": 8,
            "transfer.local_tensors": ["own.*"],
            "simulation": {"workers": 2, "duration_spread": 0.8, "drop_out": 0.1},
        },
        model=MODEL,
    )

    assert set(done.model) == {"weight"}
    seen: dict[str, list[float]] = {}
    for row in done.history("metrics"):
        if (row["source"], row["name"]) == ("update", "seen"):
            seen.setdefault(row["device"], []).append(row["value"])
    assert sum(map(len, seen.values())) == 40
    assert all(counts == list(range(len(counts))) for counts in seen.values()), seen
    assert sum(count["late"] for count in done.counts.values()) > 0


def test_devices_measure_with_their_local_tensors() -> None:
    def measure(arrays: Arrays, task: TrainingTask, data: int) -> tuple[int, Metrics]:
        del task, data
        return 1, {"count": float(arrays["own.count"][0])}

    done = simulate(
        count_own,
        range(3),
        {
            "total_rounds": 3,
            "rounds.quorum": 3,
            "transfer.local_tensors": ["own.*"],
            "evaluation.every_rounds": 1,
            "simulation": {"workers": -1},
        },
        model=MODEL,
        evaluate=measure,
        held_out=range(3),
    )

    assert done.metrics()["count"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


CURVATURE, MINIMUM = (1.0, 4.0), (0.0, 1.0)


def descend(arrays: Arrays, task: TrainingTask, data: int) -> tuple[Arrays, int, Metrics]:
    """Take ten steps down the device's parabola, with control variates if there are any."""
    steps = 10
    scaffold = Scaffold(arrays, task) if "scaffold.control.weight" in arrays else None
    weights = scaffold.weights if scaffold else dict(arrays)
    for _ in range(steps):
        gradient = CURVATURE[data] * (weights["weight"] - np.float32(MINIMUM[data]))
        if scaffold:
            gradient = gradient + scaffold.correction["weight"]
        weights["weight"] = (weights["weight"] - task.learning_rate * gradient).astype(np.float32)
    return scaffold.trained(weights, steps) if scaffold else weights, 1, {}


def run_parabolas(strategy: str) -> float:
    done = simulate(
        descend,
        [0, 1],
        {
            "total_rounds": 40,
            "rounds.quorum": 2,
            "strategy.name": strategy,
            "device_training.learning_rate": 0.05,
            "simulation": {"workers": -1},
        },
        model=MODEL,
    )
    return float(done.model["weight"][0])


def test_scaffold_reaches_the_optimum_that_averaging_misses() -> None:
    optimum = np.dot(CURVATURE, MINIMUM) / sum(CURVATURE)

    assert run_parabolas("scaffold") == pytest.approx(optimum, abs=1e-3)
    assert abs(run_parabolas("fedavg") - optimum) > 0.05


def test_a_ready_data_set_trains_with_control_variates() -> None:
    data, evaluate = ready("iris", devices=6, partition="dirichlet", alpha=0.3)

    done = simulate(
        train,
        data,
        {
            "total_rounds": 4,
            "rounds.quorum": 6,
            "strategy.name": "scaffold",
            "device_training.learning_rate": 0.1,
            "simulation": {"workers": -1},
        },
        evaluate=evaluate,
    )

    assert done.final()["test_accuracy"] > 0.6


def uneven(arrays: Arrays, task: TrainingTask, data: int) -> tuple[Arrays, int, Metrics]:
    """Move one element far and the others a little."""
    del task, data
    return {"weight": arrays["weight"] + np.array([1, 0.1, 0.1, 0.1], np.float32)}, 1, {}


def test_what_top_k_leaves_out_is_sent_later() -> None:
    done = simulate(
        uneven,
        range(2),
        {
            "total_rounds": 40,
            "rounds.quorum": 2,
            "transfer.update_kind": "UPDATE_KIND_DELTA",
            "transfer.update_encoding": "ENCODING_TOP_K",
            "transfer.top_k_fraction": 0.25,
            "simulation": {"workers": -1},
        },
        model=MODEL,
    )

    assert done.model["weight"][1:].min() > 1.5
    assert done.model["weight"].sum() == pytest.approx(40 * 1.3, abs=4)


def test_local_privacy_adds_noise_and_charges_every_release() -> None:
    done = simulate(
        uneven,
        range(4),
        {
            "total_rounds": 3,
            "rounds.quorum": 4,
            "simulation": {
                "workers": -1,
                "local_privacy": {"clip_norm": 0.5, "noise_multiplier": 2.0, "delta": 1e-5},
            },
        },
        model=MODEL,
    )

    assert done.local_epsilon == pytest.approx(gaussian_epsilon(math.sqrt(3.0), 1e-5))
    assert f"epsilon {done.local_epsilon:.4g} of a device" in str(done)
    assert np.abs(done.model["weight"]).max() > 1e-6
    assert not np.allclose(done.model["weight"][1], done.model["weight"][2])


def test_a_device_without_budget_answers_no_more() -> None:
    privacy = LocalPrivacy(clip_norm=1.0, noise_multiplier=2.0, max_epsilon=6.5)
    releases = next(
        count - 1
        for count in range(1, 99)
        if gaussian_epsilon(math.sqrt(count), 1e-5) > privacy.max_epsilon  # type: ignore[operator]
    )
    settings = {
        "total_rounds": releases + 1,
        "rounds.quorum": 2,
        "rounds.missed_quorum_action": "MISSED_QUORUM_ACTION_FAIL",
        "simulation": {"workers": -1, "local_privacy": privacy},
    }

    done = simulate(uneven, range(2), settings, model=MODEL)

    assert releases >= 1
    assert (done.state, done.version) == ("failed", releases)
    assert done.counts[releases + 1]["spent"] == 2
    with pytest.raises(SimulationError, match="local_privacy: "):
        simulate(uneven, [1], {"simulation": {"local_privacy": {"clip_norm": -1}}}, model=MODEL)


def test_everything_that_devices_keep_repeats_on_any_number_of_processes() -> None:
    def measure(arrays: Arrays, task: TrainingTask, data: int) -> tuple[int, Metrics]:
        del task
        return 5 + data, {"accuracy": float(arrays["weight"][0]) + data}

    def run(workers: int) -> History:
        return simulate(
            count_own,
            range(8),
            {
                "total_rounds": 3,
                "rounds.quorum": 4,
                "transfer.local_tensors": ["own.*"],
                "transfer.update_kind": "UPDATE_KIND_DELTA",
                "transfer.update_encoding": "ENCODING_TOP_K",
                "transfer.top_k_fraction": 0.5,
                "evaluation.every_rounds": 1,
                "simulation": {
                    "workers": workers,
                    "duration_spread": 0.5,
                    "drop_out": 0.1,
                    "local_privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5},
                },
            },
            model=MODEL,
            evaluate=measure,
            held_out=range(8),
        )

    first, again = run(-1), run(2)

    assert first.tables == again.tables
    assert first.model["weight"].tobytes() == again.model["weight"].tobytes()
    assert (first.best, first.local_epsilon) == (again.best, again.local_epsilon)


def test_what_a_device_keeps_can_be_shipped_and_comes_back(tmp_path: Path) -> None:
    home, elsewhere = HomeFolder(tmp_path / "here"), HomeFolder(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for number in range(3):
        shipped = ShippedHome(home.pack([7, 8]))
        for place in (shipped, elsewhere):
            memory = DeviceMemory(place, 7)
            known = memory.local.read("session")
            assert known == ({"own": number - 1} if number else {})
            memory.local.stage("session", f"update-{number}", {"own": np.array(number, np.float32)})
        home.unpack(shipped.shipment)
        for place in (home, elsewhere):
            DeviceMemory(place, 7).accept(f"update-{number}")
        assert home.pack([7, 8]) == elsewhere.pack([7, 8])
    assert home.pack([8]) == {8: {}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ray": "auto"}, r"needs Ray: pip install 'qflare\[ray\]'"),
        ({"ray": "auto", "workers": -1}, "simulation.workers: got -1, want 0 or more"),
        ({"ray": 6379}, "simulation.ray: got 6379, want the address"),
    ],
)
def test_a_cluster_needs_ray(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SimulationError, match=message):
        simulate(count_own, [1], {"rounds.quorum": 1, "simulation": settings}, model=MODEL)
