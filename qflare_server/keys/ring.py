"""Key rings: online keys by role, or the offline root keys.

`KeyProvider` is the interface for signing and decapsulation. `KeyRing` (keys in memory, from an encrypted file) and
a hardware module implement it. A provider holds keys; the signed keyset (`qflare_server.keys.server_keys`) alone
determines the current ones, so a ring may also hold future and retired keys.

Every key is self-tested (signature or encapsulation) when a ring is read.
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Algorithm, Provider, SigningContext, SigningKey
from qflare.crypto.symmetric import SECRET_BYTES
from qflare.v1 import security_pb2
from qflare_server.context import UnknownKeyError
from qflare_server.keys.secret_files import KeyStoreError

Role: TypeAlias = security_pb2.KeyRole.ValueType

SIGNING_ROLES: Final[tuple[Role, ...]] = (
    security_pb2.KEY_ROLE_MODEL,
    security_pb2.KEY_ROLE_REGISTRAR,
    security_pb2.KEY_ROLE_LOG,
    security_pb2.KEY_ROLE_TASK,
)
"""Roles that sign."""

ROLES: Final[tuple[Role, ...]] = (security_pb2.KEY_ROLE_SESSION_KEM, *SIGNING_ROLES)
"""Every role of an online key."""

_FORMAT: Final = 1


class KeyProvider(Protocol):
    """Signs and decapsulates with keys that do not leave it; thread-safe."""

    def public(self) -> Sequence[security_pb2.RoleKey]:
        """Return the public half of every key with its role, oldest first."""

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        """Sign a message under a FIPS 204 context; raises `UnknownKeyError`."""

    def decapsulate(self, key_id: str, encapsulation: bytes) -> bytes:
        """Recover an encapsulated secret, 32 bytes; raises `UnknownKeyError` or `UnsealError`."""


@dataclass(frozen=True)
class RingKey:
    """A private key and its role."""

    role: Role
    key: SigningKey | KemKey

    @property
    def key_id(self) -> str:
        """Key id, 64 hex digits."""
        return self.key.public.key_id

    def to_proto(self) -> security_pb2.RoleKey:
        """Return the public half with the role."""
        if isinstance(self.key, KemKey):
            return security_pb2.RoleKey(role=self.role, kem_key=self.key.public.to_proto())
        return security_pb2.RoleKey(role=self.role, signature_key=self.key.public.to_proto())


@dataclass(frozen=True)
class KeyRing:
    """Private keys in memory; a `KeyProvider`.

    Attributes:
        realm: Realm of the deployment.
        keys: The keys, oldest first; role 0 is the offline root.
        state_key: 32 random bytes that replicas share; empty for root keys.
        bundle: A serialized ``KeysetBundle``: the trust documents in force when the ring was written.
        earlier_state_keys: Previous state keys, latest first, used only to open stored secrets.
    """

    realm: str
    keys: tuple[RingKey, ...] = field(repr=False)
    state_key: bytes = field(repr=False)
    bundle: bytes = field(repr=False, default=b"")
    earlier_state_keys: tuple[bytes, ...] = field(repr=False, default=())

    @classmethod
    def generate_online(
        cls,
        realm: str,
        algorithm: Algorithm = Algorithm.ML_DSA_65,
        roles: Iterable[Role] = ROLES,
    ) -> "KeyRing":
        """Generate one key per role, and a state key."""
        keys = tuple(generate(role, algorithm) for role in roles)
        return cls(realm, keys, os.urandom(SECRET_BYTES))

    @classmethod
    def generate_root(
        cls, realm: str, count: int = 1, algorithm: Algorithm = Algorithm.ML_DSA_87
    ) -> "KeyRing":
        """Generate offline root keys."""
        role = security_pb2.KEY_ROLE_UNSPECIFIED
        return cls(realm, tuple(generate(role, algorithm) for _ in range(count)), b"")

    def public(self) -> Sequence[security_pb2.RoleKey]:
        """Return the public half of every key with its role, oldest first."""
        return [entry.to_proto() for entry in self.keys]

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        """Sign a message.

        Raises:
            UnknownKeyError: No signature key of this id is held.
            SigningError: The provider failed.
        """
        key = self._by_id.get(key_id)
        if not isinstance(key, SigningKey):
            raise UnknownKeyError("no such signature key")
        return key.sign(context, message)

    def decapsulate(self, key_id: str, encapsulation: bytes) -> bytes:
        """Recover an encapsulated secret.

        Raises:
            UnknownKeyError: No KEM key of this id is held.
            UnsealError: The encapsulation is malformed.
        """
        key = self._by_id.get(key_id)
        if not isinstance(key, KemKey):
            raise UnknownKeyError("no such KEM key")
        return key.decapsulate(encapsulation)

    def signing_keys(self) -> list[SigningKey]:
        """Return the keys that sign, oldest first."""
        return [entry.key for entry in self.keys if isinstance(entry.key, SigningKey)]

    def to_bytes(self) -> bytes:
        """Serialize, unencrypted."""
        keys = [
            {"role": int(entry.role), "key": _text(entry.key.to_bytes())} for entry in self.keys
        ]
        content = {
            "format": _FORMAT,
            "realm": self.realm,
            "keys": keys,
            "state_key": _text(self.state_key),
            "bundle": _text(self.bundle),
            "earlier_state_keys": [_text(key) for key in self.earlier_state_keys],
        }
        return json.dumps(content).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "KeyRing":
        """Parse the output of `to_bytes` and self-test every key.

        Raises:
            KeyStoreError: It is malformed, or a key fails its self-test.
        """
        try:
            content = json.loads(data)
            realm, entries = content["realm"], content["keys"]
            if content["format"] != _FORMAT or not isinstance(realm, str) or not entries:
                raise KeyStoreError(f"key ring: want format {_FORMAT}, a realm and keys")
            return cls(
                realm,
                tuple(_read_key(entry) for entry in entries),
                _data(content["state_key"]),
                _data(content["bundle"]),
                tuple(_data(key) for key in content.get("earlier_state_keys", [])),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KeyStoreError(f"key ring is not valid: {error}") from error

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {entry.key_id: entry.key for entry in self.keys})
        if len(self.state_key) not in {0, SECRET_BYTES}:
            raise KeyStoreError("key ring: state key has another length")
        if any(len(key) != SECRET_BYTES for key in self.earlier_state_keys):
            raise KeyStoreError("key ring: an earlier state key has another length")

    _by_id: Mapping[str, SigningKey | KemKey] = field(init=False, repr=False, compare=False)


def generate(role: Role, algorithm: Algorithm) -> RingKey:
    """Generate a key for a role; online keys use ``cryptography``, which releases the GIL while signing."""
    if role == security_pb2.KEY_ROLE_SESSION_KEM:
        return RingKey(role, KemKey.generate(provider=Provider.CRYPTOGRAPHY))
    offline = role == security_pb2.KEY_ROLE_UNSPECIFIED
    provider = None if offline else Provider.CRYPTOGRAPHY
    return RingKey(role, SigningKey.generate(algorithm, provider=provider))


def key_ids(keys: Iterable[RingKey]) -> list[str]:
    """Return the ids of keys."""
    return [entry.key_id for entry in keys]


def _read_key(entry: Mapping[str, Any]) -> RingKey:
    role = security_pb2.KeyRole.ValueType(entry["role"])
    data = _data(entry["key"])
    if role == security_pb2.KEY_ROLE_SESSION_KEM:
        return RingKey(role, KemKey.from_bytes(data))
    return RingKey(role, SigningKey.from_bytes(data))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
