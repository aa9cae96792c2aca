"""One robust aggregation over payloads in the coordinator's store, in a process of its own.

Run as `python -m tests.bench.cohort RULE COUNT SIZE_BYTES FOLDER`; prints its seconds and its peak memory as JSON.
The payloads are written first, which does not count; memory of the writing is given back before.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qflare.tensors import CHUNK_BYTES, DType, Manifest, TensorSpec
from qflare.tensors.vectors import VectorLayout, VectorReader
from qflare_server.storage.payload_store import PayloadFile
from qflare_server.strategies import Contribution, Reader, StrategyConfig, begin, build
from tests.bench.devices import SEED


class ChunkReader:
    """Random access to a payload in a store; keeps the chunk that was read last."""

    def __init__(self, store: PayloadFile, payload_id: str) -> None:
        self._store = store
        self._payload_id = payload_id
        self._start, self._held = 0, memoryview(b"")

    def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset` on."""
        if not self._start <= offset <= offset + length <= self._start + len(self._held):
            first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
            chunks = self._store.read(self._payload_id, first, last - first + 1)
            self._start = first * CHUNK_BYTES
            self._held = memoryview(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        return self._held[offset - self._start : offset - self._start + length]


def write(store: PayloadFile, payload_id: str, size_bytes: int, seed: int) -> None:
    """Write one random payload."""
    generator = np.random.default_rng([SEED, seed])
    for first, chunk in enumerate(_random_chunks(generator, size_bytes)):
        store.append(payload_id, first, [chunk])


def _random_chunks(generator: np.random.Generator, size_bytes: int) -> Iterator[bytes]:
    for start in range(0, size_bytes, CHUNK_BYTES):
        length = min(CHUNK_BYTES, size_bytes - start)
        yield generator.standard_normal(length // 4, dtype=np.float32).tobytes()


def aggregate(store: PayloadFile, rule: str, count: int, size_bytes: int) -> float:
    """Return the seconds in which a version is made of the payloads."""
    layout = VectorLayout(Manifest((TensorSpec("weights", DType.FLOAT32, (size_bytes // 4,)),)))

    def reader(number: int) -> Reader:
        return VectorReader(layout, ChunkReader(store, f"{number:032x}").read).read

    strategy = build(StrategyConfig(name=rule, quorum=count))
    started = time.perf_counter()
    aggregation = begin(strategy, size_bytes // 4, reader(0), thread_count=1)
    for number in range(1, count + 1):
        aggregation.add(Contribution(str(number), 100, reader(number), full_weights=True))
    for _ in aggregation.finish():
        pass
    return time.perf_counter() - started


def peak_bytes() -> int:
    """Return the most memory that this process has held resident at once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not say how much memory a process has held")


def main() -> None:
    """Measure one rule."""
    rule, count, size_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory(dir=sys.argv[4]) as folder:
        store = PayloadFile(Path(folder) / "payloads", timeout_s=60)
        for number in range(count + 1):
            write(store, f"{number:032x}", size_bytes, number)
        seconds = aggregate(store, rule, count, size_bytes)
        store.close()
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
