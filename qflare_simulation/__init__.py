"""Simulation of federated training: thousands of virtual devices on one machine, through the coordinator's own code.

    from qflare_simulation import ready, simulate, train

    data, evaluate = ready("digits", devices=100, partition="dirichlet")
    history = simulate(train, data, {"total_rounds": 10}, evaluate=evaluate)
    print(history)

`docs/simulation.md` describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qflare_simulation import partition
    from qflare_simulation.config import SimulationConfig
    from qflare_simulation.coordinator import open_coordinator
    from qflare_simulation.counterfactuals import ReplayedRound, replay
    from qflare_simulation.data import (
        READY,
        Dataset,
        Examples,
        FederatedData,
        evaluate,
        load,
        train,
    )
    from qflare_simulation.errors import SimulationError, TrainingFailedError
    from qflare_simulation.history import Best, History, compare
    from qflare_simulation.kinds import DeviceKind
    from qflare_simulation.programs import ready, run_file
    from qflare_simulation.simulation import simulate
    from qflare_simulation.tables import COLUMNS
    from qflare_simulation.terminal import Progress

__all__ = [
    "COLUMNS",
    "READY",
    "Best",
    "Dataset",
    "DeviceKind",
    "Examples",
    "FederatedData",
    "History",
    "Progress",
    "ReplayedRound",
    "SimulationConfig",
    "SimulationError",
    "TrainingFailedError",
    "compare",
    "evaluate",
    "load",
    "open_coordinator",
    "partition",
    "ready",
    "replay",
    "run_file",
    "simulate",
    "train",
]

_NAMES: Final = {
    "partition": (),
    "config": ("SimulationConfig",),
    "coordinator": ("open_coordinator",),
    "counterfactuals": ("ReplayedRound", "replay"),
    "data": ("READY", "Dataset", "Examples", "FederatedData", "evaluate", "load", "train"),
    "errors": ("SimulationError", "TrainingFailedError"),
    "history": ("Best", "History", "compare"),
    "kinds": ("DeviceKind",),
    "programs": ("ready", "run_file"),
    "simulation": ("simulate",),
    "tables": ("COLUMNS",),
    "terminal": ("Progress",),
}
"""Names by module: imported when they are first used, since a process of the pool needs none, and no server either."""


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name == module and not names:
            return import_module(f"{__name__}.{module}")
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
