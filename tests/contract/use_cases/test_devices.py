"""Devices as administrators see them: found, paged through, suspended, reinstated, revoked."""

import pytest
from sqlalchemy import select

from qflare_server.errors import (
    AlreadyExistsError,
    DeviceNotFoundError,
    InvalidRequestError,
    WrongStateError,
)
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import SYSTEM, Caller
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.storage.tables import AuditLog, Device, DeviceState
from qflare_server.use_cases.devices.administration import Profile
from tests.conftest import START, FakeClock
from tests.support.use_cases import CoordinatorHarness

ALICE = Caller("admin:alice", "192.0.2.7", "token")


def entries(core: CoordinatorHarness, event_type: str) -> list[AuditLog]:
    with core.database.read() as session:
        query = select(AuditLog).where(AuditLog.event_type == event_type)
        return list(session.scalars(query))


def test_added_device_reads_back(core: CoordinatorHarness) -> None:
    profile = Profile(
        "phone", {"ram_mib": 4096}, {"link": "lte"}, {"gpu": True}, 3, 64, learning_rate=0.5
    )

    core.devices.add(ALICE, "phone-1", profile)

    device = core.devices.get("phone-1")
    assert (device.state, device.device_type, device.registered_at) == ("active", "phone", START)
    assert device.hardware_info == {"ram_mib": 4096}
    assert device.network_info == {"link": "lte"}
    assert device.capabilities == {"gpu": True}
    assert (device.local_epochs, device.batch_size, device.learning_rate) == (3, 64, 0.5)


def test_added_device_is_audited_with_who_added_it(core: CoordinatorHarness) -> None:
    core.devices.add(ALICE, "phone-1", Profile())

    entry = next(row for row in entries(core, "device.registered") if row.subject.endswith("ne-1"))
    assert (entry.actor, entry.peer_address) == ("admin:alice", "192.0.2.7")


def test_id_that_is_taken_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(AlreadyExistsError):
        core.devices.add(SYSTEM, "device-0", Profile(device_type="other"))

    assert core.devices.get("device-0").device_type == ""


@pytest.mark.parametrize("device_id", ["", "x" * 256, "line\nbreak", "nul\0"])
def test_id_that_is_no_name_is_refused(core: CoordinatorHarness, device_id: str) -> None:
    with pytest.raises(InvalidRequestError):
        core.devices.add(SYSTEM, device_id, Profile())


@pytest.mark.parametrize(
    "profile",
    [
        Profile(device_type="x" * 101),
        Profile(capabilities={str(number): 1 for number in range(65)}),
        Profile(hardware_info={"cpu": "x" * 257}),
        Profile(network_info={"": "x"}),
        Profile(device_type="nul\0"),
        Profile(hardware_info={"cpu": "nul\0"}),
        Profile(capabilities={"nul\0": 1}),
        Profile(capabilities={"ram_mib": float("nan")}),
        Profile(capabilities={"ram_mib": float("inf")}),
        Profile(local_epochs=-1),
        Profile(learning_rate=float("nan")),
    ],
)
def test_profile_out_of_range_is_refused(core: CoordinatorHarness, profile: Profile) -> None:
    with pytest.raises(InvalidRequestError):
        core.devices.add(SYSTEM, "phone-1", profile)

    assert core.count(Device) == 4


def test_unknown_device_is_not_found(core: CoordinatorHarness) -> None:
    with pytest.raises(DeviceNotFoundError):
        core.devices.get("nobody")


def test_suspended_device_is_reinstated(core: CoordinatorHarness) -> None:
    suspended = core.devices.suspend(ALICE, "device-0", "looks odd").device
    reinstated = core.devices.reinstate(ALICE, "device-0", "was fine").device

    assert (suspended.state, suspended.state_reason) == ("suspended", "looks odd")
    assert (reinstated.state, reinstated.state_reason) == ("active", "was fine")


def test_revoked_device_stays_revoked(core: CoordinatorHarness) -> None:
    core.devices.revoke(ALICE, "device-0", "stolen")

    for move in (core.devices.reinstate, core.devices.suspend, core.devices.deactivate):
        with pytest.raises(WrongStateError):
            move(ALICE, "device-0", "by mistake")

    assert core.devices.get("device-0").state == "revoked"


def test_every_move_is_audited_with_both_states(core: CoordinatorHarness) -> None:
    core.devices.suspend(ALICE, "device-0", "looks odd")

    (entry,) = entries(core, "device.suspended")
    told = {"device_name": "device-0", "from": "active", "reason": "looks odd"}
    assert entry.details == told
    assert (entry.subject, entry.risk_level) == ("device:device-0", "high")


@pytest.mark.parametrize("move", ["suspend", "reinstate", "deactivate", "revoke"])
def test_move_of_an_unknown_device_is_refused(core: CoordinatorHarness, move: str) -> None:
    with pytest.raises(DeviceNotFoundError):
        getattr(core.devices, move)(ALICE, "nobody", "")


@pytest.mark.parametrize("reason", ["x" * 501, "nul\0"])
def test_reason_that_cannot_be_stored_is_refused(core: CoordinatorHarness, reason: str) -> None:
    with pytest.raises(InvalidRequestError):
        core.devices.suspend(ALICE, "device-0", reason)

    assert core.devices.get("device-0").state == "active"


def test_heartbeat_answers_the_state_and_takes_the_profile(core: CoordinatorHarness) -> None:
    core.devices.suspend(ALICE, "device-0", "")

    beat = core.devices.heartbeat(SYSTEM, "device-0", Profile(device_type="phone"))

    assert (beat.state, beat.server_time) == ("suspended", START)
    device = core.devices.get("device-0")
    assert (device.device_type, device.reported_type) == ("", "phone")


def test_heartbeat_without_a_profile_writes_nothing(core: CoordinatorHarness) -> None:
    before = core.count(AuditLog)

    core.devices.heartbeat(SYSTEM, "device-0", None)

    assert core.count(AuditLog) == before


def test_devices_that_have_not_called_become_inactive(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    clock.advance(3600)
    core.devices.add(SYSTEM, "late", Profile())
    core.devices.suspend(SYSTEM, "device-3", "")

    marked = core.devices.mark_inactive(1800)

    assert marked == 3
    assert core.devices.counts()[0] == {"active": 1, "inactive": 3, "suspended": 1}


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pages_hold_every_device_once_by_id(core: CoordinatorHarness, size: int) -> None:
    seen, token = [], ""
    while True:
        page = core.devices.list(PageRequest(size, token), DeviceFilter())
        seen += [row.id for row in page.rows]
        token = page.next_token
        if not token:
            break

    assert seen == [f"device-{number}" for number in range(4)]


def test_page_goes_on_behind_a_device_that_is_gone_from_the_filter(
    core: CoordinatorHarness,
) -> None:
    wanted = DeviceFilter(state="active")
    first = core.devices.list(PageRequest(2), wanted)
    core.devices.suspend(SYSTEM, "device-1", "")

    second = core.devices.list(PageRequest(2, first.next_token), wanted)

    assert [row.id for row in second.rows] == ["device-2", "device-3"]


def test_page_token_of_another_filter_is_refused(core: CoordinatorHarness) -> None:
    token = core.devices.list(PageRequest(2), DeviceFilter()).next_token

    with pytest.raises(InvalidRequestError, match="page_token"):
        core.devices.list(PageRequest(2, token), DeviceFilter(state="active"))


def test_page_token_that_is_none_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(InvalidRequestError, match="page_token"):
        core.devices.list(PageRequest(2, "not a token"), DeviceFilter())


def test_list_filters_by_type_state_and_last_call(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    clock.advance(60)
    core.devices.add(SYSTEM, "phone-1", Profile(device_type="phone"))
    core.devices.add(SYSTEM, "phone-2", Profile(device_type="phone"))
    core.devices.suspend(SYSTEM, "phone-2", "")

    page = core.devices.list(
        PageRequest(), DeviceFilter(state="active", device_type="phone", seen_after=START)
    )

    assert [row.id for row in page.rows] == ["phone-1"]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        (("ram_mib", "at_least", 2048.0), ["big", "middle"]),
        (("ram_mib", "at_most", 2048.0), ["middle", "small"]),
        (("ram_mib", "equal", 512.0), ["small"]),
        (("disk_mib", "at_least", 0.0), []),
    ],
)
def test_list_filters_by_capability(
    core: CoordinatorHarness, condition: tuple[str, str, float], found: list[str]
) -> None:
    for name, size in (("small", 512), ("middle", 2048), ("big", 8192)):
        core.devices.add(SYSTEM, name, Profile(capabilities={"ram_mib": size}))

    page = core.devices.list(PageRequest(), DeviceFilter(capabilities=(condition,)))

    assert [row.id for row in page.rows] == found


def test_capability_that_is_text_matches_no_number(core: CoordinatorHarness) -> None:
    core.devices.add(SYSTEM, "phone-1", Profile(capabilities={"ram_mib": "plenty"}))
    core.devices.add(SYSTEM, "phone-2", Profile(capabilities={"ram_mib": 4096}))

    wanted = DeviceFilter(capabilities=(("ram_mib", "at_least", 1.0),))

    assert [row.id for row in core.devices.list(PageRequest(), wanted).rows] == ["phone-2"]


def test_active_devices_come_by_id(core: CoordinatorHarness) -> None:
    core.devices.suspend(SYSTEM, "device-2", "")

    assert [row.id for row in core.devices.list_active()] == ["device-0", "device-1", "device-3"]


def test_counts_by_state_and_type(core: CoordinatorHarness) -> None:
    core.devices.add(SYSTEM, "phone-1", Profile(device_type="phone"))

    by_state, by_type = core.devices.counts()

    assert by_state == {DeviceState.ACTIVE.value: 5}
    assert by_type == {"": 4, "phone": 1}
