"""Updates of 10 KB and other small operations: how many a second, and how long one takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from grpc_health.v1 import health_pb2
from sqlalchemy import text

from qflare.v1 import training_pb2
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import Model, download, polls, submissions
from tests.bench.figures import KB, Figure, Latencies, milliseconds, percent
from tests.bench.handshakes import registrations
from tests.bench.load import Call, alternating, closed_loop, paced, sequence
from tests.bench.population import BenchDevice
from tests.bench.process import ServerProcess

SMALL = Model(10 * KB)
SHARE_GOAL, P99_GOAL_MS, CPU_GOAL_S = 0.40, 25.0, 1.4e-3
IDLE_GOAL_S = 0.35e-3
UNBOUNDED = 1_000_000
STATISTICS_S = 1.5
"""How long PostgreSQL's backends keep their counts to themselves, in seconds."""
_TRANSACTIONS = text(
    "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
)
NO_SIGNATURES = {"QFLARE_REQUIRE_SIGNATURES": "false"}


def start_unbounded(coordinator: Coordinator, model: Model) -> str:
    """Start a training session whose first round takes as many updates as come."""
    config = training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=UNBOUNDED))
    return coordinator.admin.start_session(model.manifest, model.payload, config)


def updates(lab: Laboratory) -> Iterator[Figure]:
    """Durable updates of 10 KB per second."""
    count = lab.times(3000, 600)
    with lab.sink() as sink:
        for backend in Backend:
            with lab.coordinator(backend) as coordinator:
                devices = coordinator.population.devices(count)
                warm_up(coordinator, devices)
                for in_flight in (16, 64):
                    session_id = start_unbounded(coordinator, SMALL)
                    calls = submissions(coordinator, session_id, devices, SMALL)
                    what = f"{backend}, {in_flight} devices"
                    rate, figure = _closed(what, coordinator, sink, calls, in_flight)
                    yield figure
                session_id = start_unbounded(coordinator, SMALL)
                calls = submissions(coordinator, session_id, devices, SMALL)
                yield _paced(f"{backend}, 64 devices", coordinator, sink, calls, rate / 2)


def warm_up(coordinator: Coordinator, devices: list[BenchDevice]) -> None:
    """Let each device ask for its task and send one update, as it has in any round but the first."""
    session_id = start_unbounded(coordinator, SMALL)
    closed_loop(coordinator.address, polls(devices, session_id), 16)
    closed_loop(coordinator.address, submissions(coordinator, session_id, devices, SMALL), 16)


def _closed(
    what: str, coordinator: Coordinator, sink: ServerProcess, calls: list[Call], in_flight: int
) -> tuple[float, Figure]:
    """Return the rate reached, in updates per second, and the figure."""
    before = coordinator.process.cpu_s()
    done, bound = alternating((coordinator.address, sink.address), (calls, calls), in_flight)
    cpu_s = (coordinator.process.cpu_s() - before) / len(calls)
    share = done.rate / bound.rate
    return done.rate, Figure(
        f"update of 10 KB, {what}, closed loop",
        f"{done}; {milliseconds(cpu_s)} of CPU each",
        f"no-op call: {bound}",
        percent(share),
        f">= {percent(SHARE_GOAL)} and <= {milliseconds(CPU_GOAL_S)}",
        share >= SHARE_GOAL and cpu_s <= CPU_GOAL_S,
    )


def _paced(
    what: str, coordinator: Coordinator, sink: ServerProcess, calls: list[Call], rate: float
) -> Figure:
    """Measure latencies at half of the closed loop's rate, and those of calls that do nothing at the same rate."""
    before = coordinator.process.cpu_s()
    done = paced(coordinator.address, calls, rate, 64)
    cpu_s = (coordinator.process.cpu_s() - before) / len(calls)
    bound = paced(sink.address, calls, rate, 64)
    return Figure(
        f"update of 10 KB, {what}, paced at half of that rate, {rate:.0f}/s",
        f"{done}; {milliseconds(cpu_s)} of CPU each",
        f"no-op call: {bound}",
        goal=f"p99 < {P99_GOAL_MS:.0f} ms",
        reached=done.quantile_ms(0.99) < P99_GOAL_MS,
    )


def signatures(lab: Laboratory) -> Iterator[Figure]:
    """What signatures cost: the same path with and without them."""
    count = lab.times(3000, 600)
    with (
        lab.coordinator(Backend.SQLITE) as strict,
        lab.coordinator(Backend.SQLITE, NO_SIGNATURES) as lax,
    ):
        calls = []
        for coordinator in (strict, lax):
            devices = coordinator.population.devices(count)
            warm_up(coordinator, devices)
            session_id = start_unbounded(coordinator, SMALL)
            calls.append(
                submissions(
                    coordinator, session_id, devices, SMALL, with_signatures=coordinator is strict
                )
            )
        signed, unsigned = alternating((strict.address, lax.address), calls, 16)
    share = signed.rate / unsigned.rate
    yield Figure(
        "signed update of 10 KB, SQLite, 16 devices",
        str(signed),
        f"unsigned: {unsigned}",
        percent(share),
        ">= 70%",
        share >= 0.7,
    )


def latencies(lab: Laboratory) -> Iterator[Figure]:
    """Median latency of single operations with nothing else going on."""
    count = lab.times(300, 60)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            devices = coordinator.population.devices(count)
            warm_up(coordinator, devices)
            session_id = start_unbounded(coordinator, SMALL)
            submitted = submissions(coordinator, session_id, devices, SMALL)
            gets = [download(devices[0], session_id)] * count
            checks = [Call("/grpc.health.v1.Health/Check", (_health(),))] * count
            yield _median(f"submit 10 KB, {backend}", sequence(coordinator.address, submitted), 5)
            yield _median(f"get a 10 KB model, {backend}", sequence(coordinator.address, gets), 3)
            yield _median(f"health, {backend}", sequence(coordinator.address, checks), 2)
            yield _median(f"register, {backend}", registrations(coordinator, count), 10)


def _health() -> bytes:
    return bytes(health_pb2.HealthCheckRequest().SerializeToString())


def _median(what: str, done: Latencies, goal_ms: float) -> Figure:
    return Figure(
        f"{what}, one device",
        f"p50 {done.median_ms:.2f} ms, p99 {done.quantile_ms(0.99):.1f} ms",
        goal=f"p50 < {goal_ms:.0f} ms",
        reached=done.median_ms < goal_ms,
    )


def idle_polls(lab: Laboratory) -> Iterator[Figure]:
    """Processor time of a poll that finds nothing to do."""
    count = lab.times(4000, 1000)
    with lab.sink() as sink:
        for backend in Backend:
            with lab.coordinator(backend) as coordinator:
                devices = coordinator.population.devices(64)
                session_id = start_unbounded(coordinator, SMALL)
                closed_loop(
                    coordinator.address, submissions(coordinator, session_id, devices, SMALL), 8
                )
                calls = polls(devices, "") * (count // len(devices))
                closed_loop(coordinator.address, calls[: len(devices)], 8)
                with _counted_transactions(coordinator) as transactions:
                    cost_s = _cpu(coordinator.process, calls)
                bound_s = _cpu(sink, calls)
                counted = f"; {transactions[0]} transactions of all threads" if transactions else ""
                yield Figure(
                    f"CPU of the coordinator for one idle poll, {backend}",
                    f"{milliseconds(cost_s)} ({len(calls):,} polls{counted})",
                    f"no-op call: {milliseconds(bound_s)}",
                    f"{cost_s / bound_s:.1f} x",
                    f"<= {milliseconds(IDLE_GOAL_S)}",
                    cost_s <= IDLE_GOAL_S,
                )


@contextmanager
def _counted_transactions(coordinator: Coordinator) -> Iterator[list[int]]:
    """Give the number of transactions on PostgreSQL during the block, afterwards; SQLite counts none.

    Those of the background threads count too: a few each second.
    """
    counted: list[int] = []
    before = _transactions(coordinator)
    yield counted
    if before is not None:
        coordinator.process.settle()
        time.sleep(STATISTICS_S)
        counted.append((_transactions(coordinator) or 0) - before)


def _transactions(coordinator: Coordinator) -> int | None:
    database = coordinator.population.database
    if database.is_sqlite:
        return None
    with database.read() as session:
        return int(session.execute(_TRANSACTIONS).scalar_one())


def _cpu(process: ServerProcess, calls: list[Call]) -> float:
    """Return the processor time that a server spends on a call, in seconds."""
    closed_loop(process.address, calls[:64], 8)
    before = process.cpu_s()
    closed_loop(process.address, calls, 8)
    return (process.cpu_s() - before) / len(calls)
