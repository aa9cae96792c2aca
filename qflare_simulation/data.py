"""Federated data: the examples of each device, and those that versions are evaluated on.

Ready data sets are those that scikit-learn ships; nothing is downloaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qflare_simulation import partition
from qflare_simulation.config import SimulationConfig
from qflare_simulation.errors import SimulationError
from qflare_simulation.softmax import Examples, evaluate, first_model, train

TEST_SHARE: Final = 0.2


@dataclass(frozen=True)
class FederatedData(Sequence[Any]):
    """The data of each device, by index, made when a device trains and not before.

    Attributes:
        devices: Number of devices.
        at: Returns the data of the device of an index.
        test: Data that versions are evaluated on; None without.
        model: First model of a ready data set; empty without.
        held_out: What each device measures versions on, by index, None for a device that measures none; None if no
            device does.
    """

    devices: int
    at: Callable[[int], Any]
    test: Any = None
    model: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    held_out: Sequence[Any] | None = None

    def __len__(self) -> int:
        """Return the number of devices."""
        return self.devices

    def __getitem__(self, index: Any) -> Any:
        """Return the data of a device."""
        if not 0 <= index < self.devices:
            raise IndexError(index)
        return self.at(index)


@dataclass(frozen=True)
class Dataset:
    """Examples of one place, before they are divided.

    Attributes:
        inputs: One row for each example.
        labels: Class of each example, from 0.
        columns: Further values of each example by name, to divide by.
    """

    inputs: NDArray[Any]
    labels: NDArray[Any]
    columns: Mapping[str, Sequence[Any] | NDArray[Any]] = field(default_factory=dict)

    def divided(self, config: SimulationConfig) -> FederatedData:
        """Hold out a fifth of the examples for evaluation and divide the others as a configuration says.

        Raises:
            SimulationError: There are not enough examples, or there is no such column.
        """
        order = np.random.default_rng(config.seed).permutation(len(self.labels))
        held = max(1, int(len(order) * TEST_SHARE))
        kept = np.sort(order[held:])
        indices = [kept[part] for part in self._parts(config, kept)]
        own = None
        if config.held_out:
            split = [_split(part, config) for part in indices]
            indices = [trained for trained, _ in split]
            own = _HeldOut(_Parts(self.inputs, self.labels, [measured for _, measured in split]))
        parts = _Parts(self.inputs, self.labels, indices)
        test = Examples(self.inputs[order[:held]], self.labels[order[:held]])
        model = first_model(self.inputs.shape[1], int(self.labels.max()) + 1)
        return FederatedData(len(indices), parts.at, test, model, own)

    def _parts(self, config: SimulationConfig, kept: NDArray[Any]) -> list[partition.Indices]:
        labels, devices, seed = self.labels[kept], config.devices, config.seed
        if config.partition == "dirichlet":
            return partition.dirichlet(labels, devices, alpha=config.alpha, seed=seed)
        if config.partition == "shards":
            return partition.shards(labels, devices, per_device=config.shards, seed=seed)
        if config.partition == "column":
            if config.column not in self.columns:
                names = ", ".join(sorted(self.columns)) or "none"
                raise SimulationError(
                    f"simulation.column: got {config.column!r}, the data set has: {names}"
                )
            return partition.by_column(np.asarray(self.columns[config.column])[kept], devices)
        return partition.iid(len(kept), devices, seed=seed)


class _Parts(NamedTuple):
    """The examples of every device, as indices into one data set."""

    inputs: NDArray[Any]
    labels: NDArray[Any]
    indices: Sequence[partition.Indices]

    def at(self, device: int) -> Examples:
        chosen = self.indices[device]
        return Examples(self.inputs[chosen], self.labels[chosen])


class _HeldOut(Sequence[Any]):
    """What each device measures versions on; None where there is nothing."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts.indices)

    def __getitem__(self, index: Any) -> Any:
        return self._parts.at(index) if len(self._parts.indices[index]) else None


def _split(
    part: partition.Indices, config: SimulationConfig
) -> tuple[partition.Indices, partition.Indices]:
    """Return what a device trains on and what it holds out: nothing if it has one example."""
    if len(part) <= 1:
        return part, part[:0]
    shuffled = np.random.default_rng([config.seed, int(part[0])]).permutation(part)
    count = min(len(part) - 1, max(1, round(config.held_out * len(part))))
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def load(name: str) -> Dataset:
    """Return a ready data set: digits, iris, wine or breast_cancer, with inputs scaled to mean 0 and deviation 1.

    Each has the column `label`.

    Raises:
        SimulationError: There is none of this name, or scikit-learn is not installed.
    """
    if name not in READY:
        raise SimulationError(f"data: got {name!r}, want one of {', '.join(READY)}")
    try:
        from sklearn import datasets  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise SimulationError(
            "ready data sets need scikit-learn: pip install 'qflare[simulation]'"
        ) from error
    found = getattr(datasets, f"load_{name}")()
    inputs = np.asarray(found.data, np.float32)
    deviation = inputs.std(axis=0)
    scaled = (inputs - inputs.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    labels = np.asarray(found.target, np.int64)
    return Dataset(scaled.astype(np.float32), labels, {"label": labels})


READY: Final = ("digits", "iris", "wine", "breast_cancer")
"""Names of the ready data sets."""

__all__ = ["READY", "Dataset", "Examples", "FederatedData", "evaluate", "load", "train"]
