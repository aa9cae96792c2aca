"""Every stage of a round with secure aggregation is shown: audit log, notices, dashboard, metrics, command line."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from qflare_server.context import utc_now
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.training.rounds import HELPER_AWAITED
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.training_sessions.explanation import Explanations
from tests.integration.rpc.test_observability import scrape, value
from tests.integration.secure_aggregation.conftest import (
    TIMEOUT_S,
    SecureDeployment,
    SecureStart,
    contribute,
    wait_for_round,
    wait_for_version,
)
from tests.support.lying_helper import LyingHelper
from tests.support.visitor import Visitor

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def _events(made: SecureDeployment, session_id: str) -> list[Any]:
    """Return type and details of the entries on a session's rounds, the oldest first."""
    log = made.deployment.coordinator.use_cases.audit
    rows = log.list(PageRequest(1000), AuditFilter(subject=f"training_session:{session_id}")).rows
    return [row for row in reversed(rows) if row.event_type.startswith("round.")]


def _wait_until(is_met: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not is_met():
        assert time.monotonic() < end
        threading.Event().wait(0.02)


def _reason(made: SecureDeployment, session_id: str) -> str:
    with made.deployment.coordinator.parts.database.read() as session:
        found = training_sessions.get_round(session, session_id, 1)
    assert found is not None
    return found.state_reason


def _page(made: SecureDeployment, path: str) -> str:
    assert made.deployment.coordinator.dashboard is not None
    visitor = Visitor(made.deployment.coordinator.dashboard.url)
    visitor.log_in(made.deployment.issue_admin(Role.ADMIN))
    return visitor.get(path).text


def test_a_round_that_waits_for_a_helper_says_so_until_it_is_unmasked(secure: SecureStart) -> None:
    made = secure(dashboard="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    session_id, parts = made.session(quorum=2), made.deployment.coordinator.parts
    helper_id = made.helpers[0].helper_id
    made.helpers[0].kill()
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    _wait_until(lambda: _reason(made, session_id).startswith(HELPER_AWAITED))

    (notice,) = parts.use_cases.explanations.find(session_id)
    assert notice.code == "helper_awaited"
    assert f"helper {helper_id[:16]} has not answered for" in notice.text
    later = Explanations(_at(parts.context, 44))
    assert "has not answered for 40 s: helper " in later.find(session_id)[0].text
    waits = value(
        scrape(made.deployment),
        "qflare_training_session_waits",
        name="test",
        reason="helper_awaited",
    )
    assert waits == 1
    page = _page(made, f"/sessions/{session_id}/rounds/1")
    assert "asks the helpers for the sum of the masks" in page
    assert "2, at least 2, at most 2" in page
    assert "has not answered" in _page(made, f"/sessions/{session_id}")

    made.helpers[0].start()
    wait_for_version(clients[0], session_id, 1)
    assert _reason(made, session_id) == ""
    entries = _events(made, session_id)
    assert [entry.event_type for entry in entries] == [
        "round.opened",
        "round.set_closed",
        "round.sent_to_helper",
        "round.helper_unavailable",
        "round.helper_answered",
        "round.unmasked",
    ]
    opened, closed, sent, _, answered, unmasked = (entry.details for entry in entries)
    assert (opened["min_cohort"], opened["helpers"]) == (2, [helper_id])
    assert closed["members"] == sent["members"] == answered["members"] == 2
    assert sent["members_digest"] == closed["members_digest"]
    assert sent["helper_id"] == answered["helper_id"] == helper_id
    assert answered["answer_digest"] == unmasked["answer_digest"]
    assert "unmasked: the sum is known" in _page(made, f"/sessions/{session_id}/rounds/1")
    samples = scrape(made.deployment)
    assert value(samples, "qflare_helper_requests_total", outcome="answered") == 1
    assert value(samples, "qflare_helper_answer_seconds_count") == 1


def _at(context: Any, seconds: float) -> Any:
    """Return a context whose clock is ahead."""
    return replace(context, clock=lambda: utc_now() + timedelta(seconds=seconds))


@pytest.fixture
def liars() -> Iterator[list[LyingHelper]]:
    """Return a list of lying helpers that are closed at the end."""
    made: list[LyingHelper] = []
    yield made
    for liar in made:
        liar.close()


def test_a_refusal_of_a_helper_is_in_the_audit_log(
    secure: SecureStart, liars: list[LyingHelper]
) -> None:
    made = secure()
    session_id = made.session(quorum=2)
    liars.append(LyingHelper(made.helpers[0]))
    liars[0].lie = lambda answers: answers[:1]
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_round(clients[0], session_id, 2)
    counts = Counter(entry.event_type for entry in _events(made, session_id))
    assert counts["round.helper_refused"] == 1
    assert counts["round.helper_answered"] == counts["round.unmasked"] == 0
    refused = next(
        entry for entry in _events(made, session_id) if entry.event_type == "round.helper_refused"
    )
    assert "its sum" in refused.details["reason"]
    assert refused.details["helper_id"] == made.helpers[0].helper_id
