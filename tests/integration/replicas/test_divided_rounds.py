"""Coordinator processes that share a round slice by slice, killed and frozen in the middle of a slice."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from sqlalchemy.orm import Session

from qflare_client import Client
from qflare_server.aggregation.slice_worker import SliceWorker
from qflare_server.serving.application import Application
from qflare_server.storage.repository import leases
from qflare_server.storage.tables import FoldSlice
from qflare_server.strategies.blocks import BLOCK
from qflare_server.verification import recompute_version
from tests.support.jobs import DEVICES, enroll_devices, prepare, wait_for_end
from tests.support.processes import (
    CoordinatorProcess,
    DeviceThread,
    Replicas,
    addresses,
    trained,
)
from tests.support.slices import BegunPass

WEIGHTS = {"w": np.zeros(8 * BLOCK, np.float32)}
WAIT_S = 60.0
ATTEMPTS = 50
SETTINGS: Final[dict[str, Any]] = {
    "lease_s": 1,
    "worker_poll_s": 0.01,
    "fold_slice_bytes": 2 * BLOCK * 4,
}
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


def collect(parts: Application, coordinator: CoordinatorProcess, folder: Path) -> str:
    """Let devices send updates for a round that stays open; return the training session's id."""
    session_id = prepare(parts, WEIGHTS, quorum=DEVICES + 1, deadline_s=3600, rounds=2)
    for index, home in enumerate(enroll_devices(parts, folder, coordinator.address)):
        with Client(home=home) as client:
            task = client.get_task(session_id)
            base = client.download_base(task)
            client.submit(task, base, trained(base.arrays, index, 1), 10 + index)
    return session_id


def announce(session: Session, name: str, at: datetime) -> None:
    """Tell other coordinators of one that runs in the test: one that sees no other rarely looks for slices."""
    (other,) = leases.list_replicas(session, at - timedelta(seconds=WAIT_S))
    leases.announce(session, name, "localhost:1", "1", other.payload_store, at, at)


def freeze_in_slice(begun: BegunPass, coordinator: CoordinatorProcess) -> FoldSlice | None:
    """Freeze a coordinator as soon as it holds a slice; return the slice, None if it has recorded it before."""
    while begun.unfinished() and not any(row.holder for row in begun.unfinished()):
        pass
    coordinator.send(signal.SIGSTOP)
    return next((row for row in begun.unfinished() if row.holder), None)


def is_done(begun: BegunPass, worker: SliceWorker) -> bool:
    """Compute a slice if one is free; return whether all have results."""
    return not worker.run_once() and not begun.unfinished()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "frozen"])
def test_a_slice_of_a_coordinator_that_is_gone_is_computed_by_another(
    parts: Application, replicas: Replicas, tmp_path: Path, killed: bool
) -> None:
    log = tmp_path / "log"
    other = replicas.start(log_file=log, **SETTINGS)
    parts.context.database.write(partial(announce, name="this", at=parts.context.clock()))
    session_id = collect(parts, other, tmp_path)
    context = replace(parts.context, config=replace(parts.config, lease_s=1.0))
    this = SliceWorker(context, parts.executor, "this")

    for _ in range(ATTEMPTS):  # until it is frozen between two commits, not during the last one
        begun = BegunPass.begin(context, session_id)
        caught = freeze_in_slice(begun, other)
        if killed:
            other.kill()
        wait_until(partial(is_done, begun, this))
        if caught is not None and begun.rows()[caught.slice_index].fence > 1:
            break
        if killed:
            other.start()
        other.send(signal.SIGCONT)

    assert caught is not None
    row = begun.rows()[caught.slice_index]
    assert (row.fence, row.holder) == (2, "this")
    if not killed:
        other.send(signal.SIGCONT)
        wait_until(lambda: f"slice={row.slice_index} fence=1 is not the current" in log.read_text())
    again = begun.rows()[caught.slice_index]
    assert (again.fence, again.holder, again.payload_id) == (2, "this", row.payload_id)
    assert begun.results().tobytes() == begun.alone().tobytes()


@pytest.mark.slow
def test_rounds_are_published_while_coordinators_are_killed_and_frozen(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    rounds = 3
    trio = [replicas.start(**SETTINGS) for _ in range(3)]
    session_id = prepare(parts, WEIGHTS, rounds=rounds)
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
