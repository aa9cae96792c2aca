"""`kill -9` of coordinators, and of the helper if there is one, at random points of a job with secure aggregation.

`QFLARE_TEST_CRASHES` sets the number of kills.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from qflare.v1 import training_pb2
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.verification.recomputation import recompute_version
from tests.support.helpers import HelperProcess
from tests.support.jobs import DEVICES, enroll_devices, prepare, wait_for_end
from tests.support.processes import CoordinatorProcess, DeviceThread

KILLS: Final = int(os.environ.get("QFLARE_TEST_CRASHES", "5"))
TIMEOUT_S: Final = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 30 * KILLS)]


@pytest.fixture
def helper(parts: Application, tmp_path: Path) -> Iterator[HelperProcess]:
    """Yield a helper of the coordinators of this test."""
    pinned = bootstrap_bundle(parts.keys.trust, "localhost:1")
    made = HelperProcess(tmp_path / "helper", pinned, tmp_path / "helpers")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def known(parts: Application, helper: HelperProcess) -> Iterator[Application]:
    """Yield the use cases of a coordinator that knows the helper."""
    config = replace(parts.context.config, helper_dir=helper.bundle_file.parent)
    opened = Application.open(config)
    yield opened
    opened.close()


def _prepare(known: Application, helper: HelperProcess, rounds: int, **settings: Any) -> str:
    policy = training_pb2.SecureAggregationPolicy(
        mode=training_pb2.SECURE_AGGREGATION_MODE_HELPER,
        clip=100.0,
        helpers=[helper.helper_id],
        metrics=[training_pb2.MaskedMetric(name="loss", bound=10.0)],
    )
    return prepare(known, rounds=rounds, secure=policy, **settings)


def _check(
    known: Application,
    helper: HelperProcess,
    session_id: str,
    rounds: int,
    quorum: int = DEVICES,
) -> None:
    """Every version has the bytes that its masked updates give, and the helper answered each set once."""
    assert known.use_cases.training.get(session_id).current_version == rounds
    for version in range(1, rounds + 1):
        found = recompute_version(known.context, session_id, version)
        assert found.recomputed
        assert found.differences == ()
    assert f"{rounds} answers with {rounds * quorum} updates" in helper.run("audit", "verify")


@pytest.mark.parametrize("quorum", [DEVICES, DEVICES - 1], ids=["synchronous", "asynchronous"])
def test_a_sealed_secure_job_survives_kills_of_coordinator_and_helper(
    known: Application, helper: HelperProcess, database_url: str, tmp_path: Path, quorum: int
) -> None:
    rounds = max(4, KILLS // 2)
    fedbuff = training_pb2.StrategyConfig(name="fedbuff") if quorum < DEVICES else None
    session_id = _prepare(known, helper, rounds, sealed=True, quorum=quorum, strategy=fedbuff)
    settings = {"QFLARE_HELPER_DIR": str(helper.bundle_file.parent)}
    coordinator = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
    coordinator.start()
    homes = enroll_devices(known, tmp_path, coordinator.address)
    chance = random.Random(7)
    threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
    victims: list[Callable[[], None]] = [
        lambda: _restart(coordinator),
        lambda: _restart(helper),
        lambda: _restart(coordinator, helper),
    ]
    try:
        for thread in threads:
            thread.start()
        for number in range(KILLS):
            threads[0].join(chance.uniform(0.0, 0.6))
            victims[number % len(victims)]()
        wait_for_end(threads, TIMEOUT_S)
    finally:
        coordinator.stop()
    _check(known, helper, session_id, rounds, quorum)


def _restart(*victims: CoordinatorProcess | HelperProcess) -> None:
    for victim in victims:
        victim.kill()
    for victim in victims:
        victim.start()


def test_a_job_with_neighbors_survives_kills_of_coordinators(
    parts: Application, database_url: str, tmp_path: Path
) -> None:
    rounds = max(2, KILLS // 5)
    policy = training_pb2.SecureAggregationPolicy(
        mode=training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS,
        clip=100.0,
        corrupt_fraction=0.1,
        metrics=[training_pb2.MaskedMetric(name="loss", bound=10.0)],
    )
    # No number of kills may cost a round its time, however slow the machine is.
    policy.step_timeout.seconds = 3600
    session_id = prepare(parts, rounds=rounds, secure=policy, deadline_s=3600)
    settings = {"QFLARE_LEASE_S": "1"}  # that of a killed coordinator has to end
    coordinator = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
    coordinator.start()
    homes = enroll_devices(parts, tmp_path, coordinator.address)
    threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
    chance = random.Random(7)
    try:
        for thread in threads:
            thread.start()
        for _ in range(KILLS):
            threads[0].join(chance.uniform(0.0, 0.6))
            _restart(coordinator)
        wait_for_end(threads, TIMEOUT_S)
    finally:
        coordinator.stop()
    for version in range(1, rounds + 1):
        found = recompute_version(parts.context, session_id, version)
        assert (found.recomputed, found.differences) == (True, ())


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_coordinators_unmask_every_round_once(
    known: Application, helper: HelperProcess, database_url: str, tmp_path: Path
) -> None:
    rounds = 4
    session_id = _prepare(known, helper, rounds)
    settings = {"QFLARE_HELPER_DIR": str(helper.bundle_file.parent)}
    coordinators = [
        CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
        for _ in range(2)
    ]
    for coordinator in coordinators:
        coordinator.start()
    try:
        homes = enroll_devices(known, tmp_path, coordinators[0].address)
        threads = [
            DeviceThread(home, index, session_id, address=coordinators[index % 2].address)
            for index, home in enumerate(homes)
        ]
        for thread in threads:
            thread.start()
        wait_for_end(threads, TIMEOUT_S)
    finally:
        for coordinator in coordinators:
            coordinator.stop()
    _check(known, helper, session_id, rounds)
