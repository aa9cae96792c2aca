"""Signed model statements: their lineage and their contributors.

A version is named by the digest of its signed statement, and each statement names the digest of the
one before, so a verifier that accepted a version can verify any later one (`verify_chain`), and no
version in between can be replaced. Version numbers only increase; a rollback is a new version that
names the old one and has its content.

Contributors are a Merkle tree: leaf i is the leaf hash of the SHA-256 of a signed update payload, the
SHA-256 values sorted. A device shows with `contribution_proof` and checks with
`verify_contribution` that its own update is in a version.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import PublicKey, Signer, SigningContext
from qflare.evidence.statements import (
    StatementError,
    check_inclusion,
    check_metrics,
    digest_of,
    open_statement,
    require_digests,
    require_equal,
)
from qflare.tensors.download_encodings import DOWNLOAD_ENCODINGS
from qflare.v1 import security_pb2

NO_VERSION: Final = -1
"""Base version of an initial model."""


@dataclass(frozen=True)
class ModelVersion:
    """A version whose statement was checked.

    Attributes:
        statement: The statement.
        digest: Its digest, 64 hex digits: the name of the version.
    """

    statement: security_pb2.ModelStatement
    digest: str


def sign_model(key: Signer, statement: security_pb2.ModelStatement) -> security_pb2.SignedEnvelope:
    """Sign a version; its digest is `digest_of` the payload.

    Raises:
        StatementError: The statement is malformed.
    """
    check_model_form(statement)
    return sign_envelope(key, SigningContext.MODEL, statement)


def open_model(
    envelope: security_pb2.SignedEnvelope,
    keys: Iterable[PublicKey],
    *,
    realm: str,
    training_session_id: str,
) -> ModelVersion:
    """Check signature, form, realm and training session of a version.

    Args:
        envelope: As received.
        keys: Model keys of the trusted keyset.
        realm: Name of the deployment.
        training_session_id: Training session.

    Raises:
        StatementMismatchError: The statement is for another realm or training session.
        StatementError: It is malformed, or not signed by a model key.
    """
    statement = open_statement(envelope, SigningContext.MODEL, keys, security_pb2.ModelStatement)
    check_model_form(statement)
    require_equal("realm", statement.realm, realm)
    require_equal("training_session_id", statement.training_session_id, training_session_id)
    return ModelVersion(statement, digest_of(envelope.payload))


def verify_chain(
    envelopes: Iterable[security_pb2.SignedEnvelope],
    keys: Sequence[PublicKey],
    *,
    realm: str,
    training_session_id: str,
    known: ModelVersion | None = None,
) -> list[ModelVersion]:
    """Verify a chain of versions.

    Args:
        envelopes: Signed statements by rising version, without gaps, from the version after `known`
            (or `known` itself). Without `known` the first one is taken on its signature alone, and
            from version 0 the chain is whole.
        keys: Model keys of the trusted keyset.
        realm: Name of the deployment.
        training_session_id: Training session.
        known: Last accepted version.

    Returns:
        The versions that were given, in order.

    Raises:
        StatementMismatchError: A version is missing, goes back, or does not follow the one before.
        StatementError: A statement is malformed, or not signed by a model key.
    """
    followed: list[ModelVersion] = []
    previous = known
    seen = {} if known is None else {known.statement.version: known.statement}
    for envelope in envelopes:
        version = open_model(envelope, keys, realm=realm, training_session_id=training_session_id)
        if previous is not None:
            _check_follows(version, previous, repeated=not followed)
        _check_rollback(version.statement, seen)
        seen[version.statement.version] = version.statement
        followed.append(version)
        previous = version
    return followed


def contributors_digest(update_digests: Iterable[str]) -> str:
    """Root over contributors, from the digests of their signed update payloads in any order.

    Returns:
        64 hex digits; empty for no contributor, as in a statement.

    Raises:
        StatementError: A digest comes twice.
    """
    leaves = [merkle.leaf_hash(digest) for digest in _sorted_digests(update_digests)]
    return merkle.root(leaves).hex() if leaves else ""


def contribution_proof(
    update_digests: Iterable[str], update_digest: str
) -> security_pb2.InclusionProof:
    """Prove that an update is among the contributors.

    Raises:
        StatementError: It is not, or a digest comes twice.
    """
    ordered = _sorted_digests(update_digests)
    wanted = bytes.fromhex(update_digest)
    index = bisect.bisect_left(ordered, wanted)
    if index == len(ordered) or ordered[index] != wanted:
        raise StatementError("update is not among the contributors")
    node = merkle.nodes_of([merkle.leaf_hash(digest) for digest in ordered])
    siblings = merkle.inclusion_proof(node, index, len(ordered))
    return security_pb2.InclusionProof(
        leaf_index=index,
        tree_size=len(ordered),
        sibling_digests=[sibling.hex() for sibling in siblings],
    )


def verify_contribution(
    statement: security_pb2.ModelStatement,
    update_payload: bytes,
    proof: security_pb2.InclusionProof,
) -> None:
    """Check that a signed update payload is in a version.

    Raises:
        StatementError: It is not shown to be.
    """
    require_equal("tree_size", proof.tree_size, statement.contributor_count)
    leaf = merkle.leaf_hash(bytes.fromhex(digest_of(update_payload)))
    check_inclusion(leaf, proof, statement.contributors_digest)


def check_step(
    statement: security_pb2.ModelStatement,
    parent: ModelVersion | None,
    restored: security_pb2.ModelStatement | None = None,
) -> None:
    """Check that a version continues a chain by the rules of `verify_chain`.

    Args:
        statement: Of the version.
        parent: The version before it; None for an initial model.
        restored: For a rollback: of the version that it restores.

    Raises:
        StatementMismatchError: It does not follow, or does not restore what it names.
    """
    if parent is None:
        require_equal("version", statement.version, 0)
    else:
        require_equal("version", statement.version, parent.statement.version + 1)
        require_equal("parent_digest", statement.parent_digest, parent.digest)
    _check_rollback(statement, {} if restored is None else {restored.version: restored})


def _check_follows(version: ModelVersion, previous: ModelVersion, *, repeated: bool) -> None:
    """Check a step of the chain; the first may repeat the version that was known."""
    if repeated and version.statement.version == previous.statement.version:
        require_equal("digest", version.digest, previous.digest)
        return
    check_step(version.statement, previous)


def _check_rollback(
    statement: security_pb2.ModelStatement, seen: dict[int, security_pb2.ModelStatement]
) -> None:
    """Check that a rollback restores the named version, if that version is available."""
    if not statement.HasField("rollback_version"):
        return
    restored = seen.get(statement.rollback_version)
    if restored is not None:
        for field in ("payload_digest", "layout_digest", "size_bytes", "download", "wire_digest"):
            require_equal(field, getattr(statement, field), getattr(restored, field))


def check_model_form(statement: security_pb2.ModelStatement) -> None:
    """Check a version's statement on its own.

    Raises:
        StatementError: It is malformed.
    """
    require_digests(statement, "layout_digest", "payload_digest")
    for field in ("realm", "training_session_id"):
        _require(getattr(statement, field), f"{field} is empty")
    _require(statement.size_bytes >= 0, "size_bytes is negative")
    _require(statement.example_count >= 0, "example_count is negative")
    _require(
        math.isfinite(statement.weight_sum) and statement.weight_sum >= 0,
        "weight_sum is not a finite number >= 0",
    )
    check_metrics(statement.metrics)
    if statement.HasField("download"):
        _require(
            statement.download.encoding in DOWNLOAD_ENCODINGS,
            f"download.encoding {statement.download.encoding} is no download encoding"
            "; if a later release made it, upgrade qflare",
        )
        _require(statement.download.size_bytes >= 0, "download.size_bytes is negative")
        require_digests(statement.download, "payload_digest")
    _check_place(statement)
    _check_contributors(statement)
    if statement.HasField("in_process_count"):
        unmixed = (0, statement.contributor_count)
        _require(statement.in_process_count in unmixed, "in_process_count is neither all nor none")
    _check_sealing(statement)
    _check_unmasking(statement)


def _check_unmasking(statement: security_pb2.ModelStatement) -> None:
    """Check the answers of helpers that a version with secure aggregation names."""
    if not statement.HasField("unmasking"):
        return
    require_digests(statement.unmasking, "task_digest")
    digests = statement.unmasking.answer_digests
    _require(
        1 <= len({*digests}) == len(digests), "an answer of a helper is missing or named twice"
    )
    _require(statement.contributor_count > 1, "the sum of one update is that update")


def _check_place(statement: security_pb2.ModelStatement) -> None:
    """Check version, parent, base and restored version against each other."""
    version = statement.version
    _require(version >= 0, "version is negative")
    _require(NO_VERSION <= statement.base_version < max(version, 0), "base_version is not below")
    if version == 0:
        _require(not statement.parent_digest, "an initial model has no parent")
    else:
        require_digests(statement, "parent_digest")
    if statement.HasField("rollback_version"):
        _require(0 <= statement.rollback_version < version, "rollback_version is not below")


def _check_contributors(statement: security_pb2.ModelStatement) -> None:
    if statement.contributor_count:
        _require(statement.contributor_count > 0, "contributor_count is negative")
        require_digests(statement, "contributors_digest")
    else:
        _require(not statement.contributors_digest, "contributors without a count")


def _check_sealing(statement: security_pb2.ModelStatement) -> None:
    """Check that the sealing fields are set exactly when the payload is sealed."""
    if not statement.sealed:
        named = statement.wire_digest or statement.sealed_header_digest
        has_version = statement.HasField("sealed_version")
        _require(not named and not has_version, "payload is not sealed but has a header")
        return
    require_digests(statement, "wire_digest", "sealed_header_digest")
    _require(statement.HasField("sealed_version"), "sealed_version is missing")
    if statement.HasField("rollback_version"):
        _require(
            0 <= statement.sealed_version <= statement.rollback_version,
            "sealed_version is above the restored version",
        )
    else:
        require_equal("sealed_version", statement.sealed_version, statement.version)


def _sorted_digests(update_digests: Iterable[str]) -> list[bytes]:
    ordered = sorted(bytes.fromhex(digest) for digest in update_digests)
    if any(first == second for first, second in itertools.pairwise(ordered)):
        raise StatementError("a contributor comes twice")
    return ordered


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise StatementError(problem)
