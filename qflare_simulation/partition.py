"""Partitioners: they divide the examples of a data set among devices.

Each returns one array of indices for each device; together they hold every example once. The same seed makes the same
partition.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qflare_simulation.errors import SimulationError

Indices: TypeAlias = NDArray[np.int64]


def iid(example_count: int, devices: int, *, seed: int = 0) -> list[Indices]:
    """Divide shuffled examples evenly.

    Args:
        example_count: Number of examples, at least one for each device.
        devices: Number of devices, 1 or more.
        seed: Of the shuffle.

    Raises:
        SimulationError: There are more devices than examples.
    """
    _require_enough(example_count, devices)
    return _split(np.random.default_rng(seed).permutation(example_count), devices)


def dirichlet(
    labels: ArrayLike, devices: int, *, alpha: float = 0.5, seed: int = 0, least: int = 1
) -> list[Indices]:
    """Divide the examples of each class in shares drawn from a Dirichlet distribution.

    Devices that are left with fewer than `least` examples get some of those that have most.

    Args:
        labels: Class of each example.
        devices: Number of devices, 1 or more.
        alpha: Concentration, above 0; the smaller, the more uneven.
        seed: Of shares and shuffle.
        least: Fewest examples of a device.

    Raises:
        SimulationError: There are not enough examples.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", arXiv:1909.06335, section 3.
    """
    classes = np.asarray(labels)
    _require_enough(len(classes), devices * max(1, least))
    random = np.random.default_rng(seed)
    parts: list[list[Indices]] = [[] for _ in range(devices)]
    for value in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == value))
        cuts = np.cumsum(random.dirichlet(np.full(devices, alpha)))[:-1] * len(members)
        for part, piece in zip(parts, np.split(members, cuts.astype(np.int64)), strict=True):
            part.append(piece)
    return _leveled([np.concatenate(part) for part in parts], least)


def shards(labels: ArrayLike, devices: int, *, per_device: int = 2, seed: int = 0) -> list[Indices]:
    """Sort the examples by class, cut them into shards of one size, and deal those out at random.

    Args:
        labels: Class of each example.
        devices: Number of devices, 1 or more.
        per_device: Shards that each device gets, 1 or more.
        seed: Of the deal.

    Raises:
        SimulationError: There are more shards than examples.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        arXiv:1602.05629, section 3.
    """
    classes = np.asarray(labels)
    count = devices * per_device
    _require_enough(len(classes), count)
    pieces = _split(np.argsort(classes, kind="stable"), count)
    dealt = np.random.default_rng(seed).permutation(count).reshape(devices, per_device)
    return [np.concatenate([pieces[index] for index in row]) for row in dealt]


def by_column(values: Sequence[Any] | ArrayLike, devices: int) -> list[Indices]:
    """Give each value of a column, such as a hospital or an author, to one device, values in sorted order in turn.

    Raises:
        SimulationError: The column has fewer values than there are devices.
    """
    column = np.asarray(values)
    found, codes = np.unique(column, return_inverse=True)
    if len(found) < devices:
        raise SimulationError(f"column: got {len(found)} values, want at least {devices}")
    return [np.flatnonzero(codes % devices == device) for device in range(devices)]


def _split(order: Indices, count: int) -> list[Indices]:
    return [np.asarray(part, np.int64) for part in np.array_split(order, count)]


def _leveled(parts: list[Indices], least: int) -> list[Indices]:
    """Move examples from the largest parts to those that have too few."""
    for index in range(len(parts)):
        while len(parts[index]) < least:
            largest = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[index] = np.append(parts[index], parts[largest][-1])
            parts[largest] = parts[largest][:-1]
    return parts


def _require_enough(example_count: int, wanted: int) -> None:
    if example_count < wanted:
        raise SimulationError(f"data: got {example_count} examples, want at least {wanted}")
