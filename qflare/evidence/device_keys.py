"""Device signature keys, each established by signed evidence.

A key belongs to a device if a registrar signed a receipt that names both, or if the device rotated to the key. A
rotation is signed by the previous key and by the new key. No other evidence is accepted.
"""

from collections.abc import Collection

from qflare.crypto.signing import PublicKey, SigningContext
from qflare.evidence.statements import open_rotation, open_statement, require_equal
from qflare.v1 import security_pb2, verification_pb2


class ProvenKeys:
    """Device keys that have been proven by receipts and rotations.

    Args:
        realm: Name of the deployment.
        registrar_keys: Keys trusted to sign receipts.
    """

    def __init__(self, realm: str, registrar_keys: Collection[PublicKey]) -> None:
        self._realm = realm
        self._registrar_keys = registrar_keys
        self._known: dict[str, tuple[str, PublicKey]] = {}

    def add(self, evidence: verification_pb2.DeviceKeyEvidence) -> None:
        """Add a key; add a rotation after the key that it replaces.

        Raises:
            ValueError: The evidence does not prove that the key belongs to the device.
        """
        key = PublicKey.from_proto(evidence.key)
        if evidence.WhichOneof("origin") == "receipt":
            self._check_receipt(evidence, key)
        elif evidence.WhichOneof("origin") == "rotation":
            self._check_rotation(evidence, key)
        else:
            raise ValueError(f"nothing shows whose key {key.key_id} is")
        self._known[key.key_id] = (evidence.device_id, key)

    def get(self, device_id: str, key_id: str) -> PublicKey:
        """Return a key of a device.

        Raises:
            ValueError: The device has no such key.
        """
        owner, key = self._known.get(key_id, ("", None))
        if key is None or owner != device_id:
            raise ValueError(f"key {key_id[:64]} is not shown to be of device {device_id[:64]}")
        return key

    def _check_receipt(self, evidence: verification_pb2.DeviceKeyEvidence, key: PublicKey) -> None:
        receipt = open_statement(
            evidence.receipt,
            SigningContext.RECEIPT,
            self._registrar_keys,
            security_pb2.EnrollmentReceipt,
        )
        require_equal("realm", receipt.realm, self._realm)
        require_equal("device_id", receipt.device_id, evidence.device_id)
        require_equal("signature_key_id", receipt.signature_key_id, key.key_id)

    def _check_rotation(self, evidence: verification_pb2.DeviceKeyEvidence, key: PublicKey) -> None:
        stated = security_pb2.KeyRotation.FromString(evidence.rotation.payload)
        rotation = open_rotation(
            evidence.rotation,
            self.get(evidence.device_id, stated.previous_key_id),
            realm=self._realm,
            device_id=evidence.device_id,
            rotation_count=stated.sequence_number - 1,
        )
        require_equal("signature_key", rotation.signature_key.key_id, key.key_id)
