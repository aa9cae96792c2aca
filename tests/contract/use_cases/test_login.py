"""Logins, refreshes and proofs of possession against the real use cases, on both databases."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from qflare.crypto.signing import SigningContext, SigningKey
from qflare.protocol.possession import METADATA_KEY, CallProver, Refresh
from qflare.v1 import security_pb2
from qflare_server.errors import (
    DeviceRevokedError,
    DeviceSuspendedError,
    QflareError,
    UnauthenticatedError,
)
from qflare_server.storage.tables import RiskLevel, TokenKind, UserToken
from qflare_server.use_cases.access.authentication import NOBODY, Principal
from qflare_server.use_cases.access.roles import Role
from tests.conftest import FakeClock
from tests.support.identity import ADMIN, CALLER, Coordinator, SimulatedDevice, everything_stored

GET_TASK = "/qflare.v1.CoordinatorService/GetTask"


def admit(coordinator: Coordinator, grant: security_pb2.TokenGrant) -> Principal:
    return coordinator.authentication.admit(GET_TASK, grant.access_token)


def tokens_of(coordinator: Coordinator, device_id: str, kind: TokenKind) -> list[UserToken]:
    with coordinator.context.database.read() as session:
        query = select(UserToken).where(
            UserToken.device_id == device_id, UserToken.kind == kind.value
        )
        return list(session.scalars(query))


class TestLoggingIn:
    def test_the_access_token_admits_the_device(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, grant = device.log_in(coordinator)
        principal = admit(coordinator, grant)
        assert principal.device_id == device.device_id
        assert principal.roles == {Role.DEVICE}
        assert principal.key_id == device.signing.public.key_id

    def test_the_grant_names_the_keyset(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, grant = device.log_in(coordinator)
        assert grant.keyset_version == coordinator.keys.keyset_version

    def test_the_access_token_expires(
        self, coordinator: Coordinator, device: SimulatedDevice, clock: FakeClock
    ) -> None:
        _, grant = device.log_in(coordinator)
        clock.advance(coordinator.context.config.access_token_s)
        with pytest.raises(UnauthenticatedError):
            admit(coordinator, grant)

    def test_the_refresh_token_admits_nobody(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, grant = device.log_in(coordinator)
        with pytest.raises(UnauthenticatedError):
            coordinator.authentication.admit(GET_TASK, grant.refresh_token)

    def test_it_is_audited(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        keys, _ = device.log_in(coordinator)
        (event,) = coordinator.events("device.logged_in")
        assert event.subject == f"device:{device.device_id}"
        assert event.details["session_id"] == keys.session_id

    def test_no_secret_is_in_the_database(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        stored = everything_stored(coordinator.context.database)
        for token in (grant.access_token, grant.refresh_token):
            assert token.rsplit(".", 1)[1].encode() not in stored
        for secret in (keys.binding_key, keys.grant_key, coordinator.keys.state_key):
            assert secret not in stored
            assert secret.hex().encode() not in stored

    def test_replicas_share_a_login(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, proof = device.proof(coordinator)
        grant = keys.open_grant(coordinator.replica().login.authenticate(CALLER, proof))
        assert admit(coordinator, grant).device_id == device.device_id

    def test_an_inactive_device_may_log_in(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        coordinator.devices.deactivate(ADMIN, device.device_id, "away")
        device.log_in(coordinator)


class TestRefusingLogins:
    def refuse(self, coordinator: Coordinator, call: Callable[[], Any]) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            call()
        assert str(refused.value) == str(UnauthenticatedError())
        (event,) = coordinator.events("login.refused")
        assert event.risk_level == RiskLevel.HIGH.value
        return str(event.details["problem"])

    def test_the_same_proof_again(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        _, proof = device.proof(coordinator)
        coordinator.login.authenticate(CALLER, proof)
        self.refuse(coordinator, lambda: coordinator.login.authenticate(CALLER, proof))

    def test_the_same_proof_at_the_same_moment(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, proof = device.proof(coordinator)
        barrier = threading.Barrier(4)

        def finish(_: int) -> bool:
            barrier.wait(timeout=10)
            try:
                coordinator.login.authenticate(CALLER, proof)
            except QflareError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(finish, range(4))) == 1
        assert len(tokens_of(coordinator, device.device_id, TokenKind.ACCESS)) == 1

    def test_a_late_proof(
        self, coordinator: Coordinator, device: SimulatedDevice, clock: FakeClock
    ) -> None:
        _, proof = device.proof(coordinator)
        clock.advance(31)
        self.refuse(coordinator, lambda: coordinator.login.authenticate(CALLER, proof))

    def test_a_key_that_was_never_enrolled(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        thief = replace(device, signing=SigningKey.generate())
        self.refuse(coordinator, lambda: thief.log_in(coordinator))

    def test_another_devices_key(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        other = SimulatedDevice()
        other.enroll(coordinator)
        _, proof = other.proof(coordinator, device.device_id)
        self.refuse(coordinator, lambda: coordinator.login.authenticate(CALLER, proof))

    def test_an_unknown_device(self, coordinator: Coordinator) -> None:
        stranger = SimulatedDevice(device_id="stranger")
        self.refuse(coordinator, lambda: stranger.log_in(coordinator))

    def test_a_signature_in_another_context(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        class WrongContext:
            public = device.signing.public

            def sign(self, _context: SigningContext, message: bytes) -> bytes:
                return device.signing.sign(SigningContext.UPDATE, message)

        thief = replace(device, signing=WrongContext())
        self.refuse(coordinator, lambda: thief.log_in(coordinator))

    def test_a_changed_state(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        _, proof = device.proof(coordinator)
        proof.sealed_state = proof.sealed_state[:-1] + bytes([proof.sealed_state[-1] ^ 1])
        self.refuse(coordinator, lambda: coordinator.login.authenticate(CALLER, proof))

    def test_an_enrollments_state(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        token = coordinator.enrollment_token()
        _, proof = device.proof(coordinator)
        proof.sealed_state = SimulatedDevice().confirmation(coordinator, token).sealed_state
        self.refuse(coordinator, lambda: coordinator.login.authenticate(CALLER, proof))

    def test_another_protocol_version(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        hello = device.start_login(coordinator).hello()
        hello.protocol_version = 0
        self.refuse(coordinator, lambda: coordinator.login.begin(CALLER, hello, ""))

    def test_empty_messages(self, coordinator: Coordinator) -> None:
        hello = security_pb2.SessionHello()
        self.refuse(coordinator, lambda: coordinator.login.begin(CALLER, hello, ""))

    def test_a_suspended_device(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        _, proof = device.proof(coordinator)
        coordinator.devices.suspend(ADMIN, device.device_id, "odd")
        with pytest.raises(DeviceSuspendedError):
            coordinator.login.authenticate(CALLER, proof)
        assert len(coordinator.events("login.refused")) == 1

    def test_a_revoked_device(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        _, proof = device.proof(coordinator)
        coordinator.devices.revoke(ADMIN, device.device_id, "stolen")
        with pytest.raises(DeviceRevokedError):
            coordinator.login.authenticate(CALLER, proof)

    def test_who_cannot_sign_is_not_told_the_state(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        coordinator.devices.suspend(ADMIN, device.device_id, "odd")
        thief = replace(device, signing=SigningKey.generate())
        self.refuse(coordinator, lambda: thief.log_in(coordinator))


class TestRefreshing:
    def refreshed(
        self, coordinator: Coordinator, keys: Any, grant: security_pb2.TokenGrant
    ) -> security_pb2.TokenGrant:
        refresh = Refresh.start(keys.binding_key, keys.session_id, grant.refresh_token)
        return refresh.open_grant(coordinator.login.refresh(CALLER, refresh.request))

    def test_the_next_tokens_admit(self, coordinator: Coordinator, device: SimulatedDevice) -> None:
        keys, grant = device.log_in(coordinator)
        following = self.refreshed(coordinator, keys, grant)
        assert following.refresh_token != grant.refresh_token
        assert admit(coordinator, following).device_id == device.device_id

    def test_the_next_tokens_refresh(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        for _ in range(3):
            grant = self.refreshed(coordinator, keys, grant)
        admit(coordinator, grant)

    def test_a_second_use_ends_the_login(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        following = self.refreshed(coordinator, keys, grant)
        with pytest.raises(UnauthenticatedError):
            self.refreshed(coordinator, keys, grant)
        with pytest.raises(UnauthenticatedError):
            admit(coordinator, following)
        with pytest.raises(UnauthenticatedError):
            self.refreshed(coordinator, keys, following)

    def test_a_second_use_is_audited(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        self.refreshed(coordinator, keys, grant)
        with pytest.raises(UnauthenticatedError):
            self.refreshed(coordinator, keys, grant)
        (event,) = coordinator.events("token.reused")
        assert event.risk_level == RiskLevel.HIGH.value
        (used, *_) = [row for row in self.family(coordinator, device) if row.used_at]
        assert used.revoked_reason == "refresh token used twice"

    def family(self, coordinator: Coordinator, device: SimulatedDevice) -> list[UserToken]:
        return tokens_of(coordinator, device.device_id, TokenKind.REFRESH)

    def test_a_second_use_leaves_other_logins_alone(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, other = device.log_in(coordinator)
        keys, grant = device.log_in(coordinator)
        self.refreshed(coordinator, keys, grant)
        with pytest.raises(UnauthenticatedError):
            self.refreshed(coordinator, keys, grant)
        admit(coordinator, other)

    def test_two_uses_at_the_same_moment_end_the_login(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        barrier = threading.Barrier(2)

        def use(_: int) -> security_pb2.TokenGrant | None:
            barrier.wait(timeout=10)
            try:
                return self.refreshed(coordinator, keys, grant)
            except UnauthenticatedError:
                return None

        with ThreadPoolExecutor(2) as pool:
            (won,) = [result for result in pool.map(use, range(2)) if result is not None]
        with pytest.raises(UnauthenticatedError):
            admit(coordinator, won)

    def refuse(self, coordinator: Coordinator, request: security_pb2.SessionRefresh) -> str:
        with pytest.raises(UnauthenticatedError):
            coordinator.login.refresh(CALLER, request)
        (event,) = coordinator.events("login.refused")
        return str(event.details["problem"])

    def test_a_stolen_token_is_no_use_without_the_key(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        forged = Refresh.start(bytes(32), keys.session_id, grant.refresh_token)
        self.refuse(coordinator, forged.request)
        self.refreshed(coordinator, keys, grant)

    def test_an_access_token_does_not_refresh(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        refresh = Refresh.start(keys.binding_key, keys.session_id, grant.access_token)
        assert self.refuse(coordinator, refresh.request) == "unknown refresh token"

    def test_a_token_of_another_session_does_not_refresh(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        _, grant = device.log_in(coordinator)
        other, _ = device.log_in(coordinator)
        refresh = Refresh.start(other.binding_key, other.session_id, grant.refresh_token)
        self.refuse(coordinator, refresh.request)

    def test_an_expired_token_does_not_refresh(
        self, coordinator: Coordinator, device: SimulatedDevice, clock: FakeClock
    ) -> None:
        keys, grant = device.log_in(coordinator)
        clock.advance(coordinator.context.config.refresh_token_s)
        refresh = Refresh.start(keys.binding_key, keys.session_id, grant.refresh_token)
        assert self.refuse(coordinator, refresh.request) == "refresh token has expired"

    def test_a_token_of_absurd_length_does_not_refresh(self, coordinator: Coordinator) -> None:
        refresh = Refresh.start(bytes(32), "0" * 32, "x" * 10_000)
        self.refuse(coordinator, refresh.request)

    def test_a_suspended_device_keeps_its_token(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        coordinator.devices.suspend(ADMIN, device.device_id, "odd")
        with pytest.raises(DeviceSuspendedError):
            self.refreshed(coordinator, keys, grant)
        coordinator.devices.reinstate(ADMIN, device.device_id, "well again")
        self.refreshed(coordinator, keys, grant)

    def test_a_revoked_device_is_refused(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        keys, grant = device.log_in(coordinator)
        coordinator.devices.revoke(ADMIN, device.device_id, "stolen")
        refresh = Refresh.start(keys.binding_key, keys.session_id, grant.refresh_token)
        assert self.refuse(coordinator, refresh.request).startswith("refresh token is revoked")


class TestProvingPossession:
    @pytest.fixture
    def strict(self, coordinator: Coordinator) -> Coordinator:
        return coordinator.replica(require_pop=True)

    @pytest.fixture
    def session(
        self, strict: Coordinator, device: SimulatedDevice
    ) -> tuple[Principal, CallProver, str]:
        keys, grant = device.log_in(strict)
        prover = CallProver(keys.binding_key, grant.access_token)
        return admit(strict, grant), prover, f"Bearer {grant.access_token}"

    def metadata(self, bearer: str, proof: bytes) -> list[tuple[str, str | bytes]]:
        return [("authorization", bearer), (METADATA_KEY, proof)]

    def test_a_proof_is_accepted(
        self, strict: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, prover, bearer = session
        for message in (b"one", b"two"):
            metadata = self.metadata(bearer, prover.prove(GET_TASK, message))
            strict.login.check_pop(principal, GET_TASK, metadata, message)

    def test_proofs_may_come_out_of_order(
        self, strict: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, prover, bearer = session
        proofs = [prover.prove(GET_TASK, b"m") for _ in range(3)]
        for proof in reversed(proofs):
            strict.login.check_pop(principal, GET_TASK, self.metadata(bearer, proof), b"m")

    def test_a_call_without_proof_is_refused(
        self, strict: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, _, bearer = session
        with pytest.raises(UnauthenticatedError):
            strict.login.check_pop(principal, GET_TASK, [("authorization", bearer)], b"m")

    def test_a_replay_is_refused(
        self, strict: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, prover, bearer = session
        metadata = self.metadata(bearer, prover.prove(GET_TASK, b"m"))
        strict.login.check_pop(principal, GET_TASK, metadata, b"m")
        with pytest.raises(UnauthenticatedError):
            strict.login.check_pop(principal, GET_TASK, metadata, b"m")

    def test_a_replay_at_another_replica_is_refused(
        self, strict: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, prover, bearer = session
        metadata = self.metadata(bearer, prover.prove(GET_TASK, b"m"))
        strict.login.check_pop(principal, GET_TASK, metadata, b"m")
        with pytest.raises(UnauthenticatedError):
            strict.replica().login.check_pop(principal, GET_TASK, metadata, b"m")

    @pytest.mark.parametrize(("method", "message"), [(GET_TASK, b"other"), ("/other", b"m")])
    def test_a_proof_is_for_one_method_and_message(
        self,
        strict: Coordinator,
        session: tuple[Principal, CallProver, str],
        method: str,
        message: bytes,
    ) -> None:
        principal, prover, bearer = session
        metadata = self.metadata(bearer, prover.prove(GET_TASK, b"m"))
        with pytest.raises(UnauthenticatedError):
            strict.login.check_pop(principal, method, metadata, message)

    def test_a_proof_is_for_one_token(
        self,
        strict: Coordinator,
        device: SimulatedDevice,
        session: tuple[Principal, CallProver, str],
    ) -> None:
        _, prover, bearer = session
        _, other = device.log_in(strict)
        metadata = self.metadata(bearer, prover.prove(GET_TASK, b"m"))
        with pytest.raises(UnauthenticatedError):
            strict.login.check_pop(admit(strict, other), GET_TASK, metadata, b"m")

    def test_a_proof_survives_a_refresh(self, strict: Coordinator, device: SimulatedDevice) -> None:
        keys, grant = device.log_in(strict)
        refresh = Refresh.start(keys.binding_key, keys.session_id, grant.refresh_token)
        following = refresh.open_grant(strict.login.refresh(CALLER, refresh.request))
        proof = CallProver(keys.binding_key, following.access_token).prove(GET_TASK, b"m")
        metadata = self.metadata(f"Bearer {following.access_token}", proof)
        strict.login.check_pop(admit(strict, following), GET_TASK, metadata, b"m")

    def test_it_is_asked_of_devices_only(self, strict: Coordinator) -> None:
        strict.login.check_pop(NOBODY, "/any", [], b"")

    def test_it_is_not_asked_unless_configured(
        self, coordinator: Coordinator, session: tuple[Principal, CallProver, str]
    ) -> None:
        principal, _, bearer = session
        coordinator.login.check_pop(principal, GET_TASK, [("authorization", bearer)], b"m")
