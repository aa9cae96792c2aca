"""`python -m tests.bench.fleet`: a fleet of registered devices on two coordinators and one PostgreSQL.

The rows of all devices are real; the calls are those of a sample, which sends them as fast as it is answered. Three
phases: idle polls, a round that closes with the last update, and an upload storm, in which every device of the sample
polls and sends its update at once after both coordinators have restarted.
"""

import argparse
import contextlib
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]
from sqlalchemy import insert
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from qflare_server.serving.application import open_database
from qflare_server.storage.database import Database
from qflare_server.storage.tables import Device, DeviceState
from tests.bench.coordinator import Coordinator, with_administrator
from tests.bench.devices import Model, polls, submissions
from tests.bench.figures import KB, Latencies
from tests.bench.load import Call, side_by_side
from tests.bench.population import BenchDevice
from tests.bench.process import ServerProcess
from tests.support.postgresql import PostgresServer, fresh_database

SMALL = Model(10 * KB)
BATCH = 5000
COORDINATORS = 2
CONNECTIONS = 64
STORM_CONNECTIONS = 256
MILLION = 10**6
POLL_INTERVAL_S = 300.0
UPDATES_PER_MINUTE = 10_000

T = TypeVar("T")
administered = contextlib.contextmanager(with_administrator)


@dataclass(frozen=True)
class Load:
    """What one phase took.

    Attributes:
        calls: Latencies of its calls.
        coordinator_s: Processor seconds of the coordinators.
        database_s: Processor seconds of PostgreSQL.
    """

    calls: Latencies
    coordinator_s: float
    database_s: float

    def per_call_ms(self, seconds: float) -> float:
        """Return processor time per call in milliseconds."""
        return 1000 * seconds / len(self.calls.seconds)

    def line(self, what: str) -> str:
        """Return the phase as a line of text."""
        return (
            f"{what}: {self.calls}, p99.9 {self.calls.quantile_ms(0.999):.0f} ms;"
            f" {self.per_call_ms(self.coordinator_s):.2f} ms of a coordinator's core"
            f" and {self.per_call_ms(self.database_s):.2f} ms of PostgreSQL's each"
        )


class Fleet:
    """Two coordinators on one database, with a population."""

    def __init__(self, environment: dict[str, str], server: PostgresServer, folder: Path) -> None:
        self._environment = environment
        self._server = server
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.processes: list[ServerProcess] = []

    def start(self) -> None:
        """Start the coordinators."""
        for number in range(COORDINATORS):
            arguments = ("-m", "qflare_server", "serve")
            process = ServerProcess(arguments, self._environment, self._folder / f"log-{number}")
            self.processes.append(self._stack.enter_context(process))

    def stop(self) -> None:
        """Stop them."""
        self._stack.close()
        self.processes.clear()

    def drive(self, calls: Sequence[Sequence[Call]], connection_count: int) -> Load:
        """Make the calls for each coordinator at the same time; return what they took."""
        before = self._coordinators_s(), self._database_s()
        addresses = [process.address for process in self.processes]
        done = side_by_side(addresses, calls, connection_count // COORDINATORS)
        after = self._coordinators_s(), self._database_s()
        return Load(done, after[0] - before[0], after[1] - before[1])

    def _coordinators_s(self) -> float:
        return sum(process.cpu_s() for process in self.processes)

    def _database_s(self) -> float:
        processes = psutil.Process(self._server.pid).children(recursive=True)
        total = 0.0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


def register(database: Database, count: int) -> None:
    """Insert the rows of devices that make no calls in this run."""
    now = datetime.now(UTC)
    for start in range(0, count, BATCH):
        rows = [_row(now) for _ in range(min(BATCH, count - start))]

        def work(session: Session, rows: list[dict[str, object]] = rows) -> None:
            session.execute(insert(Device), rows)

        database.write(work)


def _row(now: datetime) -> dict[str, object]:
    device_id = str(uuid.uuid4())
    return {
        "id": device_id,
        "name": f"fleet-{device_id}",
        "state": DeviceState.ACTIVE.value,
        "device_type": "fleet",
        "hardware_info": {},
        "network_info": {},
        "capabilities": {},
        "registered_at": now,
        "last_seen_at": now,
    }


def measure(device_count: int, sample_count: int, poll_count: int) -> Iterator[str]:
    """Yield one line for each figure."""
    with (
        PostgresServer(durable=True) as server,
        fresh_database(server.url) as url,
        tempfile.TemporaryDirectory(prefix="qflare-fleet-") as name,
    ):
        environment = {
            "QFLARE_DATA_DIR": name,
            "QFLARE_DATABASE_URL": url,
            "QFLARE_LISTEN": "127.0.0.1:0",
            "QFLARE_AUTO_MIGRATE": "true",
            "QFLARE_MAX_CALLS_PER_SECOND": "0",
        }
        fleet = Fleet(environment, server, Path(name))
        config = ServerConfig.from_env(environment)
        database = open_database(config)
        register(database, device_count - sample_count)
        database.close()
        fleet.start()
        try:
            yield from _phases(fleet, config, device_count, sample_count, poll_count)
        finally:
            fleet.stop()


def _phases(
    fleet: Fleet, config: ServerConfig, device_count: int, sample_count: int, poll_count: int
) -> Iterator[str]:
    with administered(config, fleet.processes[0]) as coordinator:
        devices = coordinator.population.devices(sample_count)
        yield f"{device_count} registered devices, calls of {sample_count}"
        _round(
            fleet, coordinator, devices
        )  # warms caches and connections, as any round but the first finds them
        repeated = -(-poll_count // sample_count)
        idle = fleet.drive(divided(polls(devices, "") * repeated), CONNECTIONS)
        yield idle.line("idle polls")
        updates, closing_s = _round(fleet, coordinator, devices)
        yield updates.line("updates of 10 KB")
        yield f"from the last update to the version: {closing_s:.2f} s"
    fleet.stop()
    fleet.start()
    with administered(config, fleet.processes[0]) as coordinator:
        session_id = coordinator.admin.start_session(
            SMALL.manifest, SMALL.payload, _rounds(MILLION)
        )
        pairs = list(
            zip(
                polls(devices, session_id),
                submissions(coordinator, session_id, devices, SMALL),
                strict=True,
            )
        )
        calls = [[call for pair in part for call in pair] for part in divided(pairs)]
        storm = fleet.drive(calls, STORM_CONNECTIONS)
        yield storm.line("storm after a restart, polls and updates")
    yield from _extrapolation(idle, updates)


def _rounds(quorum: int) -> training_pb2.TrainingConfig:
    policy = training_pb2.RoundPolicy(quorum=quorum, target=quorum)
    return training_pb2.TrainingConfig(rounds=policy, total_rounds=1)


def _round(
    fleet: Fleet, coordinator: Coordinator, devices: Sequence[BenchDevice]
) -> tuple[Load, float]:
    """Run a round of all sampled devices; return its load and the seconds from its last update to its version."""
    session_id = coordinator.admin.start_session(
        SMALL.manifest, SMALL.payload, _rounds(len(devices))
    )
    calls = divided(submissions(coordinator, session_id, devices, SMALL))
    load = fleet.drive(calls, CONNECTIONS)
    begun = time.perf_counter()
    coordinator.admin.await_version(session_id, 1)
    return load, time.perf_counter() - begun


def divided(items: Sequence[T]) -> list[Sequence[T]]:
    """Return the share of each coordinator."""
    return [items[number::COORDINATORS] for number in range(COORDINATORS)]


def _extrapolation(idle: Load, updates: Load) -> Iterator[str]:
    """Yield what a million devices would need, with the assumptions."""
    poll_rate, update_rate = MILLION / POLL_INTERVAL_S, UPDATES_PER_MINUTE / 60
    for what, of in (("coordinators", "coordinator_s"), ("PostgreSQL", "database_s")):
        cores = (
            poll_rate * idle.per_call_ms(getattr(idle, of))
            + update_rate * updates.per_call_ms(getattr(updates, of))
        ) / 1000
        yield f"10^6 devices: {cores:.1f} cores for {what}"
    yield (
        f"assumptions: each device polls every {POLL_INTERVAL_S:.0f} s (QFLARE_MAX_POLL_S or the pace of"
        f" QFLARE_POLLS_PER_SECOND), {UPDATES_PER_MINUTE} updates of 10 KB a minute, the processor time of a call"
        " does not grow with the number of rows"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=__doc__)
    parser.add_argument("--devices", type=int, default=100_000, help="registered devices")
    parser.add_argument("--sample", type=int, default=2000, help="devices that make calls")
    parser.add_argument("--polls", type=int, default=20_000, help="idle polls")
    options = parser.parse_args(arguments)
    for line in measure(options.devices, options.sample, options.polls):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
