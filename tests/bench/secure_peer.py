"""Whole secure rounds, beside those of Flower's `SecAggPlusWorkflow` on the same machine."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Self

from qflare.tensors import Manifest
from qflare.v1 import security_pb2
from qflare_client import Client
from qflare_client.models.masked_update import add_masks, quantize_update, seal_seeds
from tests.bench.coordinator import Laboratory
from tests.bench.devices import Model
from tests.bench.figures import MB, Figure
from tests.bench.flower_deployed import deployed_round
from tests.bench.process import cpu_of
from tests.bench.rounds import sdk_devices
from tests.bench.secure_rounds import Secured, secured, trained
from tests.bench.simulation import FLOWER, HERE, measured
from tests.support.line import Line

COHORTS: Final = (10, 50, 100)
DROPPED: Final = 10
"""One device of so many drops out."""
WIDTHS: Final = ((32, False), (16, False), (16, True))
"""Bits of an element of a masked update, and whether devices get the version as float16."""
PROCESSES: Final = len(os.sched_getaffinity(0))
"""Processes of devices: in one, the interpreter's lock would join them."""
THREADS: Final = 2
"""Devices of a process that run at once."""
SHARES: Final = 33
"""Flower's neighbors of a node among 100, against nodes that follow the protocol; fewer nodes are a complete graph."""
THRESHOLD: Final = 21
"""Shares of so many that restore a secret of Flower's."""
ROUNDS: Final = 2
"""Rounds that are run; the last one is measured."""
LOOK_S: Final = 0.02
WALL_GOAL: Final = 10.0
BYTES_GOAL: Final = 0.5


@dataclass(frozen=True)
class Spent:
    """What a round took.

    Attributes:
        wall_s: Seconds from its start to the version.
        cpu_s: CPU seconds of all parties.
        up_bytes: Bytes that devices sent.
        down_bytes: Bytes that devices received.
    """

    wall_s: float
    cpu_s: float
    up_bytes: int
    down_bytes: int

    def __str__(self) -> str:
        moved = f"{self.up_bytes / MB:,.0f} MB up, {self.down_bytes / MB:,.0f} MB down"
        return f"{self.wall_s:.1f} s; {self.cpu_s:.1f} s of CPU; {moved}"


def beside_flower(lab: Laboratory) -> Iterator[Figure]:
    """Rounds with a helper, coordinator, helper and devices with the SDK in processes of their own, beside Flower's."""
    _require_flower()
    model = Model(10 * MB)
    for count in COHORTS[:1] if lab.quick else COHORTS:
        theirs = _theirs(model, count)
        for bits, half_base in WIDTHS:
            ours = _ours(lab, model, count, bits, half_base=half_base)
            yield from _compared(ours, theirs, count, _named(bits, half_base=half_base))


def beside_flower_deployed(lab: Laboratory) -> Iterator[Figure]:
    """The smallest of these rounds beside Flower as it is deployed: each node a process, over loopback.

    A SuperNode starts a process for each message of a round, and 500 of them do not fit into the memory of a small
    machine. Its first round is like every other: nothing of these processes is left for the next.
    """
    _require_flower()
    model, count = Model(10 * MB), COHORTS[0]
    with lab.temporary() as folder:
        numbers = (count, model.size_bytes // 4, count // DROPPED)
        wall_s, cpu_s = deployed_round(folder, *numbers, *_secret_sharing(count))
    for bits, half_base in WIDTHS:
        ours = _ours(lab, model, count, bits, half_base=half_base)
        yield Figure(
            _round_name(count, _named(bits, half_base=half_base)),
            str(ours),
            f"Flower's secaggplus, as deployed, over loopback: {wall_s:.1f} s; {cpu_s:.1f} s of CPU of the machine",
            f"{wall_s / ours.wall_s:.0f} x faster; {cpu_s / ours.cpu_s:.0f} x less CPU",
            f">= {WALL_GOAL:g} x faster",
            wall_s / ours.wall_s >= WALL_GOAL,
        )


def _require_flower() -> None:
    if not FLOWER.exists():
        raise RuntimeError("Flower is not installed: `make test` installs it")


def _named(bits: int, *, half_base: bool) -> str:
    return f"{bits} bits" + (", versions as float16" if half_base else "")


def _round_name(count: int, what: str) -> str:
    dropped = count // DROPPED
    return f"secure round of {count} x 10 MB, {dropped} dropped out, helper, {what}, SQLite, SDK"


def _compared(ours: Spent, theirs: Spent, count: int, what: str) -> Iterator[Figure]:
    faster = theirs.wall_s / ours.wall_s
    yield Figure(
        _round_name(count, what),
        str(ours),
        f"Flower's secaggplus, without a network: {theirs}",
        f"{faster:.1f} x faster; {theirs.cpu_s / ours.cpu_s:.1f} x less CPU",
        f">= {WALL_GOAL:g} x faster",
        faster >= WALL_GOAL,
    )
    share = (ours.up_bytes + ours.down_bytes) / (theirs.up_bytes + theirs.down_bytes)
    yield Figure(
        f"bytes of the same round, {count} devices, {what}",
        f"{(ours.up_bytes + ours.down_bytes) / MB:,.0f} MB",
        f"Flower: {(theirs.up_bytes + theirs.down_bytes) / MB:,.0f} MB",
        f"{share:.0%}; {ours.up_bytes / theirs.up_bytes:.0%} of the upload",
        f"<= {BYTES_GOAL:.0%}",
        share <= BYTES_GOAL,
    )


def _ours(lab: Laboratory, model: Model, count: int, bits: int, *, half_base: bool) -> Spent:
    """Let devices take part in two rounds, and return what the second one took.

    A training session has many rounds in the same processes: the first one loads code and fills caches.
    """
    present = count - count // DROPPED
    with secured(lab) as made, lab.temporary() as folder, ExitStack() as stack:
        for client in sdk_devices(made.coordinator, folder, count):
            client.close()
        session_id = made.session(model, present, ROUNDS + 1, bits=bits, half_base=half_base)
        homes = [folder / f"device-{number}" for number in range(count)]
        groups = [
            stack.enter_context(DeviceProcess(homes[first::PROCESSES], session_id))
            for first in range(PROCESSES)
        ]
        for version in range(1, ROUNDS + 1):
            made.coordinator.process.settle()
            before, begun = _cpu(made, groups), time.perf_counter()
            for device in [group.start(homes[: count // DROPPED]) for group in groups]:
                device.result()
            made.coordinator.admin.await_version(session_id, version, every_s=LOOK_S)
            wall_s, cpu_s = time.perf_counter() - begun, _cpu(made, groups) - before
        stack.close()
        second = made.session(model, 2, 1, bits=bits, half_base=half_base)
        with (
            Line(made.coordinator.address) as line,
            Client(home=homes[0], address=line.address) as moved,
        ):
            _contribute(moved, second)
            up_bytes, down_bytes = line.up_bytes, line.down_bytes
    return Spent(wall_s, cpu_s, up_bytes * present, down_bytes * count)


def _cpu(made: Secured, groups: Sequence["DeviceProcess"]) -> float:
    parties = made.coordinator.process.cpu_s() + cpu_of(made.helper.pid)
    return time.process_time() + parties + sum(group.cpu_s() for group in groups)


class DeviceProcess:
    """Devices in a process of their own, `THREADS` at once; use it as a context manager.

    Args:
        homes: Key stores of the devices. Their sessions are open when it is made, as Flower's nodes are.
        session_id: The training session.
    """

    def __init__(self, homes: Sequence[Path], session_id: str) -> None:
        self._session_id = session_id
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._pid = self._pool.submit(_open, homes, session_id).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.submit(_close).result()
        self._pool.shutdown()

    def cpu_s(self) -> float:
        """Return the processor time that the devices have used so far, in seconds."""
        return cpu_of(self._pid)

    def start(self, dropped: Sequence[Path]) -> Future[None]:
        """Let each device take part in a round; those that drop out send nothing."""
        return self._pool.submit(_take_part, self._session_id, dropped)


_OPENED: Final[dict[Path, Client]] = {}
"""Clients of this process, by key store."""


def _open(homes: Sequence[Path], session_id: str) -> int:
    for home in homes:
        _OPENED[home] = Client(home=home)
        _OPENED[home].get_task(session_id)
    return os.getpid()


def _close() -> None:
    while _OPENED:
        _OPENED.popitem()[1].close()


def _take_part(session_id: str, dropped: Sequence[Path]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        done = [
            pool.submit(_drop_out if home in dropped else _contribute, client, session_id)
            for home, client in _OPENED.items()
        ]
        for one in done:
            one.result()


def _contribute(client: Client, session_id: str) -> None:
    task = client.get_task(session_id)
    base = client.download_base(task)
    client.submit(task, base, trained(base), 100)


def _drop_out(client: Client, session_id: str) -> None:
    """Mask an update and seal its seed, and send nothing."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    assert task.masking is not None
    arrays = dict(base.arrays)
    update = quantize_update(
        task.masking, Manifest.from_arrays(arrays), trained(base), arrays, 100, {}
    )
    seal_seeds(task.masking, add_masks(task.masking, update), security_pb2.UpdateStatement())


def _theirs(model: Model, count: int) -> Spent:
    """Run a round of Flower's workflow under its own interpreter, after a first one that is not measured."""
    numbers = (count, model.size_bytes // 4, count // DROPPED, *_secret_sharing(count))
    words = [str(number) for number in numbers]
    run = measured([str(FLOWER), str(HERE / "flower_secure_job.py"), *words])
    wall_s, cpu_s, down_bytes, up_bytes = run.said.split()
    return Spent(float(wall_s), float(cpu_s), int(up_bytes), int(down_bytes))


def _secret_sharing(count: int) -> tuple[int, int]:
    """Return the shares of each of Flower's secrets, and how many restore it."""
    return min(SHARES, count), max(2, min(SHARES, count) * THRESHOLD // SHARES)
