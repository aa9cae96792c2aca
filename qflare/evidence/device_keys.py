"""Device signature keys, each established by signed evidence.

A key belongs to a device if a registrar signed a receipt that names both, or if the device rotated to the key. A
rotation is signed by the previous key and by the new key, and its number is one more than that of the previous key. No
other evidence is accepted. Each number belongs to one key of a device: where two have the same number, the history is
forked, and neither of them is accepted, nor what follows from them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from qflare.crypto.signing import PublicKey, SigningContext
from qflare.evidence.statements import open_rotation, open_statement, require_equal
from qflare.v1 import security_pb2, verification_pb2

OpenReceipt = Callable[
    [security_pb2.SignedEnvelope, Collection[PublicKey]], security_pb2.EnrollmentReceipt
]
"""Returns a receipt that one of the keys has signed; raises `StatementError`."""

ReadKey = Callable[[security_pb2.PublicKey], PublicKey]
"""Returns a key whose id is that of its bytes; raises `InvalidKeyError`."""


def open_receipt(
    envelope: security_pb2.SignedEnvelope, keys: Collection[PublicKey]
) -> security_pb2.EnrollmentReceipt:
    """Verify the receipt of a registrar.

    Args:
        envelope: As received.
        keys: Keys trusted to sign receipts.

    Raises:
        StatementError: No trusted key signed it, or it is no receipt.
    """
    return open_statement(envelope, SigningContext.RECEIPT, keys, security_pb2.EnrollmentReceipt)


@dataclass(frozen=True)
class ProvenKey:
    """A key, and what the evidence says of it.

    Attributes:
        device_id: The device that it belongs to.
        key: Signature key.
        kem_key_id: KEM key that came with it, empty for none.
        rotation_count: Number of the device's earlier exchanges of keys.
        previous_key_id: Key that the device rotated from, empty where a receipt brought the key in.
    """

    device_id: str
    key: PublicKey
    kem_key_id: str
    rotation_count: int
    previous_key_id: str = ""


class ProvenKeys:
    """Device keys that have been proven by receipts and rotations.

    Args:
        realm: Name of the deployment.
        registrar_keys: Keys trusted to sign receipts.
        open_receipt: Opens receipts; one that remembers them need not verify each again.
        read_key: Reads keys; one that remembers them need not load each again.
    """

    def __init__(
        self,
        realm: str,
        registrar_keys: Collection[PublicKey],
        open_receipt: OpenReceipt = open_receipt,
        read_key: ReadKey = PublicKey.from_proto,
    ) -> None:
        self._realm = realm
        self._registrar_keys = registrar_keys
        self._open_receipt = open_receipt
        self._read_key = read_key
        self._known: dict[str, ProvenKey] = {}
        self._numbered: dict[tuple[str, int], str] = {}
        self._forked: set[str] = set()

    def add(self, evidence: verification_pb2.DeviceKeyEvidence) -> ProvenKey:
        """Add a key; add a rotation after the key that it replaces.

        Raises:
            ValueError: The evidence does not prove that the key belongs to the device.
        """
        key = self._read_key(evidence.key)
        if evidence.WhichOneof("origin") == "receipt":
            proven = self._check_receipt(evidence, key)
        elif evidence.WhichOneof("origin") == "rotation":
            proven = self._check_rotation(evidence, key)
        else:
            raise ValueError(f"nothing shows whose key {key.key_id} is")
        self._require_unforked(proven)
        self._known[key.key_id] = proven
        return proven

    def get(self, device_id: str, key_id: str) -> PublicKey:
        """Return a key of a device.

        Raises:
            ValueError: The device has no such key.
        """
        return self.proof(device_id, key_id).key

    def proof(self, device_id: str, key_id: str) -> ProvenKey:
        """Return what the evidence says of a key of a device.

        Raises:
            ValueError: The device has no such key.
        """
        found = self._known.get(key_id)
        if found is None or found.device_id != device_id:
            raise ValueError(f"key {key_id[:64]} is not shown to be of device {device_id[:64]}")
        earlier: ProvenKey | None = found
        while earlier is not None:
            if earlier.key.key_id in self._forked:
                raise ValueError(f"key {key_id[:64]} is of a forked history")
            earlier = self._known.get(earlier.previous_key_id)
        return found

    def _require_unforked(self, proven: ProvenKey) -> None:
        key_id = proven.key.key_id
        place = proven.device_id, proven.rotation_count
        first = self._numbered.setdefault(place, key_id)
        if first != key_id:
            self._forked.update((first, key_id))
            raise ValueError(
                f"keys {first} and {key_id} both follow {proven.rotation_count} exchanges of keys: a forked history"
            )

    def _check_receipt(
        self, evidence: verification_pb2.DeviceKeyEvidence, key: PublicKey
    ) -> ProvenKey:
        receipt = self._open_receipt(evidence.receipt, self._registrar_keys)
        require_equal("realm", receipt.realm, self._realm)
        require_equal("device_id", receipt.device_id, evidence.device_id)
        require_equal("signature_key_id", receipt.signature_key_id, key.key_id)
        return ProvenKey(evidence.device_id, key, receipt.kem_key_id, receipt.key_rotation_count)

    def _check_rotation(
        self, evidence: verification_pb2.DeviceKeyEvidence, key: PublicKey
    ) -> ProvenKey:
        stated = security_pb2.KeyRotation.FromString(evidence.rotation.payload)
        previous = self.proof(evidence.device_id, stated.previous_key_id)
        rotation = open_rotation(
            evidence.rotation,
            previous.key,
            realm=self._realm,
            device_id=evidence.device_id,
            rotation_count=previous.rotation_count,
        )
        require_equal("signature_key", rotation.signature_key.key_id, key.key_id)
        return ProvenKey(
            evidence.device_id,
            key,
            rotation.kem_key.key_id,
            rotation.sequence_number,
            previous.key.key_id,
        )
