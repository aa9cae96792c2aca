"""`kill -9` of the coordinator at random points of a running job; two coordinators on one PostgreSQL."""

import random
from pathlib import Path

import pytest

from qflare_server.serving.application import Application
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


def test_a_job_survives_kills_at_random_points(
    parts: Application, database_url: str, tmp_path: Path
) -> None:
    session_id = prepare(parts)
    coordinator = CoordinatorProcess(tmp_path / "coordinator", database_url)
    coordinator.start()
    homes = enroll_devices(parts, tmp_path, coordinator.address)
    chance = random.Random(7)
    threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(4):
            threads[0].join(chance.uniform(0.05, 0.6))
            coordinator.kill()
            coordinator.start()
        wait_for_end(threads, 120)
    finally:
        coordinator.stop()

    assert parts.use_cases.training.get(session_id).current_version == ROUNDS
    check_every_version(parts, session_id)


def test_two_coordinators_publish_every_version_once(
    parts: Application, database_url: str, tmp_path: Path
) -> None:
    session_id = prepare(parts)
    coordinators = [CoordinatorProcess(tmp_path / "coordinator", database_url) for _ in range(2)]
    for coordinator in coordinators:
        coordinator.start()
    try:
        homes = enroll_devices(parts, tmp_path, coordinators[0].address)
        threads = [
            DeviceThread(home, index, session_id, address=coordinators[index % 2].address)
            for index, home in enumerate(homes)
        ]
        for thread in threads:
            thread.start()
        wait_for_end(threads, 120)
    finally:
        for coordinator in coordinators:
            coordinator.stop()

    assert [thread.update_count for thread in threads] == [ROUNDS] * DEVICES
    check_every_version(parts, session_id)
