"""Signed statements of secure aggregation: helpers, masking tasks, requests, answers, and transcripts of versions.

A *helper* is named by the id of its signature key. Its document names the KEM key for seeds; a task contains the
documents, so a device needs to know nothing but the ids. Every masked update names the digest of its task: updates that
were made for different tasks, such as for another base version, are never in one sum, unless rounds are asynchronous.
Then each counts by its staleness (`SumTasks`), from a table that all of the tasks have in common.

Every failure is a `StatementError`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, Signer, SigningContext
from qflare.evidence.lineage import contributors_digest
from qflare.evidence.statements import (
    StatementError,
    digest_of,
    open_statement,
    open_task,
    require_digests,
    require_equal,
)
from qflare.masking.graph_parameters import InfeasibleGroupError, practical_parameters
from qflare.masking.neighbor_graph import InvalidRosterError, NeighborGraph
from qflare.masking.noise import HELPER
from qflare.masking.parameters import (
    DTYPES,
    InvalidMaskingError,
    MaskingParameters,
    policy_of,
)
from qflare.masking.staleness import weights_digest
from qflare.v1 import security_pb2, training_pb2, verification_pb2

MAX_HELPER_COUNT = 3
"""Most helpers of a training session."""

_MODES = (
    training_pb2.SECURE_AGGREGATION_MODE_HELPER,
    training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS,
)

MIN_COHORT = 2
"""Smallest minimum of a cohort: the sum of one update is that update."""


@dataclass(frozen=True)
class Helper:
    """A helper whose document was checked.

    Attributes:
        key: Signature key; its id names the helper.
        kem_key: KEM key for seeds.
        sequence_number: Number of the document.
    """

    key: PublicKey
    kem_key: KemPublicKey
    sequence_number: int

    @property
    def helper_id(self) -> str:
        """Id of the helper, 64 hex digits."""
        return self.key.key_id


def sign_helper(key: Signer, document: security_pb2.HelperDocument) -> security_pb2.SignedEnvelope:
    """Sign the document of a helper with its signature key."""
    return sign_envelope(key, SigningContext.HELPER, document)


def open_helper(envelope: security_pb2.SignedEnvelope, realm: str) -> Helper:
    """Check the document of a helper: it is signed by the key that names the helper.

    Whether this is the wanted helper is up to the caller, by `Helper.helper_id`.

    Raises:
        StatementError: It is malformed, of another realm, or not signed by its key.
    """
    try:
        document = security_pb2.HelperDocument.FromString(envelope.payload)
        key = PublicKey.from_proto(document.signature_key)
        kem_key = KemPublicKey.from_proto(document.kem_key)
    except (ValueError, DecodeError) as error:
        raise StatementError("document of a helper is malformed") from error
    open_statement(envelope, SigningContext.HELPER, [key], security_pb2.HelperDocument)
    require_equal("realm", document.realm, realm)
    if document.sequence_number < 1:
        raise StatementError("document of a helper has no number")
    return Helper(key, kem_key, document.sequence_number)


@dataclass(frozen=True)
class NeighborPolicy:
    """How the groups of secure aggregation with neighbors are formed.

    Attributes:
        corrupt_fraction: Share of the devices of a group that may collude with the coordinator.
        dropout_fraction: Share of the devices of a group that may drop out.
    """

    corrupt_fraction: float
    dropout_fraction: float

    def graph(self, members: Sequence[str]) -> NeighborGraph:
        """Return the graph of a group.

        Raises:
            StatementError: There is none for so many members, or they are not in order.
        """
        fractions = self.corrupt_fraction, self.dropout_fraction
        try:
            return NeighborGraph(members, practical_parameters(len(members), *fractions))
        except (InfeasibleGroupError, InvalidRosterError) as error:
            raise StatementError(f"group: {error}") from error


@dataclass(frozen=True)
class Masking:
    """Masking that a signed task requires, checked.

    Attributes:
        task_digest: Digest of the task statement, 64 hex digits.
        parameters: Ring, scale and layout.
        min_cohort: Fewest updates of a sum.
        helpers: In the order of the policy; none with neighbors.
        neighbors: How groups are formed; None with helpers.
    """

    task_digest: str
    parameters: MaskingParameters
    min_cohort: int
    helpers: tuple[Helper, ...]
    neighbors: NeighborPolicy | None = None

    @property
    def noise_multiplier(self) -> float:
        """Multiplier of the noise that devices or helpers add; 0 without it."""
        return self.parameters.noise.multiplier if self.parameters.noise is not None else 0.0

    @property
    def helper_noise(self) -> float:
        """Multiplier of the noise that each helper adds to the sum of the masks; 0 without it."""
        noise = self.parameters.noise
        return self.noise_multiplier if noise is not None and noise.source == HELPER else 0.0


def masking_of(envelope: security_pb2.SignedEnvelope) -> Masking | None:
    """Return the masking of a task whose signature was checked; None if it requires none.

    Raises:
        StatementError: It is malformed: an unknown mode, parameters out of range, or documents of other helpers.
    """
    task = security_pb2.TaskStatement.FromString(envelope.payload)
    masked = task.transfer.update_encoding == training_pb2.ENCODING_MASKED
    if masked != task.HasField("masking"):
        raise StatementError(
            "a task has masking without masked updates, or the reverse"
            "; if a later release made it, upgrade qflare"
        )
    if not masked:
        return None
    policy = policy_of(task.masking)
    if policy.mode not in _MODES:
        raise StatementError(
            f"secure aggregation: got mode {policy.mode}, want HELPER or NEIGHBORS"
            "; if a later release made it, upgrade qflare"
        )
    require_equal("update_kind", task.transfer.update_kind, training_pb2.UPDATE_KIND_DELTA)
    try:
        parameters = MaskingParameters.of_task(task.masking)
    except InvalidMaskingError as error:
        raise StatementError(f"secure aggregation: {error}") from error
    if not MIN_COHORT <= policy.min_cohort <= policy.max_cohort:
        raise StatementError("secure aggregation: min_cohort is out of range")
    digest = digest_of(envelope.payload)
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        _require_no_helpers(task.masking, parameters)
        neighbors = NeighborPolicy(policy.corrupt_fraction, policy.dropout_fraction)
        return Masking(digest, parameters, policy.min_cohort, (), neighbors)
    helpers = tuple(open_helper(document, task.realm) for document in task.masking.helpers)
    require_equal("helpers", [item.helper_id for item in helpers], list(policy.helpers))
    if not 1 <= len({*policy.helpers}) == len(policy.helpers) <= MAX_HELPER_COUNT:
        raise StatementError("secure aggregation: want 1 to 3 different helpers")
    return Masking(digest, parameters, policy.min_cohort, helpers)


def _require_no_helpers(task: security_pb2.MaskingTask, parameters: MaskingParameters) -> None:
    """Refuse in a task with neighbors what only helpers can do."""
    if task.helpers or policy_of(task).helpers:
        raise StatementError("secure aggregation with neighbors has no helpers")
    if parameters.noise is not None and parameters.noise.source == HELPER:
        raise StatementError("secure aggregation with neighbors has no noise of helpers")
    if parameters.staleness_weights:
        raise StatementError("secure aggregation with neighbors has no staleness weights")


def check_masked_update(statement: security_pb2.UpdateStatement, masking: Masking) -> None:
    """Check that an update was masked for a task.

    Raises:
        StatementError: It was made for another task or other noise, or seeds are missing or of other helpers.
    """
    require_equal("encoding", statement.encoding, training_pb2.ENCODING_MASKED)
    require_equal("task_digest", statement.masking.task_digest, masking.task_digest)
    require_equal("noise_multiplier", statement.masking.noise_multiplier, masking.noise_multiplier)
    with_neighbors = statement.masking.HasField("neighbors")
    require_equal("neighbors", with_neighbors, masking.neighbors is not None)
    named = [(seed.helper_id, seed.kem_key_id) for seed in statement.masking.seeds]
    wanted = [(item.helper_id, item.kem_key.key_id) for item in masking.helpers]
    require_equal("seeds", named, wanted)


class SumTasks:
    """The tasks for which the updates of one sum were made: that of the round and, if it is asynchronous, earlier ones.

    Attributes:
        masking: Of the round's task.
        min_cohort: Fewest updates that every task allows.

    Args:
        task: The round's, its signature checked.
        masking: What it requires.
    """

    def __init__(self, task: security_pb2.TaskStatement, masking: Masking) -> None:
        self.masking = masking
        self.min_cohort = masking.min_cohort
        self._latest = task
        self._tasks = {masking.task_digest: (task, masking)}

    def add_earlier(self, envelope: security_pb2.SignedEnvelope) -> None:
        """Add an earlier task whose signature was checked.

        Raises:
            StatementError: It is not of an earlier round of the same training session with the same masking.
        """
        task, masking = (
            security_pb2.TaskStatement.FromString(envelope.payload),
            masking_of(envelope),
        )
        if masking is None or not self.masking.parameters.staleness_weights:
            raise StatementError("an earlier task without staleness weights")
        for field in ("realm", "training_session_id"):
            require_equal(field, getattr(task, field), getattr(self._latest, field))
        require_equal("masking", task.masking.policy, self._latest.masking.policy)
        if not 1 <= task.round_number < self._latest.round_number:
            raise StatementError("an earlier task of a later round")
        self._weight(task.base_version)
        self.min_cohort = max(self.min_cohort, masking.min_cohort)
        self._tasks[masking.task_digest] = (task, masking)

    def _weight(self, base_version: int) -> int:
        weights = self.masking.parameters.staleness_weights
        staleness = self._latest.base_version - base_version
        if not weights:
            return 1
        if not 0 <= staleness < len(weights):
            raise StatementError(
                f"base_version: {staleness} versions behind, want 0 to {len(weights) - 1}"
            )
        return weights[staleness]

    def weight_of(self, statement: security_pb2.UpdateStatement) -> int:
        """Check that an update was masked for one of the tasks, and return its staleness weight; 1 without any.

        Raises:
            StatementError: It was made for another task or base version, or its seeds are for other helpers.
        """
        known = self._tasks.get(statement.masking.task_digest)
        if known is None:
            raise StatementError("task_digest: the update was masked for another task")
        task, masking = known
        for field in (
            "realm",
            "training_session_id",
            "round_number",
            "task_nonce",
            "base_version",
            "base_digest",
        ):
            require_equal(field, getattr(statement, field), getattr(task, field))
        check_masked_update(statement, masking)
        return self._weight(statement.base_version)

    def digest_of_weights(self, weights: Iterable[tuple[str, int]]) -> str:
        """Return what requests and answers state of the weights: their digest, empty without staleness weights."""
        return weights_digest(weights) if self.masking.parameters.staleness_weights else ""


def sign_answer(key: Signer, answer: security_pb2.UnmaskingAnswer) -> security_pb2.SignedEnvelope:
    """Sign an answer of a helper.

    Raises:
        StatementError: It is malformed.
    """
    check_answer_form(answer)
    return sign_envelope(key, SigningContext.UNMASKING_ANSWER, answer)


def open_answer(
    envelope: security_pb2.SignedEnvelope, key: PublicKey
) -> security_pb2.UnmaskingAnswer:
    """Check signature and form of an answer.

    Raises:
        StatementError: It is malformed, or not signed by the helper.
    """
    answer = open_statement(
        envelope, SigningContext.UNMASKING_ANSWER, [key], security_pb2.UnmaskingAnswer
    )
    check_answer_form(answer)
    require_equal("helper_id", answer.helper_id, key.key_id)
    return answer


def check_answer(
    answer: security_pb2.UnmaskingAnswer,
    request: security_pb2.UnmaskingRequest,
    masking: Masking,
    size_bytes: int,
) -> None:
    """Check that an answer is the one to a request.

    Args:
        answer: Signed by the helper.
        request: What was asked for.
        masking: Of the task.
        size_bytes: Size of a masked update.

    Raises:
        StatementMismatchError: It is for another request, or its counter is not above the last one.
    """
    for field in (
        "realm",
        "training_session_id",
        "round_number",
        "helper_id",
        "task_digest",
        "members_digest",
        "member_count",
        "weights_digest",
    ):
        require_equal(field, getattr(answer, field), getattr(request, field))
    require_equal("bits", answer.bits, masking.parameters.bits)
    require_equal("noise_multiplier", answer.noise_multiplier, masking.helper_noise)
    require_equal("size_bytes", answer.size_bytes, size_bytes)


def check_answer_form(answer: security_pb2.UnmaskingAnswer) -> None:
    """Raise a `StatementError` unless an answer is well-formed."""
    require_digests(answer, "helper_id", "task_digest", "members_digest", "mask_digest")
    if answer.weights_digest:
        require_digests(answer, "weights_digest")
    if answer.counter > 1:
        require_digests(answer, "previous_digest")
    elif answer.previous_digest or answer.counter < 1:
        raise StatementError("an answer has no counter, or the first one names a previous one")
    if not answer.realm or not answer.training_session_id or answer.round_number < 1:
        raise StatementError("an answer names no round")
    if answer.bits not in DTYPES or answer.size_bytes < answer.bits // 8:
        raise StatementError("an answer has no size")
    if not MIN_COHORT <= answer.counted_member_count <= answer.member_count:
        raise StatementError("an answer has too few members")


def check_request_form(request: security_pb2.UnmaskingRequest) -> None:
    """Raise a `StatementError` unless a request is well-formed."""
    require_digests(request, "helper_id", "task_digest", "members_digest")
    if request.weights_digest:
        require_digests(request, "weights_digest")
    if not request.realm or not request.training_session_id or request.round_number < 1:
        raise StatementError("a request names no round")
    if request.member_count < 1 or request.last_counter < 0:
        raise StatementError("a request has no members, or a counter below 0")


def open_request(
    envelope: security_pb2.SignedEnvelope, keys: Iterable[PublicKey], realm: str
) -> security_pb2.UnmaskingRequest:
    """Check signature, form and realm of a request.

    Raises:
        StatementError: It is malformed, of another realm, or not signed by a task key.
    """
    request = open_statement(
        envelope, SigningContext.UNMASKING_REQUEST, keys, security_pb2.UnmaskingRequest
    )
    check_request_form(request)
    require_equal("realm", request.realm, realm)
    return request


def verify_transcript(
    transcript: verification_pb2.UnmaskingTranscript,
    statement: security_pb2.ModelStatement,
    task_keys: Collection[PublicKey],
    updates: Sequence[security_pb2.UpdateStatement],
    update_digests: Iterable[str],
) -> Masking:
    """Check the transcript of the secure aggregation of a version, and return the masking of its task.

    With neighbors, `neighbor_transcripts.check_groups` checks the rest.

    Args:
        transcript: Task and answers.
        statement: Of the version, verified.
        task_keys: Keys that may have signed the task.
        updates: Verified statements of all updates in the version.
        update_digests: Their digests, in the same order.

    Raises:
        StatementError: The transcript is not that of the version.
    """
    unmasking = statement.unmasking
    task = open_task(transcript.task, task_keys, statement.realm)
    masking = masking_of(transcript.task)
    if masking is None:
        raise StatementError("the task of the version requires no masking")
    require_equal("task_digest", unmasking.task_digest, masking.task_digest)
    for field in ("training_session_id", "round_number", "base_version", "config_digest"):
        require_equal(field, getattr(task, field), getattr(statement, field))
    tasks, digests_of_updates = SumTasks(task, masking), list(update_digests)
    for envelope in transcript.earlier_tasks:
        open_task(envelope, task_keys, statement.realm)
        tasks.add_earlier(envelope)
    require_equal("updates", len(digests_of_updates), len(updates))
    weights = [tasks.weight_of(update) for update in updates]
    members = contributors_digest(digests_of_updates)
    require_equal("contributors_digest", members, statement.contributors_digest)
    count = statement.contributor_count
    if not tasks.min_cohort <= count <= masking.parameters.max_cohort:
        raise StatementError("the number of contributors is not what the task allows")
    if masking.neighbors is not None:
        require_equal("answers", len(transcript.answers), 0)
        return masking
    require_equal("groups", len(transcript.groups), 0)
    digests = [digest_of(answer.payload) for answer in transcript.answers]
    require_equal("answer_digests", digests, list(unmasking.answer_digests))
    require_equal("answers", len(digests), len(masking.helpers))
    stated = tasks.digest_of_weights(zip(digests_of_updates, weights, strict=True))
    for envelope, helper in zip(transcript.answers, masking.helpers, strict=True):
        _check_answer_of(open_answer(envelope, helper.key), statement, masking, stated)
    return masking


def _check_answer_of(
    answer: security_pb2.UnmaskingAnswer,
    statement: security_pb2.ModelStatement,
    masking: Masking,
    weights: str,
) -> None:
    wanted: Mapping[str, object] = {
        "realm": statement.realm,
        "training_session_id": statement.training_session_id,
        "round_number": statement.round_number,
        "task_digest": masking.task_digest,
        "members_digest": statement.contributors_digest,
        "member_count": statement.contributor_count,
        "bits": masking.parameters.bits,
        "noise_multiplier": masking.helper_noise,
        "weights_digest": weights,
    }
    for field, value in wanted.items():
        require_equal(field, getattr(answer, field), value)
