"""Folding and combining updates: how fast beside memory and numpy, and in how much memory."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies import Accumulator, Contribution, Reader, StrategyConfig, build
from tests.bench.coordinator import Laboratory
from tests.bench.devices import SEED
from tests.bench.figures import MB, Figure, megabytes, milliseconds, percent, throughput

Vectors = list[NDArray[np.float32]]
RULES = ("median", "trimmed_mean", "krum")
PEAK_GOAL_BYTES = 500 * MB
FASTER = 1.5
"""How many times as fast two threads are as one, at least."""
REPEATED = 3
"""How often the same bytes are folded as so many updates."""
NUMPY: dict[str, Callable[[NDArray[np.float32]], object]] = {
    "median": lambda stack: np.median(stack, axis=0),
    "trimmed_mean": lambda stack: np.sort(stack, axis=0)[10:-10].mean(axis=0),
    "krum": lambda stack: np.argsort(
        ((stack @ stack.T).diagonal()[:, None] - 2 * (stack @ stack.T)), axis=1
    ),
}


def _updates(count: int, size_bytes: int) -> Vectors:
    generator = np.random.default_rng(SEED)
    return [generator.standard_normal(size_bytes // 4, dtype=np.float32) for _ in range(count)]


def _best(repeats: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def fold(vectors: Vectors, threads: int, *, together: bool) -> tuple[float, float]:
    """Make a version of updates that are in memory, taken in one by one or as many as have come.

    Returns:
        Seconds of folding, and of making the version after the last one.
    """
    count = vectors[0].size
    base = np.zeros(count, np.float32)
    strategy = build(StrategyConfig(name="fedavg", quorum=len(vectors)))
    contributions = [
        Contribution(str(number), 100 + number, _reader(vector), full_weights=True)
        for number, vector in enumerate(vectors * REPEATED)
    ]
    accumulator = Accumulator(strategy, count, _reader(base), thread_count=threads)
    started = time.perf_counter()
    if together:
        accumulator.extend(contributions)
    else:
        for contribution in contributions:
            accumulator.add(contribution)
    folded = time.perf_counter()
    for _ in accumulator.finish():
        pass
    return folded - started, time.perf_counter() - folded


def _reader(vector: NDArray[np.float32]) -> Reader:
    return lambda start, stop: vector[start:stop]


def folding(lab: Laboratory) -> Iterator[Figure]:
    """FedAvg over thirty updates of 100 MB in memory, beside a plain read of the same bytes."""
    vectors = _updates(10, lab.times(100, 25) * MB)
    total_bytes = REPEATED * sum(vector.nbytes for vector in vectors)
    repeats = lab.times(5, 3)
    bound_s = REPEATED * _best(
        repeats, lambda: [vector.view(np.uint64).max() for vector in vectors]
    )
    for together in (True, False):
        for threads in (1, 2):
            runs = [fold(vectors, threads, together=together) for _ in range(repeats)]
            seconds, made_s = min(runs)
            yield Figure(
                f"FedAvg fold, {len(vectors) * REPEATED} x {vectors[0].nbytes / MB:.0f} MB in memory,"
                f" {'taken together' if together else 'one by one'}, threads: {threads}",
                f"{throughput(total_bytes, seconds)}; then the version in {milliseconds(made_s)}",
                f"plain read, one thread: {throughput(total_bytes, bound_s)}",
                percent(bound_s / seconds),
                ">= 30%",
                bound_s / seconds >= 0.3,
            )


def sliced(lab: Laboratory) -> Iterator[Figure]:
    """FedAvg over updates in memory slice by slice, as of models whose total is not held: two threads beside one."""
    vectors = _updates(3, lab.times(400, 50) * MB)
    count, base = vectors[0].size, np.zeros(vectors[0].size, np.float32)
    strategy = build(StrategyConfig(name="fedavg", quorum=len(vectors)))

    def make(threads: int) -> None:
        accumulator = Accumulator(
            strategy, count, _reader(base), thread_count=threads, resident_bytes=0
        )
        accumulator.extend(
            [
                Contribution(str(number), 100 + number, _hashed(vector), full_weights=True)
                for number, vector in enumerate(vectors)
            ]
        )
        for _ in accumulator.finish():
            pass

    seconds = {threads: _best(lab.times(5, 3), partial(make, threads)) for threads in (1, 2)}
    yield Figure(
        f"FedAvg by slices, {len(vectors)} x {vectors[0].nbytes / MB:.0f} MB, hashed, two threads",
        throughput(sum(vector.nbytes for vector in vectors), seconds[2]),
        f"one thread: {throughput(sum(vector.nbytes for vector in vectors), seconds[1])}",
        f"{seconds[1] / seconds[2]:.1f} x",
        ">= 1.5 x",
        seconds[1] / seconds[2] >= FASTER,
    )


def _hashed(vector: NDArray[np.float32]) -> Reader:
    """Return a reader that hashes what it reads, as the coordinator does."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        hashlib.sha256(vector[start:stop].data).digest()
        return vector[start:stop]

    return read


def robust(lab: Laboratory) -> Iterator[Figure]:
    """Robust rules over 100 updates on disk, beside numpy with everything in memory."""
    size_bytes = 100 * MB if lab.full else lab.times(10, 4) * MB
    small = np.stack(_updates(100, lab.times(4, 1) * MB))
    for rule in RULES:
        numpy_s = _best(1, partial(NUMPY[rule], small))
        arguments = ["-m", "tests.bench.cohort", rule, "100", str(size_bytes), str(lab.folder)]
        done = subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, text=True
        )
        facts = json.loads(done.stdout)
        peak_bytes = facts["peak_bytes"]
        yield Figure(
            f"{rule} over 100 x {size_bytes / MB:.0f} MB on disk",
            f"{throughput(100 * size_bytes, facts['seconds'])} ({facts['seconds']:.1f} s),"
            f" peak memory {megabytes(peak_bytes)}",
            f"numpy in memory, 100 x {small[0].nbytes / MB:.0f} MB:"
            f" {throughput(small.nbytes, numpy_s)}",
            f"{100 * size_bytes / facts['seconds'] / (small.nbytes / numpy_s):.1f} x",
            f"peak < {megabytes(PEAK_GOAL_BYTES)}",
            peak_bytes < PEAK_GOAL_BYTES,
        )
