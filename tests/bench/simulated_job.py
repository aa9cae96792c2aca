"""`python -m tests.bench.simulated_job DEVICES ROUNDS`: one simulation whose training function adds a constant."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from qflare_client import TrainingTask
from qflare_simulation import simulate

ELEMENTS = 2_500
"""Elements of float32: 10 KB."""


def add(
    arrays: dict[str, Any], task: TrainingTask, data: int
) -> tuple[dict[str, Any], int, Mapping[str, float]]:
    """Add 1 to every element."""
    del task, data
    return {name: array + np.float32(1) for name, array in arrays.items()}, 1, {}


def main() -> None:
    """Simulate, and print the last version."""
    devices, rounds = (int(word) for word in sys.argv[1:])
    model = {"weight": np.zeros(ELEMENTS, np.float32)}
    settings = {"total_rounds": rounds, "rounds.quorum": devices}
    done = simulate(add, range(devices), settings, model=model)
    sys.stdout.write(f"{done.version} {float(done.model['weight'][0])}\n")


if __name__ == "__main__":
    main()
