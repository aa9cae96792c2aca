"""What a training session waits for is said with the reason and what to do."""

from datetime import datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.errors import DeviceSuspendedError, RoundNotOpenError
from qflare_server.storage.repository import devices
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, DeviceFailure
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.training_sessions.explanation import Explanations, Notice
from qflare_server.use_cases.updates.failures import Failures
from tests.conftest import FakeClock
from tests.support.use_cases import CoordinatorHarness

PROFILE = Profile()
WARDS = ("ward-1", "ward-2", "ward-3", "ward-4")


def policy(quorum: int = 4, deadline_s: int = 600) -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(quorum=quorum, deadline=Duration(seconds=deadline_s))


def see(core: CoordinatorHarness, at: datetime, *names: str) -> None:
    def work(session: Session) -> None:
        devices.record_seen(session, dict.fromkeys(names, at))

    core.database.write(work)


def fail(core: CoordinatorHarness, name: str, training_session_id: str, kind: str) -> None:
    Failures(core.context).report(SYSTEM, name, training_session_id, 0, kind=kind, text="")


def notices(core: CoordinatorHarness, training_session_id: str) -> list[Notice]:
    return list(Explanations(core.context).find(training_session_id))


@pytest.fixture
def wards(core: CoordinatorHarness) -> CoordinatorHarness:
    """A coordinator whose only active devices are four wards."""
    with core.database.read() as session:
        others = [row.id for row in devices.list_active(session)]
    for name in others:
        core.devices.suspend(SYSTEM, name, "not of this test")
    for name in WARDS:
        core.devices.add(SYSTEM, name, PROFILE)
    return core


def test_a_round_says_whom_it_waits_for_and_why(
    wards: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = wards.start(rounds=policy())
    see(wards, clock(), *WARDS)
    wards.submit("ward-1", training_session_id)
    clock.advance(9 * 60)
    see(wards, clock(), "ward-1", "ward-4")
    fail(wards, "ward-4", training_session_id, "OutOfMemory")

    (found,) = notices(wards, training_session_id)

    assert found.text == (
        "round 1 waits for 3 of 4 devices: ward-2 and ward-3 were last seen 9 min ago, "
        "ward-4 reported OutOfMemory"
    )
    assert found.code == "device_failed"
    assert found.remedy
    assert set(found.device_ids) == {"ward-2", "ward-3", "ward-4"}


def test_a_round_that_has_just_opened_says_nothing(
    wards: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = wards.start(rounds=policy())
    see(wards, clock(), *WARDS)
    wards.submit("ward-1", training_session_id)

    assert notices(wards, training_session_id) == []


@pytest.mark.parametrize("action", ["EXTEND", "RETRY"])
def test_a_missed_quorum_is_said(wards: CoordinatorHarness, clock: FakeClock, action: str) -> None:
    rounds = policy(deadline_s=60)
    rounds.missed_quorum_action = training_pb2.MissedQuorumAction.Value(
        f"MISSED_QUORUM_ACTION_{action}"
    )
    training_session_id = wards.start(rounds=rounds)
    wards.submit("ward-1", training_session_id)
    clock.advance(61)
    see(wards, clock(), *WARDS)
    wards.settle()

    (found,) = notices(wards, training_session_id)

    assert "round 1 missed its quorum: got 1, want 4" in found.text
    if action == "EXTEND":
        assert found.text.endswith(
            "waits for 3 of 4 devices: ward-2, ward-3 and ward-4 are at work"
        )


def test_too_few_devices_are_said_at_once(wards: CoordinatorHarness) -> None:
    training_session_id = wards.start(rounds=policy(quorum=5))

    (found,) = notices(wards, training_session_id)

    assert found.code == "too_few_devices"
    assert found.text == "round 1 needs 5 devices, but 4 can take part"


def test_a_session_says_what_it_waits_for_before_and_between_rounds(
    wards: CoordinatorHarness,
) -> None:
    training_session_id = wards.create(rounds=policy())
    created = notices(wards, training_session_id)
    wards.training.start(SYSTEM, training_session_id)
    wards.training.pause(SYSTEM, training_session_id)
    paused = notices(wards, training_session_id)
    wards.training.cancel(SYSTEM, training_session_id, "a test")

    assert [item.code for item in (*created, *paused)] == ["not_started", "paused"]
    assert all(training_session_id in item.remedy for item in (*created, *paused))
    assert notices(wards, training_session_id) == []


def test_reports_of_a_device_are_one_row(wards: CoordinatorHarness) -> None:
    training_session_id = wards.start(rounds=policy())
    events = wards.count(AuditLog)

    for number in range(20):
        fail(wards, "ward-2", training_session_id, f"Kind{number}")

    assert wards.count(DeviceFailure) == 1
    assert wards.count(AuditLog) == events + 1
    assert "ward-2 reported Kind19" in notices(wards, training_session_id)[0].text


def test_failures_of_other_rounds_and_devices_that_are_out_are_not_recorded(
    wards: CoordinatorHarness,
) -> None:
    training_session_id = wards.start(rounds=policy(1))
    report = Failures(wards.context).report
    with pytest.raises(RoundNotOpenError):
        report(SYSTEM, "ward-2", training_session_id, 2, kind="X", text="")
    wards.submit("ward-1", training_session_id)
    wards.settle()
    report(SYSTEM, "ward-2", training_session_id, 1, kind="X", text="")
    wards.devices.suspend(SYSTEM, "ward-3", "a test")
    with pytest.raises(DeviceSuspendedError):
        fail(wards, "ward-3", training_session_id, "X")

    assert wards.count(DeviceFailure) == 0


def test_many_devices_are_named_up_to_five(wards: CoordinatorHarness, clock: FakeClock) -> None:
    names = [f"phone-{number}" for number in range(30)]
    for name in names:
        wards.devices.add(SYSTEM, name, PROFILE)
    training_session_id = wards.start(rounds=policy(34))
    see(wards, clock() - timedelta(hours=3), *names, *WARDS)
    clock.advance(400)

    (found,) = notices(wards, training_session_id)

    assert found.text.endswith("and 29 more were last seen 3 h ago")
    assert len(found.device_ids) == 34
