"""Coordinators as processes on one PostgreSQL: ended in mid-upload, given new certificates, told of a revocation."""

import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.tensors import Manifest, chunks
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1.admin_service_pb2_grpc import AdminServiceStub
from qflare.v1.coordinator_service_pb2 import Chunk
from qflare_client import Client, DeviceRevokedError, Receipt, Tls
from qflare_server.cli.main import main
from qflare_server.serving.application import Application
from qflare_server.storage.repository import updates
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.use_cases.access.roles import ADMINISTRATIVE, Role
from tests.support.held_uploads import LARGE, WAIT_S, held_upload
from tests.support.jobs import (
    DEVICES,
    ROUNDS,
    check_every_version,
    enroll_devices,
    prepare,
    wait_for_end,
)
from tests.support.processes import CoordinatorProcess, DeviceThread, Replicas, addresses

DRAIN_S = 20.0
Health = health_pb2.HealthCheckResponse


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Return a PostgreSQL database: several processes need one."""
    return postgres_url


@contextmanager
def watched_health(coordinator: CoordinatorProcess) -> Iterator[Iterator[Any]]:
    """Give the states of a coordinator's health as it reports them, the first of which is SERVING."""
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        states = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(states).status == Health.SERVING
        yield states


def test_a_running_upload_finishes_where_it_began(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    coordinator = replicas.start(drain_s=DRAIN_S)
    with (
        held_upload(parts, tmp_path / "device", coordinator) as upload,
        watched_health(coordinator) as health,
    ):
        coordinator.send(signal.SIGTERM)
        assert next(health).status == Health.NOT_SERVING
        assert upload.finish().acceptance_sequence == 1
        assert coordinator.wait(DRAIN_S / 2) == 0  # the watch of its health does not hold it up


def test_a_draining_replica_takes_no_new_connection(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    coordinator = replicas.start()
    assert main(["health", "--address", coordinator.address]) == 0
    with (
        held_upload(parts, tmp_path / "device", coordinator),
        watched_health(coordinator) as health,
    ):
        coordinator.send(signal.SIGTERM)
        assert next(health).status == Health.NOT_SERVING
        assert main(["health", "--address", coordinator.address, "--timeout", "2"]) == 1


def test_an_upload_that_does_not_finish_in_time_goes_on_at_the_other_replica(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    first, second = replicas.start(drain_s=1), replicas.start()
    with held_upload(parts, tmp_path / "device", first, second) as upload:
        assert first.stop() == 0
        receipt = upload.finish()
    assert accepted_ids(parts, receipt) == [receipt.update_id]


def accepted_ids(parts: Application, receipt: Receipt) -> list[str]:
    """Return the ids of the updates that the round of a receipt has taken."""
    with parts.database.read() as session:
        taken = updates.accepted_after(
            session, receipt.training_session_id, receipt.round_number, 0, 100
        )
    return [update.update_id for update in taken]


@pytest.mark.slow
def test_replicas_that_are_replaced_one_by_one_lose_no_update(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    session_id = prepare(parts)
    pair = [replicas.start(), replicas.start()]
    homes = enroll_devices(parts, tmp_path, pair[0].address)
    threads = [
        DeviceThread(home, index, session_id, address=addresses(*pair))
        for index, home in enumerate(homes)
    ]
    for thread in threads:
        thread.start()
    for coordinator in pair * 2:
        threads[0].join(0.3)
        assert coordinator.stop() == 0
        coordinator.start()
    wait_for_end(threads, 120)
    assert [thread.update_count for thread in threads] == [ROUNDS] * DEVICES
    check_every_version(parts, session_id)


def test_a_device_revoked_at_one_replica_in_mid_upload_is_refused_by_the_other(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    first, second = replicas.start(), replicas.start()
    with (
        held_upload(parts, tmp_path / "device", second) as upload,
        administrator(parts, first) as admin,
    ):
        (device,) = admin("ListDevices").devices
        admin("RevokeDevice", device_id=device.device_id, reason="stolen")
        with pytest.raises(DeviceRevokedError):
            upload.finish()


def test_a_token_revoked_at_one_replica_in_mid_upload_is_refused_by_the_other(
    parts: Application, replicas: Replicas
) -> None:
    first, second = replicas.start(), replicas.start()
    revoked = parts.use_cases.tokens.issue_admin(SYSTEM, "alice", [Role.ADMIN])
    with administrator(parts, first) as admin, grpc.insecure_channel(second.address) as channel:
        created = admin(
            "CreateTrainingSession", name="x", config={"rounds": {"quorum": 1}}
        ).training_session
        half, go_on = threading.Event(), threading.Event()
        call = AdminServiceStub(channel).UploadInitialModel.future(
            model_messages(created.training_session_id, half, go_on),
            metadata=bearer(revoked.secret),
            timeout=WAIT_S,
        )
        assert half.wait(WAIT_S)
        admin("RevokeToken", token_id=revoked.token.id)
        go_on.set()
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        request = {"training_session_id": created.training_session_id}
        assert admin("GetTrainingSession", **request).training_session.current_version == -1


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a token."""
    return (("authorization", f"Bearer {secret}"),)


@contextmanager
def administrator(
    parts: Application, coordinator: CoordinatorProcess
) -> Iterator[Callable[..., Any]]:
    """Give what calls a method of AdminService at a coordinator."""
    secret = parts.use_cases.tokens.issue_admin(SYSTEM, "tester", list(ADMINISTRATIVE)).secret
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = AdminServiceStub(channel)

        def call(method: str, **fields: Any) -> Any:
            request = getattr(pb, f"{method}Request")(**fields)
            return getattr(stub, method)(request, metadata=bearer(secret), timeout=WAIT_S)

        yield call


def model_messages(
    session_id: str, half: threading.Event, go_on: threading.Event
) -> Iterator[pb.UploadInitialModelRequest]:
    """Yield the messages of an upload that stops half-way until it may go on."""
    manifest = Manifest.from_arrays(LARGE)
    header = pb.InitialModelHeader(training_session_id=session_id, manifest=manifest.to_proto())
    yield pb.UploadInitialModelRequest(header=header)
    for index, data in enumerate(chunks(LARGE, manifest)):
        if index == manifest.chunk_count // 2:
            half.set()
            go_on.wait(WAIT_S)
        yield pb.UploadInitialModelRequest(chunk=Chunk(index=index, data=data))


def test_new_certificates_are_taken_over_by_both_replicas_while_open_connections_go_on(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(folder)]) == 0
    files: dict[str, Any] = {
        "tls_certificate_file": folder / "server.pem",
        "tls_key_file": folder / "server.key",
    }
    pair = [replicas.start(**files), replicas.start(**files)]
    tls = Tls.from_files(folder / "ca.pem", server_name="localhost")
    homes = enroll_devices(parts, tmp_path, pair[0].address, tls=tls)
    before = serial_of(folder)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client(home=home, address=one.address, tls=tls))
            for home, one in zip(homes, pair, strict=False)
        ]
        for client in clients:
            client.heartbeat()
        assert main(["certificates", "make", "--output", str(folder)]) == 0
        assert serial_of(folder) != before
        assert [shown_serial(one, folder) for one in pair] == [serial_of(folder)] * 2
        for client in clients:
            client.heartbeat()


def serial_of(folder: Path) -> int:
    """Return the serial number of the server certificate in a folder."""
    return x509.load_pem_x509_certificate((folder / "server.pem").read_bytes()).serial_number


def shown_serial(coordinator: CoordinatorProcess, folder: Path) -> int:
    """Return the serial number of the certificate that a fresh connection is shown."""
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as stream,
    ):
        shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number
