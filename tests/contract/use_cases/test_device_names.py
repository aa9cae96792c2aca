"""Names of devices: where they come from, that they are unique, and how devices are found by them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.errors import (
    AlreadyExistsError,
    DeviceNotFoundError,
    InvalidRequestError,
    TrainingSessionNotFoundError,
)
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import audit
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.repository.device_names import MAX_NAME, is_name, wanted_name
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.use_cases.devices.administration import Profile
from tests.support.identity import ADMIN, Coordinator, SimulatedDevice
from tests.support.use_cases import CoordinatorHarness

UUID = "5f0c31aa-7d5e-4f5e-9d22-4d90f5cc3163"


def enroll(coordinator: Coordinator, *labels: str) -> list[str]:
    """Enroll a device for each label and return their names."""
    names = []
    for label in labels:
        issued = coordinator.tokens.issue_enrollment(ADMIN, label=label)[0]
        device = SimulatedDevice()
        device.enroll(coordinator, issued.secret)
        names.append(coordinator.devices.get(device.device_id).name)
    return names


def test_a_label_becomes_the_name_with_a_number_from_the_second_device_on(
    coordinator: Coordinator,
) -> None:
    names = enroll(coordinator, "ward 3", "ward 3", "ward 3", " ward\t3 ")

    assert names == ["ward-3", "ward-3-2", "ward-3-3", "ward-3-4"]


@pytest.mark.parametrize("label", ["", "   ", "---", UUID, "\u202e"])
def test_without_a_usable_label_the_name_is_a_short_id(
    coordinator: Coordinator, label: str
) -> None:
    enroll(coordinator, label)

    (device,) = coordinator.devices.list(PageRequest(), DeviceFilter()).rows
    assert device.name == device.id[:8]


@given(st.text(max_size=200))
def test_every_label_gives_a_name(label: str) -> None:
    assert is_name(wanted_name(label, UUID))


def test_numbers_are_found_among_many(core: CoordinatorHarness) -> None:
    for number in range(40):
        core.devices.add(ADMIN, f"{'x' * 70}{number}", Profile())

    page = core.devices.list(PageRequest(100), DeviceFilter())
    names = [row.name for row in page.rows if row.id.startswith("x")]

    assert len(set(names)) == 40
    assert max(map(len, names)) <= MAX_NAME


def test_devices_that_enroll_at_once_get_names_of_their_own(coordinator: Coordinator) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: enroll(coordinator, "ward"), range(8)))

    assert len({name for (name,) in found}) == 8


def test_a_renamed_device_is_audited_with_both_names(core: CoordinatorHarness) -> None:
    renamed = core.devices.rename(ADMIN, "device-0", "theatre", "moved")

    assert renamed.device.name == core.devices.get("device-0").name == "theatre"
    with core.database.read() as session:
        wanted = AuditFilter(event_type="device.renamed")
        page = audit.list_entries(session, PageRequest(), wanted)
    told = {"device_name": "theatre", "from": "device-0", "reason": "moved"}
    assert [row.details for row in page.rows] == [told]


@pytest.mark.parametrize(
    "name", ["", "two words", "-rf", "x" * 65, UUID, UUID.upper(), "a\nb", "\u200b"]
)
def test_what_is_no_name_is_refused(core: CoordinatorHarness, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name: want 1 to 64"):
        core.devices.rename(ADMIN, "device-0", name, "")


def test_a_name_that_is_taken_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(AlreadyExistsError, match="another device has the name 'device-1'"):
        core.devices.rename(ADMIN, "device-0", "device-1", "")
    assert core.devices.rename(ADMIN, "device-0", "device-0", "").device.name == "device-0"


def test_a_device_is_found_by_id_name_and_beginning_of_its_id(core: CoordinatorHarness) -> None:
    core.devices.add(ADMIN, UUID, Profile())
    core.devices.rename(ADMIN, UUID, "theatre", "")

    assert [core.devices.find_id(text) for text in (UUID, "theatre", UUID[:4])] == [UUID] * 3
    assert core.devices.find_id("device-1") == "device-1"
    for unknown in (UUID[:3], UUID[:4].upper(), "theatr", "%", "____"):
        with pytest.raises(DeviceNotFoundError):
            core.devices.find_id(unknown)
    with pytest.raises(InvalidRequestError, match="'devi' may be device-0"):
        core.devices.find_id("devi")


def test_a_training_session_is_found_by_id_name_and_beginning_of_its_id(
    core: CoordinatorHarness,
) -> None:
    session_id = core.create()
    name = core.training.get(session_id).name

    found = [core.training.find_id(text) for text in (session_id, name, session_id[:6])]
    assert found == [session_id] * 3
    other_id = core.create()
    with pytest.raises(InvalidRequestError, match=other_id):
        core.training.find_id(name)
    with pytest.raises(TrainingSessionNotFoundError):
        core.training.find_id("absent")
