"""Runs a simulation from its first model to its history."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qflare.analytics.queries import TENSOR, InvalidQueryError, Query
from qflare.analytics.results import NoisySum, Result
from qflare.tensors import Manifest, assemble
from qflare.tensors.control_variates import CONTROL
from qflare.v1 import tensor_pb2, training_pb2
from qflare_client import Scaffold
from qflare_client.admin.queries import RESULT_VERSION
from qflare_server.storage.records import TrainingSession
from qflare_server.training.objective import objective_of
from qflare_simulation import tables
from qflare_simulation.cluster import RayPool
from qflare_simulation.config import SimulationConfig
from qflare_simulation.coordinator import (
    DEVICES,
    REALM,
    SimulatedCoordinator,
    opened,
)
from qflare_simulation.engine import Course, Engine, Notice
from qflare_simulation.errors import SimulationError
from qflare_simulation.history import Best, History
from qflare_simulation.memory import HomeFolder
from qflare_simulation.pool import ProcessPool
from qflare_simulation.worker import EvaluateFunction, Programs, QueryFunction, TrainFunction


def _silent(version: int, rounds: int, accepted: int, target: int) -> None:
    del version, rounds, accepted, target


def simulate(
    train: TrainFunction | None,
    data: Sequence[Any],
    config: SimulationConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    model: Mapping[str, NDArray[Any]] | None = None,
    evaluate: EvaluateFunction | None = None,
    test: Any = None,
    held_out: Sequence[Any] | None = None,
    analytics: Mapping[str, QueryFunction] | None = None,
    folder: str | Path | None = None,
    notice: Notice = _silent,
) -> History:
    """Train one model on virtual devices, through the coordinator's own code, and return what happened.

    The same arguments give the same model, to the byte, and the same tables, on any number of processes, if the
    training function draws its random numbers from numpy's or Python's global generators, PyTorch's, or from a seed
    that it derives from its task.

    Args:
        train: Maps (arrays, task, data of the device) to (arrays, example count, metrics). A real device runs
            `qflare_client.run(client, lambda arrays, task: train(arrays, task, data))`. None for a query.
        data: The data of each device, by index; there are as many devices. A `FederatedData` may also hold test
            data and the first model.
        config: A `SimulationConfig`, the settings as a mapping, or the path of a file.
        model: Tensors of version 0; None means those of the data. SCAFFOLD's control variates are added.
        evaluate: Maps (arrays, task, data) to (example count, metrics); None evaluates no version. It measures versions
            on the test data and, in a training session with federated evaluation, on what each device holds out.
        test: Test data; None means that of the data.
        held_out: What each device measures versions on, by index, None for a device that measures none; None means that
            of the data.
        analytics: Functions by column that map (query, data of the device) to the values of the column, for a
            configuration with a query of federated analytics.
        folder: Empty or new folder to keep the coordinator's database in; None keeps none.
        notice: Called with version, rounds, accepted updates and target as the simulation proceeds.

    Raises:
        SimulationError: The configuration or the model cannot be simulated.
        TrainingFailedError: Too many devices failed in one round; the message holds the first traceback.
    """
    chosen = _with_devices(SimulationConfig.from_value(config), data)
    columns = dict(analytics or {})
    _require_functions(chosen, train, columns)
    if chosen.training.HasField("analytics"):
        arrays, evaluate = _zeros(chosen.training.analytics), None
    else:
        first = model if model is not None else getattr(data, "model", None)
        arrays = _first(first, chosen.training)
    shared = test if test is not None else getattr(data, "test", None)
    own = held_out if held_out is not None else getattr(data, "held_out", None)
    _require_evaluation(chosen, evaluate, own)
    is_kept = folder is not None
    with _folder(folder) as home:
        programs = Programs(
            train=train,
            evaluate=evaluate,
            data=data,
            test=shared,
            held_out=own,
            privacy=chosen.local_privacy,
            seed=chosen.seed,
            realm=REALM,
            home=HomeFolder(home / DEVICES),
            columns=columns,
        )
        # The processes of the pool start while the coordinator makes its keys and its database.
        with (
            _pool(programs, chosen, home) as pool,
            opened(home, chosen, is_kept=is_kept) as coordinator,
        ):
            coordinator.register(chosen)
            coordinator.create(chosen, arrays)
            engine = Engine(coordinator, pool, chosen, notice, programs)
            engine.run()
            return _history(coordinator, chosen, engine.course, home if is_kept else None)


def _pool(programs: Programs, config: SimulationConfig, folder: Path) -> ProcessPool | RayPool:
    if config.ray:
        return RayPool(programs, config.ray, config.workers)
    return ProcessPool(programs, config.workers, folder)


def _first(
    model: Mapping[str, NDArray[Any]] | None, config: training_pb2.TrainingConfig
) -> dict[str, NDArray[Any]]:
    """Return the tensors of version 0, with control variates of zero where SCAFFOLD needs them."""
    if not model:
        raise SimulationError("model: got none, want the tensors of version 0 by name")
    arrays = {name: np.ascontiguousarray(array) for name, array in model.items()}
    if config.strategy.name == "scaffold" and not any(name.startswith(CONTROL) for name in arrays):
        return Scaffold.initial(arrays)
    return arrays


def _zeros(message: training_pb2.AnalyticsQuery) -> dict[str, NDArray[Any]]:
    """Return version 0 of a query, to which the answers of devices are added."""
    try:
        query = Query.from_proto(message)
    except InvalidQueryError as error:
        raise SimulationError(f"analytics.{error}") from error
    return {TENSOR: np.zeros(query.element_count, np.float32)}


def _require_functions(
    config: SimulationConfig, train: TrainFunction | None, columns: Mapping[str, QueryFunction]
) -> None:
    """Refuse a configuration whose devices have no function for what they are asked.

    Raises:
        SimulationError: There is none to train, or none of the column of the query.
    """
    if not config.training.HasField("analytics"):
        if train is None:
            raise SimulationError("train: got none, want a training function")
        return
    column = config.training.analytics.column
    if column not in columns:
        raise SimulationError(
            f"analytics: devices have no column {column[:100]!r}: pass its function as analytics, or set "
            "simulation.analytics"
        )
    if config.local_privacy is not None:
        raise SimulationError(
            "simulation.local_privacy: has no meaning in a query, whose noise is that of its epsilon"
        )


def _require_evaluation(
    config: SimulationConfig, evaluate: EvaluateFunction | None, held_out: Sequence[Any] | None
) -> None:
    """Refuse a configuration whose devices are to measure versions and cannot.

    Raises:
        SimulationError: There is no function, or no data.
    """
    if config.held_out and held_out is None:
        raise SimulationError(
            "simulation.held_out: divides the examples of a data set; pass held_out for data of devices"
        )
    if not config.training.evaluation.every_rounds:
        return
    if evaluate is None:
        raise SimulationError("evaluation.every_rounds: want an evaluation function")
    if held_out is None:
        raise SimulationError(
            "evaluation.every_rounds: devices hold out nothing to measure versions on: set "
            "simulation.held_out, or pass held_out"
        )
    if len(held_out) != config.devices:
        raise SimulationError(
            f"held_out: got {len(held_out)}, want one for each of {config.devices}"
        )


def _with_devices(config: SimulationConfig, data: Sequence[Any]) -> SimulationConfig:
    """Return a configuration with as many devices as there are data."""
    if not len(data):
        raise SimulationError("data: got none, want those of at least one device")
    return config.with_devices(len(data))


@contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="qflare-simulation-") as temporary:
        yield Path(temporary)


def _history(
    coordinator: SimulatedCoordinator, config: SimulationConfig, course: Course, home: Path | None
) -> History:
    owner, _ = coordinator.state()
    path, manifest = coordinator.download(owner.current_version)
    layout = Manifest.from_proto(tensor_pb2.Manifest.FromString(manifest))
    read = tables.read(coordinator.application.database, owner.id, course.evaluations)
    return History(
        config=config,
        tables=read,
        model=assemble(layout, [path.read_bytes()]),
        version=owner.current_version,
        state=owner.state,
        reason=owner.state_reason,
        virtual_s=coordinator.clock.elapsed_s,
        refusals=course.refusals,
        counts={number: asdict(counts) for number, counts in sorted(course.counts.items())},
        session_id=owner.id,
        folder=home,
        best=_best(owner, course),
        local_epsilon=course.local_epsilon,
        result=_result(owner, path),
    )


def _result(owner: TrainingSession, path: Path) -> Result | None:
    """Return the result of a query; None without one."""
    if not owner.config.HasField("analytics") or owner.current_version < RESULT_VERSION:
        return None
    return NoisySum.of_version(owner.config, path.read_bytes()).result()


def _best(owner: TrainingSession, course: Course) -> Best | None:
    """Return the best version by the session's objective, measured on held-out data where there are measurements.

    The coordinator compares versions by what devices hold out. Without federated evaluation it has their training
    metrics only, and the test data of the simulation decides instead.
    """
    objective = objective_of(owner.config)
    if not objective.is_held_out:
        best: Best | None = None
        for version, metrics in sorted(course.evaluations.items()):
            value = metrics.get(objective.metric)
            if value is not None and objective.prefers(value, best.value if best else None):
                best = Best(version, objective.metric, value, "test data")
        if best is not None:
            return best
    if owner.best_version is None or owner.best_value is None:
        return None
    return Best(owner.best_version, objective.metric, owner.best_value, objective.data)
