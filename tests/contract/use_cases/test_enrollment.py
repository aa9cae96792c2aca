"""Enrollment and rotation against the real use cases, on both databases."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from sqlalchemy import func, select

from qflare.crypto.envelope import open_envelope, sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import device_pb2, security_pb2
from qflare_server.errors import (
    InvalidEnrollmentTokenError,
    InvalidRequestError,
    InvalidSignatureError,
    QflareError,
    UnauthenticatedError,
    WrongStateError,
)
from qflare_server.storage.tables import Device, DeviceKey, DeviceState, RiskLevel
from qflare_server.use_cases.access.authentication import Principal
from qflare_server.use_cases.access.failed_attempts import BURST, INTERVAL_S
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.devices.enrollment import EnrollmentResult
from tests.conftest import FakeClock
from tests.support.identity import ADMIN, CALLER, Coordinator, SimulatedDevice, everything_stored

T = TypeVar("T")


def count_devices(coordinator: Coordinator) -> int:
    with coordinator.context.database.read() as session:
        return session.execute(select(func.count()).select_from(Device)).scalar_one()


def keys_of(coordinator: Coordinator, device_id: str) -> list[DeviceKey]:
    with coordinator.context.database.read() as session:
        query = select(DeviceKey).where(DeviceKey.device_id == device_id)
        return list(session.scalars(query.order_by(DeviceKey.sequence)))


def principal_of(coordinator: Coordinator, access_token: str) -> Principal:
    method = "/qflare.v1.CoordinatorService/RotateKeys"
    return coordinator.authentication.admit(method, access_token)


def at_once(count: int, call: Callable[[int], T]) -> list[T | QflareError]:
    barrier = threading.Barrier(count)

    def run(number: int) -> T | QflareError:
        barrier.wait(timeout=10)
        try:
            return call(number)
        except QflareError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def open_receipt(
    coordinator: Coordinator, enrolled: EnrollmentResult
) -> security_pb2.EnrollmentReceipt:
    keys = coordinator.keys.trust.signature_keys(security_pb2.KEY_ROLE_REGISTRAR)
    payload = open_envelope(enrolled.receipt, SigningContext.RECEIPT, keys)
    return security_pb2.EnrollmentReceipt.FromString(payload)


class TestEnrolling:
    def test_a_device_accepts_its_receipt(self, coordinator: Coordinator) -> None:
        device = SimulatedDevice()
        exchange = device.enrollment(coordinator, coordinator.enrollment_token())
        challenge = coordinator.enrollment.begin(CALLER, exchange.request())
        enrolled = coordinator.enrollment.register(CALLER, exchange.confirm(challenge))
        registrars = coordinator.keys.trust.signature_keys(security_pb2.KEY_ROLE_REGISTRAR)
        receipt = exchange.accept(enrolled.receipt, registrars)
        assert receipt.device_id == enrolled.device_id
        assert receipt.key_rotation_count == 0

    def test_the_row_holds_the_public_keys(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        row = coordinator.devices.get(device.device_id)
        assert row.signature_public_key == device.signing.public.data
        assert row.kem_public_key == device.kem.public.data
        assert row.state == DeviceState.ACTIVE.value

    def test_the_receipt_is_kept_with_the_key(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        (key,) = keys_of(coordinator, device.device_id)
        assert key.key_id == device.signing.public.key_id
        stored = security_pb2.SignedEnvelope.FromString(key.statement or b"")
        receipt = security_pb2.EnrollmentReceipt.FromString(stored.payload)
        assert receipt.device_id == device.device_id

    def test_it_is_audited(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        (event,) = coordinator.events("device.registered")
        assert event.subject == f"device:{device.device_id}"
        assert event.peer_address == CALLER.peer_address

    def test_the_profile_is_stored(self, coordinator: Coordinator) -> None:
        profile = device_pb2.DeviceProfile(device_type="phone", capabilities={"ram_mib": 4096})
        device = SimulatedDevice()
        device.enroll(coordinator, profile=profile.SerializeToString())
        row = coordinator.devices.get(device.device_id)
        assert (row.device_type, row.capabilities) == ("phone", {"ram_mib": 4096})

    def test_the_receipt_says_what_selection_goes_by(self, coordinator: Coordinator) -> None:
        profile = device_pb2.DeviceProfile(device_type="phone", capabilities={"ram_mib": 4096})
        device = SimulatedDevice()
        receipt = open_receipt(
            coordinator, device.enroll(coordinator, profile=profile.SerializeToString())
        )
        assert receipt.profile.device_type == "phone"
        assert dict(receipt.profile.capabilities) == {"ram_mib": 4096}

    def test_the_token_puts_the_device_into_groups(self, coordinator: Coordinator) -> None:
        issued = coordinator.tokens.issue_enrollment(ADMIN, groups=["ward-3", "a", "a"])[0]
        device = SimulatedDevice()
        device.enroll(coordinator, issued.secret)
        groups = coordinator.devices.groups_of([device.device_id])
        assert groups == {device.device_id: ["a", "ward-3"]}
        (event,) = coordinator.events("device.registered")
        assert event.details["groups"] == "a,ward-3"

    def test_a_profile_out_of_range_spends_no_token(self, coordinator: Coordinator) -> None:
        token = coordinator.enrollment_token()
        profile = device_pb2.DeviceProfile(device_type="x" * 101).SerializeToString()
        with pytest.raises(InvalidRequestError):
            SimulatedDevice().enroll(coordinator, token, profile)
        SimulatedDevice().enroll(coordinator, token)

    def test_no_token_is_in_the_database(self, coordinator: Coordinator) -> None:
        token = coordinator.enrollment_token()
        SimulatedDevice().enroll(coordinator, token)
        assert token.rsplit(".", 1)[1].encode() not in everything_stored(
            coordinator.context.database
        )

    def test_two_replicas_share_an_enrollment(self, coordinator: Coordinator) -> None:
        device, other = SimulatedDevice(), coordinator.replica()
        exchange = device.enrollment(coordinator, coordinator.enrollment_token())
        challenge = coordinator.enrollment.begin(CALLER, exchange.request())
        assert other.enrollment.register(CALLER, exchange.confirm(challenge)).device_id


class TestRepeating:
    def test_the_same_keys_get_the_same_receipt(self, coordinator: Coordinator) -> None:
        device, token = SimulatedDevice(), coordinator.enrollment_token()
        assert device.enroll(coordinator, token) == device.enroll(coordinator, token)
        assert count_devices(coordinator) == 1

    def test_other_keys_are_refused(self, coordinator: Coordinator) -> None:
        token = coordinator.enrollment_token()
        SimulatedDevice().enroll(coordinator, token)
        with pytest.raises(InvalidEnrollmentTokenError):
            SimulatedDevice().enroll(coordinator, token)

    def test_another_kem_key_is_refused(self, coordinator: Coordinator) -> None:
        device, token = SimulatedDevice(), coordinator.enrollment_token()
        device.enroll(coordinator, token)
        with pytest.raises(InvalidEnrollmentTokenError):
            replace(device, kem=KemKey.generate()).enroll(coordinator, token)

    def test_a_known_key_is_refused_with_another_token(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        with pytest.raises(InvalidEnrollmentTokenError):
            device.enroll(coordinator)

    def test_of_two_devices_at_the_same_moment_one_wins(self, coordinator: Coordinator) -> None:
        token = coordinator.enrollment_token()
        proofs = [SimulatedDevice().confirmation(coordinator, token) for _ in range(4)]
        results = at_once(4, lambda number: coordinator.enrollment.register(CALLER, proofs[number]))
        assert sorted(type(result).__name__ for result in results) == [
            "EnrollmentResult",
            *["InvalidEnrollmentTokenError"] * 3,
        ]
        assert count_devices(coordinator) == 1

    def test_one_device_twice_at_the_same_moment_gets_one_receipt(
        self, coordinator: Coordinator
    ) -> None:
        device, token = SimulatedDevice(), coordinator.enrollment_token()
        proofs = [device.confirmation(coordinator, token) for _ in range(4)]
        results = at_once(4, lambda number: coordinator.enrollment.register(CALLER, proofs[number]))
        receipts = {
            result.receipt.SerializeToString(deterministic=True)
            for result in results
            if isinstance(result, EnrollmentResult)
        }
        assert len(receipts) == 1
        assert count_devices(coordinator) == 1


class TestRefusing:
    def refuse(self, coordinator: Coordinator, call: Callable[[], Any]) -> str:
        with pytest.raises(InvalidEnrollmentTokenError) as refused:
            call()
        assert str(refused.value) == str(InvalidEnrollmentTokenError())
        assert count_devices(coordinator) == 0
        (event,) = coordinator.events("enrollment.refused")
        assert event.risk_level == RiskLevel.HIGH.value
        return str(event.details["problem"])

    def test_an_unknown_token(self, coordinator: Coordinator) -> None:
        device = SimulatedDevice()
        problem = self.refuse(coordinator, lambda: device.enroll(coordinator, "qfe1.no.such"))
        assert problem == "unknown token"

    def test_an_expired_token(self, coordinator: Coordinator, clock: FakeClock) -> None:
        token = coordinator.enrollment_token(lifetime_s=60)
        clock.advance(60)
        device = SimulatedDevice()
        problem = self.refuse(coordinator, lambda: device.enroll(coordinator, token))
        assert problem == "the token has expired"

    def test_a_token_that_expires_between_the_calls(
        self, coordinator: Coordinator, clock: FakeClock
    ) -> None:
        token = coordinator.enrollment_token(lifetime_s=30)
        confirmation = SimulatedDevice().confirmation(coordinator, token)
        clock.advance(31)
        self.refuse(coordinator, lambda: coordinator.enrollment.register(CALLER, confirmation))

    def test_a_revoked_token(self, coordinator: Coordinator) -> None:
        issued = coordinator.tokens.issue_enrollment(ADMIN)[0]
        coordinator.tokens.revoke(ADMIN, issued.token.id, "lost")
        device = SimulatedDevice()
        problem = self.refuse(coordinator, lambda: device.enroll(coordinator, issued.secret))
        assert problem == "the token is revoked"

    def test_a_wrong_confirmation(self, coordinator: Coordinator) -> None:
        token = coordinator.enrollment_token()
        confirmation = SimulatedDevice().confirmation(coordinator, token)
        confirmation.confirmation = bytes(32)
        self.refuse(coordinator, lambda: coordinator.enrollment.register(CALLER, confirmation))

    def test_a_late_confirmation(self, coordinator: Coordinator, clock: FakeClock) -> None:
        token = coordinator.enrollment_token()
        confirmation = SimulatedDevice().confirmation(coordinator, token)
        clock.advance(61)
        self.refuse(coordinator, lambda: coordinator.enrollment.register(CALLER, confirmation))

    def test_a_request_for_another_realm(self, coordinator: Coordinator) -> None:
        exchange = SimulatedDevice().enrollment(coordinator, coordinator.enrollment_token())
        request = exchange.request()
        request.realm = "elsewhere"
        self.refuse(coordinator, lambda: coordinator.enrollment.begin(CALLER, request))

    def test_a_request_for_another_coordinators_key(self, coordinator: Coordinator) -> None:
        exchange = SimulatedDevice().enrollment(coordinator, coordinator.enrollment_token())
        request = exchange.request()
        request.server_kem_key_id = KemKey.generate().public.key_id
        self.refuse(coordinator, lambda: coordinator.enrollment.begin(CALLER, request))

    def test_an_empty_request(self, coordinator: Coordinator) -> None:
        empty = security_pb2.SealedEnrollment()
        self.refuse(coordinator, lambda: coordinator.enrollment.begin(CALLER, empty))

    def test_the_audit_log_is_not_filled_by_it(
        self, coordinator: Coordinator, clock: FakeClock
    ) -> None:
        empty = security_pb2.SealedEnrollment()
        for _ in range(BURST + 5):
            with pytest.raises(InvalidEnrollmentTokenError):
                coordinator.enrollment.begin(CALLER, empty)
        assert len(coordinator.events("enrollment.refused")) == BURST
        clock.advance(INTERVAL_S)
        with pytest.raises(InvalidEnrollmentTokenError):
            coordinator.enrollment.begin(CALLER, empty)
        assert coordinator.events("enrollment.refused")[-1].details["left_out_count"] == 5


class TestLosingKeys:
    def again(self, coordinator: Coordinator, device: SimulatedDevice) -> SimulatedDevice:
        following = SimulatedDevice()
        following.enroll(coordinator, coordinator.enrollment_token(device.device_id))
        return following

    def test_the_device_stays_and_its_keys_change(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        following = self.again(coordinator, device)
        row = coordinator.devices.get(device.device_id)
        assert following.device_id == device.device_id
        assert row.signature_key_id == following.signing.public.key_id
        assert row.key_rotation_count == 1

    def test_the_receipt_tells_the_count(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        token = coordinator.enrollment_token(device.device_id)
        receipt = open_receipt(coordinator, SimulatedDevice().enroll(coordinator, token))
        assert receipt.key_rotation_count == 1

    def test_the_lost_key_stays_as_evidence(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        self.again(coordinator, device)
        first, second = keys_of(coordinator, device.device_id)
        assert (first.key_id, first.retired_reason) == (device.signing.public.key_id, "lost")
        assert second.retired_at is None

    def test_the_lost_keys_login_ends(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, grant = device.log_in(coordinator)
        self.again(coordinator, device)
        with pytest.raises(UnauthenticatedError):
            principal_of(coordinator, grant.access_token)
        with pytest.raises(UnauthenticatedError):
            device.log_in(coordinator)

    def test_the_next_rotation_follows(
        self, coordinator: Coordinator, device: SimulatedDevice, clock: FakeClock
    ) -> None:
        following = self.again(coordinator, device)
        _, grant = following.log_in(coordinator)
        principal = principal_of(coordinator, grant.access_token)
        rotation = following.rotation(SimulatedDevice(), 2, clock())
        assert coordinator.key_rotations.rotate(CALLER, principal, rotation) == 2

    def test_the_same_keys_again_get_the_same_receipt(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        token, following = coordinator.enrollment_token(device.device_id), SimulatedDevice()
        assert following.enroll(coordinator, token) == following.enroll(coordinator, token)
        assert coordinator.devices.get(device.device_id).key_rotation_count == 1

    def test_a_suspended_device_stays_suspended(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        token = coordinator.enrollment_token(device.device_id)
        coordinator.devices.suspend(ADMIN, device.device_id, "odd")
        SimulatedDevice().enroll(coordinator, token)
        assert coordinator.devices.get(device.device_id).state == DeviceState.SUSPENDED.value

    def test_a_revoked_device_is_refused(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        token = coordinator.enrollment_token(device.device_id)
        coordinator.devices.revoke(ADMIN, device.device_id, "stolen")
        with pytest.raises(InvalidEnrollmentTokenError):
            SimulatedDevice().enroll(coordinator, token)

    def test_an_empty_profile_changes_nothing(self, coordinator: Coordinator) -> None:
        device = SimulatedDevice()
        profile = device_pb2.DeviceProfile(device_type="phone").SerializeToString()
        device.enroll(coordinator, profile=profile)
        self.again(coordinator, device)
        assert coordinator.devices.get(device.device_id).device_type == "phone"

    def test_the_receipt_repeats_what_the_device_said_before(
        self, coordinator: Coordinator
    ) -> None:
        device = SimulatedDevice()
        profile = device_pb2.DeviceProfile(device_type="phone").SerializeToString()
        device.enroll(coordinator, profile=profile)
        token = coordinator.enrollment_token(device.device_id)
        receipt = open_receipt(coordinator, SimulatedDevice().enroll(coordinator, token))
        assert receipt.profile.device_type == "phone"

    def test_what_was_confirmed_stays(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        confirmed = Profile("phone", capabilities={"ram_mib": 512.0})
        coordinator.devices.confirm_profile(ADMIN, device.device_id, confirmed, "")
        boast = device_pb2.DeviceProfile(device_type="server", capabilities={"ram_mib": 1e6})
        token = coordinator.enrollment_token(device.device_id)
        enrolled = SimulatedDevice().enroll(coordinator, token, boast.SerializeToString())
        row = coordinator.devices.get(device.device_id)
        assert (row.device_type, row.capabilities) == ("phone", {"ram_mib": 512.0})
        assert (row.reported_type, row.reported_capabilities) == ("server", {"ram_mib": 1e6})
        assert open_receipt(coordinator, enrolled).profile.device_type == "phone"

    def test_groups_stay(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        coordinator.devices.set_groups(ADMIN, device.device_id, ["ward-3"], "")
        self.again(coordinator, device)
        assert coordinator.devices.groups_of([device.device_id]) == {device.device_id: ["ward-3"]}


class TestRotating:
    @pytest.fixture
    def principal(self, coordinator: Coordinator, device: SimulatedDevice) -> Principal:
        _, grant = device.log_in(coordinator)
        return principal_of(coordinator, grant.access_token)

    def test_the_next_keys_are_in_use(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        following = SimulatedDevice(device_id=device.device_id)
        rotation = device.rotation(following, 1, clock())
        assert coordinator.key_rotations.rotate(CALLER, principal, rotation) == 1
        following.log_in(coordinator)
        with pytest.raises(UnauthenticatedError):
            device.log_in(coordinator)

    def test_the_rotation_is_kept_with_the_key(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), 1, clock())
        coordinator.key_rotations.rotate(CALLER, principal, rotation)
        first, second = keys_of(coordinator, device.device_id)
        assert first.retired_reason == "rotated"
        assert security_pb2.SignedEnvelope.FromString(second.statement or b"") == rotation

    def test_the_same_rotation_again_changes_nothing(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), 1, clock())
        coordinator.key_rotations.rotate(CALLER, principal, rotation)
        assert coordinator.key_rotations.rotate(CALLER, principal, rotation) == 1
        assert len(keys_of(coordinator, device.device_id)) == 2

    def test_other_logins_end_and_this_one_goes_on(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        clock: FakeClock,
    ) -> None:
        _, other = device.log_in(coordinator)
        _, own = device.log_in(coordinator)
        principal = principal_of(coordinator, own.access_token)
        rotation = device.rotation(SimulatedDevice(), 1, clock())
        coordinator.key_rotations.rotate(CALLER, principal, rotation)
        assert principal_of(coordinator, own.access_token).device_id == device.device_id
        with pytest.raises(UnauthenticatedError):
            principal_of(coordinator, other.access_token)

    @pytest.mark.parametrize("sequence_number", [0, 2])
    def test_another_number_is_refused(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
        sequence_number: int,
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), sequence_number, clock())
        with pytest.raises(WrongStateError) as refused:
            coordinator.key_rotations.rotate(CALLER, principal, rotation)
        assert refused.value.metadata == {"key_rotation_count": "0"}

    def test_a_negative_number_is_an_invalid_request(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), -1, clock())
        with pytest.raises(InvalidRequestError) as refused:
            coordinator.key_rotations.rotate(CALLER, principal, rotation)
        assert refused.value.field == "rotation.payload.sequence_number"

    def test_a_rotated_key_cannot_rotate(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        first = device.rotation(SimulatedDevice(), 1, clock())
        coordinator.key_rotations.rotate(CALLER, principal, first)
        with pytest.raises(WrongStateError):
            coordinator.key_rotations.rotate(
                CALLER, principal, device.rotation(SimulatedDevice(), 2, clock())
            )

    def test_a_key_cannot_come_back(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        following = SimulatedDevice(device_id=device.device_id)
        coordinator.key_rotations.rotate(CALLER, principal, device.rotation(following, 1, clock()))
        with pytest.raises(InvalidRequestError):
            coordinator.key_rotations.rotate(
                CALLER, principal, following.rotation(device, 2, clock())
            )

    @pytest.mark.parametrize("signer", ["previous", "next"])
    def test_one_signature_is_not_enough(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
        signer: str,
    ) -> None:
        following = SimulatedDevice()
        statement = device.rotation_statement(following, 1, clock())
        key = device.signing if signer == "previous" else following.signing
        envelope = sign_envelope(key, SigningContext.ROTATION, statement)
        with pytest.raises(InvalidSignatureError):
            coordinator.key_rotations.rotate(CALLER, principal, envelope)
        (event,) = coordinator.events("rotation.refused")
        assert event.risk_level == RiskLevel.HIGH.value

    def test_the_signatures_are_in_their_own_context(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), 1, clock())
        rotation.signatures[0].signature = device.signing.sign(
            SigningContext.UPDATE, rotation.payload
        )
        with pytest.raises(InvalidSignatureError):
            coordinator.key_rotations.rotate(CALLER, principal, rotation)

    @pytest.mark.parametrize("change", [{"realm": "elsewhere"}, {"device_id": "another"}])
    def test_another_realm_or_device_is_refused(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
        change: dict[str, str],
    ) -> None:
        rotation = device.rotation(SimulatedDevice(), 1, clock(), **change)
        with pytest.raises(InvalidRequestError):
            coordinator.key_rotations.rotate(CALLER, principal, rotation)

    def test_another_devices_key_cannot_sign(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        other = SimulatedDevice()
        other.enroll(coordinator)
        thief = replace(other, device_id=device.device_id)
        with pytest.raises(WrongStateError):
            coordinator.key_rotations.rotate(
                CALLER, principal, thief.rotation(SimulatedDevice(), 1, clock())
            )

    def test_a_malformed_rotation_is_refused(
        self, coordinator: Coordinator, principal: Principal
    ) -> None:
        envelope = sign_envelope(SigningKey.generate(), SigningContext.ROTATION, b"\xff")
        with pytest.raises(InvalidRequestError):
            coordinator.key_rotations.rotate(CALLER, principal, envelope)

    def test_of_two_rotations_at_the_same_moment_one_counts(
        self,
        coordinator: Coordinator,
        device: SimulatedDevice,
        principal: Principal,
        clock: FakeClock,
    ) -> None:
        rotations = [device.rotation(SimulatedDevice(), 1, clock()) for _ in range(2)]
        results = at_once(
            2, lambda number: coordinator.key_rotations.rotate(CALLER, principal, rotations[number])
        )
        assert sorted(type(result).__name__ for result in results) == ["WrongStateError", "int"]
        assert coordinator.devices.get(device.device_id).key_rotation_count == 1
