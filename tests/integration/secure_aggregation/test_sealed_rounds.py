"""Secure aggregation in sealed training sessions: no payload is stored as it is, and everything verifies."""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import Client
from qflare_client.errors import UnavailableError
from qflare_client.models.upload import Receipt, Upload
from qflare_client.tasks import TaskKind
from qflare_server.context import utc_now
from qflare_server.storage.tables import Payload
from qflare_server.verification import recompute_version, verify_database
from tests.independent.bundle import check_bundle
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    SecureStart,
    contribute,
    trained,
    wait_for_round,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_neighbors import (
    mean_of,
    session_of,
    together,
    train,
    until,
)
from tests.support.sealing import rotate

SEALED: Final = training_pb2.TransferPolicy(
    sealed=True, payload_retention=training_pb2.PAYLOAD_RETENTION_ALL
)
LARGE: Final = {"w": np.linspace(-1, 1, 400_000, dtype=np.float32)}
MODELS: Final = {"in rows": WEIGHTS, "in the payload store": LARGE}


def check_everything(deployment: Deployment, session_id: str, version: int) -> None:
    """Recompute a version, verify its bundle twice and the whole database, and find every payload sealed."""
    parts = deployment.coordinator.parts
    found = recompute_version(parts.context, session_id, version)
    assert (found.recomputed, found.differences) == (True, ())
    bundle = verification_pb2.VerificationBundle()
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    pinned = parts.keys.trust.root_key_ids()
    verify_bundle(bundle, pinned, utc_now())
    check_bundle(bundle, pinned, 1, utc_now())
    assert verify_database(parts.context, parts.keys.root_key_ids).findings == ()
    with parts.database.read() as session:
        rows = session.query(Payload).all()
        assert rows
        assert all(row.sealed_header is not None for row in rows)


@pytest.mark.parametrize("model", MODELS)
def test_rounds_with_helpers(secure: SecureStart, model: str) -> None:
    arrays = MODELS[model]
    made = secure(helper_count=2)
    session_id = made.session(
        quorum=2, round_count=2, arrays=arrays, transfer=SEALED, policy={"clip": 1000.0}
    )
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for version in (1, 2):
        wait_for_round(clients[0], session_id, version)
        base = clients[0].download(session_id, version - 1)
        changes = [contribute(client, session_id, index)[0] for index, client in enumerate(clients)]
        got = wait_for_version(clients[0], session_id, version)
        mean = (100 * changes[0]["w"] + 200 * changes[1]["w"]) / 300
        assert np.abs(got.arrays["w"].astype(float) - base.arrays["w"] - mean).max() < 1e-4
        assert got.statement.sealed
    check_everything(made.deployment, session_id, 2)
    for helper in made.helpers:
        assert "2 answers with 4 updates" in helper.run("audit", "verify")


def leave_unsent(home: Any, session_id: str, patch: pytest.MonkeyPatch) -> str:
    """Train in a program whose connection breaks with the upload; return the id of the kept update."""

    def broken(*_: object) -> Receipt:
        raise UnavailableError("broken")

    with patch.context() as broken_upload, Client(home=home) as client:
        task = client.get_task(session_id)
        base = client.download_base(task)
        broken_upload.setattr(Upload, "run", broken)
        with pytest.raises(UnavailableError):
            client.submit(task, base, trained(base.arrays, 0), 100, {"loss": 0.0})
        kept = client._sender._outbox
        assert kept is not None
        found = kept.find(session_id)
        assert found is not None
        return found.statement.update_id


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("rotates_device", [False, True], ids=["", "device keys rotated too"])
@pytest.mark.parametrize("model", MODELS)
def test_a_kept_update_outlives_rotated_keys(
    secure: SecureStart, model: str, monkeypatch: pytest.MonkeyPatch, *, rotates_device: bool
) -> None:
    """The seed of its mask is sealed to its id: only the payload's key is wrapped anew."""
    made = secure()
    session_id = made.session(quorum=2, arrays=MODELS[model], transfer=SEALED)
    made.deployment.device("device-0").close()
    home = made.deployment.folder / "device-0"
    update_id = leave_unsent(home, session_id, monkeypatch)
    contribute(made.deployment.device("device-1"), session_id, 1)
    rotate(made.deployment, 3)
    with Client(home=home) as client:
        if rotates_device:
            client.rotate_keys()
        (outcome,) = client.send_kept()
        assert isinstance(outcome, Receipt)
        sent = security_pb2.UpdateStatement.FromString(outcome.statement.payload)
        assert sent.update_id == update_id
        got = wait_for_version(client, session_id, 1)
    assert got.statement.contributor_count == 2
    check_everything(made.deployment, session_id, 1)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_round_with_neighbors(deploy: Callable[..., Deployment]) -> None:
    made = deploy(worker_poll_s=0.02)
    session_id = session_of(made, 3, 3, transfer=SEALED)
    clients = [made.device(f"device-{index}") for index in range(3)]
    changes: dict[int, Any] = {}
    trained_all = threading.Barrier(3)

    def work(index: int) -> None:
        train(clients[index], session_id, index, changes)
        trained_all.wait(60)
        until(clients[index], session_id, lambda task: task.kind is TaskKind.DONE)

    together(work, 3)
    got = wait_for_version(clients[0], session_id, 1)
    change = got.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(change - mean_of(changes, "w")).max() < 1e-5
    check_everything(made, session_id, 1)
