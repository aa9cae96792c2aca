"""An accepted update is evidence: what no verifier would take later is refused, however well it is signed."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest

from qflare.crypto.envelope import open_envelope
from qflare.crypto.signing import SigningContext
from qflare.evidence.statements import open_update
from qflare_server.storage.tables import ModelUpdate
from tests.integration.conftest import Deployment
from tests.support.raw_device import Draft, RawDevice, info_of

STATEMENT = "header.statement.payload."
WEIGHTS = {"w": np.ones(4, np.float32)}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: nothing is written here."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture
def device(deployment: Deployment) -> RawDevice:
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


@pytest.fixture
def draft(deployment: Deployment, device: RawDevice) -> Draft:
    session_id = deployment.session(WEIGHTS, rounds={"quorum": 2, "target": 2})
    return device.draft(device.task(session_id), WEIGHTS)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("payload_digest", "", f"{STATEMENT}payload_digest"),
        ("payload_digest", "A" * 64, f"{STATEMENT}payload_digest"),
        ("wire_digest", "0" * 64, f"{STATEMENT}wire_digest"),
        ("sealed", True, "sealed"),
        ("sealed_header_digest", "0" * 64, f"{STATEMENT}sealed_header_digest"),
    ],
)
def test_a_signature_that_does_not_vouch_for_the_bytes_is_refused(
    device: RawDevice, draft: Draft, field: str, value: object, named: str
) -> None:
    setattr(draft.statement, field, value)
    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info_of(caught.value).metadata["field"] == named


def test_what_is_stored_of_an_accepted_update_verifies(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    device.submit(draft)
    with deployment.coordinator.parts.database.read() as session:
        row = session.query(ModelUpdate).one()
        payload, signature = row.statement, row.signature
    envelope = device.header(draft).statement
    key = device.identity.keys.signing.public
    assert payload == envelope.payload
    del envelope.signatures[:]
    assert signature is not None
    envelope.signatures.add().ParseFromString(signature)
    assert open_envelope(envelope, SigningContext.UPDATE, [key]) == payload
    assert open_update(envelope, key).payload_digest == row.payload_digest


def test_an_accepted_update_gets_its_receipt_after_the_device_has_changed_its_keys(
    device: RawDevice, draft: Draft
) -> None:
    messages = list(device.messages(draft))
    first = device.stub.SubmitUpdate(iter(messages), metadata=device.metadata)

    assert device.client.rotate_keys() == 1

    again = device.stub.SubmitUpdate(iter(messages), metadata=device.metadata)
    assert again == first
    messages[0].header.statement.payload += b"\x0a\x01x"
    with pytest.raises(grpc.RpcError):
        device.stub.SubmitUpdate(iter(messages), metadata=device.metadata)
