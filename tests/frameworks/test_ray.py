"""Simulations on a Ray cluster, a real one of this machine: what they compute is what the local pool computes."""

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray.cluster_utils import Cluster

from qflare.analytics.queries import Query
from qflare_client import TrainingTask
from qflare_simulation import History, SimulationError, TrainingFailedError, run_file, simulate
from qflare_simulation.tables import COLUMNS

pytestmark = pytest.mark.frameworks
Arrays = dict[str, NDArray[Any]]
MODEL = {"weight": np.zeros(64, np.float32)}
STATEFUL = {
    "total_rounds": 4,
    "rounds.quorum": 4,
    "rounds.target": 6,
    "transfer.local_tensors": ["own.*"],
    "transfer.update_kind": "delta",
    "transfer.update_encoding": "top_k",
    "transfer.top_k_fraction": 0.25,
    "evaluation.every_rounds": 1,
    "objective.metric": "loss",
}
BUFFERED = {
    "total_rounds": 6,
    "strategy.name": "fedbuff",
    "rounds.quorum": 3,
    "rounds.max_staleness": 5,
}
MASKED = {
    "total_rounds": 2,
    "rounds.quorum": 6,
    "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_HELPER",
    "secure_aggregation.clip": 50.0,
    "strategy.uniform_weights": True,
}


def train(
    arrays: Arrays, task: TrainingTask, data: NDArray[np.float32]
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Move by random numbers, count in a tensor that stays on the device, and write to the device's data."""
    del task
    drawn = np.random.standard_normal(64).astype(np.float32)  # noqa: NPY002
    data[0] += 1
    data[0] -= 1
    seen = arrays.get("own.seen", np.zeros(1, np.float32)) + np.float32(1)
    return {"weight": arrays["weight"] + drawn, "own.seen": seen}, 5, {"seen": float(seen[0])}


def train_shared(
    arrays: Arrays, task: TrainingTask, data: NDArray[np.float32]
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Train without a tensor of the device's own."""
    trained, count, metrics = train(arrays, task, data)
    return {"weight": trained["weight"]}, count, metrics


def fail(
    arrays: Arrays, task: TrainingTask, data: NDArray[np.float32]
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Raise."""
    raise RuntimeError(f"no data for {task.local_epochs} epochs: {arrays.keys()} {data}")


def die(
    arrays: Arrays, task: TrainingTask, data: NDArray[np.float32]
) -> tuple[Arrays, int, Mapping[str, float]]:
    """End the process, as one does that has no memory left."""
    del arrays, task, data
    os._exit(1)


def measure(arrays: Arrays, task: TrainingTask, data: float) -> tuple[int, Mapping[str, float]]:
    """Return how far a version is from what a device holds out, with its own count."""
    del task
    own = float(arrays.get("own.seen", np.zeros(1))[0])
    return 5, {"loss": abs(float(arrays["weight"][0]) - data), "own": own}


def run(settings: dict[str, Any], **virtual: Any) -> History:
    data = [np.full(3, index, np.float32) for index in range(12)]
    config = settings | {"simulation": {"duration_spread": 0.8, "drop_out": 0.1} | virtual}
    is_local = "transfer.local_tensors" in settings
    return simulate(
        train if is_local else train_shared,
        data,
        config,
        model=MODEL,
        evaluate=measure,
        test=0.5,
        held_out=[float(index) for index in range(12)],
    )


def require_equal(one: History, other: History) -> None:
    assert one.version == other.version > 1
    assert {name: array.tobytes() for name, array in one.model.items()} == {
        name: array.tobytes() for name, array in other.model.items()
    }
    for table in COLUMNS:
        assert one.history(table) == other.history(table), table
    assert one.counts == other.counts


def test_a_pool_starts_and_ends_a_ray_of_its_own() -> None:
    assert not ray.is_initialized()
    require_equal(run(MASKED, ray="local", workers=2), run(MASKED))
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_said() -> None:
    with pytest.raises(SimulationError, match="no cluster at"):
        run(MASKED, ray="auto")


def test_a_ray_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever Ray raises: here the names of its sockets are too long."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 40)))
    with pytest.raises(SimulationError, match="no cluster at 'local': "):
        run(MASKED, ray="local")
    assert not ray.is_initialized()


def test_programs_that_cannot_be_shipped_are_said(cluster: str) -> None:
    settings = {"rounds.quorum": 1, "simulation": {"ray": cluster}}
    with pytest.raises(SimulationError, match="the programs cannot be shipped"):
        simulate(train_shared, [threading.Lock()], settings, model=MODEL)
    assert not ray.is_initialized()


def test_a_pool_connects_to_a_cluster_and_leaves_it(cluster: str) -> None:
    require_equal(run(MASKED, ray=cluster), run(MASKED))
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a cluster of two nodes, each with an object store of its own; return its address."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[None]:
    """Connect once for several simulations, as a program does that calls `ray.init` itself."""
    ray.init(address=cluster, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    "settings", [STATEFUL, BUFFERED, MASKED], ids=["stateful", "buffered", "masked"]
)
def test_results_are_those_of_the_local_pool(settings: dict[str, Any]) -> None:
    require_equal(run(settings, ray="auto"), run(settings, workers=2))


@pytest.mark.usefixtures("connected")
def test_queries_are_answered_on_the_cluster() -> None:
    def own(query: Query, data: int) -> list[float]:
        return [min(query.upper, float(data))]

    question = {
        "analytics.column": "own",
        "analytics.kind": "mean",
        "analytics.upper": 8.0,
        "privacy.epsilon_budget": 500.0,
        "rounds.quorum": 8,
        "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_HELPER",
    }
    virtual = {"ray": "auto"}, {"workers": -1}
    results = [
        simulate(None, range(8), question | {"simulation": where}, analytics={"own": own}).result
        for where in virtual
    ]
    assert results[0] == results[1] is not None


@pytest.mark.usefixtures("connected")
def test_functions_of_files_are_shipped(tmp_path: Path) -> None:
    """The processes of a cluster need no file of the simulation."""
    program = tmp_path / "shipped_program.py"
    program.write_text(
        "import numpy as np\n"
        "STEP = np.float32(2)\n"
        "def train(arrays, task, data):\n"
        "    return {name: array + STEP for name, array in arrays.items()}, 1, {}\n"
        "def data():\n"
        "    return [1, 2, 3]\n"
        "def model():\n"
        "    return {'weight': np.zeros(2, np.float32)}\n"
    )
    config = tmp_path / "config.toml"
    parts = "\n".join(
        f'{name} = "shipped_program.py:{name}"' for name in ("train", "data", "model")
    )
    config.write_text(
        f'total_rounds = 2\nrounds = {{ quorum = 3 }}\n[simulation]\nray = "auto"\n{parts}\n'
    )

    assert run_file(config).model["weight"].tolist() == [4.0, 4.0]


@pytest.mark.usefixtures("connected")
def test_a_training_that_raises_is_a_failed_device() -> None:
    with pytest.raises(TrainingFailedError, match="no data for"):
        simulate(fail, [1, 2], {"rounds.quorum": 2, "simulation": {"ray": "auto"}}, model=MODEL)


@pytest.mark.usefixtures("connected")
def test_a_process_that_dies_ends_the_simulation() -> None:
    with pytest.raises(SimulationError, match="Ray lost a process"):
        simulate(die, [1, 2], {"rounds.quorum": 2, "simulation": {"ray": "auto"}}, model=MODEL)
