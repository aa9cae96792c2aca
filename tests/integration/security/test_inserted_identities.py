"""Whoever inserts rows into the database of a coordinator becomes no device by it, over the network either."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import update

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import security_pb2, training_pb2
from qflare_client import errors as client_errors
from qflare_server.storage.tables import AuditLog, DeviceKey
from qflare_server.verification import verify_database
from tests.support.inserted_keys import exchange_key, receipt_of
from tests.support.raw_device import RawDevice, reason_of

Deploy = Callable[..., Any]


def execute(deployment: Any, *statements: Any) -> None:
    """Change rows of the coordinator's database behind its back."""

    def work(session: Any) -> None:
        for statement in statements:
            session.execute(statement)

    deployment.coordinator.parts.context.database.write(work)


def events(deployment: Any, event_type: str) -> list[AuditLog]:
    with deployment.coordinator.parts.context.database.read() as session:
        return list(session.query(AuditLog).filter_by(event_type=event_type))


def wrong_keys(deployment: Any) -> list[str]:
    """Return the device keys that the verification of the database says are wrong."""
    parts = deployment.coordinator.parts
    report = verify_database(parts.context, parts.keys.root_key_ids, read_bytes=False)
    return [found.subject for found in report.findings if found.kind == "device_key"]


def signed_by_stranger(device_id: str, key_id: str) -> bytes:
    """Return a receipt that a key of no keyset has signed."""
    statement = security_pb2.EnrollmentReceipt(
        realm="qflare", device_id=device_id, signature_key_id=key_id, kem_key_id="ab" * 32
    )
    envelope = sign_envelope(SigningKey.generate(), SigningContext.RECEIPT, statement)
    return envelope.SerializeToString()


@pytest.mark.parametrize("receipt", ["none", "by a stranger", "of another device"])
def test_an_inserted_device_does_not_log_in(deploy: Deploy, receipt: str) -> None:
    deployment = deploy()
    other = deployment.device("other")
    client = deployment.device("inserted")
    identity = client._login.identity
    key_id = identity.keys.signing.public.key_id
    statement = {
        "none": None,
        "by a stranger": signed_by_stranger(identity.device_id, key_id),
        "of another device": receipt_of(deployment, other._login.identity.device_id),
    }[receipt]
    execute(
        deployment,
        update(DeviceKey).where(DeviceKey.key_id == key_id).values(statement=statement),
    )

    with pytest.raises(client_errors.AuthenticationError):
        client.get_task()

    assert "unproven key" in events(deployment, "login.refused")[0].details["problem"]
    assert {event.subject for event in events(deployment, "device.logged_in")} == set()
    assert wrong_keys(deployment) == [key_id]
    other.get_task()


@pytest.mark.parametrize("receipt", ["none", "of the device"])
def test_an_update_by_an_inserted_key_is_refused(deploy: Deploy, receipt: str) -> None:
    deployment = deploy()
    device = RawDevice(deployment.device("honest"), deployment.devices_stub)
    session_id = deployment.session(rounds=training_pb2.RoundPolicy(quorum=1), total_rounds=1)
    task = device.task(session_id)
    statement = receipt_of(deployment, device.identity.device_id) if receipt != "none" else None
    key = exchange_key(deployment, device, statement)
    draft = device.draft(task, {"w": np.zeros(4, np.float32)})
    draft.statement.key_id = key.public.key_id
    draft.statement.wire_digest = draft.statement.payload_digest
    envelope = sign_envelope(key, SigningContext.UPDATE, draft.statement)
    draft.spoil_header = lambda header: header.statement.CopyFrom(envelope)

    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)

    assert reason_of(caught.value) == "INVALID_SIGNATURE"
    assert not events(deployment, "update.accepted")
    assert wrong_keys(deployment) == [key.public.key_id]
