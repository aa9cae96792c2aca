"""Number of processors that this process may use: what its affinity and the quotas of its control groups leave."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_UNIFIED: Final = "0::"
"""Begins the line of /proc/self/cgroup that names the group in the unified hierarchy (version 2)."""


def usable_processor_count(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Return the number of processors that threads of this process can keep busy, at least 1.

    `os.cpu_count` counts those of the machine: in a container, threads beyond the quota only wait for each other.

    Args:
        root: Where the control groups are mounted.
        membership: Names the group of this process.

    Source: sched_setaffinity(2); cgroup-v2 of the Linux kernel documentation, `cpu.max`.
    """
    return max(1, min(_affinity_count(), *_quota_counts(root, membership)))


def _affinity_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # noqa: TID251 - where there is no affinity


def _quota_counts(root: Path, membership: Path) -> list[int]:
    """Return the quotas of the process's group and of those above it, in processors, rounded up; at least one entry."""
    group = ""
    with suppress(OSError, UnicodeDecodeError):
        for line in membership.read_text().splitlines():
            if line.startswith(_UNIFIED):
                group = line.removeprefix(_UNIFIED).strip("/")
    counts = [_affinity_count()]
    folder = root / group
    for place in (folder, *folder.parents):
        if place == root.parent:
            break
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (int(word) for word in (place / "cpu.max").read_text().split())
            counts.append(-(-quota // period))
    return counts
