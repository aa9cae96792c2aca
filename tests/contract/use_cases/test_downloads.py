"""Versions that devices get in a smaller form: written, signed, folded against, verified, on both databases."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qflare.tensors import Array, Manifest, chunks
from qflare.tensors.encodings import Encoding
from qflare.v1 import security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.errors import InvalidManifestError, InvalidRequestError, InvalidUpdateError
from qflare_server.payloads.writer import VersionWriter
from qflare_server.storage.repository import global_models, views
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import GlobalModel, Payload
from qflare_server.use_cases.versions.promotion import Promotion
from qflare_server.verification import recompute_version
from qflare_server.verification.downloads import DownloadVerification
from qflare_server.verification.findings import Tally
from tests.contract.aggregation.test_aggregation import LARGE, crashing, run_out
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, CrashError, Fuse, with_quorum

NUMBERS = {
    training_pb2.ENCODING_FLOAT16: np.dtype(np.float16),
    training_pb2.ENCODING_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
KINDS = [training_pb2.UPDATE_KIND_WEIGHTS, training_pb2.UPDATE_KIND_DELTA]
BFLOAT16 = training_pb2.ENCODING_BFLOAT16
FLOAT16 = training_pb2.ENCODING_FLOAT16


def values(size: int = 50, seed: int = 1) -> dict[str, Array]:
    """Return weights of which no 16-bit float is exact."""
    return {"w": np.random.default_rng(seed).normal(size=size).astype(np.float32)}


def transfer(encoding: Any = BFLOAT16, **settings: Any) -> training_pb2.TransferPolicy:
    return training_pb2.TransferPolicy(download_encoding=encoding, **settings)


def start(
    core: CoordinatorHarness, weights: dict[str, Array], encoding: Any = BFLOAT16, **config: Any
) -> str:
    kind = config.pop("kind", training_pb2.UPDATE_KIND_WEIGHTS)
    config = {"rounds": training_pb2.RoundPolicy(quorum=1), "total_rounds": 20, **config}
    return core.start(weights, transfer=transfer(encoding, update_kind=kind), **config)


def downloaded(
    core: CoordinatorHarness, training_session_id: str, version: int | None = None
) -> Array:
    """Return what a device has after its download, widened to float32."""
    model = core.versions(training_session_id)[-1 if version is None else version]
    assert model.download_encoding is not None
    delivery = core.deliveries.find(
        training_session_id, model.version, encoding=model.download_encoding
    )
    data = b"".join(data for _, data in core.deliveries.chunks(delivery, 0))
    number = training_pb2.Encoding.ValueType(model.download_encoding)
    return np.frombuffer(data, NUMBERS[number]).astype(np.float32)


def full(core: CoordinatorHarness, training_session_id: str, version: int | None = None) -> Array:
    return np.frombuffer(core.weights(training_session_id, version), np.float32)


def contribute(
    core: CoordinatorHarness,
    training_session_id: str,
    step: Any,
    device: str = "device-0",
    examples: int = 10,
) -> None:
    """Train from the version as it is downloaded: add a step, and send what the session asks for."""
    config = training_pb2.TrainingConfig()
    config.CopyFrom(core.tasks.next_task(device, training_session_id).config or config)
    delta = config.transfer.update_kind == training_pb2.UPDATE_KIND_DELTA
    base = downloaded(core, training_session_id) * np.float32(0 if delta else 1)
    draft = core.draft(device, training_session_id, {"w": base + step}, examples=examples)
    draft.statement.kind = config.transfer.update_kind
    draft.statement.base_encoding = config.transfer.download_encoding
    core.send(draft)


@pytest.mark.parametrize("encoding", NUMBERS)
@pytest.mark.parametrize("size", [50, LARGE])
def test_an_initial_model_is_rounded_and_its_statement_says_so(
    make_core: MakeCore, encoding: Any, size: int
) -> None:
    core = make_core(inline_payload_bytes=2**18, upload_batch_bytes=2**20)
    weights = values(size)

    training_session_id = start(core, weights, encoding)

    model = core.versions(training_session_id)[0]
    stated = security_pb2.ModelStatement.FromString(model.statement).download
    row = (model.download_encoding, model.download_size_bytes, model.download_payload_digest)
    assert row == (stated.encoding, stated.size_bytes, stated.payload_digest)
    assert (stated.encoding, stated.size_bytes) == (encoding, size * 2)
    wanted = weights["w"].astype(NUMBERS[encoding]).astype(np.float32)
    np.testing.assert_array_equal(downloaded(core, training_session_id), wanted)
    np.testing.assert_array_equal(full(core, training_session_id), weights["w"])


def test_a_session_without_the_setting_writes_one_payload(core: CoordinatorHarness) -> None:
    training_session_id = core.start(values())

    model = core.versions(training_session_id)[0]

    assert model.download_payload_id is None
    assert not security_pb2.ModelStatement.FromString(model.statement).HasField("download")


def test_both_payloads_are_counted(core: CoordinatorHarness) -> None:
    start(core, values(50))

    with core.database.read() as session:
        assert views.stored(session).payload_bytes == 50 * 4 + 50 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large_payloads", [False, True])
def test_what_devices_changed_is_added_to_the_version_in_full_precision(
    make_core: MakeCore, kind: Any, large_payloads: bool
) -> None:
    core = make_core(inline_payload_bytes=0 if large_payloads else 2**18)
    core.add_devices(2)
    weights = values(LARGE if large_payloads else 50)
    training_session_id = start(core, weights, kind=kind, rounds=training_pb2.RoundPolicy(quorum=2))
    steps = [np.float32(0.25), np.float32(1.0)]

    contribute(core, training_session_id, steps[0], "device-0", 30)
    contribute(core, training_session_id, steps[1], "device-1", 10)
    core.settle()

    base = weights["w"].astype(np.float64)
    sent = downloaded(core, training_session_id, 0)
    changes = [(sent + step).astype(np.float64) - sent for step in steps]
    if kind == training_pb2.UPDATE_KIND_DELTA:
        changes = [np.full(len(base), step) for step in steps]
    wanted = (base + (30 * changes[0] + 10 * changes[1]) / 40).astype(np.float32)
    np.testing.assert_allclose(full(core, training_session_id, 1), wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        downloaded(core, training_session_id, 1),
        full(core, training_session_id, 1).astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_changes_too_small_for_the_smaller_form_add_up(core: CoordinatorHarness) -> None:
    """A step of 2^-11 is lost next to 1.0 in bfloat16, whose neighbors are 2^-7 apart, but not for ever."""
    training_session_id = start(
        core, {"w": np.ones(4, np.float32)}, kind=training_pb2.UPDATE_KIND_DELTA
    )
    before = downloaded(core, training_session_id)

    for _ in range(16):
        contribute(core, training_session_id, np.full(4, 2.0**-11, np.float32))
        core.settle()

    assert (downloaded(core, training_session_id, 1) == before).all()
    assert (downloaded(core, training_session_id) == 1 + 2.0**-7).all()


def test_a_late_update_is_folded_against_what_its_device_had(core: CoordinatorHarness) -> None:
    rounds = training_pb2.RoundPolicy(quorum=1, max_staleness=2)
    strategy = training_pb2.StrategyConfig(name="fedbuff")
    training_session_id = start(core, values(), rounds=rounds, strategy=strategy)
    step = np.float32(0.5)
    had = downloaded(core, training_session_id, 0)
    draft = core.draft("device-3", training_session_id, {"w": had + step})
    draft.statement.base_encoding = BFLOAT16
    contribute(core, training_session_id, np.float32(1.0))
    core.settle()
    before = full(core, training_session_id).astype(np.float64)

    core.send(draft)
    core.settle()

    change = ((had + step).astype(np.float64) - had) / np.sqrt(2.0)
    np.testing.assert_allclose(
        full(core, training_session_id), before + change, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ["median", "krum", "fedadam"])
def test_other_strategies_see_what_devices_changed(core: CoordinatorHarness, name: str) -> None:
    rounds = training_pb2.RoundPolicy(quorum=4)
    chosen = training_pb2.StrategyConfig(name=name)
    sessions = [start(core, values(), kind=kind, rounds=rounds, strategy=chosen) for kind in KINDS]
    # Steps that are exact next to any of the values, so that both forms say the same.
    for training_session_id in sessions:
        for number, step in enumerate((0, 1, 3, 9)):
            sent = downloaded(core, training_session_id)
            exact = (sent + np.float32(step)) - sent
            contribute(core, training_session_id, exact, f"device-{number}")
    core.settle()

    weights, deltas = (full(core, training_session_id) for training_session_id in sessions)
    np.testing.assert_allclose(weights, deltas, rtol=1e-5, atol=1e-6)


def test_the_smaller_form_is_the_same_bytes_after_any_crash(core: CoordinatorHarness) -> None:
    def prepare() -> str:
        training_session_id = start(core, values(), total_rounds=2)
        contribute(core, training_session_id, np.float32(0.5))
        return training_session_id

    undisturbed = prepare()
    fuse = Fuse()
    run_out(crashing(core, fuse))
    wanted = core.versions(undisturbed)[1].download_payload_digest
    for step in range(1, fuse.count + 1):
        training_session_id = prepare()
        with pytest.raises(CrashError):
            run_out(crashing(core, Fuse(step)))
        run_out(Aggregator(core.context, core.executor, "one"))
        assert core.versions(training_session_id)[1].download_payload_digest == wanted, (
            f"step {step}"
        )
        core.training.cancel(SYSTEM, training_session_id, "")


@pytest.mark.parametrize("size", [50, LARGE])
def test_a_version_and_its_smaller_form_are_recomputed(make_core: MakeCore, size: int) -> None:
    core = make_core(inline_payload_bytes=2**18)
    core.add_devices(1)
    training_session_id = start(core, values(size))
    contribute(core, training_session_id, np.float32(0.5))
    core.settle()

    for version, recomputed in ((0, False), (1, True)):
        result = recompute_version(core.context, training_session_id, version)
        assert (result.recomputed, result.differences) == (recomputed, ())


def test_a_rollback_restores_both_payloads(core: CoordinatorHarness) -> None:
    training_session_id = start(core, values())
    contribute(core, training_session_id, np.float32(0.5))
    core.settle()
    payload_count = core.count(Payload)

    Promotion(core.context).roll_back(SYSTEM, training_session_id, 0, "")

    first, last = core.versions(training_session_id)[0], core.versions(training_session_id)[-1]
    assert last.download_payload_id == first.download_payload_id
    assert core.count(Payload) == payload_count
    assert recompute_version(core.context, training_session_id).differences == ()


def publish_wrongly(core: CoordinatorHarness) -> str:
    """Publish an initial model whose smaller form, signed as it is, is that of other weights."""
    config = training_pb2.TrainingConfig(transfer=transfer())
    created = core.training.create(
        SYSTEM, name="wrong", model_type="", architecture={}, config=with_quorum(config)
    )
    received = []
    for weights in (values(seed=1), values(seed=2)):
        manifest = Manifest.from_arrays(weights)
        writer = VersionWriter(
            core.context, core.executor, manifest, Encoding.BFLOAT16, core.clock()
        )
        received.append(writer.write(chunks(weights, manifest)))
    payload, download = received[0][0], received[1][1]
    core.training.add_initial_model(SYSTEM, created.id, manifest, payload, download)
    return created.id


def test_a_smaller_form_of_something_else_is_found(core: CoordinatorHarness) -> None:
    training_session_id = publish_wrongly(core)
    tally = Tally()

    found = list(DownloadVerification(core.context, tally, read_bytes=True).findings())
    result = recompute_version(core.context, training_session_id, 0)

    assert [finding.subject for finding in found] == [f"{training_session_id} version 0"]
    assert found[0].problem.startswith("download: got")
    assert result.differences[0].startswith("download: got")
    assert tally.checked["download"] == 1


def test_smaller_forms_that_are_not_read_are_counted(core: CoordinatorHarness) -> None:
    start(core, values())
    tally = Tally()

    assert list(DownloadVerification(core.context, tally, read_bytes=False).findings()) == []
    assert tally.unchecked["downloads whose versions were not read"] == 1


def test_a_version_without_the_smaller_form_is_not_published(core: CoordinatorHarness) -> None:
    config = training_pb2.TrainingConfig(transfer=transfer())
    created = core.training.create(
        SYSTEM, name="none", model_type="", architecture={}, config=with_quorum(config)
    )
    manifest = Manifest.from_arrays(values())
    writer = VersionWriter(
        core.context, core.executor, manifest, Encoding.FULL_PRECISION, core.clock()
    )
    payload, download = writer.write(chunks(values(), manifest))

    with pytest.raises(ValueError, match="got FULL_PRECISION, want BFLOAT16"):
        core.training.add_initial_model(SYSTEM, created.id, manifest, payload, download)
    assert core.count(GlobalModel) == 0


# Refusals


def test_an_initial_model_beyond_the_range_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(InvalidUpdateError, match="download as float16: tensor 'w', element 1"):
        core.create({"w": np.array([1.0, 1e5], np.float32)}, transfer=transfer(FLOAT16))

    assert core.count(GlobalModel) == core.count(Payload) == 0


def test_a_model_that_would_not_get_smaller_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(InvalidManifestError, match="no tensor over 16 bits"):
        core.create({"w": np.ones(3, np.float16)}, transfer=transfer(FLOAT16))


def test_a_round_that_leaves_the_range_makes_no_version(core: CoordinatorHarness) -> None:
    training_session_id = start(core, {"w": np.full(3, 6e4, np.float32)}, FLOAT16)

    contribute(core, training_session_id, np.float32(1e4))
    core.settle()

    assert [row.version for row in core.versions(training_session_id)] == [0]
    failed = core.round(training_session_id, 1)
    assert failed.state == "failed"
    assert "download as float16: tensor 'w', element 0" in failed.state_reason
    assert core.round(training_session_id).base_version == 0


@pytest.mark.parametrize("got", [0, training_pb2.ENCODING_NONE, FLOAT16])
def test_an_update_trained_from_another_form_is_refused(core: CoordinatorHarness, got: Any) -> None:
    training_session_id = start(core, values())
    draft = core.draft("device-0", training_session_id, values())
    draft.statement.base_encoding = got

    with pytest.raises(InvalidRequestError, match=r"base_encoding: got \w+, want ENCODING_BF"):
        core.send(draft)
    assert core.round(training_session_id).accepted_count == 0


@pytest.mark.parametrize("encoding", [FLOAT16, training_pb2.ENCODING_INT8, 99])
def test_a_download_in_another_encoding_is_refused(core: CoordinatorHarness, encoding: int) -> None:
    training_session_id = start(core, values())

    with pytest.raises(InvalidRequestError, match="want BFLOAT16 or FULL_PRECISION") as caught:
        core.deliveries.find(training_session_id, encoding=encoding)
    assert caught.value.metadata == {"field": "encoding"}


def test_a_download_of_a_session_without_the_setting_is_in_full_precision(
    core: CoordinatorHarness,
) -> None:
    training_session_id = core.start(values())

    assert core.deliveries.find(training_session_id).encoding is Encoding.FULL_PRECISION
    with pytest.raises(InvalidRequestError, match="want FULL_PRECISION"):
        core.deliveries.find(training_session_id, encoding=Encoding.FLOAT16)


def test_statements_that_no_message_holds_come_in_several_answers(
    core: CoordinatorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_session_id = core.start()
    for _ in range(3):
        core.submit("device-0", training_session_id)
        core.settle()
    whole = core.deliveries.lineage(training_session_id, 0, None)
    size = sum(map(len, whole[0]))
    monkeypatch.setattr(global_models, "MAX_STATEMENTS_BYTES", 2 * size + size // 2)

    pages = [core.deliveries.lineage(training_session_id, 0, None)]
    while sum(map(len, pages)) < len(whole):
        pages.append(core.deliveries.lineage(training_session_id, sum(map(len, pages)), None))

    assert len(pages) > 1
    assert [pair for page in pages for pair in page] == list(whole)
