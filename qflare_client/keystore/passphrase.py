"""Passphrase encryption of key-store secrets: Argon2id and AES-256-GCM.

A file is ``magic (5) || salt (16) || nonce (12) || ciphertext || tag (16)``, with magic and salt authenticated. The
magic identifies the parameters of Argon2id; other parameters use another magic.

It does not keep the passphrase anywhere, or choose a good one.

Source: RFC 9106 section 4, second recommended option (64 MiB), for the parameters.
"""

import os
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from qflare.crypto.symmetric import SECRET_BYTES, UnsealError, decrypt, encrypt
from qflare_client import arguments
from qflare_client.errors import KeyStoreError, WrongPassphraseError
from qflare_client.keystore.store import SecretCoding

_MAGIC: Final = b"QFDK\x01"
_SALT_BYTES: Final = 16


def secret_coding(passphrase: str | None) -> SecretCoding:
    """Return the encryption of secrets under a passphrase; without one, only file permissions protect them.

    Raises:
        InvalidArgumentError: It is not a str.
        KeyStoreError: The passphrase is empty, because an empty file or variable must not leave the keys unencrypted.
    """
    if passphrase is None:
        return SecretCoding(bytes, _decode_plain)
    if not arguments.text("passphrase", passphrase, is_secret=True):
        raise KeyStoreError("the passphrase is empty: give one, or omit it for unencrypted keys")
    return passphrase_coding(passphrase)


def _decode_plain(data: bytes) -> bytes:
    if data.startswith(_MAGIC):
        raise WrongPassphraseError("the keys are under a passphrase: give it")
    return data


def passphrase_coding(passphrase: str) -> SecretCoding:
    """Return the encryption of secrets under a non-empty passphrase.

    The first use takes about a tenth of a second; later uses with the same salt take none. Files written by one
    instance share a salt.
    """

    @lru_cache(maxsize=4)
    def key(head: bytes) -> bytes:
        return _derive(passphrase.encode(), head)

    fresh = _MAGIC + os.urandom(_SALT_BYTES)

    def encode(data: bytes) -> bytes:
        return fresh + encrypt(key(fresh), data, fresh)

    def decode(data: bytes) -> bytes:
        head, rest = data[: len(fresh)], data[len(fresh) :]
        if not head.startswith(_MAGIC):
            raise WrongPassphraseError("the keys are not under a passphrase, but one was given")
        try:
            return decrypt(key(head), rest, head)
        except UnsealError:
            raise WrongPassphraseError("wrong passphrase, or the key file was altered") from None

    return SecretCoding(encode, decode)


def _derive(passphrase: bytes, head: bytes) -> bytes:
    return Argon2id(
        salt=head[len(_MAGIC) :],
        length=SECRET_BYTES,
        iterations=3,
        lanes=4,
        memory_cost=64 * 2**10,
    ).derive(passphrase)
