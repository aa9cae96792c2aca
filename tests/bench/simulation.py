"""A simulation of many devices, beside Flower's of the same job."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.coordinator import Laboratory
from tests.bench.figures import MB, Figure, percent

HERE: Final = Path(__file__).parent
FLOWER: Final = Path(os.environ.get("FLOWER_PYTHON", HERE.parents[1] / ".venv-flower/bin/python"))
SAMPLE_S: Final = 0.2
GOAL_S, GOAL_BYTES = 12.0, 500 * MB
RECORDED_ROUND_S: Final = 12.2
RECORDED: Final = (
    "Flower 1.41.0 on Ray, recorded on two cores (no Ray in its environment now): 12.2 s a round"
)


@dataclass(frozen=True)
class Run:
    """One run of a program.

    Attributes:
        wall_s: How long it took, in seconds.
        cpu_s: Processor time of all its processes, in seconds.
        peak_bytes: Most memory of all its processes at once, in bytes; pages that they share count once.
        said: What it printed.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    said: str


def simulation(lab: Laboratory) -> Iterator[Figure]:
    """1,000 devices and 10 rounds of a 10 KB model, with a training function that adds a constant."""
    devices, rounds = lab.times(1000, 200), lab.times(10, 3)
    job = f"{devices:,} devices x {rounds} rounds of 10 KB"
    ours = measured([sys.executable, "-m", "tests.bench.simulated_job", str(devices), str(rounds)])
    if ours.said.split() != [str(rounds), f"{float(rounds)}"]:
        raise RuntimeError(f"the simulation did not end as it should: {ours.said}")
    theirs_s, ceiling = _flower(devices, lab.times(2, 1))
    is_whole = not lab.quick
    share = ours.wall_s / rounds / (theirs_s * devices / 1000)
    yield Figure(
        f"simulation of {job}",
        f"{ours.wall_s:.1f} s; {ours.cpu_s:.1f} s of CPU",
        ceiling,
        percent(share) + " of a round",
        f"< {GOAL_S:.0f} s, 10% of a round" if is_whole else "",
        (ours.wall_s < GOAL_S and share <= 0.1) if is_whole else None,
    )
    yield Figure(
        f"peak memory of all processes, {job}",
        f"{ours.peak_bytes / MB:.0f} MB",
        goal=f"< {GOAL_BYTES // MB} MB",
        reached=ours.peak_bytes < GOAL_BYTES,
    )


def _flower(devices: int, rounds: int) -> tuple[float, str]:
    """Return Flower's seconds a round for 1,000 devices, and where that is from."""
    if not _has_ray():
        return RECORDED_ROUND_S, RECORDED
    # Ray's start is in both runs: their difference is that of the rounds alone.
    job = [str(FLOWER), str(HERE / "flower_job.py"), str(devices)]
    short, long = measured([*job, "1"]), measured([*job, str(1 + rounds)])
    round_s = (long.wall_s - short.wall_s) / rounds
    text = f"Flower on Ray: {round_s:.1f} s a round, {long.wall_s:.1f} s for {1 + rounds}"
    return round_s * 1000 / devices, f"{text}, {long.peak_bytes / MB:.0f} MB"


def _has_ray() -> bool:
    if not FLOWER.exists():
        return False
    done = subprocess.run(
        [str(FLOWER), "-c", "import flwr, ray"], capture_output=True, check=False, timeout=60
    )
    return done.returncode == 0


def measured(command: Sequence[str]) -> Run:
    """Run a program and watch the memory of it and of all that it starts.

    Raises:
        RuntimeError: It failed.
    """
    before, begun = os.times(), time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watch = _Watch(process.pid)
        said, complained = process.communicate()
        peak_bytes = watch.stop()
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{complained[-4000:]}")
    cpu_s = sum(after[2:4]) - sum(before[2:4])
    return Run(time.monotonic() - begun, cpu_s, peak_bytes, said)


class _Watch:
    """Samples the memory of a process and its descendants in the background."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the most memory that was seen, in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak_bytes

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            held = sum(_proportional_bytes(pid) for pid in _tree(self._pid))
            self._peak_bytes = max(self._peak_bytes, held)


def _tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(word) for item in threads for word in (item / "children").read_text().split()
        ]
    except OSError:  # it ended at this moment
        return
    for child in children:
        yield from _tree(child)


def _proportional_bytes(pid: int) -> int:
    """Return the memory of a process, of shared pages its share."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024
