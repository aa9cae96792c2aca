"""Keys in a hardware security module, accessed through PKCS#11 (optional extra ``hsm``: python-pkcs11).

A module stores:

* one non-extractable AES-256 key, which encrypts the passphrase of the online key file: a stolen copy of the files
  cannot be decrypted without the module. Every module supports this.
* the signature keys of the roles, if it offers ``CKM_ML_DSA`` (PKCS#11 3.2) and the configuration enables it. They
  are generated in the module, marked sensitive and not extractable, labeled ``qflare/ROLE`` with their key id as
  ``CKA_ID``.

The session KEM key is always in the key file: no module offers X-Wing. There is no fallback: if signing in the module
is configured and it has no ML-DSA, loading fails.

A module computes one signature at a time per process. Each key is self-tested before use: it signs, and
`crypto.signing` verifies.

Source: PKCS#11 3.2, section 6.67 (ML-DSA) for mechanism and parameters.
"""

import ctypes
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, Protocol

from qflare.crypto.signing import (
    Algorithm,
    InvalidSignatureError,
    PublicKey,
    SigningContext,
    algorithm_of,
)
from qflare.v1 import security_pb2
from qflare_server.context import UnknownKeyError
from qflare_server.keys.ring import KeyProvider, KeyRing, Role
from qflare_server.keys.secret_files import KeyStoreError, read_passphrase

_WRAPPING_LABEL: Final = "qflare/passphrase"
_NONCE_BYTES: Final = 12
_AES_BITS: Final = 256
_SIGNING_LABEL: Final = "qflare/"
_HEDGE_PREFERRED: Final = 0  # CKH_HEDGE_PREFERRED
_ALGORITHMS: Final = {
    Algorithm.ML_DSA_44: "ML_DSA_44",
    Algorithm.ML_DSA_65: "ML_DSA_65",
    Algorithm.ML_DSA_87: "ML_DSA_87",
}


class _SigningContext(ctypes.Structure):
    """``CK_SIGN_ADDITIONAL_CONTEXT``."""

    _fields_ = (
        ("hedge_variant", ctypes.c_ulong),
        ("context", ctypes.c_char_p),
        ("context_bytes", ctypes.c_ulong),
    )


class _HardwareKey(NamedTuple):
    """A signature key in a token."""

    role: Role
    public: PublicKey
    private: Any


class Hardware(Protocol):
    """Interface of a hardware module for the key folder."""

    @property
    def signs(self) -> bool:
        """Whether it holds the signature keys."""

    def wrap(self, secret: bytes) -> bytes:
        """Encrypt a short secret."""

    def unwrap(self, wrapped: bytes) -> bytes:
        """Decrypt what `wrap` encrypted; raises `KeyStoreError`."""

    def generate(self, role: Role, algorithm: Algorithm) -> PublicKey:
        """Generate a signature key for a role."""

    def public(self) -> Sequence[security_pb2.RoleKey]:
        """Return the signature keys in it, oldest first."""

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        """Sign a message; raises `UnknownKeyError`."""

    def keep_only(self, key_ids: Collection[str]) -> None:
        """Destroy every other signature key."""


@dataclass(frozen=True)
class JoinedProvider:
    """A `KeyProvider`: KEM keys of a ring, signature keys of a module."""

    ring: KeyRing
    hardware: Hardware

    def public(self) -> Sequence[security_pb2.RoleKey]:
        """Return the public half of every key with its role."""
        return [*self.ring.public(), *self.hardware.public()]

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        """Sign in the module.

        Raises:
            UnknownKeyError: It has no such key.
        """
        return self.hardware.sign(key_id, context, message)

    def decapsulate(self, key_id: str, encapsulation: bytes) -> bytes:
        """Recover an encapsulated secret with a key of the ring.

        Raises:
            UnknownKeyError: It has no such key.
            UnsealError: The encapsulation is malformed.
        """
        return self.ring.decapsulate(key_id, encapsulation)


def provider_of(ring: KeyRing, hardware: Hardware | None) -> KeyProvider:
    """Return the provider that signs and decapsulates: the ring, or the ring with a module."""
    return ring if hardware is None else JoinedProvider(ring, hardware)


class Pkcs11Module:
    """A token of a PKCS#11 module, logged in.

    Args:
        library: File of the module, a shared library.
        token_label: Label of the token.
        pin_file: File with the user PIN.
        signs: Whether it holds the signature keys; otherwise it only encrypts the passphrase.

    Raises:
        KeyStoreError: The extra is not installed, the token cannot be opened, or it should sign and lacks ML-DSA.
    """

    def __init__(self, library: Path, token_label: str, pin_file: Path, *, signs: bool) -> None:
        self._api = _import_pkcs11()
        self._lock = threading.Lock()
        self.signs: Final = signs
        with self._translated("open the token"):
            token = self._api.lib(str(library)).get_token(token_label=token_label)
            self._session = token.open(user_pin=read_passphrase(pin_file).decode(), rw=True)
            mechanisms = token.slot.get_mechanisms()
        if signs and self._api.Mechanism.ML_DSA not in mechanisms:
            raise KeyStoreError(
                "the PKCS#11 token has no ML-DSA: set QFLARE_PKCS11_SIGNING=false to keep"
                " signature keys in the key file, or use another token"
            )
        self._keys: dict[str, _HardwareKey] = {}
        if signs:
            self._load()

    def wrap(self, secret: bytes) -> bytes:
        """Encrypt a short secret with the token's AES key, generated on first use.

        Raises:
            KeyStoreError: The token refuses or fails.
        """
        nonce = os.urandom(_NONCE_BYTES)
        with self._translated("encrypt"):
            return nonce + bytes(self._wrapping_key().encrypt(secret, **self._gcm(nonce)))

    def unwrap(self, wrapped: bytes) -> bytes:
        """Decrypt what `wrap` encrypted.

        Raises:
            KeyStoreError: The data was encrypted by another token, or was changed.
        """
        nonce, rest = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
        with self._translated("decrypt"):
            return bytes(self._wrapping_key().decrypt(rest, **self._gcm(nonce)))

    def generate(self, role: Role, algorithm: Algorithm) -> PublicKey:
        """Generate a signature key for a role in the token.

        Raises:
            KeyStoreError: PKCS#11 does not define the algorithm, or the token refuses or fails.
        """
        if algorithm not in _ALGORITHMS:
            raise KeyStoreError(f"PKCS#11 has no {algorithm.name}")
        label = _SIGNING_LABEL + security_pb2.KeyRole.Name(role)
        attribute = self._api.Attribute
        with self._translated("make a key"):
            parameters = self._api.MLDSAParameterSet[_ALGORITHMS[algorithm]]
            public, private = self._session.generate_keypair(
                self._api.KeyType.ML_DSA,
                store=True,
                label=label,
                public_template={attribute.PARAMETER_SET: parameters},
                private_template={attribute.SENSITIVE: True, attribute.EXTRACTABLE: False},
            )
            key = PublicKey(algorithm, bytes(public[attribute.VALUE]))
            for half in (public, private):
                half[attribute.ID] = bytes.fromhex(key.key_id)
        self._keys[key.key_id] = _HardwareKey(role, key, private)
        self._test(key)
        return key

    def public(self) -> Sequence[security_pb2.RoleKey]:
        """Return the signature keys in the token with their roles, including other processes'.

        Raises:
            KeyStoreError: The token refuses or fails, or a key fails its self-test.
        """
        self._load()
        return [
            security_pb2.RoleKey(role=held.role, signature_key=held.public.to_proto())
            for held in self._keys.values()
        ]

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        """Sign a message in the token.

        Raises:
            UnknownKeyError: It has no such key.
            KeyStoreError: The token refuses or fails.
        """
        held = self._keys.get(key_id)
        if held is None:
            raise UnknownKeyError("no such signature key")
        name = context.encode()
        parameter = bytes(_SigningContext(_HEDGE_PREFERRED, name, len(name)))  # points into `name`
        mechanism = self._api.Mechanism.ML_DSA
        with self._translated("sign"):
            return bytes(held.private.sign(message, mechanism=mechanism, mechanism_param=parameter))

    def keep_only(self, key_ids: Collection[str]) -> None:
        """Destroy every other signature key of the coordinator.

        Raises:
            KeyStoreError: The token refuses or fails.
        """
        attribute = self._api.Attribute
        for key_id in self._keys.keys() - set(key_ids):
            with self._translated("destroy a key"):
                for half in list(self._session.get_objects({attribute.ID: bytes.fromhex(key_id)})):
                    half.destroy()
            del self._keys[key_id]

    def _load(self) -> None:
        with self._translated("list the keys"):
            found = dict(self._held_keys())
        fresh = [found[key_id].public for key_id in found.keys() - self._keys.keys()]
        self._keys = found
        for public in fresh:
            self._test(public)

    def _held_keys(self) -> Iterator[tuple[str, _HardwareKey]]:
        attribute, classes = self._api.Attribute, self._api.ObjectClass
        wanted = {attribute.CLASS: classes.PUBLIC_KEY, attribute.KEY_TYPE: self._api.KeyType.ML_DSA}
        for half in list(self._session.get_objects(wanted)):
            role = _role_of(half.label)
            if role is None:
                continue
            algorithm = _algorithm_of(half[attribute.PARAMETER_SET])
            public = PublicKey(algorithm, bytes(half[attribute.VALUE]))
            private = self._session.get_key(
                object_class=classes.PRIVATE_KEY, id=bytes.fromhex(public.key_id)
            )
            yield public.key_id, _HardwareKey(role, public, private)

    def _test(self, key: PublicKey) -> None:
        """Sign in the token and verify outside, under a context."""
        signature = self.sign(key.key_id, SigningContext.SELF_TEST, b"qflare")
        try:
            key.verify(SigningContext.SELF_TEST, b"qflare", signature)
        except InvalidSignatureError as error:
            raise KeyStoreError("a key of the PKCS#11 token fails its self-test") from error

    def _wrapping_key(self) -> Any:
        key_type = self._api.KeyType.AES
        try:
            return self._session.get_key(key_type=key_type, label=_WRAPPING_LABEL)
        except self._api.NoSuchKey:
            attribute = self._api.Attribute
            return self._session.generate_key(
                key_type,
                _AES_BITS,
                label=_WRAPPING_LABEL,
                store=True,
                template={attribute.SENSITIVE: True, attribute.EXTRACTABLE: False},
            )

    def _gcm(self, nonce: bytes) -> dict[str, Any]:
        parameters = self._api.GCMParams(nonce, _WRAPPING_LABEL.encode())
        return {"mechanism": self._api.Mechanism.AES_GCM, "mechanism_param": parameters}

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            with self._lock:  # a PKCS#11 session runs one operation at a time
                yield
        except (self._api.PKCS11Error, RuntimeError) as error:
            problem = str(error) or type(error).__name__
            raise KeyStoreError(f"PKCS#11 token cannot {what}: {problem}") from error


@lru_cache(maxsize=8)
def open_module(library: Path, token_label: str, pin_file: Path, *, signs: bool) -> Pkcs11Module:
    """Open a token once per process; PKCS#11 logins are per process.

    Raises:
        KeyStoreError: As `Pkcs11Module`.
    """
    return Pkcs11Module(library, token_label, pin_file, signs=signs)


def _import_pkcs11() -> ModuleType:
    try:
        import pkcs11  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise KeyStoreError(
            "python-pkcs11 is missing: pip install 'qflare[server,hsm]'",
            remedy="pip install 'qflare[server,hsm]'",
        ) from error
    return pkcs11


def _role_of(label: str) -> Role | None:
    if not label.startswith(_SIGNING_LABEL):
        return None
    name = label.removeprefix(_SIGNING_LABEL)
    return security_pb2.KeyRole.Value(name) if name in security_pb2.KeyRole.keys() else None  # noqa: SIM118


def _algorithm_of(parameter_set: Any) -> Algorithm:
    for algorithm, name in _ALGORITHMS.items():
        if getattr(parameter_set, "name", "") == name:
            return algorithm
    return algorithm_of(int(parameter_set))
