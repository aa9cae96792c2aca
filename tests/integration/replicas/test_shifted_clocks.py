"""Replicas whose clocks are minutes apart: rounds, leases, deadlines and tokens go on.

The clocks are those of real processes under libfaketime.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qflare_server.serving.application import Application
from qflare_server.storage.paging import PageRequest
from tests.support.jobs import (
    DEVICES,
    ROUNDS,
    check_every_version,
    enroll_devices,
    prepare,
    wait_for_end,
)
from tests.support.processes import CoordinatorProcess, DeviceThread

pytestmark = pytest.mark.slow

DEADLINE_S = 5


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Return a PostgreSQL database: only replicas on it have several clocks."""
    return postgres_url


@pytest.fixture
def shifted(
    faketime: str, database_url: str, tmp_path: Path
) -> Iterator[Callable[..., CoordinatorProcess]]:
    """Yield what starts a coordinator with a clock of its own, such as `+300s`."""
    with ExitStack() as stack:

        def start(shift: str) -> CoordinatorProcess:
            settings = {
                "LD_PRELOAD": faketime,
                "FAKETIME": shift,
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "QFLARE_LEASE_S": "2",
            }
            process = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
            stack.callback(process.stop)
            process.start()
            return process

        yield start


@pytest.fixture
def session_id(parts: Application) -> str:
    """Return a started training session whose rounds are open for seconds."""
    return prepare(parts, deadline_s=DEADLINE_S)


def test_replicas_minutes_apart_train_and_take_over(
    parts: Application,
    session_id: str,
    shifted: Callable[..., CoordinatorProcess],
    tmp_path: Path,
) -> None:
    ahead, behind = shifted("+300s"), shifted("-300s")
    homes = enroll_devices(parts, tmp_path, ahead.address)
    threads = [
        DeviceThread(home, index, session_id, address=behind.address)
        for index, home in enumerate(homes)
    ]
    for thread in threads:
        thread.start()
    threads[0].join(random.Random(3).uniform(0.2, 0.5))
    ahead.kill()
    wait_for_end(threads, 120)

    assert [thread.update_count for thread in threads] == [ROUNDS] * DEVICES
    assert parts.use_cases.training.get(session_id).current_version == ROUNDS
    check_every_version(parts, session_id)
    states = {
        row.state
        for row in parts.use_cases.training.list_rounds(session_id, PageRequest(1000)).rows
    }
    assert states == {"published"}, "no deadline passed for a wrong clock"
