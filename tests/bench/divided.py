"""Rounds that several coordinators aggregate slice by slice, each pinned to a core as if it were a machine."""

import asyncio
import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from tests.bench.coordinator import Backend, Coordinator, Laboratory, with_administrator
from tests.bench.devices import Model, polls, submissions
from tests.bench.figures import MB, Figure, milliseconds
from tests.bench.load import closed_loop
from tests.bench.process import ServerProcess
from tests.bench.rounds import time_publication

FASTER = 1.5
SLICES = 12
PAUSE_S = 0.02
"""Between two questions for the next version, so that the answers take no part of a core."""
PINNED = (
    "import os, runpy; os.sched_setaffinity(0, {%d});"
    " runpy.run_module('qflare_server', run_name='__main__', alter_sys=True)"
)
"""Program of a coordinator that runs on one core."""


def divided_rounds(lab: Laboratory) -> Iterator[Figure]:
    """Medians of large updates: from the last update to the version, two coordinators beside one."""
    count, model = 40, Model(lab.times(56, 28) * MB)
    seconds = {number: _close(lab, number, count, model) for number in (1, 2)}
    yield Figure(
        f"median of {count} x {model.size_bytes / MB:.0f} MB on PostgreSQL, from the last update to"
        " the version, two coordinators on a core each",
        milliseconds(seconds[2]),
        f"one coordinator: {milliseconds(seconds[1])}",
        f"{seconds[1] / seconds[2]:.1f} x",
        f">= {FASTER} x",
        seconds[1] / seconds[2] >= FASTER,
    )


administered = contextlib.contextmanager(with_administrator)


def _close(lab: Laboratory, coordinator_count: int, update_count: int, model: Model) -> float:
    """Return the median time from a round's last acknowledgement until a device is given the next version."""
    repeats = lab.times(5, 2)
    cores = sorted(os.sched_getaffinity(0))
    with lab.environment(Backend.POSTGRESQL) as defaults, contextlib.ExitStack() as stack:
        slice_bytes = update_count * model.size_bytes // SLICES
        environment = {
            **defaults,
            "QFLARE_FOLD_SLICE_BYTES": str(slice_bytes),
            "QFLARE_PAYLOAD_STORE": "files",  # PostgreSQL would need a core to read from it
        }
        folder = Path(environment["QFLARE_DATA_DIR"])
        processes = [
            stack.enter_context(
                ServerProcess(
                    ("-c", PINNED % cores[number % len(cores)], "serve"),
                    environment,
                    folder / f"log-{number}",
                )
            )
            for number in range(coordinator_count)
        ]
        config = ServerConfig.from_env(environment)
        coordinator = stack.enter_context(administered(config, processes[0]))
        return _median(coordinator, update_count, model, repeats)


def _median(coordinator: Coordinator, update_count: int, model: Model, repeats: int) -> float:
    devices = coordinator.population.devices(update_count)
    config = training_pb2.TrainingConfig(
        total_rounds=repeats + 1,
        strategy=training_pb2.StrategyConfig(name="median"),
        rounds=training_pb2.RoundPolicy(quorum=update_count, deadline=Duration(seconds=3600)),
    )
    session_id = coordinator.admin.start_session(model.manifest, model.payload, config)
    ask = polls(devices[:1], session_id)[0]
    seconds = []
    for _ in range(repeats):
        calls = submissions(coordinator, session_id, devices, model)
        closed_loop(coordinator.address, calls[:-1], 2)
        coordinator.process.settle()
        published = time_publication(coordinator.address, calls[-1], ask, PAUSE_S)
        seconds.append(asyncio.run(published))
    return statistics.median(seconds)
