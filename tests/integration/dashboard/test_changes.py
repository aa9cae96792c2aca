"""The dashboard shows that an administrator has changed the rule of a running training session's rounds."""

import re
from collections.abc import Callable

from google.protobuf.duration_pb2 import Duration

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.visitor import Visitor

Deploy = Callable[..., Deployment]


def change(deployment: Deployment, session_id: str, **values: object) -> None:
    request = admin_pb2.UpdateTrainingSessionRequest(training_session_id=session_id, **values)  # type: ignore[arg-type]
    deployment.admin.UpdateTrainingSession(request, metadata=deployment.metadata)


def text_of(page: str) -> str:
    """Return the text of a page without its tags, in one line."""
    return " ".join(re.sub("<[^>]*>", " ", page).split())


def test_changes_are_on_the_pages_of_the_session_its_round_and_the_audit_log(
    deploy: Deploy,
) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")
    assert deployment.coordinator.dashboard is not None
    rounds = {"quorum": 2, "target": 4, "deadline": Duration(seconds=600)}
    session_id = deployment.session(total_rounds=3, rounds=rounds)
    viewer = Visitor(deployment.coordinator.dashboard.url)
    viewer.log_in(deployment.issue_admin(Role.VIEWER, Role.AUDITOR))
    assert 'id="changes"' not in viewer.get(f"/sessions/{session_id}").text

    change(deployment, session_id, quorum=3, deadline=Duration(seconds=7200))
    change(deployment, session_id, target=5)

    page = text_of(viewer.get(f"/sessions/{session_id}").text)
    _, _, shown = page.partition(" Changes ")
    later, earlier = (
        "in round 1 rounds.target 4 → 5",
        "in round 1 rounds.quorum 2 → 3 rounds.deadline 10 min 00 s → 2 h 00 min",
    )
    assert -1 < shown.find(later) < shown.find(earlier)
    assert "0 of 5 quorum 3" in page
    round_page = text_of(viewer.get(f"/sessions/{session_id}/rounds/1").text)
    assert "Quorum 3 Target 5" in round_page
    events = text_of(viewer.get("/audit?event=training_session.changed").text)
    for told in ("new.quorum 3", "old.quorum 2", "new.deadline_s 7200", "old.target 4"):
        assert told in events
    assert "{" not in events
