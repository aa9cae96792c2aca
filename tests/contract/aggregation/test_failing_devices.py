"""A round or training session ends when more of its devices fail than may."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import devices, history
from qflare_server.storage.repository.audit import SYSTEM, AuditFilter, list_entries
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.training_sessions.explanation import Explanations
from qflare_server.use_cases.updates.failures import Failures
from tests.support.use_cases import CoordinatorHarness

WARDS = tuple(f"ward-{number}" for number in range(5))
END_SESSION = training_pb2.FAILURE_ACTION_END_SESSION


def policy(quorum: int = 3, target: int = 5) -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(quorum=quorum, target=target, deadline=Duration(seconds=600))


@pytest.fixture
def wards(core: CoordinatorHarness) -> CoordinatorHarness:
    """A coordinator whose only active devices are five wards."""
    with core.database.read() as session:
        others = [row.id for row in devices.list_active(session)]
    for name in others:
        core.devices.suspend(SYSTEM, name, "not of this test")
    for name in WARDS:
        core.devices.add(SYSTEM, name, Profile())
    return core


def fail(core: CoordinatorHarness, session_id: str, *numbers: int) -> None:
    for number in numbers:
        failures = Failures(core.context)
        failures.report(SYSTEM, WARDS[number], session_id, 0, kind="MemoryError", text="")
    core.settle()


def state(core: CoordinatorHarness, session_id: str, number: int = 1) -> tuple[str, str]:
    return core.training.get(session_id).state, core.round(session_id, number).state


@pytest.mark.parametrize(
    "limit", [{"max_failures": 1}, {"max_failed_fraction": 0.39}, {"max_failed_fraction": 0.2}]
)
def test_one_failure_more_than_allowed_ends_the_round(
    wards: CoordinatorHarness, limit: dict[str, Any]
) -> None:
    session_id = wards.start(rounds=policy(), failures=training_pb2.FailurePolicy(**limit))
    wards.submit(WARDS[4], session_id)

    fail(wards, session_id, 0, 0)
    assert state(wards, session_id) == ("running", "open")
    fail(wards, session_id, 1)

    assert state(wards, session_id) == ("running", "failed")
    reason = "too many devices failed: at least 2 of 5, at most 1 may"
    assert wards.round(session_id, 1).state_reason == reason
    assert [row.state for row in wards.updates(session_id, 1)] == ["rejected"]
    assert (wards.round(session_id).number, wards.round(session_id).base_version) == (2, 0)
    codes = {item.code: item.text for item in Explanations(wards.context).find(session_id)}
    assert codes == {"too_many_failures": f"round 1 ended early: {reason}"}
    assert _audited(wards, session_id) == [
        {"round": 1, "reason": reason, "action": "FAILURE_ACTION_END_ROUND"}
    ]


def _audited(core: CoordinatorHarness, session_id: str) -> list[Any]:
    wanted = AuditFilter(event_type="round.too_many_failures")
    with core.database.read() as session:
        entries = list_entries(session, PageRequest(100), wanted).rows
    return [row.details for row in entries if session_id in row.subject]


def test_rounds_count_each_device_that_failed_once(wards: CoordinatorHarness) -> None:
    session_id = wards.start(rounds=policy(quorum=2, target=2))

    fail(wards, session_id, 0, 0, 1, 3)
    for number in (3, 4):
        wards.submit(WARDS[number], session_id)
    wards.settle()
    Failures(wards.context).report(SYSTEM, WARDS[2], session_id, 1, kind="MemoryError", text="")
    fail(wards, session_id, 0)

    assert [wards.round(session_id, number).failed_count for number in (1, 2)] == [3, 1]
    with wards.database.read() as session:
        rounds = list(history.rounds(session, session_id))
    assert [row["failed_count"] for row in rounds] == [3, 1]


def test_a_round_with_a_quorum_makes_a_version(wards: CoordinatorHarness) -> None:
    limit = training_pb2.FailurePolicy(max_failures=0)
    session_id = wards.start(rounds=policy(quorum=2), failures=limit)
    for number in (3, 4):
        wards.submit(WARDS[number], session_id)

    fail(wards, session_id, 0)

    assert state(wards, session_id) == ("running", "published")
    assert wards.versions(session_id)[1].participant_count == 2


def test_failures_end_the_session(wards: CoordinatorHarness) -> None:
    limit = training_pb2.FailurePolicy(max_failures=1, action=END_SESSION)
    session_id = wards.start(rounds=policy(quorum=2), failures=limit)
    for number in (3, 4):
        wards.submit(WARDS[number], session_id)

    fail(wards, session_id, 0, 1)

    assert state(wards, session_id) == ("failed", "failed")
    assert "at least 2 of 5" in wards.training.get(session_id).state_reason
    assert len(wards.versions(session_id)) == 1


def test_rounds_that_fail_do_not_go_on_for_ever(wards: CoordinatorHarness) -> None:
    limit = training_pb2.FailurePolicy(max_failures=0)
    session_id = wards.start(total_rounds=2, rounds=policy(), failures=limit)

    fail(wards, session_id, 0)
    fail(wards, session_id, 0)

    assert state(wards, session_id, 2) == ("failed", "failed")


def test_devices_outside_the_round_and_those_that_recovered_do_not_count(
    wards: CoordinatorHarness,
) -> None:
    limit = training_pb2.FailurePolicy(max_failures=0)
    selection = training_pb2.SelectionPolicy(device_count=3)
    session_id = wards.start(rounds=policy(), selection=selection, failures=limit)
    asked = [
        number
        for number, name in enumerate(WARDS)
        if wards.tasks.next_task(name, session_id).round is not None
    ]
    fail(wards, session_id, *({0, 1, 2, 3, 4} - set(asked)))
    assert state(wards, session_id) == ("running", "open")

    wards.training.pause(SYSTEM, session_id)
    fail(wards, session_id, asked[0])
    assert state(wards, session_id) == ("paused", "open")
    wards.training.resume(SYSTEM, session_id)
    wards.submit(WARDS[asked[0]], session_id)
    wards.settle()
    assert state(wards, session_id) == ("running", "open")

    fail(wards, session_id, asked[1])
    assert state(wards, session_id) == ("running", "failed")


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ({"max_failures": -1}, "failures.max_failures"),
        ({"max_failed_fraction": 1.0}, "failures.max_failed_fraction"),
        ({"max_failed_fraction": float("nan")}, "failures.max_failed_fraction"),
        ({"action": END_SESSION}, "failures.action"),
    ],
)
def test_limits_that_mean_nothing_are_refused(
    core: CoordinatorHarness, limit: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        core.create(rounds=policy(), failures=training_pb2.FailurePolicy(**limit))
