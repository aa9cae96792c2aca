"""The recorded vectors of secure aggregation: the product accepts them, and so does the independent verifier."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Provider, PublicKey
from qflare.evidence.statements import StatementError, digest_of, open_update
from qflare.evidence.unmasking import (
    check_masked_update,
    masking_of,
    sign_answer,
    verify_transcript,
)
from qflare.masking.masks import Mask
from qflare.masking.seeds import open_seed
from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2, verification_pb2
from tests.independent import exchange, unmasking, verifier
from tests.independent.verifier import RefusedError
from tests.vectors.protocol import generate, masking

FOLDER = Path(generate.__file__).parent
MASKING = json.loads((FOLDER / "masking.json").read_text(encoding="utf-8"))
NOISE = json.loads((FOLDER / "noise.json").read_text(encoding="utf-8"))
UNMASKING = json.loads((FOLDER / "unmasking.json").read_text(encoding="utf-8"))
ASYNCHRONOUS = json.loads((FOLDER / "asynchronous_unmasking.json").read_text(encoding="utf-8"))
Transcript = verification_pb2.UnmaskingTranscript


def test_what_is_not_random_comes_out_the_same() -> None:
    assert json.loads(json.dumps(masking.masking())) == MASKING


@pytest.mark.parametrize("vector", MASKING["masks"])
def test_a_mask_by_the_page(vector: dict[str, Any]) -> None:
    wanted = bytes.fromhex(vector["bytes"])
    stream = unmasking.mask(bytes.fromhex(vector["seed"]), vector["offset"] + len(wanted))
    assert stream[vector["offset"] :] == wanted


@pytest.mark.parametrize("vector", [*MASKING["parameters"], ASYNCHRONOUS["parameters"]])
def test_parameters_and_slots_by_the_page(vector: dict[str, Any]) -> None:
    policy = training_pb2.SecureAggregationPolicy.FromString(bytes.fromhex(vector["policy"]))
    layout = unmasking.Layout(policy, vector["max_weight"])
    assert (layout.limit, layout.scale) == (vector["limit"], vector["scale"])
    assert layout.digit_bits == vector["digit_bits"]
    slots = layout.elements(bytes.fromhex(vector["slots"]))
    assert len(slots) == vector["slot_count"]
    weight, metrics = layout.totals(slots)
    assert weight == vector["weight"]
    assert metrics == pytest.approx(vector["metrics"], abs=1e-5)


def _layout() -> unmasking.Layout:
    task = pb.TaskStatement.FromString(_transcript().task.payload)
    return unmasking.Layout(task.masking.policy, task.masking.max_weight)


def _transcript(vectors: dict[str, Any] = UNMASKING) -> Transcript:
    return Transcript.FromString(bytes.fromhex(vectors["transcript"]))


def _update(vector: dict[str, Any]) -> tuple[pb.SignedEnvelope, pb.PublicKey]:
    envelope = pb.SignedEnvelope.FromString(bytes.fromhex(vector["statement"]))
    return envelope, pb.PublicKey.FromString(bytes.fromhex(vector["device_key"]))


@pytest.mark.parametrize("vector", MASKING["noise"])
def test_the_room_and_the_size_of_noise_by_the_page(vector: dict[str, Any]) -> None:
    task = pb.MaskingTask.FromString(bytes.fromhex(vector["masking_task"]))
    policy, multiplier = unmasking.policy_of(task)
    layout = unmasking.Layout(policy, task.max_weight, multiplier)
    assert layout.room == vector["room"]
    assert (layout.limit, layout.scale) == (vector["limit"], vector["scale"])
    for count, stddev in vector["stddev"].items():
        least = unmasking.noise_stddev(policy, multiplier, layout.scale, int(count))
        assert least <= stddev <= least * (1 + 1e-11)


@pytest.mark.parametrize("source", ["devices", "helper"])
def test_noise_is_in_the_sum_by_the_page(source: str) -> None:
    vectors = NOISE[source]
    transcript = Transcript.FromString(bytes.fromhex(vectors["transcript"]))
    made = pb.SignedEnvelope.FromString(bytes.fromhex(vectors["version"]))
    statement = pb.ModelStatement.FromString(made.payload)
    _check_both(transcript, statement, vectors)
    task = pb.TaskStatement.FromString(transcript.task.payload)
    policy, multiplier = unmasking.policy_of(task.masking)
    layout = unmasking.Layout(policy, task.masking.max_weight, multiplier)
    payloads = [layout.elements(bytes.fromhex(item["payload"])) for item in vectors["updates"]]
    columns = zip(*payloads, layout.elements(bytes.fromhex(vectors["mask_sum"])), strict=True)
    total = [(sum(column[:-1]) - column[-1]) % 2**layout.bits for column in columns]
    signs = 1 if source == "devices" else -1
    noise = [signs * sum(samples) for samples in zip(*vectors["noise"], strict=True)]
    for index, drawn in enumerate(noise):
        wanted = sum(
            item["change"][index]
            * layout.scale
            * min(1.0, 4.0 / sum(value**2 for value in item["change"]) ** 0.5)
            for item in vectors["updates"]
        )
        assert abs(layout.signed(total[index]) - drawn - wanted) < len(payloads)
    assert layout.totals(total[len(noise) :]) == (len(payloads), {})
    assert any(noise)


@pytest.mark.parametrize("source", ["devices", "helper"])
def test_statements_without_the_noise_of_the_task_do_not_verify(source: str) -> None:
    """The settings at their old place, as software that knows no noise reads them, are refused as well."""
    vectors = json.loads(json.dumps(NOISE[source]))
    transcript = Transcript.FromString(bytes.fromhex(vectors["transcript"]))
    task = pb.TaskStatement.FromString(transcript.task.payload)
    assert not task.masking.HasField("policy")
    for change in (
        lambda masking: masking.noisy.ClearField("noise_multiplier"),
        lambda masking: setattr(masking.noisy, "noise_multiplier", 1e7),
        lambda masking: masking.noisy.policy.ClearField("noise"),
        lambda masking: setattr(masking.noisy.policy, "noise", 7),
        lambda masking: masking.policy.CopyFrom(masking.noisy.policy),
        lambda masking: setattr(masking, "max_weight", 2),
        lambda masking: masking.ClearField("noisy"),
        lambda masking: setattr(masking.noisy.policy, "mode", 2 if source == "helper" else 9),
    ):
        changed = pb.TaskStatement.FromString(task.SerializeToString())
        change(changed.masking)
        with pytest.raises(StatementError):
            masking_of(pb.SignedEnvelope(payload=changed.SerializeToString()))
        with pytest.raises(RefusedError):
            unmasking.policy_of(changed.masking)
    envelope, key = _update(vectors["updates"][0])
    statement = open_update(envelope, PublicKey.from_proto(key))
    masking = masking_of(transcript.task)
    assert masking is not None
    check_masked_update(statement, masking)
    statement.masking.ClearField("noise_multiplier")
    with pytest.raises(StatementError, match="noise_multiplier"):
        check_masked_update(statement, masking)


@pytest.mark.parametrize("vector", UNMASKING["updates"])
def test_a_seed_opens_by_the_product_and_by_the_page(vector: dict[str, Any]) -> None:
    envelope, key = _update(vector)
    secret = bytes.fromhex(UNMASKING["helper_kem_seed"])
    statement = open_update(envelope, PublicKey.from_proto(key))
    ours = open_seed(statement.masking.seeds[0], KemKey(Provider.CRYPTOGRAPHY, secret), statement)
    theirs = unmasking.open_seed(verifier.open_update(envelope, key), 0, exchange.KemKey(secret))
    assert ours == theirs
    payload = bytes.fromhex(vector["payload"])
    assert verifier.payload_digest(payload) == statement.payload_digest
    layout = _layout()
    values = layout.unmasked(payload, [theirs])
    norm = sum(value**2 for value in vector["change"]) ** 0.5
    factor = layout.scale * min(1.0, 4.0 / norm) * vector["weight"] / layout.max_weight
    for value, change in zip(values, vector["change"], strict=False):
        assert abs(layout.signed(value) - change * factor) < 1
    weight, metrics = layout.totals(values[len(vector["change"]) :])
    assert weight == vector["weight"]
    assert metrics["loss"] == pytest.approx(vector["loss"], abs=1e-5)
    assert Mask(ours).read(0, 16) == unmasking.mask(theirs, 16)


def test_the_sum_of_the_updates_by_the_page() -> None:
    layout, count = _layout(), len(UNMASKING["updates"][0]["change"])
    vectors = [layout.elements(bytes.fromhex(item["payload"])) for item in UNMASKING["updates"]]
    masks = layout.elements(bytes.fromhex(UNMASKING["mask_sum"]))
    modulus = 2**layout.bits
    columns = zip(*vectors, masks, strict=True)
    total = [(sum(column[:-1]) - column[-1]) % modulus for column in columns]
    weight, metrics = layout.totals(total[count:])
    assert weight == 1200
    assert metrics["loss"] == pytest.approx((400 * 0.5 + 800 * 1.0) / 1200, abs=1e-5)
    answer = pb.UnmaskingAnswer.FromString(_transcript().answers[0].payload)
    digest = verifier.payload_digest(bytes.fromhex(UNMASKING["mask_sum"]))
    assert digest == answer.mask_digest


def _check_both(
    transcript: Transcript, made: pb.ModelStatement, vectors: dict[str, Any] = UNMASKING
) -> None:
    """Check a transcript with the product and by the page; both must agree."""
    envelopes = [_update(vector)[0] for vector in vectors["updates"]]
    payloads = {digest_of(envelope.payload): envelope.payload for envelope in envelopes}
    key = pb.PublicKey.FromString(bytes.fromhex(vectors["task_key"]))
    stated = [pb.UpdateStatement.FromString(payload) for payload in payloads.values()]
    try:
        verify_transcript(transcript, made, [PublicKey.from_proto(key)], stated, payloads)
    except StatementError:
        with pytest.raises(RefusedError):
            unmasking.check_transcript(transcript, made, {key.key_id: key}, payloads)
        raise
    unmasking.check_transcript(transcript, made, {key.key_id: key}, payloads)


def _made(vectors: dict[str, Any] = UNMASKING) -> pb.ModelStatement:
    envelope = pb.SignedEnvelope.FromString(bytes.fromhex(vectors["version"]))
    return pb.ModelStatement.FromString(envelope.payload)


def test_the_transcript_verifies_by_the_product_and_by_the_page() -> None:
    _check_both(_transcript(), _made())


def _other_task(transcript: Transcript, made: pb.ModelStatement) -> None:
    transcript.task.payload += b"\x98\x06\x01"
    made.unmasking.task_digest = digest_of(transcript.task.payload)


def _unsigned_answer(transcript: Transcript, made: pb.ModelStatement) -> None:
    transcript.answers[0].payload += b"\x98\x06\x01"
    made.unmasking.answer_digests[0] = digest_of(transcript.answers[0].payload)


CHANGES: list[Callable[[Transcript, pb.ModelStatement], object]] = [
    _other_task,
    _unsigned_answer,
    lambda transcript, _: transcript.ClearField("answers"),
    lambda transcript, _: transcript.task.ClearField("signatures"),
    lambda transcript, _: transcript.answers.append(transcript.answers[0]),
    lambda _, made: setattr(made, "round_number", 2),
    lambda _, made: setattr(made, "base_version", -1),
    lambda _, made: setattr(made, "config_digest", "0" * 64),
    lambda _, made: setattr(made, "realm", "another"),
    lambda _, made: setattr(made, "contributor_count", 1),
    lambda _, made: setattr(made, "contributors_digest", "0" * 64),
    lambda _, made: setattr(made.unmasking, "task_digest", "0" * 64),
    lambda _, made: made.unmasking.ClearField("answer_digests"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_transcript_is_refused_by_both(
    change: Callable[[Transcript, pb.ModelStatement], object],
) -> None:
    transcript, made = _transcript(), _made()
    change(transcript, made)
    with pytest.raises(StatementError):
        _check_both(transcript, made)


def test_a_weighted_sum_by_the_page() -> None:
    """The sum is that of the updates times their weights, plus a number below the largest weight; slots count once."""
    task = pb.TaskStatement.FromString(_transcript(ASYNCHRONOUS).task.payload)
    layout, table = unmasking.Layout(task.masking.policy, 1), task.masking.policy.staleness_weights
    count = len(ASYNCHRONOUS["updates"][0]["change"])
    key = exchange.KemKey(bytes.fromhex(ASYNCHRONOUS["helper_kem_seed"]))
    masks = layout.elements(bytes.fromhex(ASYNCHRONOUS["mask_sum"]))
    total, exact, slots = (
        [-mask for mask in masks[:count]],
        [0] * count,
        [-m for m in masks[count:]],
    )
    for vector, weight in zip(ASYNCHRONOUS["updates"], (table[1], table[0]), strict=True):
        update = verifier.open_update(*_update(vector))
        payload = bytes.fromhex(vector["payload"])
        masked = layout.elements(payload)
        plain = layout.unmasked(payload, [unmasking.open_seed(update, 0, key)])
        for place in range(count):
            total[place] += weight * masked[place]
            exact[place] += weight * layout.signed(plain[place])
        slots = [slot + value for slot, value in zip(slots, masked[count:], strict=True)]
    modulus = 2**layout.bits
    assert layout.totals([slot % modulus for slot in slots])[0] == 2
    for value, wanted in zip(total, exact, strict=True):
        assert 0 <= layout.signed(value % modulus) - wanted < table[0]


def _swap_weights(transcript: Transcript, made: pb.ModelStatement) -> None:
    answer = pb.UnmaskingAnswer.FromString(transcript.answers[0].payload)
    answer.weights_digest = "0" * 64
    transcript.answers[0].CopyFrom(sign_answer(generate.signing_key("helper"), answer))
    made.unmasking.answer_digests[0] = digest_of(transcript.answers[0].payload)


STALE_CHANGES: list[Callable[[Transcript, pb.ModelStatement], object]] = [
    lambda transcript, _: transcript.ClearField("earlier_tasks"),
    lambda transcript, _: transcript.earlier_tasks[0].CopyFrom(transcript.task),
    lambda transcript, _: transcript.earlier_tasks[0].ClearField("signatures"),
    lambda transcript, _: transcript.earlier_tasks.append(_transcript().task),
    _swap_weights,
]


@pytest.mark.parametrize("change", STALE_CHANGES)
def test_a_transcript_with_weights_verifies_and_a_changed_one_is_refused_by_both(
    change: Callable[[Transcript, pb.ModelStatement], object],
) -> None:
    transcript, made = _transcript(ASYNCHRONOUS), _made(ASYNCHRONOUS)
    _check_both(transcript, made, ASYNCHRONOUS)
    change(transcript, made)
    with pytest.raises(StatementError):
        _check_both(transcript, made, ASYNCHRONOUS)
