"""Training sessions whose payloads are sealed, with the SDK, on both databases."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from qflare.crypto.sealed_payloads import PayloadKey
from qflare.crypto.sealing import KemKey
from qflare.evidence.verification import verify_bundle
from qflare.tensors import CHUNK_BYTES
from qflare.tensors.safetensors_files import import_safetensors
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare_client import Client, TaskKind, UnavailableError
from qflare_server.errors import SealedPayloadLostError
from qflare_server.keys.rotation import replace_stolen
from qflare_server.payloads.keys import rewrap
from qflare_server.storage.repository import global_models
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, Payload
from qflare_server.use_cases.versions.download import Deliveries
from qflare_server.verification import recompute_version, verify_database
from tests.integration.conftest import Deployment
from tests.support.identity import everything_stored
from tests.support.raw_device import RawDevice
from tests.support.sealing import (
    LARGE,
    MARK,
    ROUND_COUNT,
    SMALL,
    key_folder,
    marked,
    next_task,
    rotate,
    seal,
    start,
    train_once,
)

Deploy = Callable[..., Deployment]


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy()


def stored_bytes(deployment: Deployment) -> bytes:
    """Return everything that the coordinator keeps: all rows, and the files of an SQLite database."""
    parts = deployment.coordinator.parts
    found = [everything_stored(parts.database)]
    if parts.database.is_sqlite:
        path = Path(make_url(parts.config.database_url).database or "")
        found += [item.read_bytes() for item in path.parent.glob(f"{path.stem}.*")]
    return b"".join(found)


def verify(deployment: Deployment, session_id: str, versions: range) -> None:
    """Recompute versions and verify the whole database; all has to be right."""
    context = deployment.coordinator.parts.context
    for version in versions:
        result = recompute_version(context, session_id, version)
        assert (result.recomputed, result.differences) == (True, ())
    report = verify_database(context, deployment.coordinator.parts.keys.root_key_ids)
    assert report.findings == ()


def follow(deployment: Deployment) -> None:
    """Let a coordinator look for the keyset in force at once, not after seconds."""
    deployment.coordinator.parts.keys._look()


@pytest.mark.parametrize("element_count", [SMALL, LARGE])
def test_payloads_are_stored_nowhere_as_they_are(
    deployment: Deployment, element_count: int
) -> None:
    client = deployment.device("one")
    session_id = start(deployment, element_count, strategy={"name": "fedavgm"})

    downloaded = [train_once(client, session_id) for _ in range(ROUND_COUNT)]

    assert next_task(client, session_id).kind is TaskKind.DONE
    np.testing.assert_array_equal(downloaded[0]["w"], marked(element_count)["w"])
    last = client.download(session_id)
    assert (last.version, last.statement.sealed) == (ROUND_COUNT, True)
    np.testing.assert_array_equal(last.arrays["w"][-4:], marked(element_count)["w"][-4:])
    assert last.arrays["w"][element_count // 2] > 0
    assert MARK not in stored_bytes(deployment)
    verify(deployment, session_id, range(1, ROUND_COUNT + 1))


def test_payloads_of_other_sessions_are_stored_as_they_are(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment, transfer={"sealed": False})

    train_once(client, session_id)

    assert MARK in stored_bytes(deployment)


@pytest.mark.parametrize("name", ["median", "krum"])
def test_strategies_that_see_all_updates_read_sealed_ones(
    deployment: Deployment, name: str
) -> None:
    devices = [deployment.device(str(number)) for number in range(5)]
    session_id = start(deployment, LARGE, len(devices), strategy={"name": name}, total_rounds=1)

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda client: train_once(client, session_id), devices))

    assert next_task(devices[0], session_id).kind is TaskKind.DONE
    verify(deployment, session_id, range(1, 2))


@pytest.mark.parametrize(
    "transfer",
    [
        {"update_encoding": "ENCODING_BFLOAT16"},
        {"update_encoding": "ENCODING_INT8", "update_kind": "UPDATE_KIND_DELTA"},
        {"update_encoding": "ENCODING_TOP_K", "update_kind": "UPDATE_KIND_DELTA"},
    ],
)
def test_encoded_updates_are_sealed_as_they_are(
    deployment: Deployment, transfer: dict[str, Any]
) -> None:
    client = deployment.device("one")
    session_id = start(deployment, LARGE, transfer=transfer, total_rounds=1)

    train_once(client, session_id)

    assert next_task(client, session_id).kind is TaskKind.DONE
    verify(deployment, session_id, range(1, 2))


def test_asynchronous_training_reads_older_sealed_versions(deployment: Deployment) -> None:
    one, two = deployment.device("one"), deployment.device("two")
    rounds: dict[str, Any] = {"quorum": 1, "target": 1, "max_staleness": 5}
    rounds["late_update_action"] = "LATE_UPDATE_ACTION_CARRY"
    session_id = start(deployment, LARGE, strategy={"name": "fedbuff"}, rounds=rounds)
    task = next_task(two, session_id)
    base = two.download_base(task)

    train_once(one, session_id)
    next_task(one, session_id)
    two.submit(task, base, base.arrays, 10)
    train_once(one, session_id)

    assert next_task(one, session_id).kind is TaskKind.DONE
    verify(deployment, session_id, range(1, ROUND_COUNT + 1))


def test_a_rollback_restores_a_sealed_version(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment)
    train_once(client, session_id)
    next_task(client, session_id)
    for version in (0, 2):  # the second restores what the first has restored
        request = admin_pb2.RollbackGlobalModelRequest(
            training_session_id=session_id, version=version
        )
        answer = deployment.admin.RollbackGlobalModel(request, metadata=deployment.metadata)
        if version == 0:
            train_once(client, session_id)
            next_task(client, session_id)

    restored = client.download(session_id, answer.global_model.version)

    assert restored.statement.sealed_version == 0
    np.testing.assert_array_equal(restored.arrays["w"], marked(SMALL)["w"])
    verify(deployment, session_id, range(1, restored.version + 1))


def test_a_device_that_has_changed_its_keys_opens_what_comes_next(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment)
    train_once(client, session_id)

    client.rotate_keys()
    train_once(client, session_id)

    assert next_task(client, session_id).base_version == 2


@pytest.mark.parametrize("element_count", [SMALL, LARGE])
def test_stored_payloads_outlive_the_keys_that_they_were_sealed_to(
    deployment: Deployment, element_count: int
) -> None:
    first, second = deployment.device("one"), deployment.device("two")
    session_id = start(deployment, element_count, 2, total_rounds=2)
    task = next_task(second, session_id)
    base = second.download_base(task)
    train_once(first, session_id)

    rotate(deployment, 3)
    second.submit(task, base, base.arrays, 10)

    assert next_task(first, session_id).base_version == 1
    train_once(first, session_id)
    train_once(second, session_id)
    assert next_task(first, session_id).kind is TaskKind.DONE
    verify(deployment, session_id, range(1, 3))


def test_the_key_of_an_update_is_wrapped_anew_when_the_coordinators_key_has_changed(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = deployment.device("one")
    session_id = start(deployment)
    task = next_task(client, session_id)
    base = client.download_base(task)
    retired = client._trust.session_key()
    rotate(deployment, 2)
    wrapped: list[tuple[bytes, str]] = []
    wrap = PayloadKey.wrap

    def watch(self: PayloadKey, recipient: Any) -> Any:
        wrapped.append((self.header, recipient.key_id))
        return wrap(self, recipient)

    monkeypatch.setattr(PayloadKey, "wrap", watch)
    receipt = client.submit(task, base, base.arrays, 10)

    assert receipt.acceptance_sequence == 1
    (first_header, first_key), (second_header, second_key) = wrapped
    assert first_header == second_header
    assert first_key == retired.key_id != second_key


def test_what_a_stolen_state_key_opened_is_wrapped_anew(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = start(deployment)
    client = deployment.device("one")
    train_once(client, session_id)
    next_task(client, session_id)
    parts = deployment.coordinator.parts
    replace_stolen(key_folder(deployment), parts.database, parts.context.clock())
    deployment.close()

    restarted = deploy()
    context = restarted.coordinator.parts.context
    before = stored_keys(restarted)
    moved = rewrap(context)

    assert moved == len(before) > 0
    assert not set(before) & set(stored_keys(restarted))
    assert rewrap(context) == 0
    assert context.earlier_state_keys
    assert recompute_version(context, session_id, 1).recomputed
    assert MARK in b"".join(item.chunk.data for item in download(restarted, session_id))


def stored_keys(deployment: Deployment) -> list[bytes]:
    """Return the keys of all sealed payloads as they are kept."""
    with deployment.coordinator.parts.database.read() as session:
        return [row.sealed_key for row in session.query(Payload) if row.sealed_key is not None]


def test_keys_go_with_the_bytes(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment, transfer={"payload_retention": "PAYLOAD_RETENTION_NONE"})
    train_once(client, session_id)
    train_once(client, session_id)
    next_task(client, session_id)

    with deployment.coordinator.parts.database.read() as session:
        pruned = session.query(Payload).filter_by(location="none").all()
        assert pruned
        assert all(row.sealed_key is None and row.sealed_header for row in pruned)
    parts = deployment.coordinator.parts
    assert verify_database(parts.context, parts.keys.root_key_ids).findings == ()


def flip(data: bytes) -> bytes:
    """Return bytes with their last bit changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("column", ["sealed_header", "sealed_key", "content_digests", "data"])
def test_a_sealed_payload_that_was_edited_is_found(deployment: Deployment, column: str) -> None:
    client = deployment.device("one")
    session_id = start(deployment, total_rounds=1)
    train_once(client, session_id)
    next_task(client, session_id)
    parts = deployment.coordinator.parts

    def edit(session: Session) -> str:
        model = global_models.get_model(session, session_id, 1)
        assert model is not None
        row = session.get(Payload, model.payload_id)
        assert row is not None
        setattr(row, column, flip(getattr(row, column)))
        return row.id

    payload_id = parts.database.write(edit)

    report = verify_database(parts.context, parts.keys.root_key_ids)

    assert payload_id in {item.subject for item in report.findings if item.kind == "payload"}


def test_a_seal_that_was_removed_is_found(deployment: Deployment) -> None:
    session_id = start(deployment, total_rounds=1)
    parts = deployment.coordinator.parts

    def edit(session: Session) -> None:
        for row in session.query(Payload):
            row.sealed_header = row.sealed_key = row.content_digests = None

    parts.database.write(edit)

    report = verify_database(parts.context, parts.keys.root_key_ids)

    assert f"{session_id} version 0" in {finding.subject for finding in report.findings}


def test_a_payload_whose_key_is_lost_is_a_typed_error(deployment: Deployment) -> None:
    session_id = start(deployment)
    context = replace(deployment.coordinator.parts.context, state_key=bytes(32))
    with ThreadPoolExecutor(1) as executor:
        deliveries = Deliveries(context, executor)
        delivery = deliveries.find(session_id)

        with pytest.raises(SealedPayloadLostError):
            list(deliveries.opened(SYSTEM, delivery, 0))


# Administrators.


def download(deployment: Deployment, session_id: str, first_chunk: int = 0) -> list[Any]:
    """Download the latest version as an administrator."""
    request = admin_pb2.DownloadGlobalModelRequest(
        training_session_id=session_id, first_chunk=first_chunk
    )
    return list(deployment.admin.DownloadGlobalModel(request, metadata=deployment.metadata))


@pytest.mark.parametrize("first_chunk", [0, 1, 2, 3])
def test_an_administrator_gets_a_version_opened(deployment: Deployment, first_chunk: int) -> None:
    session_id = start(deployment, LARGE)
    wanted = marked(LARGE)["w"].tobytes()[first_chunk * CHUNK_BYTES :]

    messages = download(deployment, session_id, first_chunk)

    assert b"".join(message.chunk.data for message in messages) == wanted
    assert not messages[0].header.HasField("sealed")
    indices = [message.chunk.index for message in messages if message.HasField("chunk")]
    assert indices == list(range(first_chunk, 3))


def test_opening_a_version_is_on_record(deployment: Deployment) -> None:
    session_id = start(deployment)

    download(deployment, session_id)

    with deployment.coordinator.parts.database.read() as session:
        (entry,) = session.query(AuditLog).filter_by(event_type="model.opened")
        assert entry.actor == "admin:tester"
        assert (entry.subject, entry.details["version"]) == (f"training_session:{session_id}", 0)


def test_a_command_exports_a_sealed_version(deployment: Deployment, tmp_path: Path) -> None:
    session_id = start(deployment, LARGE)
    target = tmp_path / "out.safetensors"
    config = deployment.config
    environment = {
        "QFLARE_DATA_DIR": str(config.data_dir),
        "QFLARE_DATABASE_URL": config.database_url,
        "PYTHONPATH": ":".join(sys.path),
    }

    subprocess.run(
        [sys.executable, "-m", "qflare_server", "model", "export", session_id, str(target)],
        env=environment,
        check=True,
        capture_output=True,
    )

    assert b"".join(import_safetensors(target).chunks()) == marked(LARGE)["w"].tobytes()


def test_a_bundle_of_a_sealed_version_verifies(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment)
    train_once(client, session_id)
    next_task(client, session_id)
    request = admin_pb2.ExportVerificationBundleRequest(training_session_id=session_id)
    answer = deployment.admin.ExportVerificationBundle(request, metadata=deployment.metadata)
    parts = deployment.coordinator.parts
    data = b"".join(part.bundle.SerializeToString() for part in answer)

    report = verify_bundle(
        type(admin_pb2.ExportVerificationBundleResponse().bundle).FromString(data),
        parts.keys.root_key_ids,
        parts.context.clock(),
    )

    assert report.version == 1


# Going on with what broke off.


@pytest.mark.parametrize("is_retired", [False, True])
def test_an_upload_goes_on_after_a_restart(deploy: Deploy, is_retired: bool) -> None:
    deployment = deploy(upload_batch_bytes=2**20)
    client = deployment.device("one")
    session_id = start(deployment, LARGE)
    device = RawDevice(client, deployment.devices_stub)
    draft = device.draft(device.task(session_id), marked(LARGE))
    seal(draft, client._trust.session_key())
    messages, metadata = list(device.messages(draft)), device.metadata
    request = pb.GetUploadRequest(update_id=draft.statement.update_id)

    def broken() -> Iterator[pb.SubmitUpdateRequest]:
        yield from messages[:2]
        for _ in range(500):  # the connection breaks when both are kept
            if device.stub.GetUpload(request, metadata=metadata).next_chunk == 2:
                break
            threading.Event().wait(0.02)
        raise ConnectionError

    with pytest.raises(grpc.RpcError):
        device.stub.SubmitUpdate(broken(), metadata=metadata, timeout=30)
    if is_retired:
        rotate(deployment, 2)
    home = client._store.home
    client.close()
    deployment.close()
    restarted = deploy()
    with Client(home=home, address=restarted.coordinator.address) as again:
        later = RawDevice(again, restarted.devices_stub)
        state = later.stub.GetUpload(request, metadata=later.metadata)
        assert state.next_chunk == 2
        rest = [pb.SubmitUpdateRequest(header=messages[0].header), *messages[state.next_chunk :]]
        receipt = later.stub.SubmitUpdate(iter(rest), metadata=later.metadata, timeout=30)
        assert receipt.acceptance_sequence == 1
        assert next_task(again, session_id).base_version == 1
    verify(restarted, session_id, range(1, 2))


def test_a_download_goes_on_after_it_broke_off(deployment: Deployment) -> None:
    client = deployment.device("one")
    session_id = start(deployment, LARGE)
    client.get_task(session_id)
    receive = client._calls.transport.receive
    left = [1]

    def breaking(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, message in enumerate(receive(*arguments, **options)):
            if number == 2 and left[0]:
                left[0] -= 1
                raise UnavailableError("lost", retry_after_s=0.0)
            yield message

    client._calls.transport.receive = breaking  # type: ignore[method-assign]

    model = client.download(session_id)

    assert left == [0]
    np.testing.assert_array_equal(model.arrays["w"], marked(LARGE)["w"])


def test_a_key_of_somebody_else_opens_nothing(deployment: Deployment) -> None:
    one, two = deployment.device("one"), deployment.device("two")
    session_id = start(deployment)
    raw = RawDevice(one, deployment.devices_stub)
    request = pb.GetGlobalModelRequest(training_session_id=session_id)
    (message,) = deployment.devices_stub.GetGlobalModel(request, metadata=raw.metadata)

    recipients = [key.recipient_key_id for key in message.header.sealed.wrapped_keys]

    assert recipients == [one._login.identity.keys.kem.public.key_id]
    assert recipients != [two._login.identity.keys.kem.public.key_id]
    assert KemKey.generate().public.key_id not in recipients
