"""Receipts for keys of devices that did not enroll, signed by the coordinator.

Constructor: ``Vouching(context)``.

An embedding program registers devices with their keys; a registrar key signs a receipt for each key, marked
in-process. Keys registered by earlier releases have no receipt and are not accepted. `Vouching` signs receipts for the
keys that an administrator names: a row alone does not show whether a program or an intruder inserted it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.times import timestamp_of
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.records import Device, DeviceKey
from qflare_server.storage.repository import audit, devices
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel
from qflare_server.use_cases.devices.keys import PublicKeys


@dataclass(frozen=True)
class _StoredKeys:
    """The keys of a row."""

    signature_key: PublicKey
    kem_key: KemPublicKey | None

    @classmethod
    def of(cls, row: DeviceKey) -> "_StoredKeys":
        kem_key = KemPublicKey(row.kem_public_key) if row.kem_public_key else None
        return cls(PublicKey(algorithm_of(row.algorithm), row.public_key), kem_key)


class Vouching:
    """Signs receipts for keys that have none."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def unvouched(self) -> Sequence[DeviceKey]:
        """Return the keys that have neither receipt nor rotation, ordered by device and sequence."""
        with self._context.database.read() as session:
            return devices.keys_without_statement(session)

    def vouch(self, caller: Caller, key_ids: Collection[str]) -> int:
        """Sign receipts for keys that have none; return the number of receipts signed.

        Raises:
            InvalidRequestError: A key is unknown, or its row does not match its key id; no receipt is signed.
        """
        at = self._context.clock()
        with self._context.database.read() as session:
            rows = [_find(session, key_id) for key_id in dict.fromkeys(key_ids)]
            owners = {row.device_id: devices.get_device(session, row.device_id) for row in rows}
            newest = {name: devices.last_sequence(session, name) for name in owners}
        receipts = {
            row.key_id: self._receipt(row, owners[row.device_id], newest[row.device_id])
            for row in rows
            if row.statement is None
        }
        by_id = {row.key_id: row for row in rows}
        self._context.database.write(lambda session: _store(session, caller, by_id, receipts, at))
        return len(receipts)

    def _receipt(self, row: DeviceKey, owner: Device | None, newest: int) -> bytes:
        if owner is None:
            raise InvalidRequestError(f"key {row.key_id}: its device is missing", field="key_id")
        try:
            keys = _StoredKeys.of(row)
        except ValueError as error:
            raise InvalidRequestError(f"key {row.key_id}: {error}", field="key_id") from error
        if keys.signature_key.key_id != row.key_id:
            raise InvalidRequestError(f"key {row.key_id}: the row holds another", field="key_id")
        later = newest - row.sequence  # each rotation added one row and one to the count
        return sign_receipt(
            self._context,
            row.device_id,
            keys,
            owner.registered_at,
            rotation_count=max(owner.key_rotation_count - later, 0),
        )


def sign_receipt(
    context: Context,
    device_id: str,
    keys: PublicKeys,
    registered_at: datetime,
    *,
    rotation_count: int = 0,
) -> bytes:
    """Return the signed receipt, marked in-process, of a device that did not enroll.

    Args:
        context: The coordinator's components.
        device_id: The device.
        keys: Its keys, a signature key among them.
        registered_at: When the device was registered.
        rotation_count: Number of its earlier key rotations.
    """
    assert keys.signature_key is not None
    receipt = security_pb2.EnrollmentReceipt(
        realm=context.config.realm,
        device_id=device_id,
        signature_key_id=keys.signature_key.key_id,
        kem_key_id=keys.kem_key.key_id if keys.kem_key is not None else "",
        register_time=timestamp_of(registered_at),
        key_rotation_count=rotation_count,
        in_process=True,
    )
    payload = receipt.SerializeToString(deterministic=True)
    envelope = context.signer.sign(security_pb2.KEY_ROLE_REGISTRAR, payload)
    return envelope.SerializeToString(deterministic=True)


def _find(session: Session, key_id: str) -> DeviceKey:
    row = devices.get_key(session, key_id)
    if row is None:
        raise InvalidRequestError(f"key_id: no key {key_id[:64]!r}", field="key_id")
    return row


def _store(
    session: Session,
    caller: Caller,
    rows: Mapping[str, DeviceKey],
    receipts: Mapping[str, bytes],
    at: datetime,
) -> None:
    for key_id, receipt in receipts.items():
        row = rows[key_id]
        devices.vouch_for_key(session, key_id, receipt, kem_public_key=row.kem_public_key)
        details = {"signature_key_id": key_id}
        event = Event("device.key_vouched", f"device:{row.device_id}", RiskLevel.HIGH, details)
        audit.record(session, caller, event, at)
