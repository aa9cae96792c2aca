"""`kill -9` of the coordinator in the middle of a query of federated analytics: one result, of every answer once."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from qflare.analytics.queries import KINDS
from qflare.analytics.results import NoisySum
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import training_pb2
from qflare_client import Analytics, Client, TaskKind
from qflare_client.admin.connection import Admin
from qflare_client.admin.profile import Profile
from qflare_client.admin.queries import (
    Protection,
    Question,
    create_query,
    query_config,
    read_result,
)
from qflare_helper.__main__ import main as helper_main
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.use_cases.access.roles import Role
from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import wait_for_version
from tests.support.helpers import HelperProcess
from tests.support.jobs import DEVICES, enroll_devices
from tests.support.processes import CoordinatorProcess

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

EPSILON: Final = 600.0
TIMEOUT_S: Final = 120.0
NEIGHBOR_STEPS: Final = {
    messages.TASK_KIND_ADVERTISE,
    messages.TASK_KIND_SHARE,
    messages.TASK_KIND_TRAIN,
    messages.TASK_KIND_CONFIRM,
    messages.TASK_KIND_REVEAL,
}
POLICY: Final = Analytics({"age": ["count"]}, min_cohort=2, max_epsilon=EPSILON, budget=EPSILON)


@pytest.fixture
def helper(parts: Application, tmp_path: Path) -> Iterator[HelperProcess]:
    """Yield a helper of the coordinators of this test."""
    pinned = bootstrap_bundle(parts.keys.trust, "localhost:1")
    made = HelperProcess(tmp_path / "helper", pinned, tmp_path / "helpers")
    made.start()
    yield made
    made.stop()


def _query(helper: HelperProcess) -> training_pb2.TrainingConfig:
    config = training_pb2.TrainingConfig(
        analytics=training_pb2.AnalyticsQuery(column="age", kind=KINDS["count"]),
        privacy=training_pb2.PrivacyPolicy(epsilon_budget=EPSILON),
        rounds=training_pb2.RoundPolicy(quorum=DEVICES),
    )
    config.secure_aggregation.mode = training_pb2.SECURE_AGGREGATION_MODE_HELPER
    config.secure_aggregation.helpers.append(helper.helper_id)
    return config


def _neighbor_query() -> training_pb2.TrainingConfig:
    question = Question("age", "count")
    # No kill may cost the round its time, however slow the machine is.
    protection = Protection(DEVICES, EPSILON, neighbors=True, step_timeout_s=3600, deadline_s=3600)
    return query_config(question, protection)


def _check_result(parts: Application, query_id: str, found: NoisySum) -> None:
    """The result counts every device once, and its bytes are those that the kept answers give."""
    ((count,),) = found.result().rows
    assert count == pytest.approx(DEVICES, abs=6 * found.deviation)
    again = recompute_version(parts.context, query_id, 1)
    assert (again.recomputed, again.differences) == (True, ())


def _check(parts: Application, helper: HelperProcess, query_id: str, found: NoisySum) -> None:
    config = replace(parts.context.config, helper_dir=helper.bundle_file.parent)
    known = Application.open(config)
    try:
        _check_result(known, query_id, found)
    finally:
        known.close()
    assert helper_main(["--home", str(helper.home), "audit", "verify"]) == 0


def test_a_query_survives_kills_between_its_answers_and_while_it_is_unmasked(
    parts: Application,
    helper: HelperProcess,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The coordinator is killed after the first answer, and again while it waits for a helper that is down."""
    settings = {"QFLARE_HELPER_DIR": str(helper.bundle_file.parent)}
    coordinator = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
    coordinator.start()
    token = parts.use_cases.tokens.issue_admin(SYSTEM, "tester", [Role.ADMIN, Role.AUDITOR]).secret
    with ExitStack() as stack:
        stack.callback(coordinator.stop)
        admin = stack.enter_context(Admin(Profile(coordinator.address, token=token)))
        query_id = create_query(admin, "ages", _query(helper)).training_session_id
        homes = enroll_devices(parts, tmp_path, coordinator.address)
        clients = [stack.enter_context(Client(home=home, analytics=POLICY)) for home in homes]
        for client in clients:
            if client is clients[-1]:
                helper.kill()
            client.answer(client.get_task(query_id, answers_queries=True), np.array([42.0]))
            if client in (clients[0], clients[-1]):
                coordinator.kill()
                coordinator.start()
            # Who has answered is not asked again, by neither the old process nor the new one.
            assert client.get_task(query_id, answers_queries=True).kind is not TaskKind.TRAIN
        helper.start()
        wait_for_version(clients[0], query_id, 1)
        found = read_result(admin, query_id)
        assert found.version.participant_count == DEVICES
        assert all(client.analytics_epsilon() == EPSILON for client in clients)
    _check(parts, helper, query_id, found.answers)
    assert f"1 answers with {DEVICES} updates" in capsys.readouterr().out


def _visit(client: Client, query_id: str) -> int:
    """Let a device do what the coordinator asks it for; return the kind of the task."""
    task = client.get_task(query_id, answers_queries=True, takes_steps=False)
    if client.take_step(task).kind is TaskKind.TRAIN:
        client.answer(task, np.array([42.0]))
    return messages.TASK_KIND_UNSPECIFIED if task.answer is None else task.answer.kind


def test_a_query_in_groups_survives_kills_at_each_of_its_steps(
    parts: Application, database_url: str, tmp_path: Path
) -> None:
    """The coordinator is killed when one device has taken a step and the others have not."""
    settings = {"QFLARE_LEASE_S": "1"}  # that of a killed coordinator has to end
    coordinator = CoordinatorProcess(tmp_path / "coordinator", database_url, settings=settings)
    coordinator.start()
    token = parts.use_cases.tokens.issue_admin(SYSTEM, "tester", [Role.ADMIN]).secret
    killed: set[int] = set()
    with ExitStack() as stack:
        stack.callback(coordinator.stop)
        admin = stack.enter_context(Admin(Profile(coordinator.address, token=token)))
        query_id = create_query(admin, "ages", _neighbor_query()).training_session_id
        homes = enroll_devices(parts, tmp_path, coordinator.address)
        clients = [stack.enter_context(Client(home=home, analytics=POLICY)) for home in homes]
        deadline = time.monotonic() + TIMEOUT_S
        while (
            killed != NEIGHBOR_STEPS or not parts.use_cases.training.get(query_id).current_version
        ):
            assert time.monotonic() < deadline, f"killed at {sorted(killed)}"
            for client in clients:
                kind = _visit(client, query_id)
                if kind in NEIGHBOR_STEPS - killed:
                    coordinator.kill()
                    coordinator.start()
                    killed.add(kind)
                    assert _visit(client, query_id) != kind  # what was acknowledged is durable
        found = read_result(admin, query_id)
        assert (found.version.participant_count, found.version.round_number) == (DEVICES, 1)
        assert all(client.analytics_epsilon() == EPSILON for client in clients)
    _check_result(parts, query_id, found.answers)
