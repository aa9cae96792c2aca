"""Post-quantum signatures, over the libraries that `qflare.crypto.signature_libraries` adapts.

A signature is made under a `SigningContext`, the FIPS 204 context string of one message type, so a
signature of one type is never valid for another. Public keys are named by a hash over algorithm and
bytes (`PublicKey.key_id`). `qflare.crypto.envelope` carries signed messages.

Providers
    ``pqcrypto`` and ``cryptography`` (OpenSSL) make and accept the same ML-DSA signatures; the
    tests check each with the other. Keys of ``cryptography`` are seeds (32 bytes), keys of
    ``pqcrypto`` are expanded and cannot be moved to the other, so a stored key says which it is.
    Measured on one EPYC core, ML-DSA-65, ``pqcrypto`` 1.0 / ``cryptography`` 50:

    ========  ==========  ==========  ==============================================
    sign      9.0 ms      1.0 ms      ``pqcrypto`` holds the interpreter lock
    verify    0.22 ms     0.19 ms     10 % less for a key that was used before
    generate  0.22 ms     0.22 ms
    ========  ==========  ==========  ==============================================

    Hence every operation prefers ``cryptography``, on the coordinator because other threads would
    wake 8 ms late, on a device because it is nine times faster; ``pqcrypto`` serves where the
    build of ``cryptography`` has no ML-DSA, or where a caller asks for it. SLH-DSA-SHA2-128s is
    provided by ``pqcrypto`` only (sign 260 ms, verify 0.3 ms): for root keys, which sign a few times a year.

Invariants
    Without any provider the import fails. A key signs and verifies a message before it is
    returned. There is no fallback to another algorithm. Secrets have no repr and compare by identity;
    Python cannot wipe them from memory.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Final, Protocol, Self

from cryptography.exceptions import InvalidSignature

from qflare.crypto.hashing import feed
from qflare.crypto.signature_libraries import (
    LIBRARIES,
    SIZES,
    Algorithm,
    CryptoUnavailableError,
    Provider,
    VerifyFunction,
    library_for,
    providers_of,
)
from qflare.v1 import security_pb2

__all__ = [
    "DEFAULT_PROVIDER",
    "MAX_MESSAGE_BYTES",
    "ONLINE_ALGORITHMS",
    "Algorithm",
    "CryptoUnavailableError",
    "InvalidKeyError",
    "InvalidSignatureError",
    "Provider",
    "PublicKey",
    "Signer",
    "SigningContext",
    "SigningError",
    "SigningKey",
    "algorithm_named",
    "algorithm_names",
    "algorithm_of",
    "key_id_of",
    "self_test",
    "tagged_hash",
    "wire_algorithm",
]

MAX_MESSAGE_BYTES: Final = 65_536
"""Longest message that is signed; payloads are vouched for by a digest."""


class InvalidSignatureError(ValueError):
    """A signature does not verify, or was not made by the key, context or algorithm expected."""


class InvalidKeyError(ValueError):
    """A key is malformed, or fails its self-test."""


class SigningError(RuntimeError):
    """The provider could not make a signature."""


class SigningContext(StrEnum):
    """Type of the signed message; the FIPS 204 context string."""

    ROOT = "qflare/v1/root"
    KEYSET = "qflare/v1/keyset"
    ENROLLMENT = "qflare/v1/enroll"
    RECEIPT = "qflare/v1/receipt"
    ROTATION = "qflare/v1/rotate"
    SESSION = "qflare/v1/session-device"
    TASK = "qflare/v1/task"
    UPDATE = "qflare/v1/update"
    EVALUATION = "qflare/v1/evaluation"
    MODEL = "qflare/v1/model"
    TREE_HEAD = "qflare/v1/sth"
    HELPER = "qflare/v1/helper"
    UNMASKING_REQUEST = "qflare/v1/unmasking-request"
    UNMASKING_ANSWER = "qflare/v1/unmasking-answer"
    NEIGHBOR_ADVERTISEMENT = "qflare/v1/neighbor-advertisement"
    NEIGHBOR_SHARES = "qflare/v1/neighbor-shares"
    NEIGHBOR_CONFIRMATION = "qflare/v1/neighbor-confirmation"
    NEIGHBOR_REVEAL = "qflare/v1/neighbor-reveal"
    SELF_TEST = "qflare/v1/self-test"


def tagged_hash(tag: str, *parts: bytes) -> bytes:
    """SHA-256 over a tag and length-prefixed parts, so that distinct inputs never collide by concatenation.

    ``SHA-256(tag || for each part: length as 8 bytes big-endian || part)``. Tags hold no NUL byte.
    """
    digest = hashlib.sha256(tag.encode())
    for part in parts:
        digest.update(struct.pack(">Q", len(part)))
        feed(digest, part)
    return digest.digest()


def key_id_of(algorithm: int, data: bytes) -> str:
    """Name of a public key: SHA-256("qflare/v1/key" || algorithm as 2 bytes || data) in hex."""
    return hashlib.sha256(b"qflare/v1/key" + struct.pack(">H", algorithm) + data).hexdigest()


DEFAULT_PROVIDER: Final = next(iter(LIBRARIES))
"""Provider of ML-DSA unless the caller or the key says otherwise; see the module's figures."""

ONLINE_ALGORITHMS: Final = frozenset(Algorithm) - {Algorithm.SLH_DSA_SHA2_128S}
"""Algorithms of keys that sign often: of devices, and of the coordinator's online roles."""


@dataclass(frozen=True)
class PublicKey:
    """A public key that verifies signatures.

    Attributes:
        algorithm: Signature algorithm.
        data: Key bytes, of the length that the algorithm defines.

    Raises:
        InvalidKeyError: The algorithm is unknown or the length is wrong.
    """

    algorithm: Algorithm
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_length("public key", self.data, SIZES[self.algorithm].public_bytes)

    @cached_property
    def key_id(self) -> str:
        """Name of the key, 64 hex digits."""
        return key_id_of(self.algorithm, self.data)

    def verify(
        self,
        context: SigningContext,
        message: bytes,
        signature: bytes,
        *,
        provider: Provider | None = None,
    ) -> None:
        """Check a signature of this key, by the preferred provider unless one is named.

        Raises:
            InvalidSignatureError: It is not valid for this key, context and message.
        """
        if len(message) > MAX_MESSAGE_BYTES:
            raise InvalidSignatureError(f"message is longer than {MAX_MESSAGE_BYTES} bytes")
        if len(signature) != SIZES[self.algorithm].signature_bytes:
            raise InvalidSignatureError(f"signature has {len(signature)} bytes")
        try:
            self._verifier(provider)(bytes(signature), bytes(message), context.encode())
        except (InvalidSignature, ValueError) as error:
            raise InvalidSignatureError("signature does not verify") from error

    def to_proto(self) -> security_pb2.PublicKey:
        """The key as a message."""
        return security_pb2.PublicKey(
            key_id=self.key_id, algorithm=wire_algorithm(self.algorithm), data=self.data
        )

    @classmethod
    def from_proto(cls, message: security_pb2.PublicKey) -> Self:
        """Read a key from a message.

        Raises:
            InvalidKeyError: Unknown algorithm, wrong length, or a key id of another key.
        """
        key = cls(algorithm_of(message.algorithm), message.data)
        if key.key_id != message.key_id:
            raise InvalidKeyError("key id does not belong to the key")
        return key

    def _verifier(self, provider: Provider | None) -> VerifyFunction:
        if provider is not None:
            return library_for(provider, self.algorithm).verifier(self.algorithm, self.data)
        return self._default_verifier

    @cached_property
    def _default_verifier(self) -> VerifyFunction:
        provider = preferred_provider(self.algorithm)
        return library_for(provider, self.algorithm).verifier(self.algorithm, self.data)


def preferred_provider(algorithm: Algorithm) -> Provider:
    """Return the default provider of an algorithm.

    Raises:
        CryptoUnavailableError: No provider supports the algorithm.
    """
    for provider in providers_of(algorithm):
        return provider
    raise CryptoUnavailableError(f"no provider here offers {algorithm.name}")


def algorithm_names(algorithms: Iterable[Algorithm]) -> list[str]:
    """Return the user-facing algorithm names, such as ml-dsa-65-ed25519, in the order of their numbers."""
    return [algorithm.name.lower().replace("_", "-") for algorithm in sorted(algorithms)]


def algorithm_named(name: str) -> Algorithm:
    """Return the algorithm with a name from `algorithm_names`.

    Raises:
        InvalidKeyError: The name is unknown; the message lists the known names.
    """
    names = dict(zip(algorithm_names(Algorithm), sorted(Algorithm), strict=True))
    if name not in names:
        raise InvalidKeyError(
            f"signature algorithm: got {name[:64]!r}, want one of {', '.join(names)}"
        )
    return names[name]


def algorithm_of(number: int) -> Algorithm:
    """Return the algorithm with a wire number.

    Raises:
        InvalidKeyError: The number is unknown.
    """
    try:
        return Algorithm(number)
    except ValueError as error:
        raise InvalidKeyError(
            f"unknown signature algorithm {number}; if a later release made it, upgrade qflare"
        ) from error


def wire_algorithm(algorithm: Algorithm) -> security_pb2.SignatureAlgorithm.ValueType:
    """Return the wire number of an algorithm."""
    return security_pb2.SignatureAlgorithm.ValueType(int(algorithm))


class Signer(Protocol):
    """Holder of a private key: a `SigningKey`, or a key in a hardware security module."""

    @property
    def public(self) -> PublicKey:
        """The public key."""

    def sign(self, context: SigningContext, message: bytes) -> bytes:
        """Sign at most `MAX_MESSAGE_BYTES`."""


_KEY_MAGIC: Final = b"QFSK\x01"
_KEY_HEAD: Final = struct.Struct(">HBB")
_PROVIDER_FORMS: Final = {Provider.CRYPTOGRAPHY: (1, 1), Provider.PQCRYPTO: (2, 2)}


class SigningKey:
    """A private key in memory, of one provider. Make one by `generate` or `from_bytes`."""

    __slots__ = ("_provider", "_secret", "_sign", "public")

    public: PublicKey
    """The public key."""

    def __init__(self, public: PublicKey, provider: Provider, secret: bytes) -> None:
        self.public = public
        self._provider = provider
        self._secret = secret
        try:
            self._sign = library_for(provider, public.algorithm).signer(public.algorithm, secret)
            public.verify(
                SigningContext.SELF_TEST, b"qflare", self.sign(SigningContext.SELF_TEST, b"qflare")
            )
        except (ValueError, SigningError) as error:
            raise InvalidKeyError("private key fails its self-test") from error

    @classmethod
    def generate(
        cls,
        algorithm: Algorithm = Algorithm.ML_DSA_65,
        *,
        provider: Provider | None = None,
    ) -> Self:
        """Generate a key pair from system randomness, with the preferred provider unless one is named.

        Raises:
            CryptoUnavailableError: The provider is not available.
        """
        provider = provider or preferred_provider(algorithm)
        pair = library_for(provider, algorithm).generate(algorithm)
        return cls(PublicKey(algorithm, pair.public), provider, pair.secret)

    @property
    def provider(self) -> Provider:
        """Library that the key belongs to."""
        return self._provider

    def sign(self, context: SigningContext, message: bytes) -> bytes:
        """Sign a message; two signatures of one message differ (hedged).

        Raises:
            ValueError: The message is longer than `MAX_MESSAGE_BYTES`.
            SigningError: The provider failed, twice.
        """
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message has {len(message)} bytes, want <= {MAX_MESSAGE_BYTES}")
        try:
            return self._sign(bytes(message), context.encode())
        except ValueError as error:
            raise SigningError("the provider could not sign") from error

    def to_bytes(self) -> bytes:
        """Serialize, unencrypted: magic, algorithm, provider, form, public key, secret."""
        head = _KEY_HEAD.pack(self.public.algorithm, *_PROVIDER_FORMS[self._provider])
        return _KEY_MAGIC + head + self.public.data + self._secret

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote and test the key.

        Raises:
            InvalidKeyError: It is malformed, or the halves do not belong together.
            CryptoUnavailableError: Its provider is not available.
        """
        start = len(_KEY_MAGIC) + _KEY_HEAD.size
        if len(data) < start or not data.startswith(_KEY_MAGIC):
            raise InvalidKeyError("not a signature key")
        number, *form = _KEY_HEAD.unpack_from(data, len(_KEY_MAGIC))
        algorithm = algorithm_of(number)
        provider = next((p for p, f in _PROVIDER_FORMS.items() if f == tuple(form)), None)
        if provider is None:
            raise InvalidKeyError("unknown provider or form of a signature key")
        sizes = SIZES[algorithm]
        if provider not in providers_of(algorithm):
            raise CryptoUnavailableError(f"provider {provider} offers no {algorithm.name} here")
        seeded = provider is Provider.CRYPTOGRAPHY
        secret_bytes = sizes.seed_bytes if seeded else sizes.expanded_bytes
        _check_length("signature key", data, start + sizes.public_bytes + secret_bytes)
        public = PublicKey(algorithm, data[start : start + sizes.public_bytes])
        return cls(public, provider, data[start + sizes.public_bytes :])


def self_test() -> None:
    """Sign and verify with every provider and online algorithm, each provider checking the others.

    Call at program start; takes about 40 ms.

    Raises:
        CryptoUnavailableError: A provider fails.
    """
    try:
        for provider in LIBRARIES:
            for algorithm in ONLINE_ALGORITHMS:
                key = SigningKey.generate(algorithm, provider=provider)
                signature = key.sign(SigningContext.SELF_TEST, b"start")
                for other in LIBRARIES:
                    key.public.verify(SigningContext.SELF_TEST, b"start", signature, provider=other)
    except (ValueError, SigningError) as error:
        raise CryptoUnavailableError("a provider of signatures fails its self-test") from error


def _check_length(what: str, data: bytes, want_bytes: int) -> None:
    if len(data) != want_bytes:
        raise InvalidKeyError(f"{what} has {len(data)} bytes, want {want_bytes}")
