"""A coordinator whose clock is set by an hour while it runs: rounds, leases and log-ins go on.

The clock is that of a real process under libfaketime.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qflare_client import Client
from qflare_server.serving.application import Application
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import Round
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

HOUR = "3600s"
PATIENCE_S = 120
"""For what takes seconds, and an hour where a wait depends on the clock of the machine."""


class SetClock:
    """The clock of a process, which a file sets while it runs."""

    def __init__(self, path: Path, library: str) -> None:
        self._path = path
        self.set("+0")
        self.variables = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "QFLARE_LEASE_S": "2",
        }

    def set(self, shift: str) -> None:
        """Set the clock, in one step: the process reads the file at any time."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(shift)
        temporary.replace(self._path)


@pytest.fixture
def clock(faketime: str, tmp_path: Path) -> SetClock:
    return SetClock(tmp_path / "shift", faketime)


@pytest.fixture
def coordinator(
    parts: Application, clock: SetClock, database_url: str, tmp_path: Path
) -> Iterator[CoordinatorProcess]:
    """Yield a coordinator whose clock can be set."""
    assert parts.config.database_url == database_url
    process = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=clock.variables)
    process.start()
    yield process
    process.kill()  # a set clock of libfaketime can hold timed waits of native threads, on which a stop relies


def rounds_of(parts: Application, session_id: str) -> list[Round]:
    return list(parts.use_cases.training.list_rounds(session_id, PageRequest(1000)).rows)


@pytest.mark.parametrize("shifts", [("+" + HOUR, "+0"), ("-" + HOUR, "+0")], ids=["on", "back"])
def test_training_goes_on_over_a_clock_that_is_set(
    parts: Application,
    coordinator: CoordinatorProcess,
    clock: SetClock,
    shifts: tuple[str, str],
    tmp_path: Path,
) -> None:
    session_id = prepare(parts, deadline_s=60)
    homes = enroll_devices(parts, tmp_path, coordinator.address)
    threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
    clock.set(shifts[0])
    for thread in threads[1:]:
        thread.start()
    threads[1].join(1.0)
    clock.set(shifts[1])
    threads[0].start()
    wait_for_end(threads, PATIENCE_S)

    assert [thread.update_count for thread in threads] == [ROUNDS] * DEVICES
    assert {row.state for row in rounds_of(parts, session_id)} == {"published"}
    check_every_version(parts, session_id)


@pytest.mark.parametrize("shift", ["+" + HOUR, "-" + HOUR])
def test_a_round_is_extended_at_its_deadline_by_elapsed_time(
    parts: Application, coordinator: CoordinatorProcess, clock: SetClock, shift: str, tmp_path: Path
) -> None:
    session_id = prepare(parts, deadline_s=4, quorum=1)
    began = time.monotonic()
    (home, *_) = enroll_devices(parts, tmp_path, coordinator.address)
    clock.set(shift)
    with Client(home=home) as client:
        client.heartbeat()
    end, deadline = began + PATIENCE_S, rounds_of(parts, session_id)[0].deadline_at
    while rounds_of(parts, session_id)[0].deadline_at == deadline:
        assert time.monotonic() < end
        threading.Event().wait(0.05)
    ended = time.monotonic()

    assert ended - began > 3
