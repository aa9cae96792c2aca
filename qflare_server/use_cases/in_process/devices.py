"""Devices registered by an embedding program, without enrollment."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey
from qflare_server.context import Context
from qflare_server.errors import (
    AlreadyExistsError,
    DeviceNotFoundError,
    DeviceRevokedError,
    InvalidRequestError,
)
from qflare_server.storage.records import Device
from qflare_server.storage.repository import audit, devices
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import DeviceState, RiskLevel
from qflare_server.use_cases.devices.administration import MAX_DEVICE_ID, Profile
from qflare_server.use_cases.devices.keys import insert_key, key_columns


@dataclass(frozen=True)
class PublicKeys:
    """The public keys of a device, as far as it has any."""

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
            AlreadyExistsError: There is a device with this id, or one with its signature key.
            InvalidRequestError: Something of its profile is out of range.
        """
        if self.add_many(caller, [known]) == 0:
            raise AlreadyExistsError(f"device {known.device_id[:64]!r} exists")

    def add_many(self, caller: Caller, known: Sequence[KnownDevice]) -> int:
        """Insert those devices that are not there, all in one transaction; return how many.

        Raises:
            AlreadyExistsError: A signature key is another device's; none is inserted.
            InvalidRequestError: Something of a profile is out of range; none is inserted.
            ConflictError: Another call registered one of them meanwhile: repeat the call.
        """
        rows = {item.device_id: (item, item.profile.columns()) for item in known}

        def work(session: Session) -> int:
            missing = rows.keys() - devices.existing_ids(session, list(rows))
            for device_id in sorted(missing):
                self._insert(session, caller, *rows[device_id])
            return len(missing)

        return self._context.database.write(work)

    def _insert(
        self, session: Session, caller: Caller, known: KnownDevice, columns: dict[str, Any]
    ) -> None:
        at = self._context.clock()
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
            insert_key(session, known.device_id, known.keys, None, at)
        event = Event("device.registered", f"device:{known.device_id}", RiskLevel.MEDIUM)
        audit.record(session, caller, event, at)

    def replace_keys(self, caller: Caller, device_id: str, keys: PublicKeys) -> Device:
        """Give a device other keys; a key that is None stays as it is, earlier ones stay as evidence.

        Raises:
            DeviceNotFoundError: There is no such device.
            DeviceRevokedError: It is revoked.
            AlreadyExistsError: The signature key is or was another device's, or was this one's before.
        """

        def work(session: Session) -> Device:
            at = self._context.clock()
            device = devices.lock_device(session, device_id)
            if device is None:
                raise DeviceNotFoundError(f"no device {device_id[:64]!r}")
            if device.state == DeviceState.REVOKED.value:
                raise DeviceRevokedError
            changes = key_columns(keys)
            fresh = keys.signature_key
            if fresh is not None and fresh.key_id != device.signature_key_id:
                _require_unknown(session, fresh)
                if device.signature_key_id is not None:
                    devices.retire_key(session, device.signature_key_id, "replaced in-process", at)
                insert_key(session, device_id, keys, None, at)
                changes["key_rotation_count"] = device.key_rotation_count + 1
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
        """Return how many active devices have called within so many seconds."""
        since = self._context.clock() - timedelta(seconds=within_s)
        with self._context.database.read() as session:
            return devices.count_active_since(session, since)


def _require_unknown(session: Session, key: PublicKey) -> None:
    if devices.get_key(session, key.key_id) is not None:
        raise AlreadyExistsError("the signature key is known already")
