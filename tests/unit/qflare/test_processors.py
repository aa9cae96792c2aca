import os
from pathlib import Path

import pytest

from qflare.processors import usable_processor_count


@pytest.fixture(autouse=True)
def machine_with_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def count(folder: Path, group: str, quotas: dict[str, str]) -> int:
    """Return the count for a process in a group, with these `cpu.max` by group."""
    root = folder / "cgroup"
    (root / group.strip("/")).mkdir(parents=True)
    for name, text in quotas.items():
        (root / name / "cpu.max").write_text(text)
    membership = folder / "membership"
    membership.write_text(f"12:cpu:/elsewhere\n0::{group}\n")
    return usable_processor_count(root, membership)


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, 8),
        ({"pods/one": "max 100000\n"}, 8),
        ({"pods/one": "200000 100000\n"}, 2),
        ({"pods/one": "150000 100000\n"}, 2),
        ({"pods/one": "1000 100000\n"}, 1),
        ({"pods": "300000 100000\n", "pods/one": "max 100000\n"}, 3),
        ({"": "100000 100000\n"}, 1),
        ({"pods/one": "1600000 100000\n"}, 8),
        ({"pods/one": "nonsense"}, 8),
        ({"pods/one": "100000 0\n"}, 8),
    ],
)
def test_counts_what_affinity_and_quotas_leave(
    tmp_path: Path, quotas: dict[str, str], expected: int
) -> None:
    assert count(tmp_path, "/pods/one", quotas) == expected


def test_the_group_of_a_container_is_the_root_of_what_it_sees(tmp_path: Path) -> None:
    assert count(tmp_path, "/", {"": "250000 100000\n"}) == 3


def test_a_system_without_groups_and_affinity_counts_its_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")

    assert usable_processor_count(tmp_path / "none", tmp_path / "neither") == 64
