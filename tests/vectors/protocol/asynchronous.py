"""Vectors of secure aggregation in asynchronous rounds: parameters, and a round with a stale update."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from qflare.crypto import merkle
from qflare.evidence.lineage import contributors_digest, sign_model
from qflare.evidence.statements import digest_of, sign_task, sign_update
from qflare.evidence.unmasking import sign_answer, sign_helper
from qflare.masking.masks import Mask
from qflare.masking.parameters import MaskingParameters
from qflare.masking.quantization import Quantizer, quantize_slots
from qflare.masking.seeds import seal_seed
from qflare.masking.staleness import Rounding, weigh, weights_digest
from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2, verification_pb2
from tests.vectors.protocol.documents import NONCE, SESSION_ID, device_key, moment, update_statement
from tests.vectors.protocol.generate import REALM, kem_key, seed, signing_key
from tests.vectors.protocol.masking import parameters_of, policy_of

BASE_DIGEST: Final = seed("base").hex()
DEVICES: Final = (1, 2)
STALENESS: Final = (64, 45, 37)


def task(number: int, staleness: tuple[int, ...]) -> pb.SignedEnvelope:
    """The signed task of a round with masking in 32 bits."""
    document = pb.HelperDocument(
        realm=REALM,
        sequence_number=1,
        signature_key=signing_key("helper").public.to_proto(),
        kem_key=kem_key("helper").public.to_proto(),
        create_time=moment(),
    )
    masking_task = pb.MaskingTask(
        policy=policy_of(32, 4.0, 10, {"loss": 20.0}, staleness),
        max_weight=0 if staleness else 1000,
        helpers=[sign_helper(signing_key("helper"), document)],
    )
    transfer = training_pb2.TransferPolicy(
        update_encoding=training_pb2.ENCODING_MASKED, update_kind=training_pb2.UPDATE_KIND_DELTA
    )
    statement = pb.TaskStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=number,
        base_version=number - 1,
        base_digest=base_digest(number),
        task_nonce=NONCE,
        deadline_time=moment(600),
        config_digest=seed("config").hex(),
        transfer=transfer,
        masking=masking_task,
    )
    return sign_task(signing_key("task"), statement)


def base_digest(number: int) -> str:
    """Digest of the version that a round begins with."""
    return BASE_DIGEST if number == 1 else seed(f"base {number}").hex()


def change_of(number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The change of a device: the second one is larger than the clip."""
    return np.linspace(-1.0, 2.0, 6) * (1.0 if number == 1 else 10.0)


def _update(number: int, signed_task: pb.SignedEnvelope) -> tuple[pb.SignedEnvelope, bytes]:
    wanted = pb.TaskStatement.FromString(signed_task.payload)
    made = MaskingParameters.of_task(wanted.masking)
    change, secret = change_of(number), seed(f"masking {number}")
    weight = min(400 * number, made.max_weight)
    quantized = Quantizer(made, weight, float(np.linalg.norm(change))).quantize(change)
    slots = quantize_slots(made, weight, {"loss": 0.5 * number})
    vector = np.concatenate([quantized, slots])
    Mask(secret).add_to(vector, 0)
    payload = vector.tobytes()
    statement = update_statement(number, wanted.round_number, wanted.base_digest)
    statement.ClearField("metrics")
    statement.example_count, statement.size_bytes = 1, len(payload)
    statement.kind = training_pb2.UPDATE_KIND_DELTA
    statement.encoding = training_pb2.ENCODING_MASKED
    statement.payload_digest = statement.wire_digest = merkle.leaf_hash(payload).hex()
    statement.masking.task_digest = digest_of(signed_task.payload)
    helper_id = signing_key("helper").public.key_id
    sealed = seal_seed(secret, helper_id, kem_key("helper").public, statement)
    statement.masking.seeds.append(sealed)
    return sign_update(device_key(number), statement), payload


def _answer(
    task_digest: str, members: str, mask: bytes, *, number: int, weights: str
) -> pb.SignedEnvelope:
    answer = pb.UnmaskingAnswer(
        realm=REALM,
        training_session_id=SESSION_ID,
        round_number=number,
        helper_id=signing_key("helper").public.key_id,
        task_digest=task_digest,
        members_digest=members,
        member_count=len(DEVICES),
        bits=32,
        size_bytes=len(mask),
        mask_digest=merkle.leaf_hash(mask).hex(),
        counter=1,
        counted_member_count=len(DEVICES),
        create_time=moment(),
        weights_digest=weights,
    )
    return sign_answer(signing_key("helper"), answer)


def asynchronous() -> dict[str, Any]:
    """Section 17: a round of two updates, the first one masked for the round before, the second one for this round."""
    tasks = [task(number, STALENESS) for number in (1, 2)]
    made = MaskingParameters.of_task(pb.TaskStatement.FromString(tasks[1].payload).masking)
    task_digest = digest_of(tasks[1].payload)
    updates = [_update(number, tasks[number - 1]) for number in DEVICES]
    digests = [digest_of(update.payload) for update, _ in updates]
    members, used = contributors_digest(digests), (STALENESS[1], STALENESS[0])
    weights = weights_digest(zip(digests, used, strict=True))
    count = len(updates[0][1]) // 4 - made.slot_count
    total, secrets = np.zeros(count + made.slot_count, np.dtype("<u4")), []
    for number, weight in zip(DEVICES, used, strict=True):
        secrets.append(seed(f"masking {number}"))
        mask = np.zeros_like(total)
        Mask(secrets[-1]).add_to(mask, 0)
        weigh(mask, 0, count, weight)
        total += mask
    masks = zip(secrets, used, strict=True)
    Rounding(STALENESS[0], count, masks).subtract_from(total, 0)
    answer = _answer(task_digest, members, total.tobytes(), number=2, weights=weights)
    version = _version(2, "fedbuff", members, task_digest, answer, 2)
    transcript = verification_pb2.UnmaskingTranscript(
        task=tasks[1], answers=[answer], earlier_tasks=tasks[:1]
    )
    parameters = parameters_of(32, 10.0, 100, 1, {"loss": 20.0}, STALENESS)
    return {"parameters": parameters} | _vector(transcript, version, total, updates)


def _version(
    number: int, name: str, members: str, task_digest: str, answer: pb.SignedEnvelope, weight: int
) -> pb.SignedEnvelope:
    statement = pb.ModelStatement(
        realm=REALM,
        training_session_id=SESSION_ID,
        version=number,
        parent_digest=base_digest(number),
        base_version=number - 1,
        round_number=number,
        layout_digest=seed("layout").hex(),
        size_bytes=24,
        payload_digest=seed("content 1").hex(),
        strategy_name=name,
        config_digest=seed("config").hex(),
        code_version="0",
        contributor_count=len(DEVICES),
        contributors_digest=members,
        weight_sum=float(weight),
        example_count=weight,
        create_time=moment(1),
        unmasking=pb.ModelUnmasking(
            task_digest=task_digest, answer_digests=[digest_of(answer.payload)]
        ),
    )
    return sign_model(signing_key("model"), statement)


def _vector(
    transcript: verification_pb2.UnmaskingTranscript,
    version: pb.SignedEnvelope,
    total: np.ndarray[Any, Any],
    updates: Sequence[tuple[pb.SignedEnvelope, bytes]],
) -> dict[str, Any]:
    largest = pb.TaskStatement.FromString(transcript.task.payload).masking.max_weight or 1
    return {
        "task_key": signing_key("task").public.to_proto().SerializeToString().hex(),
        "model_key": signing_key("model").public.to_proto().SerializeToString().hex(),
        "helper_kem_seed": seed("helper").hex(),
        "transcript": transcript.SerializeToString().hex(),
        "version": version.SerializeToString().hex(),
        "mask_sum": total.tobytes().hex(),
        "updates": [
            {
                "device_key": device_key(number).public.to_proto().SerializeToString().hex(),
                "statement": update.SerializeToString().hex(),
                "payload": payload.hex(),
                "change": change_of(number).tolist(),
                "weight": min(400 * number, largest),
                "loss": 0.5 * number,
            }
            for number, (update, payload) in zip(DEVICES, updates, strict=True)
        ],
    }


FILES: Final = {"asynchronous_unmasking.json": asynchronous}
