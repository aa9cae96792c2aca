"""Writes the test vectors of the wire protocol; see README.md beside this file.

Keys come from fixed seeds, so do all values that the protocol derives. What libraries draw themselves (hedged
signatures, encapsulations, nonces) is recorded.
"""

import json
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import (
    ONLINE_ALGORITHMS,
    Algorithm,
    Provider,
    PublicKey,
    SigningContext,
    SigningKey,
    tagged_hash,
)
from qflare.evidence.audit_entries import RISKS, Entry
from qflare.evidence.lineage import contribution_proof, contributors_digest
from qflare.evidence.statements import digest_of
from qflare.tensors import Manifest, PayloadHasher, chunks, rechunk
from qflare.tensors.encodings import Encoding, encode, wire_manifest

FOLDER: Final = Path(__file__).parent
AT: Final = datetime(2030, 1, 1, tzinfo=UTC)
REALM: Final = "vectors"
STATE_KEY: Final = bytes(range(32))

_MLDSA: Final[dict[Algorithm, Any]] = {
    Algorithm.ML_DSA_44: mldsa.MLDSA44PrivateKey,
    Algorithm.ML_DSA_65: mldsa.MLDSA65PrivateKey,
    Algorithm.ML_DSA_87: mldsa.MLDSA87PrivateKey,
}


def seed(label: str, length_bytes: int = 32) -> bytes:
    """A seed that follows from a label."""
    return (tagged_hash("test vector", label.encode()) * 2)[:length_bytes]


def signing_key(label: str, algorithm: Algorithm = Algorithm.ML_DSA_65) -> SigningKey:
    """The signature key of a label."""
    if algorithm is Algorithm.ML_DSA_65_ED25519:
        secret = seed(label, 64)
        public = _public(Algorithm.ML_DSA_65, secret[:32])
        public += Ed25519PrivateKey.from_private_bytes(secret[32:]).public_key().public_bytes_raw()
    else:
        secret = seed(label)
        public = _public(algorithm, secret)
    return SigningKey(PublicKey(algorithm, public), Provider.CRYPTOGRAPHY, secret)


def kem_key(label: str) -> KemKey:
    """The KEM key of a label."""
    return KemKey(Provider.CRYPTOGRAPHY, seed(label))


def _public(algorithm: Algorithm, secret: bytes) -> bytes:
    public: bytes = _MLDSA[algorithm].from_seed_bytes(secret).public_key().public_bytes_raw()
    return public


def pattern(size_bytes: int) -> bytes:
    """A payload whose byte i is i mod 251."""
    return (bytes(range(251)) * (size_bytes // 251 + 1))[:size_bytes]


def hashes() -> dict[str, Any]:
    """Sections 1, 2, 10 and 11: everything that is only hashed."""
    parts: tuple[list[bytes], ...] = ([], [b""], [b"ab", b"c"], [b"a", b"bc"], [bytes(300)])
    return {
        "tagged_hash": [
            {
                "tag": "qflare/v1/example",
                "parts": [part.hex() for part in list_],
                "digest": tagged_hash("qflare/v1/example", *list_).hex(),
            }
            for list_ in parts
        ],
        "layout": [_layout(manifest) for manifest in (_small(), Manifest(()))],
        "payload": [_payload(size) for size in (0, 1, 1 << 20, (1 << 20) + 1, 5 * (1 << 19))],
        "inclusion": [_inclusion(index, size) for index, size in ((0, 1), (2, 3), (4, 7), (6, 7))],
        "consistency": [_consistency(*sizes) for sizes in ((1, 2), (3, 7), (4, 7), (6, 8), (7, 7))],
        "contributors": _contributors(),
        "audit_entries": [_audit_entry(0, {}), _audit_entry(7, {"b": 'a "text"', "a": "1"})],
    }


def _small() -> Manifest:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "layer/w": np.zeros((2, 3), np.float32),
        "ünïcode": np.zeros((), np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    return Manifest.from_arrays(arrays)


def _layout(manifest: Manifest) -> dict[str, Any]:
    tensors = [
        {"name": spec.name, "dtype": int(spec.dtype), "shape": list(spec.shape)}
        for spec in manifest.tensors
    ]
    return {"tensors": tensors, "layout_digest": manifest.layout_digest}


def _payload(size_bytes: int) -> dict[str, Any]:
    hasher = PayloadHasher()
    for chunk in rechunk([pattern(size_bytes)]):
        hasher.add(chunk)
    return {
        "size_bytes": size_bytes,
        "chunk_digests": b"".join(hasher.leaf_hashes).hex(),
        "payload_digest": hasher.root(),
    }


def _leaves(size: int) -> list[bytes]:
    return [merkle.leaf_hash(bytes([number])) for number in range(size)]


def _inclusion(index: int, size: int) -> dict[str, Any]:
    node = merkle.nodes_of(_leaves(size))
    return {
        "leaf": _leaves(size)[index].hex(),
        "leaf_index": index,
        "tree_size": size,
        "sibling_digests": [part.hex() for part in merkle.inclusion_proof(node, index, size)],
        "root": merkle.root(_leaves(size)).hex(),
    }


def _consistency(first: int, second: int) -> dict[str, Any]:
    node = merkle.nodes_of(_leaves(second))
    return {
        "first_size": first,
        "second_size": second,
        "node_digests": [part.hex() for part in merkle.consistency_proof(node, first, second)],
        "first_root": merkle.root(_leaves(first)).hex(),
        "second_root": merkle.root(_leaves(second)).hex(),
    }


def _contributors() -> dict[str, Any]:
    payloads = [b"update one", b"update two", b"update three"]
    digests = [digest_of(payload) for payload in payloads]
    proof = contribution_proof(digests, digests[1])
    return {
        "payloads": [payload.hex() for payload in payloads],
        "contributors_digest": contributors_digest(digests),
        "proof_of_second": proof.SerializeToString(deterministic=True).hex(),
    }


def _audit_entry(audit_id: int, details: Mapping[str, str]) -> dict[str, Any]:
    salt = seed("salt")[:16]
    entry = Entry(
        audit_id=audit_id,
        event_type="device.registered",
        actor="anonymous",
        subject="device:00000000-0000-4000-8000-000000000001",
        peer_address="ipv4:192.0.2.1:5000",
        authentication_method="none",
        risk_level="medium",
        created_at=AT.replace(microsecond=123_456),
        salt=salt,
        details=details,
    )
    return {
        "audit_id": audit_id,
        "microseconds": int(AT.timestamp()) * 10**6 + 123_456,
        "risk": RISKS.index(entry.risk_level) + 1,
        "event_type": entry.event_type,
        "authentication_method": entry.authentication_method,
        "actor": entry.actor,
        "subject": entry.subject,
        "peer_address": entry.peer_address,
        "details": dict(details),
        "salt": salt.hex(),
        "entry": entry.to_bytes().hex(),
        "leaf": entry.leaf_hash().hex(),
    }


def encodings() -> dict[str, Any]:
    """Section 2: one payload in every encoding."""
    arrays = encoded_arrays()
    manifest = Manifest.from_arrays(arrays)
    cases = [
        _encoded(arrays, manifest, encoding, fraction)
        for encoding, fraction in (
            (Encoding.FULL_PRECISION, 1.0),
            (Encoding.FLOAT16, 1.0),
            (Encoding.BFLOAT16, 1.0),
            (Encoding.INT8, 1.0),
            (Encoding.TOP_K, 0.4),
        )
    ]
    return {"base": _layout(manifest), "cases": cases}


def encoded_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that are encoded."""
    return {
        "w": np.array([[0.5, -2.0, 0.001], [3.25, -0.0, 1.0]], np.float32),
        "count": np.array([1, -2], np.int32),
        "v": np.array([1e-3, -7.125, 0.3], np.float64),
    }


def _encoded(
    arrays: dict[str, np.ndarray[Any, Any]], base: Manifest, encoding: Encoding, fraction: float
) -> dict[str, Any]:
    wire = wire_manifest(base, encoding, fraction)
    payload = b"".join(chunks(encode(arrays, base, encoding, fraction), wire))
    return {
        "encoding": int(encoding),
        "top_k_fraction": fraction,
        **_layout(wire),
        "payload": payload.hex(),
    }


def signatures() -> dict[str, Any]:
    """Section 1: a signature of each algorithm."""
    return {"cases": [_signature(algorithm) for algorithm in sorted(ONLINE_ALGORITHMS)]}


def _signature(algorithm: Algorithm) -> dict[str, Any]:
    label = f"signature {algorithm.name}"
    key = signing_key(label, algorithm)
    envelope = sign_envelope(key, SigningContext.TASK, b"what is signed")
    length_bytes = 64 if algorithm is Algorithm.ML_DSA_65_ED25519 else 32
    return {
        "algorithm": int(algorithm),
        "signing_seed": seed(label, length_bytes).hex(),
        "public_key": key.public.data.hex(),
        "key_id": key.public.key_id,
        "context": str(SigningContext.TASK),
        "envelope": envelope.SerializeToString().hex(),
    }


def write(folder: Path, files: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Write one file for each part."""
    for name, make in files.items():
        text = json.dumps(make(), indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Write all files beside this one."""
    from tests.vectors.protocol import (  # noqa: PLC0415 - all import this
        asynchronous,
        documents,
        exchanges,
        masking,
        neighbors,
    )

    write(FOLDER, {"hashes.json": hashes, "encodings.json": encodings})
    write(FOLDER, {"signatures.json": signatures})
    write(FOLDER, documents.FILES)
    write(FOLDER, exchanges.FILES)
    write(FOLDER, masking.FILES)
    write(FOLDER, asynchronous.FILES)
    write(FOLDER, neighbors.FILES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
