"""A virtual device in secure aggregation with neighbors: the device SDK's own steps, on the files of the simulation.

Signature keys, secrets and nonces come from the seed of the simulation, so that equal runs form equal groups. What is
sealed to neighbors differs from run to run, as the library seals it, and no sum depends on it.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.signing import Algorithm, Provider, PublicKey, SigningKey
from qflare.v1 import security_pb2
from qflare_client.models.neighbor_rounds import Author, NeighborMember, Sources
from qflare_client.models.staged_arrays import SecretFiles
from qflare_simulation.clock import START
from qflare_simulation.seeds import SeededBytes


@lru_cache(maxsize=4096)
def signing_key(seed: int, index: int) -> SigningKey:
    """Return the signature key of a virtual device, of ML-DSA-65 as real devices have; the same in every process."""
    secret = SeededBytes(seed, "device key", index).draw()
    public = MLDSA65PrivateKey.from_seed_bytes(secret).public_key().public_bytes_raw()
    return SigningKey(PublicKey(Algorithm.ML_DSA_65, public), Provider.CRYPTOGRAPHY, secret)


class VirtualStore:
    """The files of a virtual device, as the device SDK uses a key store for its states.

    Args:
        files: Of the device.
        name: Of the device.
    """

    place: Final = 1
    """No virtual device is copied."""

    def __init__(self, files: SecretFiles, name: str) -> None:
        self._files = files
        self.home = Path(name)

    def read_secret(self, name: str, /) -> bytes | None:
        """Return the content of a file; None if there is none."""
        return self._files.read_secret(name)

    def write_secret(self, name: str, secret: bytes, /) -> None:
        """Write a file."""
        self._files.write_secret(name, secret)

    def delete(self, name: str, /) -> None:
        """Delete a file if it exists."""
        self._files.delete(name)


class KnownRegistrars:
    """The registrar keys of the simulated coordinator.

    Args:
        keys: Algorithm and bytes of each.
    """

    def __init__(self, keys: Sequence[tuple[int, bytes]]) -> None:
        self._keys = [PublicKey(Algorithm(number), data) for number, data in keys]

    def registrar_keys(
        self, signers: Collection[str], earlier_keysets: Sequence[security_pb2.SignedEnvelope]
    ) -> Sequence[PublicKey]:
        """Return the keys; those of a simulation are never replaced."""
        del signers, earlier_keysets
        return self._keys


def member_of(
    store: VirtualStore, author: Author, registrars: KnownRegistrars, *label: object
) -> NeighborMember:
    """Return a virtual device as a member of groups.

    Args:
        store: Its files.
        author: The device.
        registrars: Vouch for its neighbors.
        *label: Unique to device and round, for its secrets.
    """
    sources = Sources(SeededBytes("neighbors", *label).draw, _start)
    return NeighborMember(store, registrars, lambda: author, sources)


def _start() -> Timestamp:
    at = Timestamp()
    at.FromDatetime(START)
    return at
