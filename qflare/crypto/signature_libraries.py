"""Adapters for the ML-DSA and SLH-DSA libraries, used by `crypto.signing`.

Each adapter takes and returns plain bytes: a secret in the library's own form, a message with its
FIPS 204 context. A key or signature that it does not accept raises `ValueError` or
`cryptography.exceptions.InvalidSignature`; lengths are checked by the caller.

Deliberately unused, because pqcrypto 1.0 deviates from FIPS 204: its
``hash_algorithm`` (it does not hash), contexts above 253 bytes (refused) and messages above 1 MiB
(a valid signature is rejected).
"""

import contextlib
from collections.abc import Callable
from enum import IntEnum, StrEnum
from importlib import import_module
from typing import Any, Final, NamedTuple, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from qflare.v1 import security_pb2


class CryptoUnavailableError(RuntimeError):
    """No provider of the required cryptography is available, or it fails its self-test."""


class Algorithm(IntEnum):
    """Signature algorithms, numbered as in ``qflare.v1.SignatureAlgorithm``."""

    ML_DSA_44 = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_44
    ML_DSA_65 = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_65
    ML_DSA_87 = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_87
    ML_DSA_65_ED25519 = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_65_ED25519
    SLH_DSA_SHA2_128S = security_pb2.SIGNATURE_ALGORITHM_SLH_DSA_SHA2_128S


class Provider(StrEnum):
    """Library that holds a private key."""

    PQCRYPTO = "pqcrypto"
    CRYPTOGRAPHY = "cryptography"


class Sizes(NamedTuple):
    """Lengths of an algorithm's keys and signatures; ``cryptography`` stores seeds, 0 where it has none."""

    public_bytes: int
    seed_bytes: int
    expanded_bytes: int
    signature_bytes: int


_ED25519_BYTES: Final = 32
SIZES: Final = {
    Algorithm.ML_DSA_44: Sizes(1312, 32, 2560, 2420),
    Algorithm.ML_DSA_65: Sizes(1952, 32, 4032, 3309),
    Algorithm.ML_DSA_87: Sizes(2592, 32, 4896, 4627),
    Algorithm.ML_DSA_65_ED25519: Sizes(1952 + 32, 32 + 32, 4032 + 32, 3309 + 64),
    Algorithm.SLH_DSA_SHA2_128S: Sizes(32, 0, 64, 7856),
}


class KeyPair(NamedTuple):
    """A fresh key pair as bytes."""

    secret: bytes
    public: bytes


SignFunction = Callable[[bytes, bytes], bytes]
"""``sign(message, context)`` gives the signature."""

VerifyFunction = Callable[[bytes, bytes, bytes], None]
"""``verify(signature, message, context)`` raises unless it is valid."""


class Library(Protocol):
    """Signatures of one provider."""

    def generate(self, algorithm: Algorithm) -> KeyPair:
        """Generate a key pair from system randomness."""

    def signer(self, algorithm: Algorithm, secret: bytes) -> SignFunction:
        """Load a secret."""

    def verifier(self, algorithm: Algorithm, public: bytes) -> VerifyFunction:
        """Load a public key."""


class _Pqcrypto:
    """Expanded keys; has SLH-DSA. ``verify`` returns None for a valid signature and raises for any other."""

    def __init__(self) -> None:
        own = [a for a in SIZES if a is not Algorithm.ML_DSA_65_ED25519]
        names = {a: f"pqcrypto.sign.{a.name.lower()}" for a in own}
        self._modules: dict[Algorithm, Any] = {a: import_module(n) for a, n in names.items()}

    def generate(self, algorithm: Algorithm) -> KeyPair:
        public, secret = self._modules[algorithm].keygen()
        return KeyPair(secret, public)

    def signer(self, algorithm: Algorithm, secret: bytes) -> SignFunction:
        module = self._modules[algorithm]

        def sign(message: bytes, context: bytes) -> bytes:
            try:
                return bytes(module.sign(secret, message, context))
            except ValueError:  # its rejection loop is bounded: fails once in 10**6, so try again
                return bytes(module.sign(secret, message, context))

        return sign

    def verifier(self, algorithm: Algorithm, public: bytes) -> VerifyFunction:
        module = self._modules[algorithm]

        def verify(signature: bytes, message: bytes, context: bytes) -> None:
            if module.verify(public, message, signature, context) is not None:
                raise ValueError("unexpected answer of the library")

        return verify


_PrivateKeyType = (
    type[mldsa.MLDSA44PrivateKey] | type[mldsa.MLDSA65PrivateKey] | type[mldsa.MLDSA87PrivateKey]
)
_PublicKeyType = (
    type[mldsa.MLDSA44PublicKey] | type[mldsa.MLDSA65PublicKey] | type[mldsa.MLDSA87PublicKey]
)


class _Cryptography:
    """Seed keys; releases the interpreter lock."""

    _KEYS: Final[dict[Algorithm, tuple[_PrivateKeyType, _PublicKeyType]]] = {
        Algorithm.ML_DSA_44: (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
        Algorithm.ML_DSA_65: (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
        Algorithm.ML_DSA_87: (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
    }

    def __init__(self) -> None:
        mldsa.MLDSA65PrivateKey.generate()  # raises where the build has no ML-DSA

    def generate(self, algorithm: Algorithm) -> KeyPair:
        key = self._KEYS[algorithm][0].generate()
        return KeyPair(key.private_bytes_raw(), key.public_key().public_bytes_raw())

    def signer(self, algorithm: Algorithm, secret: bytes) -> SignFunction:
        return self._KEYS[algorithm][0].from_seed_bytes(secret).sign

    def verifier(self, algorithm: Algorithm, public: bytes) -> VerifyFunction:
        return self._KEYS[algorithm][1].from_public_bytes(public).verify


class _Hybrid:
    """ML-DSA-65 and Ed25519, each over the same framed message; both have to verify.

    The frame names the pair and the context, so neither half is a signature of its own: a half cut
    out of a hybrid signature verifies under no other algorithm.
    """

    _LABEL: Final = b"qflare/v1/ML-DSA-65-Ed25519\x00"

    def __init__(self, library: Library) -> None:
        self._library = library

    def generate(self, _algorithm: Algorithm) -> KeyPair:
        lattice = self._library.generate(Algorithm.ML_DSA_65)
        curve = Ed25519PrivateKey.generate()
        return KeyPair(
            lattice.secret + curve.private_bytes_raw(),
            lattice.public + curve.public_key().public_bytes_raw(),
        )

    def signer(self, _algorithm: Algorithm, secret: bytes) -> SignFunction:
        lattice = self._library.signer(Algorithm.ML_DSA_65, secret[:-_ED25519_BYTES])
        curve = Ed25519PrivateKey.from_private_bytes(secret[-_ED25519_BYTES:])

        def sign(message: bytes, context: bytes) -> bytes:
            framed = self._frame(message, context)
            return lattice(framed, context) + curve.sign(framed)

        return sign

    def verifier(self, _algorithm: Algorithm, public: bytes) -> VerifyFunction:
        lattice = self._library.verifier(Algorithm.ML_DSA_65, public[:-_ED25519_BYTES])
        curve = Ed25519PublicKey.from_public_bytes(public[-_ED25519_BYTES:])
        split = SIZES[Algorithm.ML_DSA_65].signature_bytes

        def verify(signature: bytes, message: bytes, context: bytes) -> None:
            framed = self._frame(message, context)
            lattice(signature[:split], framed, context)
            curve.verify(signature[split:], framed)

        return verify

    def _frame(self, message: bytes, context: bytes) -> bytes:
        return self._LABEL + bytes([len(context)]) + context + message


def _load_libraries() -> dict[Provider, Library]:
    libraries: dict[Provider, Library] = {}
    with contextlib.suppress(UnsupportedAlgorithm):  # OpenSSL before 3.5
        libraries[Provider.CRYPTOGRAPHY] = _Cryptography()
    with contextlib.suppress(ImportError):
        libraries[Provider.PQCRYPTO] = _Pqcrypto()
    if not libraries:
        raise CryptoUnavailableError("neither pqcrypto nor cryptography offers ML-DSA")
    return libraries


LIBRARIES: Final = _load_libraries()
"""The providers that work here, the preferred first; never empty."""


def providers_of(algorithm: Algorithm) -> tuple[Provider, ...]:
    """Return the available providers of an algorithm, the preferred first; may be empty."""
    if algorithm is Algorithm.SLH_DSA_SHA2_128S:
        return tuple(provider for provider in LIBRARIES if provider is Provider.PQCRYPTO)
    return tuple(LIBRARIES)


def library_for(provider: Provider, algorithm: Algorithm) -> Library:
    """The library of a provider, paired with Ed25519 for the hybrid algorithm.

    Raises:
        CryptoUnavailableError: The provider is not available, or does not support the algorithm.
    """
    library = LIBRARIES.get(provider)
    if library is None or provider not in providers_of(algorithm):
        raise CryptoUnavailableError(f"provider {provider} offers no {algorithm.name} here")
    return _Hybrid(library) if algorithm is Algorithm.ML_DSA_65_ED25519 else library
