import hashlib
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qflare.crypto.sealed_payloads import PayloadKey, PayloadOpener, SealContext
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import open_update
from qflare.tensors import Array, DType, Manifest, TensorSpec, assemble, payload_digest
from qflare.tensors.encodings import Encoding, decode
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import TrainingFunctionError, UnsupportedTaskError
from qflare_client.models.download import GlobalModel
from qflare_client.models.sealed_update import SealedPayload
from qflare_client.models.submission import (
    Contribution,
    checked,
    make_payload,
    make_statement,
    sign_statement,
)
from qflare_client.models.upload import Payload
from qflare_client.tasks import Task, TaskKind, TrainingTask

DIGEST = hashlib.sha256(b"statement").hexdigest()


def base_arrays() -> dict[str, Array]:
    return {
        "w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
        "half": np.array([1.0, 2.0], ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
    }


def base_model() -> GlobalModel:
    arrays = base_arrays()
    return GlobalModel(
        training_session_id="s",
        version=2,
        digest=DIGEST,
        arrays=arrays,
        manifest=Manifest.from_arrays(arrays),
        metrics={},
        model_type="",
        architecture={},
        released=False,
        statement=security_pb2.ModelStatement(),
        envelope=security_pb2.SignedEnvelope(),
    )


def task(**transfer: Any) -> Task:
    return Task(
        kind=TaskKind.TRAIN,
        poll_delay_s=1.0,
        training_session_id="s",
        round_number=3,
        base_version=2,
        base_digest=DIGEST,
        deadline=None,
        config=TrainingTask("s", 3, 2, 1, 32, 0.1),
        transfer=training_pb2.TransferPolicy(**transfer),
        nonce=DIGEST,
    )


def contribution(arrays: Any = None, **changes: Any) -> Contribution:
    facts = {"example_count": 5, "metrics": {"loss": 0.5}, **changes}
    return Contribution(base_model(), base_arrays() if arrays is None else arrays, **facts)


def trained() -> dict[str, Array]:
    return {
        "w": base_arrays()["w"] + np.float32(0.5),
        "half": np.array([2.0, 2.0], ml_dtypes.bfloat16),
        "count": np.array(9, np.int64),
    }


def arrays_in(payload: Payload) -> dict[str, Array]:
    return assemble(payload.manifest, payload.chunks_from(0))


def assert_same(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_weights_travel_as_they_are() -> None:
    payload = make_payload(contribution(trained()), task().transfer)

    assert_same(arrays_in(payload), trained())


def test_a_delta_is_what_training_changed() -> None:
    transfer = task(update_kind=training_pb2.UPDATE_KIND_DELTA).transfer

    got = arrays_in(make_payload(contribution(trained()), transfer))

    wanted = {
        "w": np.full((2, 2), 0.5, np.float32),
        "half": np.array([1.0, 0.0], ml_dtypes.bfloat16),
        "count": np.array(9, np.int64),
    }
    assert_same(got, wanted)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_an_encoded_update_can_be_decoded(encoding: Encoding) -> None:
    transfer = task(update_encoding=int(encoding), top_k_fraction=1.0).transfer
    payload = make_payload(contribution(trained()), transfer)

    got = decode(arrays_in(payload), base_model().manifest, encoding)

    np.testing.assert_allclose(got["w"], trained()["w"], rtol=0.01)
    assert got["count"] == 9


def test_an_open_top_k_fraction_is_a_tenth() -> None:
    transfer = task(update_encoding=training_pb2.ENCODING_TOP_K).transfer

    payload = make_payload(contribution(trained()), transfer)

    assert arrays_in(payload)["w#value"].shape == (1,)


def test_a_sealed_update_says_so_in_its_statement() -> None:
    given, key = contribution(trained()), KemKey.generate()
    payload = make_payload(given, task(sealed=True).transfer)
    got = make_statement(task(sealed=True), given, payload, realm="r", device_id="d")

    sealed = SealedPayload(payload, got, key.public)

    segments = list(sealed.chunks_from(0))
    assert got.sealed
    assert got.wire_digest == payload_digest(segments) != got.payload_digest
    assert sealed.sealed is not None
    opener = PayloadOpener(
        PayloadKey.unwrap(
            sealed.sealed.header,
            sealed.sealed.wrapped_keys[0],
            SealContext.from_update(got),
            key.decapsulate,
        ),
        got.size_bytes,
    )
    assert b"".join(opener.open(segments)) == b"".join(payload.chunks_from(0))


def test_a_sealed_update_is_the_same_bytes_wherever_it_goes_on() -> None:
    arrays = {"w": np.zeros(700_000, np.float32)}
    payload = Payload(Manifest.from_arrays(arrays), arrays)
    sealed = SealedPayload(payload, statement(), KemKey.generate().public)

    segments = list(sealed.chunks_from(0))

    assert len(segments) == 3
    for first in range(4):
        assert list(sealed.chunks_from(first)) == segments[first:]


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(UnsupportedTaskError):
        make_payload(contribution(), task(update_encoding=77).transfer)


def test_float64_is_cast_to_the_type_of_the_model() -> None:
    arrays = {**trained(), "w": trained()["w"].astype(np.float64)}

    assert_same(arrays_in(make_payload(contribution(arrays), task().transfer)), trained())


def test_the_order_of_the_arrays_is_free() -> None:
    arrays = dict(reversed(list(trained().items())))

    payload = make_payload(contribution(arrays), task().transfer)

    assert payload.digest == make_payload(contribution(trained()), task().transfer).digest


@pytest.mark.parametrize(
    "change",
    [
        {"w": np.zeros((2, 3), np.float32)},
        {"w": np.zeros((2, 2), np.complex64)},
        {"count": np.array(7.5)},
        {"other": np.zeros(1)},
        {"w": np.full((2, 2), np.nan, np.float32)},
        {"w": np.full((2, 2), np.inf, np.float32)},
        {"w": np.full((2, 2), 1e300)},
        {"w": "text"},
    ],
)
def test_unusable_arrays_are_refused(change: dict[str, Any]) -> None:
    with (
        np.errstate(over="ignore"),
        pytest.raises(TrainingFunctionError),
    ):
        make_payload(contribution({**trained(), **change}), task().transfer)


def test_a_missing_array_is_refused() -> None:
    with pytest.raises(TrainingFunctionError):
        make_payload(contribution({"w": trained()["w"]}), task().transfer)


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.INT8])
def test_infinity_is_refused_in_any_encoding(encoding: Encoding) -> None:
    arrays = {**trained(), "w": np.full((2, 2), np.inf, np.float32)}

    with pytest.raises(TrainingFunctionError):
        make_payload(contribution(arrays), task(update_encoding=int(encoding)).transfer)


def statement(**changes: Any) -> security_pb2.UpdateStatement:
    given = contribution(**changes)
    payload = make_payload(given, task().transfer)
    return make_statement(task(), given, payload, realm="r", device_id="d")


def test_a_statement_binds_the_update_to_its_occasion() -> None:
    got = statement()

    assert (got.realm, got.device_id, got.training_session_id) == ("r", "d", "s")
    assert (got.round_number, got.task_nonce) == (3, DIGEST)
    assert (got.base_version, got.base_digest) == (2, DIGEST)
    assert (got.example_count, dict(got.metrics)) == (5, {"loss": 0.5})
    assert got.payload_digest == got.wire_digest
    assert got.kind == training_pb2.UPDATE_KIND_WEIGHTS
    assert got.encoding == training_pb2.ENCODING_NONE


def test_a_signed_statement_opens() -> None:
    key = SigningKey.generate()

    envelope = sign_statement(key, statement())

    assert open_update(envelope, key.public).device_id == "d"


def test_every_update_has_an_id_of_its_own() -> None:
    assert statement().update_id != statement().update_id


@pytest.mark.parametrize("example_count", [0, -1, 1.5, "7", None])
def test_an_unusable_example_count_is_refused(example_count: Any) -> None:
    with pytest.raises(TrainingFunctionError):
        statement(example_count=example_count)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None])
def test_an_unusable_metric_is_refused(value: Any) -> None:
    with pytest.raises(TrainingFunctionError):
        statement(metrics={"loss": value})


def test_numpy_numbers_are_numbers() -> None:
    got = statement(example_count=np.int64(3), metrics={"loss": np.float32(0.25)})

    assert (got.example_count, dict(got.metrics)) == (3, {"loss": 0.25})


def test_too_many_metrics_are_refused() -> None:
    metrics = {f"m{i}": 1.0 for i in range(100)}

    with pytest.raises(TrainingFunctionError):
        sign_statement(SigningKey.generate(), statement(metrics=metrics))


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_boolean_that_is_neither_0_nor_1_is_refused(encoding: Encoding) -> None:
    base = replace(base_model(), manifest=Manifest((TensorSpec("b", DType.BOOL, (1,)),)))
    given = Contribution(base, {"b": np.array([2], np.uint8).view(np.bool_)}, 1, {})

    with pytest.raises(TrainingFunctionError, match="tensor 'b', element 0: got 2, wanted 0 or 1"):
        make_payload(given, task(update_encoding=int(encoding)).transfer)


def test_an_update_kind_of_a_later_coordinator_is_not_supported() -> None:
    transfer = training_pb2.TransferPolicy()
    transfer.update_kind = 99  # type: ignore[assignment]

    with pytest.raises(UnsupportedTaskError, match="update kind: got number 99"):
        make_payload(contribution(trained()), transfer)


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"loss": "0.5"}, "metric 'loss': got '0.5', want a finite number"),
        ({"loss": 10**400}, "metric 'loss': got 1000"),
        ({1: 0.5}, "metric name: got 1, want a str"),
        ({"a\udc80": 0.5}, "want valid Unicode"),
        ({"a\nb": 0.5}, "1 to 100 printable characters"),
        ({"": 0.5}, "has no name"),
        ({"x" * 101: 0.5}, "has no name"),
        ({str(number): 0.5 for number in range(65)}, "more than 64"),
        ([0.5], "metrics: got list, want a mapping"),
    ],
)
def test_metrics_that_cannot_be_sent_are_named(metrics: Any, shown: str) -> None:
    with pytest.raises(TrainingFunctionError, match=shown):
        checked(contribution(metrics=metrics))


@pytest.mark.parametrize("count", [True, 0, -1, 2**40 + 1, 2**63, 1.0, "1", None, np.bool_(True)])
def test_example_counts_that_cannot_be_sent_are_refused(count: Any) -> None:
    with pytest.raises(TrainingFunctionError, match="want an integer, 1 to"):
        checked(contribution(example_count=count))


def test_numbers_of_numpy_are_numbers() -> None:
    given = checked(contribution(example_count=np.int64(7), metrics={"loss": np.float32(0.5)}))

    assert (given.example_count, given.metrics) == (7, {"loss": 0.5})
