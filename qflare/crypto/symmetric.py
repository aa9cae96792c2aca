"""Symmetric cryptography: key derivation, message authentication and encryption.

HKDF and HMAC with SHA-256, AES-256-GCM. None of these is broken by known quantum
attacks. A failed check or decryption raises an `UnsealError` that does not state the cause.
"""

import hmac
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

SECRET_BYTES: Final = 32
"""Length of every symmetric key, MAC and encapsulated secret."""


class UnsealError(ValueError):
    """Sealed bytes, an encapsulation or a MAC is invalid."""


def hkdf_expand(key: bytes, info: bytes, length_bytes: int = SECRET_BYTES) -> bytes:
    """Derive a key from a uniformly random one: HKDF-Expand with SHA-256 (RFC 5869)."""
    return HKDFExpand(hashes.SHA256(), length_bytes, info).derive(key)


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(key, message, "sha256")


def check_mac(key: bytes, message: bytes, tag: bytes) -> None:
    """Verify a MAC made by `mac`.

    Raises:
        UnsealError: It is not the MAC of the message.
    """
    check_equal(mac(key, message), tag)


def check_equal(expected: bytes, received: bytes) -> None:
    """Compare two MACs in constant time.

    Raises:
        UnsealError: They differ.
    """
    if not hmac.compare_digest(expected, received):
        raise UnsealError("MAC does not match")


def encrypt(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypt under a symmetric key: random nonce (12 bytes), AES-256-GCM ciphertext, tag.

    At most 2**32 messages per key (SP 800-38D section 8.3).
    """
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, associated)


def decrypt(key: bytes, encrypted: bytes, associated: bytes) -> bytes:
    """Decrypt what `encrypt` made.

    Raises:
        UnsealError: Another key or associated data, or it was changed.
    """
    try:
        return AESGCM(key).decrypt(encrypted[:12], encrypted[12:], associated)
    except (InvalidTag, ValueError) as error:
        raise UnsealError("encrypted bytes do not open") from error
