"""Coordinator processes that share a round slice by slice, killed and frozen in the middle of a slice."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.aggregation.slice_worker import SliceWorker
from qflare_server.context import Context
from qflare_server.serving.application import Application
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.tables import FoldSlice
from qflare_server.strategies.blocks import BLOCK
from qflare_server.verification import recompute_version
from tests.support.jobs import DEVICES, enroll_devices, prepare, wait_for_end
from tests.support.processes import CoordinatorProcess, DeviceThread, Replicas, addresses
from tests.support.slices import BegunPass

COUNT = 8 * BLOCK
WAIT_S = 60.0
ATTEMPTS = 50
SETTINGS = {"lease_s": 1, "worker_poll_s": 0.01, "fold_slice_bytes": 2 * BLOCK * 4}
"""A slice holds about two blocks of one update, so that a round of three updates has eight slices of a block each."""


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Return a PostgreSQL database: several processes need one."""
    return postgres_url


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what other processes do."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def context_of(parts: Application) -> Context:
    """Return what this process, the other coordinator, works with."""
    return replace(parts.context, config=replace(parts.config, lease_s=1.0))


def collect(parts: Application, coordinator: CoordinatorProcess, folder: Path) -> str:
    """Let devices send their updates of a round that stays open; return the training session's id."""
    weights = {"w": np.zeros(COUNT, np.float32)}
    session_id = prepare(parts, weights, quorum=DEVICES + 1, deadline_s=3600, rounds=2)
    for index, home in enumerate(enroll_devices(parts, folder, coordinator.address)):
        thread = DeviceThread(home, index, session_id, address=coordinator.address)
        thread.start()
    wait_until(lambda: accepted_count(parts, session_id) == DEVICES)
    return session_id


def accepted_count(parts: Application, session_id: str) -> int:
    with parts.database.read() as session:
        current = training_sessions.get_round(session, session_id, 1)
    return 0 if current is None else current.accepted_count


def caught_slice(begun: BegunPass, coordinator: CoordinatorProcess) -> FoldSlice | None:
    """Freeze a coordinator once it holds a slice; return the slice that it holds then, if it still does."""
    while not any(row.holder for row in begun.unfinished()):
        if not begun.unfinished():
            return None
    coordinator.send(signal.SIGSTOP)
    held = [row for row in begun.unfinished() if row.holder]
    return held[0] if held else None


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGCONT], ids=["killed", "frozen"])
def test_a_slice_of_a_coordinator_that_is_gone_is_computed_by_another(
    parts: Application, replicas: Replicas, tmp_path: Path, end: signal.Signals
) -> None:
    log = tmp_path / "log"
    other = replicas.start(log_file=log, **SETTINGS)
    session_id = collect(parts, other, tmp_path)
    context = context_of(parts)
    worker = SliceWorker(context, parts.executor, "this")

    for _ in range(ATTEMPTS):
        begun = BegunPass.begin(context, session_id)
        caught = caught_slice(begun, other)
        if caught is not None:
            break
        other.send(signal.SIGCONT)
    assert caught is not None
    if end == signal.SIGKILL:
        other.kill()
    wait_until(lambda: not worker.run_once() and not begun.unfinished())
    row = begun.rows()[caught.slice_index]
    refused = log.read_text().count("result refused")
    other.send(end)

    if end == signal.SIGCONT and row.fence > 1:
        wait_until(lambda: log.read_text().count("result refused") > refused)
    again = begun.rows()[caught.slice_index]
    assert (again.fence, again.holder, again.payload_id) == (row.fence, row.holder, row.payload_id)
    assert begun.results().tobytes() == begun.alone().tobytes()


@pytest.mark.slow
def test_rounds_are_published_while_coordinators_are_killed_and_frozen(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    rounds = 4
    trio = [replicas.start(**SETTINGS) for _ in range(3)]
    weights = {"w": np.zeros(COUNT, np.float32)}
    session_id = prepare(parts, weights, rounds=rounds)
    threads = [
        DeviceThread(home, index, session_id, address=addresses(*trio))
        for index, home in enumerate(enroll_devices(parts, tmp_path, trio[0].address))
    ]
    for thread in threads:
        thread.start()
    threads[0].join(1.0)
    trio[2].send(signal.SIGSTOP)
    threads[0].join(1.0)
    trio[1].kill()
    threads[0].join(2.0)
    trio[2].send(signal.SIGCONT)
    wait_for_end(threads, 2 * WAIT_S)

    assert parts.use_cases.training.get(session_id).current_version == rounds
    for version in range(1, rounds + 1):
        again = recompute_version(parts.context, session_id, version)
        assert (again.recomputed, again.differences) == (True, ())
