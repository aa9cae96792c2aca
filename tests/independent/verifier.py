"""A verifier written from docs/protocol.md alone.

It shares nothing with the product but the generated messages of `qflare.v1`: hashes are `hashlib`, signatures are
`cryptography`. What it accepts, a client in another language can check; where it disagrees with the
product, one of the two or the page is wrong. Numbers in docstrings are sections of the page.

Everything that is wrong raises `RefusedError`. What devices and the coordinator keep from others (logins, sealed
bytes) is in `tests.independent.exchange`, the bundle of a version in `tests.independent.bundle`.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import (
    MLDSA44PublicKey,
    MLDSA65PublicKey,
    MLDSA87PublicKey,
)
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.v1 import security_pb2 as pb
from qflare.v1 import tensor_pb2

CHUNK_BYTES = 1_048_576
PLAIN: dict[int, Any] = {1: MLDSA44PublicKey, 2: MLDSA65PublicKey, 3: MLDSA87PublicKey}
HYBRID = 4
ROLES = (1, 2, 3, 4, 5)
SESSION_KEM, MODEL, REGISTRAR, LOG, TASK = ROLES
Keys = Mapping[str, pb.PublicKey]


class RefusedError(Exception):
    """Something is not as the page says it has to be."""


def require(condition: object, what: str) -> None:
    """Refuse unless a condition holds."""
    if not condition:
        raise RefusedError(what)


def tagged_hash(tag: str, *parts: bytes) -> bytes:
    """H of section 1."""
    digest = hashlib.sha256(tag.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def key_id(algorithm: int, key: bytes) -> str:
    """Key id of section 1."""
    return hashlib.sha256(b"qflare/v1/key" + algorithm.to_bytes(2, "big") + key).hexdigest()


def check_signature(
    key: pb.PublicKey, context: str, message: bytes, signature: pb.Signature
) -> None:
    """Check one signature (1)."""
    require(signature.algorithm == key.algorithm, "signature names another algorithm")
    try:
        if key.algorithm == HYBRID:
            _check_hybrid(key.data, context.encode(), message, signature.signature)
        else:
            public = PLAIN[key.algorithm].from_public_bytes(key.data)
            public.verify(signature.signature, message, context.encode())
    except (InvalidSignature, ValueError, KeyError) as error:
        raise RefusedError("signature does not verify") from error


def _check_hybrid(key: bytes, context: bytes, message: bytes, signature: bytes) -> None:
    label = b"qflare/v1/ML-DSA-65-Ed25519\x00"
    frame = label + bytes([len(context)]) + context + message
    MLDSA65PublicKey.from_public_bytes(key[:1952]).verify(signature[:3309], frame, context)
    Ed25519PublicKey.from_public_bytes(key[1952:]).verify(signature[3309:], frame)


def open_envelope(
    envelope: pb.SignedEnvelope, context: str, keys: Keys, threshold: int = 1
) -> bytes:
    """Return the payload of an envelope that enough keys have signed (1)."""
    names = [signature.key_id for signature in envelope.signatures]
    require(len(envelope.payload) <= 65_536 and len(names) <= 16, "envelope is too large")
    require(len(set(names)) == len(names), "a key signed twice")
    trusted = [signature for signature in envelope.signatures if signature.key_id in keys]
    for signature in trusted:
        check_signature(keys[signature.key_id], context, envelope.payload, signature)
    require(len(trusted) >= threshold, "too few trusted keys have signed")
    return bytes(envelope.payload)


def leaf(data: bytes) -> bytes:
    """Leaf hash (2)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node (2)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes (2), by the recursive definition of RFC 9162."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return node(merkle_root(leaves[:split]), merkle_root(leaves[split:]))


def check_inclusion(start: bytes, proof: pb.InclusionProof, root: bytes) -> None:
    """Check an inclusion proof (10) recursively, from the root downwards."""
    siblings = [bytes.fromhex(text) for text in proof.sibling_digests]

    def climb(index: int, size: int) -> bytes:
        require(0 <= index < size, "leaf is not in a tree of this size")
        if size == 1:
            return start
        split = 1 << (size - 1).bit_length() - 1
        require(siblings, "inclusion proof is too short")
        sibling = siblings.pop()
        if index < split:
            return node(climb(index, split), sibling)
        return node(sibling, climb(index - split, size - split))

    computed = climb(proof.leaf_index, proof.tree_size)
    require(not siblings, "inclusion proof is too long")
    require(computed == root, "inclusion proof leads to another root")


def check_consistency(first_root: bytes, second_root: bytes, proof: pb.ConsistencyProof) -> None:
    """Check a consistency proof (10) recursively, as RFC 9162 section 2.1.4.1 makes it."""
    nodes = [bytes.fromhex(text) for text in proof.node_digests]

    def climb(first: int, second: int, *, whole: bool) -> tuple[bytes, bytes]:
        """Return the roots of the first and of all leaves of a subtree."""
        if first == second and whole:
            return first_root, first_root
        require(nodes, "consistency proof is too short")
        if first == second:
            both = nodes.pop()
            return both, both
        split = 1 << (second - 1).bit_length() - 1
        other = nodes.pop()
        if first <= split:
            old, new = climb(first, split, whole=whole)
            return old, node(new, other)
        old, new = climb(first - split, second - split, whole=False)
        return node(other, old), node(other, new)

    require(0 < proof.first_size <= proof.second_size, "sizes are out of order")
    old, new = climb(proof.first_size, proof.second_size, whole=True)
    require(not nodes, "consistency proof is too long")
    require((old, new) == (first_root, second_root), "log was rewritten")


def payload_digest(payload: bytes) -> str:
    """Merkle root over the chunks of a payload (2)."""
    starts = range(0, len(payload), CHUNK_BYTES)
    return merkle_root([leaf(payload[start : start + CHUNK_BYTES]) for start in starts]).hex()


def layout_digest(manifest: tensor_pb2.Manifest) -> str:
    """Layout digest (2)."""
    digest = hashlib.sha256(b"qflare/v1/layout")
    for tensor in manifest.tensors:
        name = tensor.name.encode()
        digest.update(len(name).to_bytes(4, "big") + name + bytes([tensor.dtype]))
        digest.update(len(tensor.shape).to_bytes(4, "big"))
        for size in tensor.shape:
            digest.update(size.to_bytes(8, "big"))
    return digest.hexdigest()


def _by_id(keys: Iterable[pb.PublicKey]) -> dict[str, pb.PublicKey]:
    listed = list(keys)
    for key in listed:
        require(key.key_id == key_id(key.algorithm, key.data), "key id of another key")
    found = {key.key_id: key for key in listed}
    require(len(found) == len(listed), "a key is listed twice")
    return found


def _current(expires: Timestamp, at: datetime) -> bool:
    return expires.ToDatetime(tzinfo=UTC) > at


def _open_roots(
    envelopes: Iterable[pb.SignedEnvelope], realm: str, pinned: frozenset[str], threshold: int
) -> tuple[pb.RootDocument, Keys]:
    before: tuple[Keys, int] | None = None
    root, keys = pb.RootDocument(), dict[str, pb.PublicKey]()
    for version, envelope in enumerate(envelopes, 1):
        root = pb.RootDocument.FromString(envelope.payload)
        require((root.realm, root.version) == (realm, version), "root document is out of order")
        keys = _by_id(root.keys)
        require(1 <= root.threshold <= len(keys) <= 16, "threshold does not fit the keys")
        if before is None:
            before = {name: key for name, key in keys.items() if name in pinned}, threshold
        open_envelope(envelope, "qflare/v1/root", *before)
        open_envelope(envelope, "qflare/v1/root", keys, root.threshold)
        before = keys, root.threshold
    require(before, "there is no root document")
    return root, keys


def open_keyset(
    bundle: pb.KeysetBundle, realm: str, pinned: Iterable[str], threshold: int, at: datetime
) -> dict[int, Keys]:
    """Check trust documents (3); return the signature keys of each role."""
    root, root_keys = _open_roots(bundle.roots, realm, frozenset(pinned), threshold)
    payload = open_envelope(bundle.keyset, "qflare/v1/keyset", root_keys, root.threshold)
    keyset = pb.Keyset.FromString(payload)
    require((keyset.realm, keyset.root_version) == (realm, root.version), "keyset is of another")
    require(_current(root.expire_time, at) and _current(keyset.expire_time, at), "expired")
    names = [entry.signature_key.key_id or entry.kem_key.key_id for entry in keyset.keys]
    require(len(names) <= 24 and len(set(names)) == len(names), "a key is listed twice")
    require({entry.role for entry in keyset.keys} == set(ROLES), "a role has no key")
    for entry in keyset.keys:
        kind = "kem_key" if entry.role == SESSION_KEM else "signature_key"
        require(entry.WhichOneof("key") == kind, "a role has a key of another sort")
    return {
        role: _by_id(entry.signature_key for entry in keyset.keys if entry.role == role)
        for role in ROLES
        if role != SESSION_KEM
    }


def open_chain(
    envelopes: Iterable[pb.SignedEnvelope], keys: Keys, realm: str, session_id: str
) -> list[tuple[pb.ModelStatement, str]]:
    """Check consecutive versions (10); return each statement with its digest."""
    chain: list[tuple[pb.ModelStatement, str]] = []
    for envelope in envelopes:
        payload = open_envelope(envelope, "qflare/v1/model", keys)
        statement = pb.ModelStatement.FromString(payload)
        require(
            (statement.realm, statement.training_session_id) == (realm, session_id),
            "version is of another training session",
        )
        require(-1 <= statement.base_version < max(statement.version, 0), "base is not below")
        require(bool(statement.version) == bool(statement.parent_digest), "parent of version 0")
        if chain:
            parent, digest = chain[-1]
            require(statement.version == parent.version + 1, "a version is missing")
            require(statement.parent_digest == digest, "version has another parent")
        _check_rollback(statement, chain)
        chain.append((statement, hashlib.sha256(payload).hexdigest()))
    require(chain, "there is no version")
    return chain


def _check_rollback(
    statement: pb.ModelStatement, chain: Sequence[tuple[pb.ModelStatement, str]]
) -> None:
    if not statement.HasField("rollback_version"):
        return
    require(statement.rollback_version < statement.version, "rollback is not to an earlier version")
    for earlier, _digest in chain:
        if earlier.version == statement.rollback_version:
            for field in ("payload_digest", "layout_digest", "size_bytes"):
                same = getattr(earlier, field) == getattr(statement, field)
                require(same, f"rollback has another {field}")


def contributors_digest(update_payloads: Iterable[bytes]) -> str:
    """Root over contributors (10)."""
    digests = sorted(hashlib.sha256(payload).digest() for payload in update_payloads)
    require(len(set(digests)) == len(digests), "a contributor comes twice")
    return merkle_root([leaf(digest) for digest in digests]).hex() if digests else ""


def open_update(envelope: pb.SignedEnvelope, key: pb.PublicKey) -> pb.UpdateStatement:
    """Check signature and form of an update (9)."""
    payload = open_envelope(envelope, "qflare/v1/update", _by_id([key]))
    statement = pb.UpdateStatement.FromString(payload)
    require(statement.key_id == key.key_id, "update names another key")
    plain = statement.wire_digest == statement.payload_digest and not statement.sealed_header_digest
    require(statement.sealed or plain, "update travels as another payload")
    return statement


def open_evaluation(envelope: pb.SignedEnvelope, key: pb.PublicKey) -> pb.EvaluationStatement:
    """Check signature and form of an evaluation (9)."""
    payload = open_envelope(envelope, "qflare/v1/evaluation", _by_id([key]))
    statement = pb.EvaluationStatement.FromString(payload)
    require(statement.key_id == key.key_id, "evaluation names another key")
    require(statement.version >= 0 and statement.example_count >= 1, "evaluation is out of range")
    require(0 < len(statement.metrics) <= 64, "evaluation has no metric, or too many")
    for name, value in statement.metrics.items():
        fits = 0 < len(name) <= 100 and not name.startswith("train_") and math.isfinite(value)
        require(fits, "evaluation has a metric that it may not have")
    return statement


def check_evidence(
    document: Mapping[str, Any], pinned: Iterable[str], threshold: int, at: datetime
) -> list[tuple[pb.ModelStatement, str]]:
    """Check a file of evidence (13); return its versions."""
    require(document["format"] == "qflare-evidence-1", "no file of evidence")
    realm, session_id = document["realm"], document["training_session_id"]
    bundle = json_format.ParseDict(document["keyset"], pb.KeysetBundle())
    roles = open_keyset(bundle, realm, pinned, threshold, at)
    envelopes = [
        json_format.ParseDict(item, pb.SignedEnvelope()) for item in document["statements"]
    ]
    chain = open_chain(envelopes, roles[MODEL], realm, session_id)
    versions = {statement.version: statement for statement, _digest in chain}
    for item in document["updates"]:
        _check_update(item, versions, roles[REGISTRAR], (realm, session_id))
    return chain


def _check_update(
    item: Mapping[str, Any],
    versions: Mapping[int, pb.ModelStatement],
    registrars: Keys,
    place: tuple[str, str],
) -> None:
    envelope = json_format.ParseDict(item["statement"], pb.SignedEnvelope())
    statement = open_update(envelope, json_format.ParseDict(item["public_key"], pb.PublicKey()))
    require((statement.realm, statement.training_session_id) == place, "update is of another")
    version = versions[item["version"]]
    proof = json_format.ParseDict(item["proof"], pb.InclusionProof())
    require(proof.tree_size == version.contributor_count, "proof is for another tree")
    start = leaf(hashlib.sha256(envelope.payload).digest())
    check_inclusion(start, proof, bytes.fromhex(version.contributors_digest))
    if "enrollment_receipt" in item:
        sent = json_format.ParseDict(item["enrollment_receipt"], pb.SignedEnvelope())
        payload = open_envelope(sent, "qflare/v1/receipt", registrars)
        receipt = pb.EnrollmentReceipt.FromString(payload)
        named = (receipt.realm, receipt.device_id, receipt.signature_key_id)
        require(named == (place[0], statement.device_id, statement.key_id), "receipt of another")
