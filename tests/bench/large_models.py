"""Large models on other payload stores, and a model of 2 GiB."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from qflare.tensors import DType, Manifest, TensorSpec
from qflare.v1 import training_pb2
from qflare_client import enroll
from tests.bench.coordinator import Backend, Laboratory
from tests.bench.devices import Model
from tests.bench.figures import MB, Figure, megabytes
from tests.bench.handshakes import bundle_of
from tests.bench.rounds import no_op_round, play_rounds, round_figure, start
from tests.support.object_store import BUCKET, bucket_settings, moto_server

SHAPES = ((10, 10 * MB, 1.2), (4, 100 * MB, 4.0))
"""Devices, size of the model in bytes, and goal in seconds with the store `database`."""
HUGE_BYTES = 2 * 2**30
HUGE_DEVICES = 4
COORDINATOR_GOAL_BYTES = 700 * MB
SDK_GOAL = 2.2
"""Models that a device may hold at once."""
DISK_BYTES = (HUGE_DEVICES + 4) * HUGE_BYTES
"""First model, updates, version, and as much again as one update for what is being written."""
PUBLISH_TIMEOUT_S = 1800.0
DEVICE = """\
import resource
import sys
import threading

from qflare_client import Client, run


def train(arrays, task):
    arrays["weights"] += 1
    return arrays, 1, {}


sent = threading.Event()
with Client(home=sys.argv[1]) as client:
    run(client, train, training_session_id=sys.argv[2], stop=sent, on_receipt=lambda _: sent.set())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def other_stores(lab: Laboratory) -> Iterator[Figure]:
    """Rounds without training on PostgreSQL, with payloads in the database, and in a bucket of moto's server."""
    yield from _rounds_on(lab, "database", {})
    with lab.temporary() as folder, moto_server() as endpoint:
        settings = bucket_settings(endpoint, f"s3://{BUCKET}/", folder)
        yield from _rounds_on(
            lab,
            "object on moto",
            {f"QFLARE_{name.upper()}": str(value) for name, value in settings.items()},
        )


def _rounds_on(lab: Laboratory, store: str, settings: dict[str, str]) -> Iterator[Figure]:
    with lab.coordinator(Backend.POSTGRESQL, settings) as coordinator:
        for count, size_bytes, goal_s in SHAPES:
            round_count, model = lab.times(5, 2), Model(size_bytes)
            session_id = start(coordinator, model, count, round_count + 1)
            devices = coordinator.population.devices(count)
            took_s = asyncio.run(play_rounds(coordinator, devices, model, session_id))
            yield round_figure(
                f"round of {count} x {size_bytes / MB:g} MB, PostgreSQL, store {store}",
                took_s / round_count,
                goal_s if store == "database" else None,
                bound_s=no_op_round(lab, model, count),
            )


def huge(lab: Laboratory) -> Iterator[Figure]:
    """Most memory of a coordinator and of a device in a round of four devices with a model of 2 GiB.

    The devices take part one after the other: together they would need the memory of four machines.
    """
    free_bytes = shutil.disk_usage(lab.folder).free
    if free_bytes < DISK_BYTES:
        yield Figure("round of 4 x 2 GiB", f"left out: {megabytes(free_bytes)} of disk are free")
        return
    manifest = Manifest((TensorSpec("weights", DType.FLOAT32, (HUGE_BYTES // 4,)),))
    config = training_pb2.TrainingConfig(
        total_rounds=1,
        rounds=training_pb2.RoundPolicy(quorum=HUGE_DEVICES, deadline=Duration(seconds=7200)),
    )
    with lab.coordinator(Backend.SQLITE) as coordinator, lab.temporary() as folder:
        session_id = coordinator.admin.start_session(manifest, bytes(HUGE_BYTES), config)
        tokens = coordinator.population.enrollment_tokens(HUGE_DEVICES)
        peaks = []
        for number, token in enumerate(tokens):
            home = folder / f"device-{number}"
            enroll(bundle_of(coordinator, token), home=home)
            peaks.append(_peak_of_device(home, session_id))
        coordinator.admin.await_version(session_id, 1, PUBLISH_TIMEOUT_S)
        peak_bytes = coordinator.process.peak_bytes()
    yield Figure(
        f"peak memory of the coordinator, round of {HUGE_DEVICES} x 2 GiB, SQLite",
        megabytes(peak_bytes),
        goal=f"< {megabytes(COORDINATOR_GOAL_BYTES)}",
        reached=peak_bytes < COORDINATOR_GOAL_BYTES,
    )
    yield Figure(
        f"peak memory of a device, round of {HUGE_DEVICES} x 2 GiB, SDK",
        megabytes(max(peaks)),
        f"the model: {megabytes(HUGE_BYTES)}",
        f"{max(peaks) / HUGE_BYTES:.2f} x",
        f"< {SDK_GOAL} x",
        max(peaks) < SDK_GOAL * HUGE_BYTES,
    )


def _peak_of_device(home: Path, session_id: str) -> int:
    """Let a device take part in one round as a process of its own; return its most memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, os.fspath(home), session_id],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)
