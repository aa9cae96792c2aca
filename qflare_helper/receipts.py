"""Receipts that were verified before: a device takes part in many rounds, and its receipt stays the same.

Whether a receipt is signed by a registrar depends on its bytes and on the keys of the registrars alone. So a digest
over both is kept for each receipt that has verified, and its signature is not verified again. What a receipt says is
read and compared each time.
"""

import hashlib
from collections.abc import Collection
from typing import Final

from qflare.crypto.signing import PublicKey, tagged_hash
from qflare.evidence.device_keys import open_receipt
from qflare.v1 import security_pb2
from qflare_helper.remembered import Remembered

MAX_RECEIPTS: Final = 2**14
"""Most receipts that are remembered, 32 bytes each; those that were not shown for the longest time are forgotten."""

_TAG: Final = "qflare/v1/verified-receipt"


class VerifiedReceipts:
    """Receipts that were verified before. Thread-safe.

    Args:
        most: Most receipts that are remembered.
    """

    def __init__(self, most: int = MAX_RECEIPTS) -> None:
        self._digests: Remembered[bytes, bool] = Remembered(most)

    def open(
        self, envelope: security_pb2.SignedEnvelope, keys: Collection[PublicKey]
    ) -> security_pb2.EnrollmentReceipt:
        """Return a receipt, verified now or before; as `qflare.evidence.device_keys.open_receipt`."""
        digest = _digest(envelope, keys)
        if self._digests.find(digest):
            return security_pb2.EnrollmentReceipt.FromString(envelope.payload)
        receipt = open_receipt(envelope, keys)
        self._digests.keep(digest, True)
        return receipt


def _digest(envelope: security_pb2.SignedEnvelope, keys: Collection[PublicKey]) -> bytes:
    trusted = hashlib.sha256("".join(sorted(key.key_id for key in keys)).encode()).digest()
    return tagged_hash(_TAG, trusted, envelope.SerializeToString(deterministic=True))
