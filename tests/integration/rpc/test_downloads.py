"""Devices that get versions as float16 or bfloat16, through real gRPC, on both databases."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sqlalchemy import update

from qflare.tensors import Array
from qflare.tensors.encodings import Encoding
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    InvalidEvidenceError,
    InvalidRequestError,
    TaskKind,
    TrainingTask,
    run,
)
from qflare_client.trust.evidence import verify
from qflare_server.storage.tables import GlobalModel
from qflare_server.verification import recompute_version, verify_database
from tests.integration.conftest import Deployment

Deploy = Callable[..., Deployment]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1)
FORMS = {
    training_pb2.ENCODING_FLOAT16: np.dtype(np.float16),
    training_pb2.ENCODING_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
MODELS = GlobalModel.__table__


def weights(size: int = 700_000) -> dict[str, Array]:
    """Return a model of some chunks in full precision and of fewer in 16 bits."""
    generator = np.random.default_rng(5)
    return {
        "w": generator.normal(size=size).astype(np.float32),
        "steps": np.array(3, np.int64),
    }


def session(deployment: Deployment, encoding: Any, **config: Any) -> str:
    transfer = training_pb2.TransferPolicy(
        download_encoding=encoding,
        update_kind=training_pb2.UPDATE_KIND_DELTA,
        payload_retention=training_pb2.PAYLOAD_RETENTION_ALL,
    )
    config = {"rounds": ONE_DEVICE, "total_rounds": 2, "transfer": transfer, **config}
    return deployment.session(weights(), **config)


def rounded(array: Array, encoding: Any) -> Array:
    return array.astype(FORMS[encoding]).astype(np.float32)


@pytest.mark.parametrize("encoding", FORMS)
def test_a_session_runs_on_the_smaller_form(deploy: Deploy, encoding: Any) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, encoding)
    seen: list[Array] = []

    def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
        seen.append(arrays["w"].copy())
        return {**arrays, "w": arrays["w"] + np.float32(0.5)}, 1, {}

    assert run(client, train, training_session_id=session_id).update_count == 2

    versions = [client.download(session_id, number).arrays["w"] for number in range(3)]
    np.testing.assert_array_equal(versions[0], weights()["w"])
    for had, version in zip(seen, versions, strict=False):
        np.testing.assert_array_equal(had, rounded(version, encoding))
    np.testing.assert_allclose(versions[2], versions[0] + 1.0, atol=0.01)


def test_auditors_find_nothing_and_recompute_every_version(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)
    run(deployment.device("a"), lambda a, _: (a, 1, {}), training_session_id=session_id)
    parts = deployment.coordinator.parts
    parts.use_cases.audit.head(fresh=True)

    report = verify_database(parts.context, parts.keys.root_key_ids)

    assert report.findings == ()
    assert report.checked["download"] == 3
    for version in range(3):
        assert recompute_version(parts.context, session_id, version).differences == ()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("download_encoding", int(training_pb2.ENCODING_BFLOAT16)),
        ("download_payload_digest", "ab" * 32),
        ("download_size_bytes", 1),
        ("download_payload_id", None),
    ],
)
def test_an_edited_column_is_found(deploy: Deploy, column: str, value: Any) -> None:
    deployment = deploy()
    session(deployment, training_pb2.ENCODING_FLOAT16)
    parts = deployment.coordinator.parts
    parts.use_cases.audit.head(fresh=True)
    changed = update(MODELS).values(**{column: value})
    with parts.database.engine.begin() as connection:
        connection.execute(changed)

    report = verify_database(parts.context, parts.keys.root_key_ids)

    assert "model" in {finding.kind for finding in report.findings}


def test_administrators_get_full_precision(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = session(deployment, training_pb2.ENCODING_BFLOAT16)

    request = admin_pb2.DownloadGlobalModelRequest(training_session_id=session_id)
    answers = list(deployment.admin.DownloadGlobalModel(request, metadata=deployment.metadata))

    data = b"".join(answer.chunk.data for answer in answers)
    np.testing.assert_array_equal(np.frombuffer(data[: 4 * 700_000], "<f4"), weights()["w"])
    shown = answers[0].header.global_model
    assert shown.download.encoding == training_pb2.ENCODING_BFLOAT16
    assert shown.download.size_bytes == 2 * 700_000 + 8


def test_devices_measure_the_form_that_they_train_from(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(
        deployment,
        training_pb2.ENCODING_BFLOAT16,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
    )
    measured: list[Array] = []

    def evaluate(arrays: dict[str, Array], _: TrainingTask) -> Any:
        measured.append(arrays["w"].copy())
        return 1, {"loss": 0.5}

    def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
        return {**arrays, "w": arrays["w"] + np.float32(0.1)}, 1, {}

    run(client, train, evaluate=evaluate, training_session_id=session_id)

    version = client.download(session_id, 1).arrays["w"]
    np.testing.assert_array_equal(measured[0], rounded(version, training_pb2.ENCODING_BFLOAT16))


def wait_for_task(client: Client, session_id: str) -> Any:
    while (task := client.get_task(session_id)).kind is not TaskKind.TRAIN:
        threading.Event().wait(0.02)
    return task


def test_a_device_that_trains_from_full_precision_is_refused(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)
    task = wait_for_task(client, session_id)
    base = client.download(session_id, task.base_version)

    with pytest.raises(InvalidRequestError, match="base_encoding: got ENCODING_NONE"):
        client.submit(task, base, base.arrays, 1)


def test_an_encoding_that_the_session_does_not_have_is_refused(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)

    with pytest.raises(InvalidRequestError, match="encoding: got number 3, want FLOAT16"):
        client.download(session_id, encoding=Encoding.BFLOAT16)


def test_the_smaller_form_is_half_the_bytes_on_the_wire(deploy: Deploy) -> None:
    deployment = deploy()
    told: list[tuple[str, int, int]] = []
    deployment.device("a").close()
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)
    with Client(home=deployment.folder / "a", progress=lambda *step: told.append(step)) as client:
        client.download_base(wait_for_task(client, session_id))

    assert told[-1] == ("download", 2 * 700_000 + 8, 2 * 700_000 + 8)


def test_a_saved_smaller_form_is_evidence_of_its_version(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)
    base = client.download_base(wait_for_task(client, session_id))
    file = deployment.folder / "model.safetensors"
    roots = list(deployment.coordinator.parts.keys.root_key_ids)

    def shown() -> str:
        evidence = client.evidence(session_id)
        return verify(
            evidence,
            root_key_ids=roots,
            threshold=len(roots),
            reference_time=datetime.now(UTC),
            model=file,
        )[-1]

    base.save(file)
    assert shown().endswith("version 0 as devices get it, in float16")
    client.download(session_id).save(file)
    assert shown().endswith("version 0, byte by byte")
    wrong = dict(base.arrays, w=base.arrays["w"] + np.float32(1))
    replace(base, arrays=wrong).save(file)
    with pytest.raises(InvalidEvidenceError, match="payload_digest"):
        shown()


def test_an_unknown_number_of_an_encoding_is_refused_on_the_wire(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = session(deployment, training_pb2.ENCODING_FLOAT16)
    request = messages.GetGlobalModelRequest(training_session_id=session_id, encoding=77)  # type: ignore[arg-type]

    with pytest.raises(InvalidRequestError, match="got number 77"):
        list(client._calls.receive(client._stub.GetGlobalModel, lambda: request))
