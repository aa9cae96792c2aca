"""Partitioners hand out every example once, to as many devices as are asked for, alike for one seed."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_simulation import SimulationError, partition

LABELS = np.repeat(np.arange(10), 40)
Partitioner = Callable[[int, int], list[partition.Indices]]
PARTITIONERS: dict[str, Partitioner] = {
    "iid": lambda devices, seed: partition.iid(len(LABELS), devices, seed=seed),
    "dirichlet": lambda devices, seed: partition.dirichlet(LABELS, devices, alpha=0.1, seed=seed),
    "shards": lambda devices, seed: partition.shards(LABELS, devices, per_device=2, seed=seed),
    "column": lambda devices, _: partition.by_column(np.arange(len(LABELS)) % 200, devices),
}


@pytest.mark.parametrize("name", PARTITIONERS)
@given(devices=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_every_example_is_on_one_device(name: str, devices: int, seed: int) -> None:
    parts = PARTITIONERS[name](devices, seed)

    assert len(parts) == devices
    assert min(len(part) for part in parts) >= 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_a_seed_decides_the_partition(name: str) -> None:
    first, again, other = (PARTITIONERS[name](20, seed) for seed in (1, 1, 2))

    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def classes_of(parts: list[partition.Indices]) -> float:
    """Return the mean number of classes of a device."""
    return float(np.mean([len(np.unique(LABELS[part])) for part in parts]))


def test_a_small_alpha_is_uneven() -> None:
    even = partition.dirichlet(LABELS, 20, alpha=100.0)
    uneven = partition.dirichlet(LABELS, 20, alpha=0.05)

    assert classes_of(uneven) < 4
    assert classes_of(even) > 8


def test_shards_hold_few_classes() -> None:
    parts = partition.shards(LABELS, 20, per_device=2)

    assert max(len(np.unique(LABELS[part])) for part in parts) <= 4
    assert {len(part) for part in parts} == {20}


def test_a_column_stays_together() -> None:
    hospitals = np.array(["b", "a", "c", "a", "b", "c", "d"])

    parts = partition.by_column(hospitals, 2)

    assert [sorted(set(hospitals[part])) for part in parts] == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize("name", PARTITIONERS)
def test_too_many_devices_are_refused(name: str) -> None:
    with pytest.raises(SimulationError, match="want at least"):
        PARTITIONERS[name](401, 1)
