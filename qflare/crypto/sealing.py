"""X-Wing keys and HPKE sealing; the only module that calls the KEM libraries.

X-Wing (draft-connolly-cfrg-xwing-kem) combines ML-KEM-768 and X25519: a secret is safe while either
is secure. `KemPublicKey.encapsulate` and `KemKey.decapsulate` agree on 32 bytes, which the protocol
feeds into `qflare.crypto.symmetric`. `seal` and `open_sealed` are HPKE base mode (RFC 9180,
draft-ietf-hpke-pq): KEM 0x647A, HKDF-SHA256, AES-256-GCM, single shot, empty AAD. Opening takes a
`Decapsulate` function, so the private key may live in another process or in hardware.

Providers
    Microseconds on one EPYC core, ``pqcrypto`` 1.0 / ``cryptography`` 50, ML-KEM-768 alone: generate
    63 / 142, encapsulate 74 / 28, decapsulate 93 / 31. So encapsulation and stored keys use
    ``cryptography``; a key that decapsulates once (a login's ephemeral key) is cheaper with
    ``pqcrypto``. Stored keys are seeds (32 bytes) of ``cryptography`` or expanded keys of ``pqcrypto``.

Invariants
    An invalid ciphertext, key, tag or length raises `UnsealError`, which does not say which one it
    was. A KEM key is tested by an encapsulation before it is returned. There is no negotiation, and no
    fallback to either half of X-Wing. Secrets have no repr.
"""

import contextlib
import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Final, NamedTuple, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qflare.crypto.signing import CryptoUnavailableError, InvalidKeyError, Provider, key_id_of
from qflare.crypto.symmetric import SECRET_BYTES, UnsealError, hkdf_expand, mac
from qflare.v1 import security_pb2

__all__ = [
    "ENCAPSULATION_BYTES",
    "PUBLIC_KEY_BYTES",
    "SEAL_OVERHEAD_BYTES",
    "SECRET_BYTES",
    "Decapsulate",
    "Encapsulation",
    "KemKey",
    "KemPublicKey",
    "UnsealError",
    "open_sealed",
    "seal",
    "self_test",
]

PUBLIC_KEY_BYTES: Final = 1216
"""Length of an X-Wing public key: ML-KEM-768 (1184) and X25519 (32)."""

ENCAPSULATION_BYTES: Final = 1120
"""Length of an X-Wing ciphertext: ML-KEM-768 (1088) and X25519 (32)."""

SEAL_OVERHEAD_BYTES: Final = ENCAPSULATION_BYTES + 16
"""What `seal` adds to a plaintext."""

Decapsulate = Callable[[bytes], bytes]
"""Recovers the secret (32 bytes) of an encapsulation (1120 bytes); `KemKey.decapsulate` is one."""

_X25519_BYTES: Final = 32
_EXPANDED_BYTES: Final = 2400
_LABEL: Final = bytes.fromhex("5c2e2f2f5e5c")
_KEM_ID: Final = security_pb2.KEM_ALGORITHM_X_WING
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_SUITE_ID: Final = b"HPKE" + struct.pack(">HHH", _KEM_ID, 0x0001, 0x0002)


_PQCRYPTO: Any = None
with contextlib.suppress(ImportError):
    _PQCRYPTO = import_module("pqcrypto.kem.ml_kem_768")
try:
    MLKEM768PrivateKey.generate()
except UnsupportedAlgorithm as unsupported:
    raise CryptoUnavailableError("cryptography is built without ML-KEM") from unsupported


class Encapsulation(NamedTuple):
    """Result of an encapsulation.

    Attributes:
        secret: 32 bytes that the owner of the key recovers.
        ciphertext: 1120 bytes to send.
    """

    secret: bytes
    ciphertext: bytes

    def __repr__(self) -> str:
        return "Encapsulation(...)"


@dataclass(frozen=True)
class KemPublicKey:
    """An X-Wing public key.

    Attributes:
        data: Its 1216 bytes.

    Raises:
        InvalidKeyError: The length is wrong, or a coefficient is out of range (FIPS 203, 7.2).
    """

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.data) != PUBLIC_KEY_BYTES:
            raise InvalidKeyError(f"KEM key has {len(self.data)} bytes, want {PUBLIC_KEY_BYTES}")
        try:
            self._halves  # noqa: B018 - reads, and thereby checks, the key
        except ValueError as error:
            raise InvalidKeyError("KEM key is not valid") from error

    @cached_property
    def key_id(self) -> str:
        """Name of the key, 64 hex digits."""
        return key_id_of(_KEM_ID, self.data)

    def encapsulate(self, *, provider: Provider = Provider.CRYPTOGRAPHY) -> Encapsulation:
        """Generate a secret that only the owner of the key can recover.

        Raises:
            UnsealError: The key leads to no secret (an X25519 point of small order).
        """
        lattice, curve = self._halves
        ephemeral = X25519PrivateKey.generate()
        try:
            if provider is Provider.PQCRYPTO:
                lattice_ct, lattice_secret = _pqcrypto().encaps(self.data[:-_X25519_BYTES])
            else:
                lattice_secret, lattice_ct = lattice.encapsulate()
            curve_secret = ephemeral.exchange(curve)
        except ValueError as error:
            raise UnsealError("cannot encapsulate to the key") from error
        curve_ct = ephemeral.public_key().public_bytes_raw()
        curve_public = self.data[-_X25519_BYTES:]
        secret = _combine(lattice_secret, curve_secret, curve_ct, curve_public)
        return Encapsulation(secret, lattice_ct + curve_ct)

    def to_proto(self) -> security_pb2.KemPublicKey:
        """The key as a message."""
        return security_pb2.KemPublicKey(key_id=self.key_id, algorithm=_KEM_ID, data=self.data)

    @classmethod
    def from_proto(cls, message: security_pb2.KemPublicKey) -> Self:
        """Read a key from a message.

        Raises:
            InvalidKeyError: Unknown algorithm, malformed key, or a key id of another key.
        """
        if message.algorithm != _KEM_ID:
            raise InvalidKeyError(
                f"unknown KEM algorithm {message.algorithm}"
                "; if a later release made it, upgrade qflare"
            )
        key = cls(message.data)
        if key.key_id != message.key_id:
            raise InvalidKeyError("key id does not belong to the key")
        return key

    @cached_property
    def _halves(self) -> tuple[MLKEM768PublicKey, X25519PublicKey]:
        lattice = MLKEM768PublicKey.from_public_bytes(self.data[:-_X25519_BYTES])
        return lattice, X25519PublicKey.from_public_bytes(self.data[-_X25519_BYTES:])


_KEY_MAGIC: Final = b"QFKK\x01"
_FORMS: Final = {Provider.CRYPTOGRAPHY: b"\x01\x01", Provider.PQCRYPTO: b"\x02\x02"}
_SECRET_BYTES: Final = {
    Provider.CRYPTOGRAPHY: SECRET_BYTES,
    Provider.PQCRYPTO: _EXPANDED_BYTES + _X25519_BYTES,
}


class KemKey:
    """An X-Wing private key in memory. Make one by `generate` or `from_bytes`.

    Args:
        provider: Library that decapsulates ML-KEM.
        secret: For ``cryptography`` the X-Wing seed (32 bytes), for ``pqcrypto`` the expanded
            ML-KEM-768 key and the X25519 key (2432 bytes).

    Raises:
        InvalidKeyError: The secret is malformed.
        CryptoUnavailableError: The provider is not available.
    """

    __slots__ = ("_curve", "_decapsulate", "_secret", "provider", "public")

    public: KemPublicKey
    """The public key."""

    def __init__(self, provider: Provider, secret: bytes) -> None:
        if len(secret) != _SECRET_BYTES[provider]:
            raise InvalidKeyError(f"KEM secret has {len(secret)} bytes")
        self.provider = provider
        self._secret = secret
        lattice_public = self._load()
        self.public = KemPublicKey(lattice_public + self._curve.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, *, provider: Provider = Provider.CRYPTOGRAPHY) -> Self:
        """Generate a long-lived key pair from system randomness.

        Raises:
            CryptoUnavailableError: The provider is not available, or its key fails the self-test.
        """
        key = cls(provider, _fresh_secret(provider))
        try:
            key.self_test()
        except InvalidKeyError as error:
            raise CryptoUnavailableError(f"KEM of {provider} fails its self-test") from error
        return key

    @classmethod
    def ephemeral(cls) -> Self:
        """Generate a key pair for one decapsulation, with the fastest provider."""
        provider = Provider.CRYPTOGRAPHY if _PQCRYPTO is None else Provider.PQCRYPTO
        return cls(provider, _fresh_secret(provider))

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Recover the secret, 32 bytes. A changed ciphertext gives another secret (FIPS 203).

        Raises:
            UnsealError: The length is wrong, or the X25519 half is a point of small order.
        """
        if len(ciphertext) != ENCAPSULATION_BYTES:
            raise UnsealError(f"encapsulation has {len(ciphertext)} bytes")
        lattice_ct, curve_ct = ciphertext[:-_X25519_BYTES], ciphertext[-_X25519_BYTES:]
        try:
            lattice_secret = self._decapsulate(lattice_ct)
            curve_secret = self._curve.exchange(X25519PublicKey.from_public_bytes(curve_ct))
        except ValueError as error:
            raise UnsealError("encapsulation is not valid") from error
        curve_public = self.public.data[-_X25519_BYTES:]
        return _combine(lattice_secret, curve_secret, curve_ct, curve_public)

    def to_bytes(self) -> bytes:
        """Serialize, unencrypted: magic, provider, form, key id, secret."""
        key_id = bytes.fromhex(self.public.key_id)
        return _KEY_MAGIC + _FORMS[self.provider] + key_id + self._secret

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote and test the key.

        Raises:
            InvalidKeyError: It is malformed, or the secret is not that of the key id.
        """
        form = data[len(_KEY_MAGIC) : len(_KEY_MAGIC) + 2]
        provider = next((p for p, f in _FORMS.items() if f == form), None)
        if not data.startswith(_KEY_MAGIC) or provider is None:
            raise InvalidKeyError("not a KEM key")
        start = len(_KEY_MAGIC) + len(form) + hashlib.sha256().digest_size
        key = cls(provider, data[start:])
        if not hmac.compare_digest(data, key.to_bytes()):
            raise InvalidKeyError("the secret does not belong to the key id")
        key.self_test()
        return key

    def self_test(self) -> None:
        """Encapsulate to the key and recover the secret.

        Raises:
            InvalidKeyError: The secret is another.
        """
        try:
            encapsulation = self.public.encapsulate()
            secret = self.decapsulate(encapsulation.ciphertext)
        except UnsealError as error:
            raise InvalidKeyError("KEM key fails its self-test") from error
        if not hmac.compare_digest(secret, encapsulation.secret):
            raise InvalidKeyError("KEM key fails its self-test")

    def _load(self) -> bytes:
        """Load both halves of the secret and return the public half of ML-KEM."""
        if self.provider is Provider.CRYPTOGRAPHY:
            expanded = hashlib.shake_256(self._secret).digest(96)
            lattice = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
            self._curve = X25519PrivateKey.from_private_bytes(expanded[64:])
            self._decapsulate: Decapsulate = lattice.decapsulate
            return lattice.public_key().public_bytes_raw()
        library, secret = _pqcrypto(), self._secret[:_EXPANDED_BYTES]
        self._curve = X25519PrivateKey.from_private_bytes(self._secret[_EXPANDED_BYTES:])
        self._decapsulate = lambda ciphertext: bytes(library.decaps(secret, ciphertext))
        return secret[1152:2336]  # FIPS 203 algorithm 16: dk = s || ek || H(ek) || z


def _pqcrypto() -> Any:
    if _PQCRYPTO is None:
        raise CryptoUnavailableError("pqcrypto is not installed")
    return _PQCRYPTO


def _fresh_secret(provider: Provider) -> bytes:
    if provider is Provider.CRYPTOGRAPHY:
        return os.urandom(SECRET_BYTES)
    _public, expanded = _pqcrypto().keygen()
    return bytes(expanded) + os.urandom(_X25519_BYTES)


def _combine(
    lattice_secret: bytes, curve_secret: bytes, curve_ct: bytes, curve_public: bytes
) -> bytes:
    """The X-Wing combiner, section 5.3 of the draft."""
    joined = lattice_secret + curve_secret + curve_ct + curve_public + _LABEL
    return hashlib.sha3_256(joined).digest()


def seal(key: KemPublicKey, plaintext: bytes, info: bytes) -> bytes:
    """Seal a plaintext to a key: encapsulation (1120 bytes), ciphertext and tag (16 bytes).

    Args:
        key: Recipient.
        plaintext: Any length that fits in memory.
        info: Public context known to both sides.

    Raises:
        UnsealError: The key leads to no secret.
    """
    recipient = hpke.MLKEM768X25519PublicKey(*key._halves)  # noqa: SLF001 - same module
    try:
        return _SUITE.encrypt(plaintext, recipient, info)
    except ValueError as error:
        raise UnsealError("cannot seal to the key") from error


def open_sealed(decapsulate: Decapsulate, sealed: bytes, info: bytes) -> bytes:
    """Open what `seal` made.

    Raises:
        UnsealError: It was sealed to another key, under another info, or was changed.
    """
    if len(sealed) < SEAL_OVERHEAD_BYTES:
        raise UnsealError("sealed bytes are too short")
    secret = decapsulate(sealed[:ENCAPSULATION_BYTES])
    key, nonce = _key_schedule(secret, info)
    try:
        return AESGCM(key).decrypt(nonce, sealed[ENCAPSULATION_BYTES:], None)
    except InvalidTag as error:
        raise UnsealError("sealed bytes do not open") from error


def _key_schedule(shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and nonce of the first message in base mode, RFC 9180 section 5.1."""
    psk_id_hash = _labeled_extract(b"", b"psk_id_hash", b"")
    context = b"\x00" + psk_id_hash + _labeled_extract(b"", b"info_hash", info)
    secret = _labeled_extract(shared_secret, b"secret", b"")
    key = _labeled_expand(secret, b"key", context, 32)
    return key, _labeled_expand(secret, b"base_nonce", context, 12)


def _labeled_extract(salt: bytes, label: bytes, material: bytes) -> bytes:
    return mac(salt, b"HPKE-v1" + _SUITE_ID + label + material)


def _labeled_expand(secret: bytes, label: bytes, info: bytes, length_bytes: int) -> bytes:
    labeled = struct.pack(">H", length_bytes) + b"HPKE-v1" + _SUITE_ID + label + info
    return hkdf_expand(secret, labeled, length_bytes)


def self_test() -> None:
    """Seal with HPKE of ``cryptography`` and open with a fresh key of each provider.

    Call at program start; takes a few milliseconds.

    Raises:
        CryptoUnavailableError: A provider fails.
    """
    for provider in Provider:
        if provider is Provider.PQCRYPTO and _PQCRYPTO is None:
            continue
        key = KemKey.generate(provider=provider)
        try:
            opened = open_sealed(key.decapsulate, seal(key.public, b"start", b"test"), b"test")
        except UnsealError as error:
            raise CryptoUnavailableError("sealing fails its self-test") from error
        if opened != b"start":
            raise CryptoUnavailableError("sealing fails its self-test")
