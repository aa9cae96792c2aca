"""Device identity in the key store: its keys, its id and its coordinator.

Invariants: keys are stored before they are sent, so a crash never leaves the coordinator with keys that the device has
lost; the public facts (`device.json`) are written after the keys that they name.

It does not enroll or log in.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Algorithm, InvalidKeyError, SigningKey, algorithm_names
from qflare_client.errors import KeyStoreError, NotEnrolledError
from qflare_client.keystore.store import KeyStore, read_document

_DOCUMENT: Final = "device.json"
_KEYS: Final = "keys"
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True)
class DeviceKeys:
    """The private keys of a device."""

    signing: SigningKey
    """Signs statements and logins."""

    kem: KemKey
    """Decrypts payloads sealed to the device."""

    @classmethod
    def generate(cls, algorithm: Algorithm = Algorithm.ML_DSA_65) -> Self:
        """Generate keys, with the given algorithm for the signature key."""
        return cls(SigningKey.generate(algorithm), KemKey.generate())

    @property
    def algorithm(self) -> Algorithm:
        """Algorithm of the signature key."""
        return self.signing.public.algorithm

    def to_bytes(self) -> bytes:
        """Serialize, unencrypted."""
        signing = self.signing.to_bytes()
        return _LENGTH.pack(len(signing)) + signing + self.kem.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse the output of `to_bytes`, and test the keys.

        Raises:
            KeyStoreError: The data is damaged.
        """
        try:
            (length,) = _LENGTH.unpack_from(data)
            end = _LENGTH.size + length
            return cls(
                SigningKey.from_bytes(data[_LENGTH.size : end]), KemKey.from_bytes(data[end:])
            )
        except (InvalidKeyError, struct.error) as error:
            raise KeyStoreError(f"the device's keys are damaged: {error}") from error


@dataclass(frozen=True)
class Identity:
    """An enrolled device."""

    realm: str
    """Name of the deployment."""

    address: str
    """Address of the coordinator, host:port."""

    device_id: str
    """Id of the device, a UUID."""

    key_rotation_count: int
    """Number of key rotations."""

    certificate_authorities: str
    """PEM certificate authorities of the coordinator; empty means those of the system."""

    receipt: str
    """The coordinator's signed receipt of the enrollment, a serialized envelope in hex."""

    keys: DeviceKeys = field(repr=False)
    """Private keys of the device."""

    helper_key_ids: tuple[str, ...] = ()
    """Key ids of the helpers for secure aggregation that the bootstrap bundle names; empty for none."""

    device_name: str = ""
    """Name of the device when it enrolled; for people, not signed. Empty from a coordinator that gave none."""

    def save(self, store: KeyStore) -> None:
        """Store the keys, then the public facts.

        Raises:
            KeyStoreError: They cannot be written.
        """
        save_keys(store, self.keys)
        store.write_document(_DOCUMENT, self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "realm": self.realm,
            "address": self.address,
            "device_id": self.device_id,
            "device_name": self.device_name,
            "key_rotation_count": self.key_rotation_count,
            "certificate_authorities": self.certificate_authorities,
            "receipt": self.receipt,
            "helper_key_ids": list(self.helper_key_ids),
            "signature_algorithm": algorithm_names([self.keys.algorithm])[0],
            "signature_key_id": self.keys.signing.public.key_id,
            "kem_key_id": self.keys.kem.public.key_id,
        }

    @classmethod
    def load(cls, store: KeyStore) -> Self:
        """Read the device of a key store.

        Raises:
            NotEnrolledError: The key store holds no device.
            KeyStoreError: It cannot be read, or is damaged.
        """
        facts = store.read_document(_DOCUMENT)
        keys = load_keys(store)
        if not facts or keys is None:
            raise NotEnrolledError(f"key store {store.home} holds no enrolled device")
        try:
            return cls(
                realm=str(facts["realm"]),
                address=str(facts["address"]),
                device_id=str(facts["device_id"]),
                key_rotation_count=int(facts["key_rotation_count"]),
                certificate_authorities=str(facts["certificate_authorities"]),
                receipt=str(facts["receipt"]),
                keys=keys,
                helper_key_ids=tuple(map(str, facts.get("helper_key_ids", ()))),
                device_name=str(facts.get("device_name", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error}") from error


def load_keys(store: KeyStore, name: str = _KEYS) -> DeviceKeys | None:
    """Return the keys in a key store; None if it holds none.

    Raises:
        KeyStoreError: They cannot be read, or are damaged.
    """
    data = store.read_secret(name)
    return None if data is None else DeviceKeys.from_bytes(data)


def save_keys(store: KeyStore, keys: DeviceKeys, name: str = _KEYS) -> None:
    """Store keys durably.

    Raises:
        KeyStoreError: They cannot be written.
    """
    store.write_secret(name, keys.to_bytes())


def read_facts(home: Path) -> dict[str, Any]:
    """Return the public facts of a device without locking its key store; empty if there is no device.

    Raises:
        KeyStoreError: They cannot be read.
    """
    return read_document(home, _DOCUMENT)
