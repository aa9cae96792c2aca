"""What only the two sides of an exchange can compute, written from docs/protocol.md alone.

The other half of `tests.independent.verifier`, under the same rule: nothing of the product but its generated messages.
"""

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from qflare.v1 import security_pb2 as pb
from tests.independent.verifier import CHUNK_BYTES, RefusedError, leaf, require, tagged_hash

SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def sha256(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC of section 1."""
    return hmac.digest(key, message, "sha256")


def expand(key: bytes, info: bytes) -> bytes:
    """Expand of section 1."""
    return HKDFExpand(hashes.SHA256(), 32, info).derive(key)


def decrypt(key: bytes, encrypted: bytes, associated: bytes) -> bytes:
    """Undo Encrypt of section 1."""
    try:
        return AESGCM(key).decrypt(encrypted[:12], encrypted[12:], associated)
    except (InvalidTag, ValueError) as error:
        raise RefusedError("encrypted bytes do not open") from error


class KemKey:
    """An X-Wing private key (1), from its seed of 32 bytes."""

    def __init__(self, seed: bytes) -> None:
        expanded = hashlib.shake_256(seed).digest(96)
        self._lattice = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        self._curve = X25519PrivateKey.from_private_bytes(expanded[64:])

    @property
    def public(self) -> bytes:
        """The public key, 1216 bytes."""
        lattice = self._lattice.public_key().public_bytes_raw()
        return lattice + self._curve.public_key().public_bytes_raw()

    def decapsulate(self, encapsulation: bytes) -> bytes:
        """Recover a secret: the combiner of draft-connolly-cfrg-xwing-kem."""
        point = encapsulation[1088:]
        joined = self._lattice.decapsulate(encapsulation[:1088])
        joined += self._curve.exchange(X25519PublicKey.from_public_bytes(point))
        joined += point + self._curve.public_key().public_bytes_raw() + b"\\.//^\\"
        return hashlib.sha3_256(joined).digest()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Undo Seal (1)."""
        key = hpke.MLKEM768X25519PrivateKey(self._lattice, self._curve)
        try:
            return SUITE.decrypt(sealed, key, info)
        except InvalidTag as error:
            raise RefusedError("sealed bytes do not open") from error


def login_secrets(
    hello: pb.SessionHello, challenge: pb.SessionChallenge, first: bytes, second: bytes
) -> tuple[bytes, bytes]:
    """Transcript hash and prk of a login (5), from the two encapsulated secrets."""
    transcript = tagged_hash(
        "qflare/v1/session transcript",
        hello.protocol_version.to_bytes(4, "big"),
        hello.realm.encode(),
        hello.device_id.encode(),
        hello.signature_key_id.encode(),
        hello.server_kem_key_id.encode(),
        hello.nonce,
        hello.ephemeral_key,
        hello.encapsulation,
        challenge.nonce,
        challenge.session_id.encode(),
        challenge.encapsulation,
        challenge.tls_group.encode(),
    )
    return transcript, mac(b"qflare/v1/session" + transcript, first + second)


def open_segments(key: bytes, header: bytes, segments: Sequence[bytes]) -> Iterator[bytes]:
    """Open a sealed payload (12)."""
    require(header[10:42] == hashlib.sha256(b"qflare/v1/dek" + key).digest(), "another key")
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        require(last or len(segment) == CHUNK_BYTES, "a segment is short")
        nonce = index.to_bytes(11, "big") + bytes([last])
        associated = b"" if index else hashlib.sha256(header).digest()
        try:
            yield AESGCM(key).decrypt(nonce, segment, associated)
        except InvalidTag as error:
            raise RefusedError("a segment does not open") from error


def audit_leaf(entry: Mapping[str, Any], salt: bytes) -> bytes:
    """Leaf hash of an audit entry (11), its details given as texts."""
    named = sorted((name.encode(), text.encode()) for name, text in entry["details"].items())
    texts = [entry[name].encode() for name in ("actor", "subject", "peer_address")]
    flat = [part for pair in named for part in pair]
    data = b"QFAE\x01" + entry["audit_id"].to_bytes(8, "big")
    data += entry["microseconds"].to_bytes(8, "big", signed=True) + bytes([entry["risk"]])
    for name in ("event_type", "authentication_method"):
        text = entry[name].encode()
        data += len(text).to_bytes(2, "big") + text
    return leaf(data + tagged_hash("qflare/v1/audit", salt, *texts, *flat))
