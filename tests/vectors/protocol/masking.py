"""Vectors of secure aggregation: parameters, masks, slots, masked updates with sealed seeds, transcripts, noise."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from qflare.crypto import merkle
from qflare.evidence.lineage import contributors_digest, sign_model
from qflare.evidence.statements import digest_of, sign_task, sign_update
from qflare.evidence.unmasking import sign_answer, sign_helper
from qflare.masking.masks import SLICE_BYTES, Mask
from qflare.masking.noise import draw_exact
from qflare.masking.parameters import MaskingParameters
from qflare.masking.quantization import Quantizer, quantize_slots
from qflare.masking.seeds import seal_seed
from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2, verification_pb2
from tests.vectors.protocol.documents import NONCE, SESSION_ID, device_key, moment, update_statement
from tests.vectors.protocol.generate import REALM, kem_key, seed, signing_key

BASE_DIGEST: Final = seed("base").hex()
DEVICES: Final = (1, 2)
MULTIPLIER: Final = 1.5
SOURCES: Final = {"devices": "NOISE_SOURCE_DEVICES", "helper": "NOISE_SOURCE_HELPER"}
POLICIES: Final[tuple[tuple[int, float, int, int, dict[str, float]], ...]] = (
    (16, 1.0, 10, 3, {"loss": 2.0}),
    (32, 0.1, 1000, 5000, {"loss": 20.0, "accuracy": 1.0}),
    (64, 100.0, 1_000_000, 2**40, {}),
)
NOISE_POLICIES: Final = (
    ("NOISE_SOURCE_DEVICES", 16, 1.0, 10, 1.1),
    ("NOISE_SOURCE_DEVICES", 32, 0.1, 1000, 0.7),
    ("NOISE_SOURCE_HELPER", 64, 100.0, 1_000_000, 3.0),
)
ELEMENTS: Final = (1, 1000, 10**9)


def policy_of(
    bits: int,
    clip: float,
    max_cohort: int,
    metrics: dict[str, float],
    staleness: tuple[int, ...] = (),
) -> training_pb2.SecureAggregationPolicy:
    """A policy with one helper."""
    return training_pb2.SecureAggregationPolicy(
        mode=training_pb2.SECURE_AGGREGATION_MODE_HELPER,
        bits=bits,
        clip=clip,
        max_cohort=max_cohort,
        min_cohort=2,
        helpers=[signing_key("helper").public.key_id],
        metrics=[training_pb2.MaskedMetric(name=name, bound=b) for name, b in metrics.items()],
        staleness_weights=staleness,
    )


def masking() -> dict[str, Any]:
    """Section 17: everything that is not random."""
    return {
        "parameters": [parameters_of(*values) for values in POLICIES],
        "noise": [_noise(*values) for values in NOISE_POLICIES],
        "masks": [_mask(offset, length) for offset, length in ((0, 64), (SLICE_BYTES - 7, 33))],
    }


def parameters_of(
    bits: int,
    clip: float,
    max_cohort: int,
    max_weight: int,
    metrics: dict[str, float],
    staleness: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Parameters of masks, with the slots of an update."""
    made = MaskingParameters(
        bits, clip, max_cohort, max_weight, metrics, staleness_weights=staleness
    )
    weight, values = max_weight - max_weight // 3, dict.fromkeys(metrics, 0.25)
    return {
        "policy": policy_of(bits, clip, max_cohort, metrics, staleness).SerializeToString().hex(),
        "max_weight": max_weight,
        "limit": made.limit,
        "scale": made.scale,
        "digit_bits": made.digit_bits,
        "slot_count": made.slot_count,
        "weight": weight,
        "metrics": values,
        "slots": quantize_slots(made, weight, values).tobytes().hex(),
    }


def noisy(policy: training_pb2.SecureAggregationPolicy, multiplier: float) -> pb.MaskingTask:
    """A task with noise of devices or helpers, and no helpers' documents."""
    return pb.MaskingTask(
        max_weight=1, noisy=pb.NoisyMasking(policy=policy, noise_multiplier=multiplier)
    )


def _noise(
    source: str, bits: int, clip: float, max_cohort: int, multiplier: float
) -> dict[str, Any]:
    policy = policy_of(bits, clip, max_cohort, {})
    policy.noise = training_pb2.NoiseSource.Value(source)
    task = noisy(policy, multiplier)
    made = MaskingParameters.of_task(task)
    assert made.noise is not None
    return {
        "masking_task": task.SerializeToString().hex(),
        "room": made.noise.room(max_cohort),
        "limit": made.limit,
        "scale": made.scale,
        "stddev": {str(count): made.noise_stddev(count) for count in ELEMENTS},
    }


def _mask(offset: int, length: int) -> dict[str, Any]:
    secret = seed("mask")
    return {
        "seed": secret.hex(),
        "offset": offset,
        "bytes": Mask(secret).read(offset, length).hex(),
    }


def task(source: str = "") -> pb.SignedEnvelope:
    """A signed task with masking in 32 bits, and noise of devices or helpers."""
    document = pb.HelperDocument(
        realm=REALM,
        sequence_number=1,
        signature_key=signing_key("helper").public.to_proto(),
        kem_key=kem_key("helper").public.to_proto(),
        create_time=moment(),
    )
    masking_task = pb.MaskingTask(policy=policy_of(32, 4.0, 10, {"loss": 20.0}), max_weight=1000)
    if source:
        policy = policy_of(32, 4.0, 10, {})
        policy.noise = training_pb2.NoiseSource.Value(source)
        masking_task = noisy(policy, MULTIPLIER)
    masking_task.helpers.append(sign_helper(signing_key("helper"), document))
    transfer = training_pb2.TransferPolicy(
        update_encoding=training_pb2.ENCODING_MASKED, update_kind=training_pb2.UPDATE_KIND_DELTA
    )
    statement = pb.TaskStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=1,
        base_version=0,
        base_digest=BASE_DIGEST,
        task_nonce=NONCE,
        deadline_time=moment(600),
        config_digest=seed("config").hex(),
        transfer=transfer,
        masking=masking_task,
    )
    return sign_task(signing_key("task"), statement)


def change_of(number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The change of a device: the second one is larger than the clip."""
    return np.linspace(-1.0, 2.0, 6) * (1.0 if number == 1 else 10.0)


def _update(
    number: int, task_digest: str, masking: pb.MaskingTask, noise: Sequence[int]
) -> tuple[pb.SignedEnvelope, bytes]:
    made = MaskingParameters.of_task(masking)
    weight = min(400 * number, made.max_weight)
    change, secret = change_of(number), seed(f"masking {number}")
    quantized = Quantizer(made, weight, float(np.linalg.norm(change))).quantize(change)
    quantized += np.array(noise, np.int64).astype(made.dtype)
    slots = quantize_slots(made, weight, {"loss": 0.5 * number})
    vector = np.concatenate([quantized, slots])
    Mask(secret).add_to(vector, 0)
    payload = vector.tobytes()
    statement = update_statement(number, 1, BASE_DIGEST)
    statement.ClearField("metrics")
    statement.example_count, statement.size_bytes = 1, len(payload)
    statement.kind = training_pb2.UPDATE_KIND_DELTA
    statement.encoding = training_pb2.ENCODING_MASKED
    statement.payload_digest = statement.wire_digest = merkle.leaf_hash(payload).hex()
    statement.masking.task_digest = task_digest
    statement.masking.noise_multiplier = masking.noisy.noise_multiplier
    helper_id = signing_key("helper").public.key_id
    sealed = seal_seed(secret, helper_id, kem_key("helper").public, statement)
    statement.masking.seeds.append(sealed)
    return sign_update(device_key(number), statement), payload


def _answer(
    task_digest: str, members: str, mask: bytes, noise_multiplier: float
) -> pb.SignedEnvelope:
    answer = pb.UnmaskingAnswer(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=1,
        helper_id=signing_key("helper").public.key_id,
        task_digest=task_digest,
        members_digest=members,
        member_count=len(DEVICES),
        bits=32,
        size_bytes=len(mask),
        mask_digest=merkle.leaf_hash(mask).hex(),
        counter=1,
        counted_member_count=len(DEVICES),
        noise_multiplier=noise_multiplier,
        create_time=moment(),
    )
    return sign_answer(signing_key("helper"), answer)


def noise() -> dict[str, Any]:
    """Section 17: as `unmasking`, with noise of the devices and of the helper; `noise` has the samples."""
    return {name: _round(source) for name, source in SOURCES.items()}


def unmasking() -> dict[str, Any]:
    """Section 17: two masked updates, the answer of a helper, and the statement of the version."""
    return _round("")


def _samples(source: str, masking: pb.MaskingTask, count: int) -> list[list[int]]:
    """The noise of each device, or that of the helper."""
    if not source:
        return []
    stddev = MaskingParameters.of_task(masking).noise_stddev(count)
    drawn = len(DEVICES) if source == SOURCES["devices"] else 1
    return [draw_exact(count, stddev).tolist() for _ in range(drawn)]


def _round(source: str) -> dict[str, Any]:
    signed_task = task(source)
    task_digest, masking = digest_of(signed_task.payload), _masking_of(signed_task)
    count = len(change_of(1))
    samples = _samples(source, masking, count)
    shares = samples if source == SOURCES["devices"] else [[0] * count] * len(DEVICES)
    updates = [
        _update(number, task_digest, masking, share)
        for number, share in zip(DEVICES, shares, strict=True)
    ]
    members = contributors_digest(digest_of(update.payload) for update, _ in updates)
    total = np.zeros(len(updates[0][1]) // 4, np.dtype("<u4"))
    for number in DEVICES:
        Mask(seed(f"masking {number}")).add_to(total, 0)
    is_of_helper = source == SOURCES["helper"]
    if is_of_helper:
        total[:count] += np.array(samples[0], np.int64).astype(total.dtype)
    multiplier = masking.noisy.noise_multiplier if is_of_helper else 0.0
    answer = _answer(task_digest, members, total.tobytes(), multiplier)
    weights = [min(400 * number, masking.max_weight) for number in DEVICES]
    statement = pb.ModelStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        version=1,
        parent_digest=BASE_DIGEST,
        base_version=0,
        round_number=1,
        layout_digest=seed("layout").hex(),
        size_bytes=24,
        payload_digest=seed("content 1").hex(),
        strategy_name="fedavg",
        config_digest=seed("config").hex(),
        code_version="0",
        contributor_count=len(DEVICES),
        contributors_digest=members,
        weight_sum=float(sum(weights)),
        example_count=sum(weights),
        create_time=moment(1),
        unmasking=pb.ModelUnmasking(
            task_digest=task_digest, answer_digests=[digest_of(answer.payload)]
        ),
    )
    transcript = verification_pb2.UnmaskingTranscript(task=signed_task, answers=[answer])
    return {
        "task_key": signing_key("task").public.to_proto().SerializeToString().hex(),
        "model_key": signing_key("model").public.to_proto().SerializeToString().hex(),
        "helper_kem_seed": seed("helper").hex(),
        "transcript": transcript.SerializeToString().hex(),
        "version": sign_model(signing_key("model"), statement).SerializeToString().hex(),
        "mask_sum": total.tobytes().hex(),
        **({"noise": samples} if source else {}),
        "updates": [
            {
                "device_key": device_key(number).public.to_proto().SerializeToString().hex(),
                "statement": update.SerializeToString().hex(),
                "payload": payload.hex(),
                "change": change_of(number).tolist(),
                "weight": weight,
                **({} if source else {"loss": 0.5 * number}),
            }
            for number, weight, (update, payload) in zip(DEVICES, weights, updates, strict=True)
        ],
    }


def _masking_of(signed_task: pb.SignedEnvelope) -> pb.MaskingTask:
    return pb.TaskStatement.FromString(signed_task.payload).masking


FILES: Final = {"masking.json": masking, "unmasking.json": unmasking, "noise.json": noise}
