"""A finished training session, checked by a verifier that shares no code with the product."""

import ast
import hashlib
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from qflare.v1 import admin_service_pb2, tensor_pb2, verification_pb2
from qflare.v1 import security_pb2 as pb
from qflare_client import Client, Receipt, Task, TaskKind
from tests.independent import bundle as bundle_verifier
from tests.independent import verifier
from tests.integration.conftest import Deployment

ROUNDS = 3
FOLDER = Path(verifier.__file__).parent


def next_task(client: Client, session_id: str) -> Task:
    """Poll as a device does, until there is something to do."""
    while (task := client.get_task(session_id)).kind is TaskKind.WAIT:
        threading.Event().wait(task.poll_delay_s)
    return task


def take_part(client: Client, session_id: str, step: float) -> list[Receipt]:
    """Add a step to the weights in every round; return the receipts."""
    receipts = []
    while (task := next_task(client, session_id)).kind is TaskKind.TRAIN:
        base = client.download_base(task)
        arrays = {name: array + array.dtype.type(step) for name, array in base.arrays.items()}
        receipts.append(client.submit(task, base, arrays, 10, {"loss": 1.0 / task.round_number}))
        if len(receipts) == ROUNDS:
            break
    return receipts


def train(deployment: Deployment) -> tuple[str, list[Client], list[list[Receipt]]]:
    """Run a training session of two devices to its end."""
    clients = [deployment.device("one"), deployment.device("two")]
    weights: dict[str, Any] = {
        "encoder/w": np.zeros((300, 1000), np.float32),  # two chunks
        "bias": np.zeros(3, np.float64),
    }
    session_id = deployment.session(weights, total_rounds=ROUNDS, rounds={"quorum": 2, "target": 2})
    receipts: list[list[Receipt]] = [[], []]

    def work(number: int) -> None:
        receipts[number] = take_part(clients[number], session_id, number + 1.0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert next_task(clients[0], session_id).kind is TaskKind.DONE
    return session_id, clients, receipts


@pytest.fixture
def trained(deploy: Callable[..., Deployment]) -> Deployment:
    """Return a running coordinator."""
    return deploy()


def test_a_finished_training_session_is_what_it_claims_to_be(trained: Deployment) -> None:
    session_id, clients, receipts = train(trained)
    pins = trained.coordinator.parts.keys.root_key_ids
    documents = [
        json.loads(client.evidence(session_id, own).to_json())
        for client, own in zip(clients, receipts, strict=True)
    ]
    document = {**documents[0], "updates": documents[0]["updates"] + documents[1]["updates"]}

    chain = verifier.check_evidence(document, pins, 1, datetime.now(UTC))

    assert [statement.version for statement, _ in chain] == [0, 1, 2, 3]
    for statement, _digest in chain[1:]:
        assert verifier.contributors_digest(_payloads(document, statement.version)) == (
            statement.contributors_digest
        )
    _check_model(clients[0], session_id, *chain[-1])
    bundle = _bundle(trained, session_id, chain[-1][0].version)
    assert len(bundle.updates) == 2
    assert list(bundle_verifier.check_bundle(bundle, pins, 1, datetime.now(UTC))) == chain

    bundle.updates[0].statement.CopyFrom(bundle.updates[1].statement)
    with pytest.raises(verifier.RefusedError):
        bundle_verifier.check_bundle(bundle, pins, 1, datetime.now(UTC))


def _bundle(
    deployment: Deployment, session_id: str, version: int
) -> verification_pb2.VerificationBundle:
    """Fetch the verification bundle of a version."""
    request = admin_service_pb2.ExportVerificationBundleRequest(
        training_session_id=session_id, version=version
    )
    parts = deployment.admin.ExportVerificationBundle(request, metadata=deployment.metadata)
    serialized = b"".join(part.bundle.SerializeToString() for part in parts)
    return verification_pb2.VerificationBundle.FromString(serialized)


def _payloads(document: dict[str, Any], version: int) -> list[bytes]:
    """Return the signed bytes of the updates in a version."""
    return [
        json_format.ParseDict(item["statement"], pb.SignedEnvelope()).payload
        for item in document["updates"]
        if item["version"] == version
    ]


def _check_model(
    client: Client, session_id: str, statement: pb.ModelStatement, digest: str
) -> None:
    """Check that the downloaded arrays are, byte by byte, what the statement vouches for."""
    model = client.download(session_id)
    payload = b"".join(
        array.astype(array.dtype.newbyteorder("<")).tobytes() for array in model.arrays.values()
    )
    manifest = tensor_pb2.Manifest(
        tensors=[
            tensor_pb2.TensorSpec(
                name="encoder/w", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[300, 1000]
            ),
            tensor_pb2.TensorSpec(name="bias", dtype=tensor_pb2.DTYPE_FLOAT64, shape=[3]),
        ]
    )
    assert len(payload) == statement.size_bytes
    assert verifier.payload_digest(payload) == statement.payload_digest
    assert verifier.layout_digest(manifest) == statement.layout_digest
    assert hashlib.sha256(model.envelope.payload).hexdigest() == digest
    assert np.allclose(model.arrays["bias"], 1.5 * ROUNDS)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_the_verifier_shares_generated_messages_only(name: str) -> None:
    allowed = {"qflare.v1"} | {f"tests.independent.{path.stem}" for path in FOLDER.glob("*.py")}
    tree = ast.parse((FOLDER / name).read_text())
    imported = {
        node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    } | {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    ours = {module for module in imported if module.split(".")[0].startswith(("qflare", "tests"))}
    assert ours <= allowed
