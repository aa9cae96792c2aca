"""Devices registered by an embedding program, without enrollment."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, algorithm_of
from qflare_server.context import Context
from qflare_server.errors import (
    AlreadyExistsError,
    ConflictError,
    DeviceNotFoundError,
    DeviceRevokedError,
    InvalidRequestError,
)
from qflare_server.storage.records import Device
from qflare_server.storage.repository import audit, devices
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import DeviceState, RiskLevel
from qflare_server.use_cases.devices.administration import MAX_DEVICE_ID, Profile
from qflare_server.use_cases.devices.keys import insert_key, key_columns, key_names
from qflare_server.use_cases.devices.vouching import sign_receipt


@dataclass(frozen=True)
class PublicKeys:
    """The public keys of a device; each may be absent."""

    signature_key: PublicKey | None = None
    kem_key: KemPublicKey | None = None


@dataclass(frozen=True)
class KnownDevice:
    """A device record imported from another registry.

    Raises:
        InvalidRequestError: The id is empty, too long or not printable.
    """

    device_id: str
    profile: Profile
    keys: PublicKeys = PublicKeys()
    state: DeviceState = DeviceState.ACTIVE
    registered_at: datetime | None = None
    last_seen_at: datetime | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.device_id) <= MAX_DEVICE_ID or not self.device_id.isprintable():
            raise InvalidRequestError(
                f"device_id: want 1 to {MAX_DEVICE_ID} printable characters", field="device_id"
            )


class KnownDevices:
    """Registers devices that the embedding program vouches for, without enrollment."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def add(self, caller: Caller, known: KnownDevice) -> None:
        """Insert a device.

        Raises:
            AlreadyExistsError: The device id or the signature key is already registered.
            InvalidRequestError: A profile value is out of range.
        """
        if self.add_many(caller, [known]) == 0:
            raise AlreadyExistsError(f"device {known.device_id[:64]!r} exists")

    def add_many(self, caller: Caller, known: Sequence[KnownDevice]) -> int:
        """Insert the devices that are not registered yet, in one transaction; return their number.

        Raises:
            AlreadyExistsError: A signature key belongs to another device; none is inserted.
            InvalidRequestError: A profile value is out of range; none is inserted.
            ConflictError: A concurrent call registered one of them; retry.
        """
        at = self._context.clock()
        rows = {item.device_id: (item, item.profile.columns()) for item in known}
        with self._context.database.read() as session:
            present = devices.existing_ids(session, list(rows))
        receipts = {
            device_id: sign_receipt(self._context, device_id, item.keys, item.registered_at or at)
            for device_id, (item, _) in rows.items()
            if device_id not in present and item.keys.signature_key is not None
        }

        def work(session: Session) -> int:
            missing = rows.keys() - devices.existing_ids(session, list(rows))
            for device_id in sorted(missing):
                receipt = receipts.get(device_id)
                self._insert(session, caller, *rows[device_id], receipt, at)
            return len(missing)

        return self._context.database.write(work)

    def _insert(
        self,
        session: Session,
        caller: Caller,
        known: KnownDevice,
        columns: dict[str, Any],
        receipt: bytes | None,
        at: datetime,
    ) -> None:
        if known.keys.signature_key is not None:
            _require_unknown(session, known.keys.signature_key)
        row = {
            "id": known.device_id,
            "state": known.state.value,
            "registered_at": known.registered_at or at,
            "last_seen_at": known.last_seen_at or at,
            "confirmed_at": at,  # the embedding program's profile counts as confirmed
        }
        devices.insert_device(session, {**row, **columns, **key_columns(known.keys)})
        if known.keys.signature_key is not None:
            if receipt is None:
                raise ConflictError("the device went away at this moment; repeat the call")
            insert_key(session, known.device_id, known.keys, receipt, at)
        event = Event("device.registered", f"device:{known.device_id}", RiskLevel.MEDIUM)
        audit.record(session, caller, event, at)

    def replace_keys(self, caller: Caller, device_id: str, keys: PublicKeys) -> Device:
        """Replace a device's keys. None keeps the current key; replaced keys are kept as evidence.

        Raises:
            DeviceNotFoundError: There is no such device.
            DeviceRevokedError: It is revoked.
            AlreadyExistsError: The signature key was used before, by this or another device.
            ConflictError: A concurrent call changed its keys; retry.
        """
        at = self._context.clock()
        with self._context.database.read() as session:
            known = _require_usable(devices.get_device(session, device_id), device_id)
        wanted = _merged(known, keys)
        count = known.key_rotation_count
        is_other = _is_other(known, keys)
        receipt = b""
        if wanted.signature_key is not None:
            count += is_other
            receipt = sign_receipt(
                self._context, device_id, wanted, known.registered_at, rotation_count=count
            )

        def work(session: Session) -> Device:
            device = _require_usable(devices.lock_device(session, device_id), device_id)
            if key_names(device) != key_names(known):
                raise ConflictError("the device's keys changed at this moment; repeat the call")
            changes = key_columns(keys)
            if is_other:
                _insert_next(session, device, wanted, receipt, at)
                changes["key_rotation_count"] = count
            elif keys.kem_key is not None and device.signature_key_id is not None:
                devices.vouch_for_key(
                    session, device.signature_key_id, receipt, kem_public_key=keys.kem_key.data
                )
            if changes:
                devices.update_device(session, device_id, changes)
                event = Event("device.keys_replaced", f"device:{device_id}", RiskLevel.HIGH)
                audit.record(session, caller, event, at)
            changed = devices.get_device(session, device_id)
            assert changed is not None
            return changed

        return self._context.database.write(work)

    def note_seen(self, device_id: str) -> None:
        """Record a device as seen now."""
        at = self._context.clock()
        self._context.database.write(lambda session: devices.record_seen(session, {device_id: at}))

    def count_seen(self, within_s: float) -> int:
        """Return the number of active devices seen within the last `within_s` seconds."""
        since = self._context.clock() - timedelta(seconds=within_s)
        with self._context.database.read() as session:
            return devices.count_active_since(session, since)


def _insert_next(
    session: Session, device: Device, keys: PublicKeys, receipt: bytes, at: datetime
) -> None:
    assert keys.signature_key is not None
    _require_unknown(session, keys.signature_key)
    if device.signature_key_id is not None:
        devices.retire_key(session, device.signature_key_id, "replaced in-process", at)
    insert_key(session, device.id, keys, receipt, at)


def _require_usable(device: Device | None, device_id: str) -> Device:
    if device is None:
        raise DeviceNotFoundError(f"no device {device_id[:64]!r}")
    if device.state == DeviceState.REVOKED.value:
        raise DeviceRevokedError
    return device


def _require_unknown(session: Session, key: PublicKey) -> None:
    if devices.get_key(session, key.key_id) is not None:
        raise AlreadyExistsError("the signature key is known already")


def _is_other(known: Device, keys: PublicKeys) -> bool:
    """Return whether keys contain a signature key that differs from the device's current one."""
    return keys.signature_key is not None and keys.signature_key.key_id != known.signature_key_id


def _merged(known: Device, keys: PublicKeys) -> PublicKeys:
    """Return a device's keys after a replacement."""
    signature_key, kem_key = keys.signature_key, keys.kem_key
    if signature_key is None and known.signature_public_key is not None:
        signature_key = PublicKey(
            algorithm_of(known.signature_algorithm or 0), known.signature_public_key
        )
    if kem_key is None and known.kem_public_key is not None:
        kem_key = KemPublicKey(known.kem_public_key)
    return PublicKeys(signature_key, kem_key)
