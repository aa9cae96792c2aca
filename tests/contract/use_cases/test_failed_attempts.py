"""What is recorded of failed attempts: nothing made up hides those about a device that there is."""

import pytest

from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.failed_attempts import BURST, DEVICE_BURST, FailedAttempts
from tests.conftest import FakeClock
from tests.support.identity import Coordinator, SimulatedDevice


@pytest.fixture
def attempts(coordinator: Coordinator) -> FailedAttempts:
    return FailedAttempts(coordinator.context)


def caller(host: str, port: int = 1) -> Caller:
    return Caller("anonymous", f"ipv4:{host}:{port}", "none")


def test_made_up_subjects_do_not_hide_a_device(
    coordinator: Coordinator, device: SimulatedDevice, attempts: FailedAttempts
) -> None:
    for number in range(200):
        attempts.record(caller("192.0.2.1"), "login.refused", f"device:made-up-{number}", "wrong")

    attempts.record(caller("192.0.2.1"), "login.refused", f"device:{device.device_id}", "wrong")

    recorded = [event.subject for event in coordinator.events("login.refused")]
    assert len(recorded) == BURST + 1
    assert f"device:{device.device_id}" in recorded


def test_one_address_does_not_hide_another(
    coordinator: Coordinator, device: SimulatedDevice, attempts: FailedAttempts, clock: FakeClock
) -> None:
    subject = f"device:{device.device_id}"
    for port in range(10):
        attempts.record(caller("192.0.2.1", port), "login.refused", subject, "wrong")
    assert len(coordinator.events("login.refused")) == DEVICE_BURST

    attempts.record(caller("192.0.2.2"), "login.refused", subject, "wrong")
    assert len(coordinator.events("login.refused")) == DEVICE_BURST + 1

    clock.advance(60)
    attempts.record(caller("192.0.2.1"), "login.refused", subject, "wrong")
    assert coordinator.events("login.refused")[-1].details["left_out_count"] == 10 - DEVICE_BURST


def test_text_that_no_database_takes_is_recorded(
    coordinator: Coordinator, attempts: FailedAttempts
) -> None:
    attempts.record(caller("192.0.2.1"), "login.refused", "device:a\0b", "bad \0 id \x1b[2J")

    (event,) = coordinator.events("login.refused")
    assert (event.subject, event.details["problem"]) == ("device:a?b", "bad ? id ?[2J")
