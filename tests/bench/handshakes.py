"""Enrollments and logins, with the device's part of the cryptography done before or beside the clock."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import grpc

from qflare.crypto.sealing import KemKey, KemPublicKey
from qflare.crypto.signing import SigningKey
from qflare.protocol.enrollment import DeviceEnrollment
from qflare.protocol.keysets import TrustedKeyset
from qflare.protocol.login import DeviceLogin
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from qflare_server.context import utc_now
from qflare_server.keys import ServerKeys
from qflare_server.keys.setup import bootstrap_bundle
from tests.bench.coordinator import Coordinator
from tests.bench.figures import Latencies
from tests.bench.load import COORDINATOR, Call
from tests.bench.population import BenchDevice


def bundle_of(coordinator: Coordinator, token: str = "") -> security_pb2.BootstrapBundle:
    """Return what an administrator hands to a device."""
    trust = ServerKeys.load(coordinator.config, coordinator.population.database, utc_now).trust
    return bootstrap_bundle(trust, coordinator.address, enrollment_token=token)


def session_key(coordinator: Coordinator, stub: CoordinatorServiceStub) -> KemPublicKey:
    """Return the coordinator's KEM key, after checking the keyset as a device does."""
    answer = stub.GetKeyset(pb.GetKeysetRequest())
    now = datetime.now(UTC)
    trusted = TrustedKeyset.bootstrap(bundle_of(coordinator))
    return trusted.updated(answer.bundle, now).kem_key(now)


def registrations(coordinator: Coordinator, count: int) -> Latencies:
    """Enroll devices one after the other; their keys are made before."""
    tokens = coordinator.population.enrollment_tokens(count)
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = CoordinatorServiceStub(channel)
        server_key = session_key(coordinator, stub)
        enrollments = [enrollment(coordinator.config.realm, token, server_key) for token in tokens]
        seconds = []
        begun = time.perf_counter()
        for one in enrollments:
            started = time.perf_counter()
            request = pb.BeginRegistrationRequest(enrollment=one.request())
            challenge = stub.BeginRegistration(request).challenge
            stub.Register(pb.RegisterRequest(confirmation=one.confirm(challenge)))
            seconds.append(time.perf_counter() - started)
        return Latencies(seconds, time.perf_counter() - begun)


def enrollment(realm: str, token: str, server_key: KemPublicKey) -> DeviceEnrollment:
    """Return an enrollment that is ready to begin, with fresh keys."""
    kem_key = KemKey.generate()
    return DeviceEnrollment(
        realm=realm,
        enrollment_token=token,
        signing_key=SigningKey.generate(),
        kem_key=kem_key.public,
        decapsulate=kem_key.decapsulate,
        server_key=server_key,
    )


class Logins:
    """Logins of devices, each half ready to be sent.

    Args:
        coordinator: Whom the devices log in to.
        devices: Who logs in.
    """

    def __init__(self, coordinator: Coordinator, devices: Sequence[BenchDevice]) -> None:
        self._channel = grpc.insecure_channel(coordinator.address)
        self._stub = CoordinatorServiceStub(self._channel)
        server_key = session_key(coordinator, self._stub)
        self._logins = [
            DeviceLogin(
                realm=coordinator.config.realm,
                device_id=device.device_id,
                signing_key=device.key,
                server_key=server_key,
            )
            for device in devices
        ]
        self._hellos = [
            pb.BeginAuthenticationRequest(hello=login.hello()) for login in self._logins
        ]

    def first_halves(self) -> list[Call]:
        """Return the calls that begin the logins."""
        method = f"{COORDINATOR}BeginAuthentication"
        return [Call(method, (hello.SerializeToString(),)) for hello in self._hellos]

    def second_halves(self) -> list[Call]:
        """Begin every login, and return the calls that end them: good for a minute, and once."""
        calls = []
        for login, hello in zip(self._logins, self._hellos, strict=True):
            _, proof = login.prove(self._stub.BeginAuthentication(hello).challenge)
            message = pb.AuthenticateRequest(proof=proof).SerializeToString()
            calls.append(Call(f"{COORDINATOR}Authenticate", (message,)))
        return calls

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()
