"""Simulation of federated training: thousands of virtual devices on one machine, through the coordinator's own code.

    from qflare_simulation import ready, simulate, train

    data, evaluate = ready("digits", devices=100, partition="dirichlet")
    history = simulate(train, data, {"total_rounds": 10}, evaluate=evaluate)
    print(history)

`docs/simulation.md` describes it.
"""

from qflare_simulation import partition
from qflare_simulation.config import SimulationConfig
from qflare_simulation.coordinator import open_coordinator
from qflare_simulation.data import READY, Dataset, Examples, FederatedData, evaluate, load, train
from qflare_simulation.errors import SimulationError, TrainingFailedError
from qflare_simulation.history import Best, History, compare
from qflare_simulation.kinds import DeviceKind
from qflare_simulation.programs import ready, run_file
from qflare_simulation.replay import ReplayedRound, replay
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
