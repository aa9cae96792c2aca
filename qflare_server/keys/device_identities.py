"""Device identities: binds keys to devices by signed evidence alone.

A row of `device_keys` proves nothing: anyone with write access to the database can insert one. A key is accepted if a
registrar key of a published keyset signed a receipt that names device and key, or if the device rotated to it from such
a key (`qflare.evidence.device_keys`). Login, updates, evaluations, the worker before folding, sealing to a device, and
database verification all use this check.

Proofs are permanent: receipts and rotations do not change, and key ids are digests. So proofs are cached, and each
process verifies a key's signatures once. Thread-safe: at worst, two threads prove the same key.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, algorithm_of, tagged_hash
from qflare.evidence.device_keys import ProvenKey, ProvenKeys
from qflare.evidence.statements import require_equal
from qflare.v1 import security_pb2, verification_pb2
from qflare_server.context import UnprovenKeyError
from qflare_server.storage.database import Database
from qflare_server.storage.records import DeviceKey
from qflare_server.storage.repository import evidence

REMEMBERED: Final = 65_536
"""Minimum number of cached keys; at most twice as many, 100 bytes each. A device has two: signature and KEM."""

LOADED: Final = 500
"""Devices per query."""

Named = tuple[str, str]
"""Ids of a device and of one of its keys."""


class Registrars(Protocol):
    """Provides the keys that may sign receipts."""

    def registrar_keys(self, *, fresh: bool = False) -> Collection[PublicKey]:
        """Return the registrar keys of every published keyset, looking for another keyset first if `fresh`."""


class DeviceIdentities:
    """Proves that keys belong to devices; thread-safe.

    Args:
        database: Database of the device keys with their evidence.
        realm: Name of the deployment.
        registrars: Provides the accepted signers of receipts.
    """

    def __init__(self, database: Database, realm: str, registrars: Registrars) -> None:
        self._database = database
        self._realm = realm
        self._registrars = registrars
        self._recent: set[bytes] = set()
        self._earlier: set[bytes] = set()

    def require(self, device_id: str, key_id: str) -> None:
        """Check that a signature key, or the KEM key introduced with one, belongs to a device.

        Opens a separate transaction if the key is not cached.

        Args:
            device_id: The device.
            key_id: Id of the key, computed from the key itself.

        Raises:
            UnprovenKeyError: No signed evidence binds the key to the device.
        """
        problem = self.problems([(device_id, key_id)]).get((device_id, key_id))
        if problem is not None:
            raise UnprovenKeyError(problem)

    def problems(self, named: Iterable[Named]) -> Mapping[Named, str]:
        """Return the reasons why keys are unproven; proven keys are omitted."""
        unknown = [pair for pair in dict.fromkeys(named) if not self._is_proven(pair)]
        found: dict[Named, str] = {}
        for start in range(0, len(unknown), LOADED):
            found |= self._examine(unknown[start : start + LOADED])
        return found

    def _examine(self, pairs: Sequence[Named]) -> dict[Named, str]:
        with self._database.read() as session:
            rows = evidence.keys_of(session, {device_id for device_id, _ in pairs})
        registrars = self._registrars.registrar_keys()
        if not _signers(rows) <= {key.key_id for key in registrars}:
            registrars = self._registrars.registrar_keys(fresh=True)
        history = _History(self._realm, registrars, rows)
        proven = set(history.proven())
        for pair in proven:
            self._remember(pair)
        return {pair: history.problem(*pair) for pair in pairs if pair not in proven}

    def _is_proven(self, pair: Named) -> bool:
        name = _digest(pair)
        return name in self._recent or name in self._earlier

    def _remember(self, pair: Named) -> None:
        if len(self._recent) >= REMEMBERED:
            self._earlier, self._recent = self._recent, set()
        self._recent.add(_digest(pair))


class _History:
    """Keys of some devices, each proven or with the reason why it is not.

    Args:
        realm: Name of the deployment.
        registrars: Keys that may sign receipts.
        rows: All keys of the devices, by device and sequence.
    """

    def __init__(
        self, realm: str, registrars: Collection[PublicKey], rows: Iterable[DeviceKey]
    ) -> None:
        self._keys = ProvenKeys(realm, registrars)
        self._problems: dict[Named, str] = {}
        self._added: list[ProvenKey] = []
        for row in rows:
            try:
                self._added.append(self._add(row))
            except (ValueError, DecodeError) as error:
                self._problems[row.device_id, row.key_id] = str(error) or type(error).__name__

    def proven(self) -> Iterable[Named]:
        """Yield the proven signature keys and KEM keys."""
        for added in self._added:
            if self._forks(added):
                continue
            yield added.device_id, added.key.key_id
            if added.kem_key_id:
                yield added.device_id, added.kem_key_id

    def problem(self, device_id: str, key_id: str) -> str:
        """Return the reason why a key is unproven."""
        known = self._problems.get((device_id, key_id))
        if known is not None:
            return known
        return f"nothing shows that key {key_id[:64]} is of device {device_id[:64]}"

    def _add(self, row: DeviceKey) -> ProvenKey:
        shown = key_evidence(row)
        require_equal("key_id", row.key_id, shown.key.key_id)
        proven = self._keys.add(shown)
        kem_key_id = KemPublicKey(row.kem_public_key).key_id if row.kem_public_key else ""
        require_equal("kem_public_key", kem_key_id, proven.kem_key_id)
        return proven

    def _forks(self, added: ProvenKey) -> bool:
        """Record a key; return whether it belongs to a forked history."""
        try:
            self._keys.proof(added.device_id, added.key.key_id)
        except ValueError as error:
            self._problems[added.device_id, added.key.key_id] = str(error)
            return True
        return False


def key_evidence(row: DeviceKey) -> verification_pb2.DeviceKeyEvidence:
    """Return a key with the receipt or rotation that introduced it.

    Raises:
        ValueError: The row holds no key, or no readable statement.
    """
    key = PublicKey(algorithm_of(row.algorithm), row.public_key)
    message = verification_pb2.DeviceKeyEvidence(device_id=row.device_id, key=key.to_proto())
    if row.statement is not None:
        origin = security_pb2.SignedEnvelope.FromString(row.statement)
        rotated = len(origin.signatures) > 1  # a rotation carries two signatures, a receipt one
        (message.rotation if rotated else message.receipt).CopyFrom(origin)
    return message


def evidence_up_to(
    rows: Iterable[DeviceKey], key_id: str
) -> list[verification_pb2.DeviceKeyEvidence]:
    """Return the evidence of a key: its receipt, or that of an earlier key and the rotations that follow it.

    Args:
        rows: Keys of the device, by sequence.
        key_id: Key of the device.

    Raises:
        ValueError: A row holds no key, or no readable statement.
    """
    found = []
    for row in rows:
        found.append(key_evidence(row))
        if row.key_id == key_id:
            break
    return found


def _signers(rows: Iterable[DeviceKey]) -> set[str]:
    """Return the claimed signer key ids of the receipts of some rows."""
    found: set[str] = set()
    for row in rows:
        try:
            signatures = security_pb2.SignedEnvelope.FromString(row.statement or b"").signatures
        except DecodeError:
            continue
        if len(signatures) == 1:
            found.add(signatures[0].key_id)
    return found


def _digest(pair: Named) -> bytes:
    return tagged_hash("qflare/identity", *(part.encode() for part in pair))
