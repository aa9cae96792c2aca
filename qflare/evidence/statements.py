"""Signed statements: updates, evaluations, tasks, key rotations and audit log tree heads.

Each statement is signed as the exact bytes sent, under its own signing context. It names realm,
training session and every other value needed to prevent replay. `sign_` functions check a statement
before signing; `open_` functions check signature and form and return the message; `check_`
functions compare it with the expected values. Model statements are in `qflare.evidence.lineage`.

Every failure is a `StatementError`. A field that does not have the expected value is a
`StatementMismatchError` that names it. This module does not use the time: the caller enforces deadlines.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from qflare.crypto import merkle
from qflare.crypto.envelope import add_signature, open_envelope, sign_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, Signer, SigningContext
from qflare.v1 import security_pb2, training_pb2

MAX_METRIC_COUNT: Final = 64
"""Most metrics of a statement."""

MAX_METRIC_NAME_CHARACTERS: Final = 100
"""Longest name of a metric."""

TRAINING_PREFIX: Final = "train_"
"""Begins the names of metrics that the coordinator makes from updates: no evaluation may use such a name."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MessageT = TypeVar("_MessageT", bound=Message)


class StatementError(ValueError):
    """A statement is malformed, or not signed by the required key."""


class StatementMismatchError(StatementError):
    """A validly signed statement has a field other than expected.

    Attributes:
        field: Name of the mismatched field.
    """

    def __init__(self, field: str, message: str = "") -> None:
        super().__init__(message or f"{field} is not what it has to be")
        self.field = field


def digest_of(payload: bytes) -> str:
    """Digest of a signed payload, 64 hex digits; identifies the statement."""
    return hashlib.sha256(payload).hexdigest()


def open_statement(
    envelope: security_pb2.SignedEnvelope,
    context: SigningContext,
    keys: Iterable[PublicKey],
    kind: type[_MessageT],
) -> _MessageT:
    """Check an envelope and read its payload as a message.

    Raises:
        StatementError: No trusted key signed it in this context, or it is no such message.
    """
    try:
        return kind.FromString(open_envelope(envelope, context, keys))
    except (ValueError, DecodeError) as error:
        raise StatementError(f"{context} is not a signed statement: {error}") from error


def sign_update(
    key: Signer, statement: security_pb2.UpdateStatement
) -> security_pb2.SignedEnvelope:
    """Sign an update; the statement must name the key.

    Raises:
        StatementError: The statement is malformed.
    """
    check_update_form(statement)
    require_equal("key_id", statement.key_id, key.public.key_id)
    return sign_envelope(key, SigningContext.UPDATE, statement)


def open_update(
    envelope: security_pb2.SignedEnvelope, key: PublicKey
) -> security_pb2.UpdateStatement:
    """Check signature and form of an update, before anything of its payload is read.

    Raises:
        StatementError: It is malformed, or not signed by this key.
    """
    statement = open_statement(envelope, SigningContext.UPDATE, [key], security_pb2.UpdateStatement)
    check_update_form(statement)
    require_equal("key_id", statement.key_id, key.key_id)
    return statement


@dataclass(frozen=True)
class UpdateOccasion:
    """Expected values of an update statement, compared field by field.

    Attributes:
        realm: Name of the deployment.
        training_session_id: Training session.
        round_number: Open round.
        task_nonce: Nonce of the round's task, 64 hex digits.
        device_id: Device that calls.
        base_version: Version that the round is trained from.
        base_digest: Digest of that version's statement, 64 hex digits.
    """

    realm: str
    training_session_id: str
    round_number: int
    task_nonce: str
    device_id: str
    base_version: int
    base_digest: str


def check_update(statement: security_pb2.UpdateStatement, occasion: UpdateOccasion) -> None:
    """Compare an update with the expected values.

    Raises:
        StatementMismatchError: It is for another realm, session, round, task, device or base.
    """
    for field in occasion.__dataclass_fields__:
        require_equal(field, getattr(statement, field), getattr(occasion, field))


def sign_evaluation(
    key: Signer, statement: security_pb2.EvaluationStatement
) -> security_pb2.SignedEnvelope:
    """Sign an evaluation; the statement must name the key.

    Raises:
        StatementError: The statement is malformed.
    """
    check_evaluation_form(statement)
    require_equal("key_id", statement.key_id, key.public.key_id)
    return sign_envelope(key, SigningContext.EVALUATION, statement)


def open_evaluation(
    envelope: security_pb2.SignedEnvelope, key: PublicKey
) -> security_pb2.EvaluationStatement:
    """Check signature and form of an evaluation.

    Raises:
        StatementError: It is malformed, or not signed by this key.
    """
    statement = open_statement(
        envelope, SigningContext.EVALUATION, [key], security_pb2.EvaluationStatement
    )
    check_evaluation_form(statement)
    require_equal("key_id", statement.key_id, key.key_id)
    return statement


def sign_task(key: Signer, statement: security_pb2.TaskStatement) -> security_pb2.SignedEnvelope:
    """Sign the task of a round.

    Raises:
        StatementError: The statement is malformed.
    """
    check_task_form(statement)
    return sign_envelope(key, SigningContext.TASK, statement)


def open_task(
    envelope: security_pb2.SignedEnvelope, keys: Iterable[PublicKey], realm: str
) -> security_pb2.TaskStatement:
    """Check signature, form and realm of a task.

    Args:
        envelope: As received.
        keys: Task keys of the trusted keyset.
        realm: Name of the deployment.

    Raises:
        StatementError: It is malformed, of another realm, or not signed by a task key.
    """
    statement = open_statement(envelope, SigningContext.TASK, keys, security_pb2.TaskStatement)
    check_task_form(statement)
    require_equal("realm", statement.realm, realm)
    return statement


def sign_rotation(
    previous: Signer, following: Signer, rotation: security_pb2.KeyRotation
) -> security_pb2.SignedEnvelope:
    """Sign a key rotation with the previous and the next signature key."""
    envelope = sign_envelope(previous, SigningContext.ROTATION, rotation)
    return add_signature(envelope, following, SigningContext.ROTATION)


@dataclass(frozen=True)
class Rotation:
    """A verified key rotation.

    Attributes:
        sequence_number: Its number, one more than the previous.
        signature_key: Next signature key; its possession is proven.
        kem_key: Next KEM key.
    """

    sequence_number: int
    signature_key: PublicKey
    kem_key: KemPublicKey


def open_rotation(
    envelope: security_pb2.SignedEnvelope,
    current: PublicKey,
    *,
    realm: str,
    device_id: str,
    rotation_count: int,
) -> Rotation:
    """Verify a key rotation.

    Args:
        envelope: As received.
        current: The device's signature key.
        realm: Name of the deployment.
        device_id: Device that calls.
        rotation_count: Number of rotations so far.

    Raises:
        StatementMismatchError: It is for another realm, device or key, or is not the next one.
        StatementError: It is malformed, or not signed by both keys.
    """
    try:
        message = security_pb2.KeyRotation.FromString(envelope.payload)
        following = PublicKey.from_proto(message.signature_key)
        kem_key = KemPublicKey.from_proto(message.kem_key)
        open_envelope(envelope, SigningContext.ROTATION, [current, following], threshold=2)
    except (ValueError, DecodeError) as error:
        raise StatementError(f"rotation is not signed by both keys: {error}") from error
    require_equal("realm", message.realm, realm)
    require_equal("device_id", message.device_id, device_id)
    require_equal("previous_key_id", message.previous_key_id, current.key_id)
    require_equal("sequence_number", message.sequence_number, rotation_count + 1)
    return Rotation(message.sequence_number, following, kem_key)


def open_tree_head(
    envelope: security_pb2.SignedEnvelope, keys: Iterable[PublicKey], origin: str
) -> security_pb2.TreeHead:
    """Check signature, form and origin of a tree head.

    Raises:
        StatementError: It is malformed, of another log, or not signed by a log key.
    """
    head = open_statement(envelope, SigningContext.TREE_HEAD, keys, security_pb2.TreeHead)
    check_head_form(head)
    require_equal("origin", head.origin, origin)
    return head


def check_growth(
    known: security_pb2.TreeHead,
    head: security_pb2.TreeHead,
    proof: security_pb2.ConsistencyProof,
) -> None:
    """Check that a log is append-only since a stored tree head.

    Raises:
        StatementError: The known entries are no longer a prefix of the log.
    """
    require_equal("origin", head.origin, known.origin)
    require_equal("first_size", proof.first_size, known.size)
    require_equal("second_size", proof.second_size, head.size)
    try:
        merkle.verify_consistency(
            known.size,
            head.size,
            bytes.fromhex(known.root_digest),
            bytes.fromhex(head.root_digest),
            [bytes.fromhex(digest) for digest in proof.node_digests],
        )
    except ValueError as error:
        raise StatementError("log is not the continuation of the known one") from error


def check_entry(
    head: security_pb2.TreeHead, leaf: bytes, proof: security_pb2.InclusionProof
) -> None:
    """Check that an entry, given as its leaf hash, is in the log of a tree head.

    Raises:
        StatementError: The proof does not verify.
    """
    require_equal("tree_size", proof.tree_size, head.size)
    check_inclusion(leaf, proof, head.root_digest)


def check_inclusion(leaf: bytes, proof: security_pb2.InclusionProof, root_digest: str) -> None:
    """Check that a leaf hash is in the tree of a root.

    Raises:
        StatementError: The proof does not verify.
    """
    try:
        siblings = [bytes.fromhex(digest) for digest in proof.sibling_digests]
        root = bytes.fromhex(root_digest)
        merkle.verify_inclusion(leaf, proof.leaf_index, proof.tree_size, siblings, root)
    except ValueError as error:
        raise StatementError("leaf is not in the tree") from error


def require_equal(field: str, got: object, want: object) -> None:
    """Raise a `StatementMismatchError` that names the field unless both are equal."""
    if got != want:
        raise StatementMismatchError(field)


def require_digests(message: Message, *fields: str) -> None:
    """Raise a `StatementError` unless each field is 64 lower-case hex digits."""
    for field in fields:
        if not _DIGEST.fullmatch(getattr(message, field)):
            raise StatementError(f"{field} is not a digest")


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise a `StatementError` unless metrics are few, named and finite."""
    _require(len(metrics) <= MAX_METRIC_COUNT, f"more than {MAX_METRIC_COUNT} metrics")
    for name, value in metrics.items():
        named = 0 < len(name) <= MAX_METRIC_NAME_CHARACTERS
        _require(named and math.isfinite(value), "a metric has no name or no finite value")


def check_update_form(statement: security_pb2.UpdateStatement) -> None:
    """Raise a `StatementError` unless an update's statement is well-formed."""
    require_digests(
        statement,
        "task_nonce",
        "key_id",
        "base_digest",
        "layout_digest",
        "payload_digest",
        "wire_digest",
    )
    for field in ("realm", "training_session_id", "update_id", "device_id"):
        _require(getattr(statement, field), f"{field} is empty")
    _require(statement.round_number >= 1, "round_number is below 1")
    _require(statement.base_version >= 0, "base_version is negative")
    _require(statement.size_bytes >= 0, "size_bytes is negative")
    _require(statement.example_count >= 1, "example_count is below 1")
    check_metrics(statement.metrics)
    check_masking_form(statement)
    if statement.sealed:
        require_digests(statement, "sealed_header_digest")
        return
    _require(not statement.sealed_header_digest, "payload is not sealed but has a header")
    _require(
        statement.wire_digest == statement.payload_digest,
        "payload is not sealed but travels as another",
    )


def check_masking_form(statement: security_pb2.UpdateStatement) -> None:
    """Raise a `StatementError` unless an update is masked entirely or not at all.

    A masked update states no example count and no metric in the clear.
    """
    if statement.encoding != training_pb2.ENCODING_MASKED:
        _require(not statement.HasField("masking"), "masking: the payload is not masked")
        return
    masking = statement.masking
    require_digests(masking, "task_digest")
    with_neighbors = masking.HasField("neighbors")
    _require(with_neighbors or masking.seeds, "masking: there is no seed")
    _require(not (with_neighbors and masking.seeds), "masking: seeds for helpers and neighbors")
    if with_neighbors:
        require_digests(
            masking.neighbors, "advertisement_digest", "roster_digest", "sharers_digest"
        )
    for seed in masking.seeds:
        require_digests(seed, "helper_id", "kem_key_id")
    _require(statement.kind == training_pb2.UPDATE_KIND_DELTA, "masking: want a delta")
    _require(statement.example_count == 1, "masking: the example count is not masked")
    _require(not statement.metrics, "masking: metrics are not masked")


def check_evaluation_form(statement: security_pb2.EvaluationStatement) -> None:
    """Raise a `StatementError` unless an evaluation is well-formed."""
    require_digests(statement, "version_digest", "evaluation_nonce", "key_id")
    for field in ("realm", "training_session_id", "device_id"):
        _require(getattr(statement, field), f"{field} is empty")
    _require(statement.version >= 0, "version is negative")
    _require(statement.example_count >= 1, "example_count is below 1")
    check_metrics(statement.metrics)
    _require(statement.metrics, "there is no metric")
    for name in statement.metrics:
        reserved = name.startswith(TRAINING_PREFIX)
        _require(
            not reserved, f"metric {name!r}: names that begin with {TRAINING_PREFIX} are reserved"
        )


def check_head_form(head: security_pb2.TreeHead) -> None:
    """Raise a `StatementError` unless a head of a log is well-formed."""
    _require(head.origin, "origin is empty")
    require_digests(head, "root_digest")
    _require(head.size >= 0, "size of a log is negative")


def check_task_form(statement: security_pb2.TaskStatement) -> None:
    """Raise a `StatementError` unless a task is well-formed."""
    require_digests(statement, "base_digest", "task_nonce", "config_digest")
    for field in ("realm", "training_session_id"):
        _require(getattr(statement, field), f"{field} is empty")
    _require(statement.round_number >= 1, "round_number is below 1")
    _require(statement.base_version >= 0, "base_version is negative")


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise StatementError(problem)
