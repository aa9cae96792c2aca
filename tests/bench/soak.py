"""`python -m tests.bench.soak`: the memory of a coordinator under steady load.

Devices take part in round after round at a steady pace. Each line gives the elapsed time, the updates taken so far and
the memory that the coordinator holds resident. The last line compares the medians of the second quarter and of the
last quarter of the samples: what grows for each update shows there, what is allocated once does not.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import Model, polls, signed, statement_of, submission
from tests.bench.figures import KB, MB
from tests.bench.load import Connection, connections
from tests.bench.population import BenchDevice

SMALL = Model(10 * KB)
DEVICES = 16
TICK_S = 0.05


@dataclass(frozen=True)
class Sample:
    """Memory at one instant.

    Attributes:
        seconds: Since the start.
        updates: Accepted so far.
        resident: Bytes that the coordinator holds in memory.
    """

    seconds: float
    updates: int
    resident: int

    def line(self) -> str:
        """Return the sample as a line of text."""
        return f"{self.seconds:6.0f} s  {self.updates:8d} updates  {self.resident / MB:7.2f} MB"


class Soak:
    """Devices that take part in every round until time is up."""

    def __init__(self, coordinator: Coordinator, seconds: float, interval_s: float) -> None:
        self._coordinator = coordinator
        self._watched = psutil.Process(coordinator.process.pid)
        self._seconds = seconds
        self._interval_s = interval_s
        self._begun = time.monotonic()
        self._updates = 0
        self.samples: list[Sample] = []

    async def run(self, devices: Sequence[BenchDevice], session_id: str, pause_s: float) -> None:
        """Drive the devices and take samples.

        Args:
            devices: Who takes part; a round waits for all of them.
            session_id: Their training session.
            pause_s: How long a device waits after each update.
        """
        async with connections(self._coordinator.address, len(devices)) as opened:
            parts = [
                self._take_part(device, connection, session_id, pause_s)
                for device, connection in zip(devices, opened, strict=True)
            ]
            await asyncio.gather(self._sample(), *parts)

    def _elapsed(self) -> float:
        return time.monotonic() - self._begun

    async def _sample(self) -> None:
        while self._elapsed() < self._seconds:
            await asyncio.sleep(self._interval_s)
            resident = int(self._watched.memory_info().rss)
            self.samples.append(Sample(self._elapsed(), self._updates, resident))
            sys.stdout.write(f"{self.samples[-1].line()}\n")
            sys.stdout.flush()

    async def _take_part(
        self, device: BenchDevice, connection: Connection, session_id: str, pause_s: float
    ) -> None:
        ask = polls([device], session_id)[0]
        while self._elapsed() < self._seconds:
            task = pb.GetTaskResponse.FromString(await connection.send(ask))
            if task.kind != pb.TASK_KIND_TRAIN:
                await asyncio.sleep(TICK_S)
                continue
            statement = statement_of(self._coordinator.config.realm, task, device, SMALL)
            await connection.send(submission(signed(statement, device), device, SMALL))
            self._updates += 1
            await asyncio.sleep(pause_s)


def growth(samples: Sequence[Sample]) -> str:
    """Return what the later samples hold beyond the earlier ones.

    Args:
        samples: At least eight, in the order of time.
    """
    quarter = len(samples) // 4
    earlier, later = samples[quarter : 2 * quarter], samples[-quarter:]
    grown = statistics.median(s.resident for s in later) - statistics.median(
        s.resident for s in earlier
    )
    updates = statistics.median(s.updates for s in later) - statistics.median(
        s.updates for s in earlier
    )
    return (
        f"{grown / MB:+.2f} MB in {updates:.0f} updates: {grown / max(updates, 1):.1f} bytes each"
    )


def _start(coordinator: Coordinator) -> str:
    policy = training_pb2.RoundPolicy(quorum=DEVICES, target=DEVICES)
    config = training_pb2.TrainingConfig(rounds=policy, total_rounds=1_000_000)
    return coordinator.admin.start_session(SMALL.manifest, SMALL.payload, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak a coordinator and print its memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between samples")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds after each update")
    parser.add_argument("--database", choices=[b.name.lower() for b in Backend], default="sqlite")
    options = parser.parse_args(arguments)
    backend = Backend[options.database.upper()]
    with Laboratory() as lab, lab.coordinator(backend) as coordinator:
        soak = Soak(coordinator, options.seconds, options.interval)
        devices = coordinator.population.devices(DEVICES)
        asyncio.run(soak.run(devices, _start(coordinator), options.pause))
    if len(soak.samples) >= 8:
        sys.stdout.write(f"{growth(soak.samples)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
