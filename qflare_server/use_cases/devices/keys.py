"""Device keys in the database: current columns, history, accepted algorithms."""

from datetime import datetime
from typing import Any, Protocol

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import Algorithm, PublicKey, algorithm_named, algorithm_names
from qflare_server.config import ServerConfig
from qflare_server.errors import AlgorithmNotAcceptedError
from qflare_server.storage.records import Device
from qflare_server.storage.repository import devices


class PublicKeys(Protocol):
    """The public keys of a device; an embedding program may supply one, both or none."""

    @property
    def signature_key(self) -> PublicKey | None:
        """Its signature key."""

    @property
    def kem_key(self) -> KemPublicKey | None:
        """Its KEM key."""


def key_columns(keys: PublicKeys) -> dict[str, Any]:
    """Return the columns of a device's row for the keys present."""
    columns: dict[str, Any] = {}
    if keys.signature_key is not None:
        columns |= {
            "signature_algorithm": int(keys.signature_key.algorithm),
            "signature_public_key": keys.signature_key.data,
            "signature_key_id": keys.signature_key.key_id,
        }
    if keys.kem_key is not None:
        columns |= {"kem_public_key": keys.kem_key.data, "kem_key_id": keys.kem_key.key_id}
    return columns


def key_names(device: Device) -> tuple[str | None, str | None, int]:
    """Return a fingerprint of a device's current keys: two reads with equal results saw the same keys."""
    return device.signature_key_id, device.kem_key_id, device.key_rotation_count


def insert_key(
    session: Session,
    device_id: str,
    keys: PublicKeys,
    statement: bytes,
    at: datetime,
    *,
    first: bool = False,
) -> None:
    """Add keys to a device's history.

    Args:
        session: Open transaction.
        device_id: The device.
        keys: The keys, a signature key among them.
        statement: The signed statement that introduced them; keys without one are not accepted.
        at: Time of the insertion.
        first: The device has no key history yet; skips the lookup.
    """
    assert keys.signature_key is not None
    sequence = 1 if first else devices.last_sequence(session, device_id) + 1
    devices.insert_key(
        session,
        {
            "key_id": keys.signature_key.key_id,
            "device_id": device_id,
            "sequence": sequence,
            "algorithm": int(keys.signature_key.algorithm),
            "public_key": keys.signature_key.data,
            "kem_public_key": None if keys.kem_key is None else keys.kem_key.data,
            "statement": statement,
            "created_at": at,
        },
    )


class AcceptedAlgorithms:
    """The algorithms of a configuration; thread-safe."""

    def __init__(self, config: ServerConfig) -> None:
        self._accepted = frozenset(algorithm_named(name) for name in config.accepted_algorithms)

    def require(self, algorithm: Algorithm) -> None:
        """Check the algorithm of a device's key.

        Raises:
            AlgorithmNotAcceptedError: It is not accepted; the error lists the accepted ones.
        """
        if algorithm not in self._accepted:
            (got,) = algorithm_names([algorithm])
            raise AlgorithmNotAcceptedError(got, algorithm_names(self._accepted))
