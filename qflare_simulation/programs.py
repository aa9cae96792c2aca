"""Programs and data that a configuration file names: `PATH:FUNCTION`, ready data sets, models."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflare.tensors import assemble
from qflare.tensors.safetensors_files import import_safetensors
from qflare_simulation import data as ready_data
from qflare_simulation.config import SimulationConfig
from qflare_simulation.data import READY, Dataset, FederatedData, load
from qflare_simulation.engine import Notice
from qflare_simulation.errors import SimulationError
from qflare_simulation.history import History
from qflare_simulation.simulation import simulate
from qflare_simulation.worker import EvaluateFunction


def ready(name: str, **settings: Any) -> tuple[FederatedData, EvaluateFunction]:
    """Return a ready data set, divided among devices, and the function that evaluates its model.

    Args:
        name: digits, iris, wine or breast_cancer.
        **settings: `devices`, `partition`, `alpha`, `shards`, `column`, `held_out` and `seed`, as in
            `SimulationConfig`.

    Raises:
        SimulationError: There is no such data set, or it cannot be divided so.
    """
    return load(name).divided(SimulationConfig(**settings)), ready_data.evaluate


def run_file(
    path: str | Path,
    *,
    folder: str | Path | None = None,
    notice: Notice | None = None,
    **changes: Any,
) -> History:
    """Simulate what a file describes.

    Args:
        path: Of a configuration, TOML or JSON.
        folder: Folder to keep the coordinator's database in; None keeps none.
        notice: Called as the simulation proceeds, see `simulate`.
        **changes: Settings of the simulation that override the file's.

    Raises:
        SimulationError: The file, or a program that it names, cannot be used.
    """
    config = replace(SimulationConfig.read(path), **changes)
    data = find_data(config)
    train = find(config.train, "train") if config.train else ready_data.train
    columns = {name: find(text, "analytics") for name, text in config.analytics.items()}
    evaluate = _evaluation(config)
    more: dict[str, Any] = {} if notice is None else {"notice": notice}
    model = find_model(config.model) if config.model else None
    return simulate(
        train,
        data,
        config,
        model=model,
        evaluate=evaluate,
        analytics=columns,
        folder=folder,
        **more,
    )


def _evaluation(config: SimulationConfig) -> EvaluateFunction | None:
    if config.evaluate:
        return find(config.evaluate, "evaluate")
    return ready_data.evaluate if config.data in READY else None


def find_evaluation(config: SimulationConfig) -> tuple[EvaluateFunction, Any]:
    """Return the function that measures versions, and its test data.

    Raises:
        SimulationError: The configuration names none.
    """
    evaluate = _evaluation(config)
    if evaluate is None:
        raise SimulationError("simulation.evaluate: got none, want PATH:FUNCTION")
    return evaluate, getattr(find_data(config), "test", None)


def find_data(config: SimulationConfig) -> Sequence[Any]:
    """Return the data of each device that a configuration describes.

    Raises:
        SimulationError: There are none.
    """
    if config.data in READY:
        return load(config.data).divided(config)
    found = find(config.data, "data")()
    return found.divided(config) if isinstance(found, Dataset) else found


def find_model(text: str) -> Any:
    """Return the tensors of a safetensors file, or those that a function returns.

    Raises:
        SimulationError: There are none.
    """
    if not text.endswith(".safetensors"):
        return find(text, "model")()
    try:
        file = import_safetensors(Path(text))
    except (OSError, ValueError) as error:
        raise SimulationError(f"simulation.model: {error}") from error
    return assemble(file.manifest, file.chunks())


def find(text: str, setting: str) -> Callable[..., Any]:
    """Return the function that `PATH:FUNCTION` names.

    Raises:
        SimulationError: The file cannot be loaded, or has no such function.
    """
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py":
        raise SimulationError(
            f"simulation.{setting}: got {text!r}, want PATH:FUNCTION, the path of a Python file"
        )
    module = _load(path, setting)
    found = getattr(module, name, None)
    if not callable(found):
        raise SimulationError(f"simulation.{setting}: {path} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _load(path: Path, setting: str) -> Any:
    """Import a file, once; its folder can be imported from, also by the processes that train."""
    path = path.resolve()
    if not path.is_file():
        raise SimulationError(f"simulation.{setting}: no file {path}")
    if path.stem not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return sys.modules[path.stem]
