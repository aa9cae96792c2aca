"""Masks and transcripts of secure aggregation, written from docs/protocol.md section 17 alone.

Under the rule of `tests.independent.verifier`: nothing of the product but its generated messages.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2, verification_pb2
from tests.independent.exchange import KemKey, expand
from tests.independent.neighbors import Devices, check_groups
from tests.independent.verifier import (
    Keys,
    contributors_digest,
    key_id,
    open_envelope,
    require,
    tagged_hash,
)

LEVELS = 2**24 - 1
HELPER_MODE = training_pb2.SecureAggregationMode.Value("SECURE_AGGREGATION_MODE_HELPER")
NEIGHBORS_MODE = training_pb2.SecureAggregationMode.Value("SECURE_AGGREGATION_MODE_NEIGHBORS")
DEVICE_NOISE = training_pb2.NoiseSource.Value("NOISE_SOURCE_DEVICES")
HELPER_NOISE = training_pb2.NoiseSource.Value("NOISE_SOURCE_HELPER")
MASKED = training_pb2.Encoding.Value("ENCODING_MASKED")
DELTA = training_pb2.UpdateKind.Value("UPDATE_KIND_DELTA")


class Layout:
    """Ring, scale and slots of a policy."""

    def __init__(
        self,
        policy: training_pb2.SecureAggregationPolicy,
        max_weight: int,
        noise_multiplier: float = 0.0,
    ) -> None:
        self.bits, self.max_weight = policy.bits, max_weight
        self.room = noise_room(policy, noise_multiplier)
        self.bounds = [(metric.name, metric.bound) for metric in policy.metrics]
        half, most = 2 ** (policy.bits - 1) - 1, policy.max_cohort
        table = list(policy.staleness_weights)
        full = (half - 3 * table[0]) // table[0] if table else half
        self.limit = full // (most + self.room)
        self.scale = math.floor(Fraction(full) / ((most + self.room) * Fraction(policy.clip)))
        self.digit_bits = math.floor(math.log2((2**policy.bits - 1) // most + 1))
        self.weight_digits = math.ceil(max_weight.bit_length() / self.digit_bits)
        self.metric_digits = math.ceil((max_weight.bit_length() + 24) / self.digit_bits)
        require(policy.bits in (16, 32, 64) and self.scale >= 1, "the ring has no room")

    def elements(self, payload: bytes) -> list[int]:
        """Elements of a payload."""
        size = self.bits // 8
        require(len(payload) % size == 0, "payload is no vector of the ring")
        starts = range(0, len(payload), size)
        return [int.from_bytes(payload[start : start + size], "little") for start in starts]

    def unmasked(self, payload: bytes, seeds: Iterable[bytes]) -> list[int]:
        """Elements of a payload, or of a sum, without masks."""
        values = self.elements(payload)
        for seed in seeds:
            masks = self.elements(mask(seed, len(payload)))
            values = [(v - m) % 2**self.bits for v, m in zip(values, masks, strict=True)]
        return values

    def signed(self, value: int) -> int:
        """An element as a number with a sign."""
        return value - 2**self.bits if value >= 2 ** (self.bits - 1) else value

    def totals(self, slots: Sequence[int]) -> tuple[int, dict[str, float]]:
        """Sum of the weights and means of the metrics, from the slots of a sum."""
        weight = self._number(slots[: self.weight_digits])
        rest, means = slots[self.weight_digits :], {}
        for name, bound in self.bounds:
            total = self._number(rest[: self.metric_digits])
            rest = rest[self.metric_digits :]
            means[name] = (2 * total / (weight * LEVELS) - 1) * bound
        require(not rest, "there are more slots than the policy has")
        return weight, means

    def _number(self, digits: Sequence[int]) -> int:
        return sum(digit << (self.digit_bits * place) for place, digit in enumerate(digits))


def policy_of(
    masking: pb.MaskingTask,
) -> tuple[training_pb2.SecureAggregationPolicy, float]:
    """Settings of a task, and the multiplier of the noise that devices or helpers add."""
    is_noisy = masking.HasField("noisy")
    require(is_noisy != masking.HasField("policy"), "settings are at two places, or at none")
    policy = masking.noisy.policy if is_noisy else masking.policy
    require(is_noisy == (policy.noise in (DEVICE_NOISE, HELPER_NOISE)), "noise of another source")
    multiplier = masking.noisy.noise_multiplier
    require(policy.mode in (HELPER_MODE, NEIGHBORS_MODE), "task has another mode")
    if is_noisy:
        require(0 < multiplier <= 1e6, "noise multiplier is out of range")
        require(masking.max_weight == 1 and not policy.metrics, "noise with weights or metrics")
        is_mistaken = policy.noise == HELPER_NOISE and policy.mode == NEIGHBORS_MODE
        require(not is_mistaken, "noise of helpers without helpers")
    return policy, multiplier


def noise_room(policy: training_pb2.SecureAggregationPolicy, multiplier: float) -> int:
    """Room of the ring for noise, as a number of updates."""
    if not multiplier:
        return 0
    shares = Fraction(len(policy.helpers))
    if policy.noise == DEVICE_NOISE:
        shares = Fraction(policy.max_cohort, policy.min_cohort)
    square = (16 * Fraction(multiplier)) ** 2 * shares
    room = math.isqrt(math.floor(square))
    return room if room * room == square else room + 1


def noise_stddev(
    policy: training_pb2.SecureAggregationPolicy, multiplier: float, scale: int, count: int
) -> float:
    """Least standard deviation of what a device or a helper adds to each of so many elements."""
    whole = multiplier * (policy.clip * scale + math.sqrt(count))
    return whole / math.sqrt(policy.min_cohort) if policy.noise == DEVICE_NOISE else whole


def mask(seed: bytes, size_bytes: int) -> bytes:
    """The first bytes of the mask of a seed."""
    key = expand(seed, b"qflare/v1/mask")
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return stream.update(bytes(size_bytes))


def open_seed(update: pb.UpdateStatement, place: int, key: KemKey) -> bytes:
    """Open the sealed seed of an update for the helper at a place."""
    sealed = update.masking.seeds[place]
    texts = (
        sealed.helper_id,
        update.realm,
        update.training_session_id,
        str(update.round_number),
        update.masking.task_digest,
        update.update_id,
        update.device_id,
        update.payload_digest,
    )
    info = tagged_hash("qflare/v1/masking-seed", *(text.encode() for text in texts))
    seed = key.open(sealed.sealed_seed, info)
    require(len(seed) == 32, "seed has another length")
    return seed


def open_helpers(task: pb.TaskStatement) -> list[tuple[pb.HelperDocument, pb.PublicKey]]:
    """Check the documents of a task's helpers, each signed by its own key."""
    opened = []
    for envelope in task.masking.helpers:
        document = pb.HelperDocument.FromString(envelope.payload)
        key = document.signature_key
        require(key.key_id == key_id(key.algorithm, key.data), "key id of another key")
        open_envelope(envelope, "qflare/v1/helper", {key.key_id: key})
        require(document.realm == task.realm, "helper of another realm")
        opened.append((document, key))
    named = [key.key_id for _, key in opened]
    require(named == list(policy_of(task.masking)[0].helpers), "documents of other helpers")
    require(1 <= len({*named}) == len(named) <= 3, "a helper is named twice")
    return opened


def check_transcript(
    transcript: verification_pb2.UnmaskingTranscript,
    made: pb.ModelStatement,
    task_keys: Keys,
    updates: Mapping[str, bytes],
    devices: Devices | None = None,
) -> list[str]:
    """Check the transcript of a version, given its updates' payloads by statement digest; return its helpers."""
    task = pb.TaskStatement.FromString(open_envelope(transcript.task, "qflare/v1/task", task_keys))
    digest = hashlib.sha256(transcript.task.payload).hexdigest()
    require(made.unmasking.task_digest == digest, "version names another task")
    policy, multiplier = policy_of(task.masking)
    transfer = (task.transfer.update_encoding, task.transfer.update_kind)
    require(transfer == (MASKED, DELTA), "task wants other updates")
    for field in (
        *("realm", "training_session_id", "round_number"),
        *("base_version", "config_digest"),
    ):
        require(getattr(task, field) == getattr(made, field), f"task has another {field}")
    table = list(policy.staleness_weights)
    if table:
        require(policy.mode == HELPER_MODE and task.masking.max_weight == 0, "task has a weight")
        require(len(table) <= 256 and table == sorted(table, reverse=True), "no staleness weights")
        require(
            table[-1] >= 1 and table[0] <= min(256, 16 * table[-1]), "weights are too far apart"
        )
    layout = Layout(policy, task.masking.max_weight or 1, multiplier)
    least, most = policy.min_cohort, policy.max_cohort
    require(2 <= least <= made.contributor_count <= most, "too few or too many contributors")
    members = contributors_digest(updates.values())
    require(members == made.contributors_digest, "other updates are in the version")
    require(len(updates) == made.contributor_count, "another number of updates")
    if policy.mode == NEIGHBORS_MODE:
        require(not (policy.helpers or task.masking.helpers or transcript.answers), "helpers")
        for payload in updates.values():
            _check_masking(pb.UpdateStatement.FromString(payload), digest, multiplier)
        check_groups(transcript.groups, made, policy, updates, devices or {})
        return []
    require(not transcript.groups, "groups of neighbors without neighbors")
    tasks = _open_tasks(transcript, task, digest, task_keys)
    entries = []
    for payload in updates.values():
        update = pb.UpdateStatement.FromString(payload)
        own = tasks.get(update.masking.task_digest)
        require(own is not None, "update was masked for another task")
        assert own is not None
        entries.append(hashlib.sha256(payload).digest() + _weight(update, own, task))
    helpers = open_helpers(task)
    stated = tagged_hash("qflare/v1/staleness-weights", b"".join(sorted(entries))).hex()
    named = [hashlib.sha256(answer.payload).hexdigest() for answer in transcript.answers]
    require(named == list(made.unmasking.answer_digests), "version names other answers")
    require(len(named) == len(helpers), "an answer is missing")
    for envelope, (_, key) in zip(transcript.answers, helpers, strict=True):
        _check_answer(envelope, key, made, layout, stated if table else "")
        answer = pb.UnmaskingAnswer.FromString(envelope.payload)
        wanted = multiplier if policy.noise == HELPER_NOISE else 0.0
        require(answer.noise_multiplier == wanted, "answer with other noise")
    return [key.key_id for _, key in helpers]


def _open_tasks(
    transcript: verification_pb2.UnmaskingTranscript,
    task: pb.TaskStatement,
    digest: str,
    task_keys: Keys,
) -> dict[str, pb.TaskStatement]:
    """Check the tasks of earlier rounds; return all tasks by digest."""
    tasks = {digest: task}
    for envelope in transcript.earlier_tasks:
        payload = open_envelope(envelope, "qflare/v1/task", task_keys)
        earlier = pb.TaskStatement.FromString(payload)
        require(bool(task.masking.policy.staleness_weights), "earlier task in a synchronous round")
        require(earlier.masking.policy == task.masking.policy, "earlier task has another masking")
        place = (earlier.realm, earlier.training_session_id)
        require(place == (task.realm, task.training_session_id), "task of another session")
        require(1 <= earlier.round_number < task.round_number, "task of a later round")
        tasks[hashlib.sha256(payload).hexdigest()] = earlier
    return tasks


def _weight(update: pb.UpdateStatement, own: pb.TaskStatement, latest: pb.TaskStatement) -> bytes:
    """Check an update against its task; return its staleness weight as bytes."""
    for field in ("round_number", "base_version", "base_digest", "task_nonce"):
        require(getattr(update, field) == getattr(own, field), f"update has another {field}")
    multiplier = policy_of(own.masking)[1]
    _check_update(update, update.masking.task_digest, open_helpers(own), multiplier)
    table, staleness = latest.masking.policy.staleness_weights, latest.base_version
    staleness -= update.base_version
    require(not table or 0 <= staleness < len(table), "update is too stale")
    return (table[staleness] if table else 1).to_bytes(4, "big")


def _check_update(
    update: pb.UpdateStatement,
    task_digest: str,
    helpers: Sequence[tuple[pb.HelperDocument, pb.PublicKey]],
    multiplier: float,
) -> None:
    _check_masking(update, task_digest, multiplier)
    require(not update.masking.HasField("neighbors"), "update has masks of neighbors")
    seeds = [(seed.helper_id, seed.kem_key_id) for seed in update.masking.seeds]
    wanted = [(key.key_id, document.kem_key.key_id) for document, key in helpers]
    require(seeds == wanted, "update has seeds for other helpers")


def _check_masking(update: pb.UpdateStatement, task_digest: str, multiplier: float) -> None:
    require(update.encoding == MASKED, "update is not masked")
    require(update.masking.task_digest == task_digest, "update was masked for another task")
    require(update.masking.noise_multiplier == multiplier, "update for other noise")
    require(update.example_count == 1 and not update.metrics, "update tells of its device")


def _check_answer(
    envelope: pb.SignedEnvelope,
    key: pb.PublicKey,
    made: pb.ModelStatement,
    layout: Layout,
    weights: str,
) -> None:
    payload = open_envelope(envelope, "qflare/v1/unmasking-answer", {key.key_id: key})
    answer = pb.UnmaskingAnswer.FromString(payload)
    require(answer.helper_id == key.key_id, "answer of another helper")
    place = (answer.realm, answer.training_session_id, answer.round_number)
    require(
        place == (made.realm, made.training_session_id, made.round_number),
        "answer of another round",
    )
    require(answer.task_digest == made.unmasking.task_digest, "answer for another task")
    members = (answer.members_digest, answer.member_count)
    require(members == (made.contributors_digest, made.contributor_count), "answer to another set")
    require(answer.bits == layout.bits, "answer in another ring")
    require(answer.weights_digest == weights, "answer with other weights")
    require(2 <= answer.counted_member_count <= answer.member_count, "answer counts too few")
    require(answer.counter >= 1, "answer has no number")
    require(bool(answer.previous_digest) == (answer.counter > 1), "answer names no previous one")
