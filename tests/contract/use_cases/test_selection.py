"""Who is asked to take part in a round: drawn so that it can be repeated, and nobody else gets in."""

from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import event, update

from qflare.v1 import training_pb2
from qflare_server.errors import TrainingSessionNotFoundError
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import Device
from qflare_server.training.selection import find_common_relation, find_relation
from qflare_server.use_cases.access.objects import ObjectAccess
from qflare_server.use_cases.devices.administration import Profile
from tests.conftest import FakeClock
from tests.support.use_cases import CoordinatorHarness, vector

ROUNDS = training_pb2.RoundPolicy(quorum=1, target=20, deadline=Duration(seconds=60))
RAM = training_pb2.CapabilityFilter(capability="ram_mib", value=2048)


@pytest.fixture
def fleet(core: CoordinatorHarness) -> CoordinatorHarness:
    """A coordinator with four bare devices and six phones of growing memory."""
    for number in range(6):
        profile = Profile("phone", capabilities={"ram_mib": 1024 * number})
        core.devices.add(SYSTEM, f"phone-{number}", profile)
    return core


def start(core: CoordinatorHarness, **policy: Any) -> str:
    return core.start(rounds=ROUNDS, selection=training_pb2.SelectionPolicy(seed=7, **policy))


def selected(core: CoordinatorHarness, training_session_id: str, number: int = 1) -> list[str]:
    with core.database.read() as session:
        return sorted(training_sessions.selection(session, training_session_id, number))


def asked(core: CoordinatorHarness, training_session_id: str) -> list[str]:
    """Return the devices that get a task."""
    names = [device.id for device in core.devices.list_active()]
    return [
        name for name in names if core.tasks.next_task(name, training_session_id).round is not None
    ]


def test_every_active_device_is_asked_without_a_selection(fleet: CoordinatorHarness) -> None:
    training_session_id = start(fleet)

    assert len(asked(fleet, training_session_id)) == 10
    assert fleet.round(training_session_id).selected_count == 0


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        ({"fraction": 0.5}, 5),
        ({"fraction": 0.01}, 1),
        ({"device_count": 3}, 3),
        ({"device_count": 30}, 10),
        ({"device_count": 4, "over_selection": 0.5}, 6),
        ({"fraction": 0.5, "device_count": 2}, 2),
        ({"device_types": ["phone"]}, 6),
        ({"device_types": ["phone"], "device_count": 2}, 2),
    ],
)
def test_as_many_are_asked_as_the_session_says(
    fleet: CoordinatorHarness, policy: dict[str, Any], count: int
) -> None:
    training_session_id = start(fleet, **policy)

    assert len(asked(fleet, training_session_id)) == count
    assert asked(fleet, training_session_id) == selected(fleet, training_session_id)
    assert fleet.round(training_session_id).selected_count == count


def test_capabilities_filter(fleet: CoordinatorHarness) -> None:
    training_session_id = start(fleet, capabilities=[RAM])

    assert asked(fleet, training_session_id) == [f"phone-{number}" for number in range(2, 6)]


def test_devices_that_are_not_active_are_not_selected(fleet: CoordinatorHarness) -> None:
    fleet.devices.suspend(SYSTEM, "phone-5", "")

    assert "phone-5" not in selected(fleet, start(fleet, device_types=["phone"]))


def test_draw_is_repeated_by_the_same_seed(fleet: CoordinatorHarness) -> None:
    first, second = (start(fleet, device_count=3) for _ in range(2))

    assert selected(fleet, first) == selected(fleet, second)


def test_rounds_draw_apart(fleet: CoordinatorHarness) -> None:
    rounds = training_pb2.RoundPolicy(quorum=1)
    policy = training_pb2.SelectionPolicy(seed=7, device_count=3)
    training_session_id = fleet.start(rounds=rounds, selection=policy)
    for _ in range(3):
        fleet.submit(asked(fleet, training_session_id)[0], training_session_id)
        fleet.settle()

    draws = {tuple(selected(fleet, training_session_id, number)) for number in range(1, 5)}

    assert len(draws) > 1


def test_selection_that_finds_nobody_asks_nobody(core: CoordinatorHarness) -> None:
    training_session_id = start(core, device_types=["phone"])

    assert asked(core, training_session_id) == []
    assert core.round(training_session_id).selected_count == -1


def test_extended_round_asks_devices_that_came_since(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = start(core, device_types=["phone"])
    core.devices.add(SYSTEM, "phone-1", Profile("phone"))
    clock.advance(60)

    core.settle()

    assert asked(core, training_session_id) == ["phone-1"]
    assert core.round(training_session_id).selected_count == 1


def test_extended_round_draws_further_devices(fleet: CoordinatorHarness, clock: FakeClock) -> None:
    training_session_id = start(fleet, device_count=2)
    before = selected(fleet, training_session_id)
    for _ in range(6):
        clock.advance(60)
        fleet.settle()

    after = selected(fleet, training_session_id)

    assert set(before) < set(after)
    assert fleet.round(training_session_id).selected_count == len(after)


def test_a_session_with_groups_asks_their_devices_alone(fleet: CoordinatorHarness) -> None:
    for name in ("phone-1", "phone-2", "device-0"):
        fleet.devices.set_groups(SYSTEM, name, ["ward-3"], "")
    fleet.devices.set_groups(SYSTEM, "phone-3", ["ward-4"], "")

    everybody = fleet.start(rounds=ROUNDS, groups=["ward-3"])
    phones = fleet.start(
        rounds=ROUNDS,
        groups=["ward-3", "ward-4"],
        selection=training_pb2.SelectionPolicy(device_types=["phone"]),
    )
    some = fleet.start(
        rounds=ROUNDS,
        groups=["ward-3"],
        selection=training_pb2.SelectionPolicy(device_count=2, seed=7),
    )

    assert asked(fleet, everybody) == ["device-0", "phone-1", "phone-2"]
    assert asked(fleet, phones) == ["phone-1", "phone-2", "phone-3"]
    assert len(asked(fleet, some)) == 2
    assert set(asked(fleet, some)) < {"device-0", "phone-1", "phone-2"}


def test_who_joins_a_group_is_asked_at_once(fleet: CoordinatorHarness) -> None:
    training_session_id = fleet.start(rounds=ROUNDS, groups=["ward-3"])
    assert asked(fleet, training_session_id) == []

    fleet.devices.set_groups(SYSTEM, "phone-1", ["ward-3"], "")

    assert asked(fleet, training_session_id) == ["phone-1"]


def test_an_update_of_who_left_the_group_is_refused(fleet: CoordinatorHarness) -> None:
    fleet.devices.set_groups(SYSTEM, "phone-1", ["ward-3"], "")
    training_session_id = fleet.start(rounds=ROUNDS, groups=["ward-3"])
    draft = fleet.draft("phone-1", training_session_id, vector(1.0))
    fleet.devices.set_groups(SYSTEM, "phone-1", [], "")

    with pytest.raises(TrainingSessionNotFoundError):
        fleet.send(draft)


def test_selection_may_ask_for_confirmed_devices(fleet: CoordinatorHarness) -> None:
    with fleet.database.engine.begin() as connection:
        connection.execute(
            update(Device.__table__).where(Device.id != "phone-4").values(confirmed_at=None)
        )

    assert asked(fleet, start(fleet, confirmed_only=True)) == ["phone-4"]
    assert asked(fleet, start(fleet, confirmed_only=True, device_types=["phone"])) == ["phone-4"]


def test_who_was_never_drawn_is_not_asked_to_measure(fleet: CoordinatorHarness) -> None:
    training_session_id = fleet.start(
        rounds=training_pb2.RoundPolicy(quorum=1),
        total_rounds=1,
        selection=training_pb2.SelectionPolicy(device_count=1, seed=7),
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
    )
    (drawn,) = asked(fleet, training_session_id)
    fleet.submit(drawn, training_session_id)
    fleet.settle()

    names = [device.id for device in fleet.devices.list_active()]
    measuring = [
        name
        for name in names
        if fleet.tasks.next_task(name, training_session_id).measurement is not None
    ]
    assert measuring == [drawn]


OPEN: dict[str, dict[str, Any]] = {
    "no policy": {},
    "groups": {"groups": ["ward-3"]},
    "a draw": {"selection": training_pb2.SelectionPolicy(seed=7, device_count=3)},
    "a kind": {"selection": training_pb2.SelectionPolicy(device_types=["phone"])},
    "a capability": {"selection": training_pb2.SelectionPolicy(capabilities=[RAM])},
    "confirmed devices": {"selection": training_pb2.SelectionPolicy(confirmed_only=True)},
}


@pytest.mark.parametrize("name", OPEN)
def test_what_all_devices_share_is_what_each_of_them_has(
    fleet: CoordinatorHarness, name: str
) -> None:
    """The relation of every device, looked up once for all, is that of each; no other session has one."""
    fleet.devices.set_groups(SYSTEM, "phone-1", ["ward-3"], "")
    training_session_id = fleet.start(rounds=ROUNDS, **OPEN[name])
    names = [device.id for device in fleet.devices.list_active()]

    with fleet.database.read() as session:
        common = find_common_relation(session, training_session_id)
        each = {find_relation(session, training_session_id, device) for device in names}
        assert find_common_relation(session, "no such session") is None

    assert (common is not None) == (name == "no policy")
    assert common is None or each == {common}


@pytest.mark.parametrize("name", ["no policy", "groups"])
def test_access_follows_every_change_of_groups_and_start(
    fleet: CoordinatorHarness, name: str
) -> None:
    training_session_id = fleet.start(rounds=ROUNDS, **OPEN[name])
    access = ObjectAccess(fleet.context)

    def taking_part() -> list[str]:
        found = []
        for device in ("phone-1", "phone-2"):
            with suppress(TrainingSessionNotFoundError):
                access.require_relation(device, training_session_id)
                found.append(device)
        return found

    everybody = ["phone-1", "phone-2"]
    before = taking_part()
    fleet.devices.set_groups(SYSTEM, "phone-2", ["ward-3"], "")
    after = taking_part()

    assert before == (everybody if name == "no policy" else [])
    assert after == (everybody if name == "no policy" else ["phone-2"])
    with pytest.raises(TrainingSessionNotFoundError):
        access.require_relation("phone-1", "no such session")


def test_the_devices_of_an_open_session_are_looked_up_once(fleet: CoordinatorHarness) -> None:
    training_session_id = fleet.start(rounds=ROUNDS)
    access = ObjectAccess(fleet.context)
    access.require_relation("phone-1", training_session_id)
    texts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: Any, *_rest: Any) -> None:
        texts.append(statement)

    event.listen(fleet.database.engine, "before_cursor_execute", note)
    try:
        relations = {
            access.require_relation(f"phone-{number}", training_session_id) for number in range(6)
        }
    finally:
        event.remove(fleet.database.engine, "before_cursor_execute", note)

    assert len(relations) == 1
    assert texts == []
