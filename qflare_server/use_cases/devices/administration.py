"""Device administration: list, rename, suspend, reinstate and revoke devices."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy.orm import Session

from qflare.references import ManyMeantError
from qflare_server.context import Context
from qflare_server.errors import (
    AlreadyExistsError,
    DeviceNotFoundError,
    InvalidRequestError,
    WrongStateError,
)
from qflare_server.storage.paging import Page, PageRequest
from qflare_server.storage.records import Device
from qflare_server.storage.repository import (
    audit,
    device_names,
    devices,
    membership,
    references,
    tokens,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.storage.repository.idempotent_calls import run_once
from qflare_server.storage.tables import DeviceState, RiskLevel
from qflare_server.training.config import is_one_line
from qflare_server.training.groups import checked_groups
from qflare_server.use_cases.access.rate_limits import hourly_budget

MAX_PROFILE_ENTRIES = 64
MAX_PROFILE_TEXT = 256
MAX_DEVICE_TYPE = 100
MAX_DEVICE_ID = 255
MAX_REASON = 500
MAX_LEARNING_RATE = 1e6
A_NAME: Final = "1 to 64 printable characters without spaces, not first a hyphen, and not a UUID"


@dataclass(frozen=True)
class Profile:
    """A device's self-reported profile; zeros and empty strings mean the defaults."""

    device_type: str = ""
    hardware_info: dict[str, Any] = field(default_factory=dict)
    network_info: dict[str, Any] = field(default_factory=dict)
    capabilities: dict[str, Any] = field(default_factory=dict)
    local_epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0

    def columns(self) -> dict[str, Any]:
        """Return the columns of a device's row.

        Raises:
            InvalidRequestError: Something is too long, too many or out of range.
        """
        if len(self.device_type) > MAX_DEVICE_TYPE or not is_one_line(self.device_type):
            raise InvalidRequestError(
                "device_type: longer than 100 characters, or holds a control character",
                field="device_type",
            )
        for name in ("hardware_info", "network_info", "capabilities"):
            _check_entries(name, getattr(self, name))
        if (
            self.local_epochs < 0
            or self.batch_size < 0
            or not 0 <= self.learning_rate <= MAX_LEARNING_RATE
        ):
            raise InvalidRequestError("training_defaults: out of range", field="training_defaults")
        return {
            "device_type": self.device_type,
            "hardware_info": self.hardware_info,
            "network_info": self.network_info,
            "capabilities": self.capabilities,
            "local_epochs": self.local_epochs or 1,
            "batch_size": self.batch_size or 32,
            "learning_rate": self.learning_rate or 0.01,
        }


def _check_entries(name: str, entries: dict[str, Any]) -> None:
    if len(entries) > MAX_PROFILE_ENTRIES:
        raise InvalidRequestError(f"{name}: more than {MAX_PROFILE_ENTRIES} entries", field=name)
    for key, value in entries.items():
        if not 1 <= len(key) <= MAX_PROFILE_TEXT or len(str(value)) > MAX_PROFILE_TEXT:
            raise InvalidRequestError(f"{name}: an entry is too long", field=name)
        if "\0" in key or "\0" in str(value):
            raise InvalidRequestError(f"{name}: an entry holds NUL", field=name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequestError(f"{name}: an entry is not finite", field=name)


class GroupedDevice(NamedTuple):
    """A device with its groups, in alphabetical order."""

    device: Device
    groups: Sequence[str]


@dataclass(frozen=True)
class Beat:
    """Answer to a heartbeat."""

    server_time: datetime
    state: str
    device_name: str


class Devices:
    """Device administration use cases."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._profile_changes = hourly_budget(
            context.config.max_device_records_per_hour, "profile changes"
        )

    def add(self, caller: Caller, device_id: str, profile: Profile, **columns: Any) -> None:
        """Insert a device that an embedding program vouches for.

        Raises:
            AlreadyExistsError: The device id is taken.
        """
        if not 1 <= len(device_id) <= MAX_DEVICE_ID or not device_id.isprintable():
            raise InvalidRequestError(
                "device_id: want 1 to 255 printable characters", field="device_id"
            )
        values = profile.columns() | columns
        at = self._context.clock()

        def work(session: Session) -> None:
            if devices.get_device(session, device_id) is not None:
                raise AlreadyExistsError(f"device {device_id!r} exists")
            row = {
                "id": device_id,
                "state": DeviceState.ACTIVE.value,
                "registered_at": at,
                "confirmed_at": at,
            }
            devices.insert_device(session, {**row, "last_seen_at": at, **values})
            event = Event("device.registered", f"device:{device_id}", RiskLevel.MEDIUM)
            audit.record(session, caller, event, at)

        self._context.database.write(work)

    def get(self, device_id: str) -> Device:
        """Return a device.

        Raises:
            DeviceNotFoundError: There is no such device.
        """
        with self._context.database.read() as session:
            return _require_device(devices.get_device(session, device_id))

    def list(self, request: PageRequest, wanted: DeviceFilter) -> Page[Device]:
        """Return devices by id."""
        with self._context.database.read() as session:
            return devices.list_devices(session, request, wanted)

    def list_active(self) -> Sequence[Device]:
        """Return every active device by id."""
        with self._context.database.read() as session:
            return devices.list_active(session)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the number of devices by state and by type."""
        with self._context.database.read() as session:
            return devices.count_by_state(session), devices.count_by_type(session)

    def suspend(self, caller: Caller, device_id: str, reason: str) -> GroupedDevice:
        """Suspend a device until it is reinstated, effective on its next call.

        Raises:
            WrongStateError: It is revoked.
        """
        return self._move(caller, device_id, DeviceState.SUSPENDED, reason)

    def reinstate(self, caller: Caller, device_id: str, reason: str) -> GroupedDevice:
        """Lift a suspension or a quarantine.

        Raises:
            WrongStateError: It is revoked.
        """
        return self._move(caller, device_id, DeviceState.ACTIVE, reason)

    def deactivate(self, caller: Caller, device_id: str, reason: str) -> GroupedDevice:
        """Mark a device inactive until its next call."""
        return self._move(caller, device_id, DeviceState.INACTIVE, reason)

    def revoke(self, caller: Caller, device_id: str, reason: str) -> GroupedDevice:
        """Revoke a device permanently, with its tokens; its evidence stays."""

        def also(session: Session, device: Device) -> None:
            at = self._context.clock()
            tokens.revoke_device_tokens(session, device.id, "device revoked", at)
            if device.signature_key_id is not None:
                devices.retire_key(session, device.signature_key_id, "device revoked", at)

        return self._move(caller, device_id, DeviceState.REVOKED, reason, also)

    def set_groups(
        self, caller: Caller, device_id: str, groups: Sequence[str], reason: str
    ) -> GroupedDevice:
        """Replace a device's groups, effective on its next call.

        Raises:
            DeviceNotFoundError: There is no such device.
            InvalidRequestError: There are too many groups, or a group name is invalid.
        """
        wanted = checked_groups(groups, "groups")
        _check_reason(reason)

        def work(session: Session) -> Device:
            device = _require_device(devices.lock_device(session, device_id))
            before = membership.groups_of(session, [device_id]).get(device_id, ())
            if sorted(before) == sorted(wanted):
                return device
            membership.set_groups(session, device_id, wanted)
            details = {"from": ",".join(before), "groups": ",".join(wanted), "reason": reason}
            event = Event("device.groups_changed", f"device:{device_id}", RiskLevel.MEDIUM, details)
            audit.record(session, caller, event, self._context.clock())
            return device

        return self._once(caller, device_id, work)

    def rename(self, caller: Caller, device_id: str, name: str, reason: str) -> GroupedDevice:
        """Change the name of a device.

        Raises:
            DeviceNotFoundError: There is no such device.
            InvalidRequestError: The name is too long, not one printable word, or has the form of an id.
            AlreadyExistsError: Another device has this name.
        """
        if not device_names.is_name(name):
            raise InvalidRequestError(f"name: want {A_NAME}", field="name")
        _check_reason(reason)

        def work(session: Session) -> Device:
            device = _require_device(devices.lock_device(session, device_id))
            if device.name == name:
                return device
            if device_names.is_taken(session, name):
                raise AlreadyExistsError(f"another device has the name {name!r}")
            devices.rename_device(session, device_id, name)
            details = {"from": device.name, "reason": reason}
            event = Event("device.renamed", f"device:{device_id}", RiskLevel.MEDIUM, details)
            audit.record(session, caller, event, self._context.clock())
            return device._replace(name=name)

        return self._once(caller, device_id, work)

    def names_of(self, device_ids: Iterable[str]) -> Mapping[str, str]:
        """Return the names of devices; unknown ids are left out."""
        with self._context.database.read() as session:
            return device_names.names_of(session, device_ids)

    def find_id(self, reference: str) -> str:
        """Return the id of the device that a person refers to by id, beginning of an id, or name.

        Raises:
            DeviceNotFoundError: There is no such device.
            InvalidRequestError: There are several; the message lists them.
        """
        try:
            with self._context.database.read() as session:
                device_id = references.find_device_id(session, reference)
        except ManyMeantError as error:
            raise InvalidRequestError(str(error), field="reference") from error
        if device_id is None:
            raise DeviceNotFoundError
        return device_id

    def groups_of(self, device_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Return the groups of devices; devices without any are left out."""
        with self._context.database.read() as session:
            return membership.groups_of(session, device_ids)

    def confirm_profile(
        self, caller: Caller, device_id: str, profile: Profile, reason: str
    ) -> GroupedDevice:
        """Confirm device type and capabilities of a device: selection uses these values.

        Raises:
            DeviceNotFoundError: There is no such device.
            InvalidRequestError: Something is too long, too many or out of range.
        """
        columns = profile.columns()
        _check_reason(reason)
        at = self._context.clock()
        values = {name: columns[name] for name in ("device_type", "capabilities")}

        def work(session: Session) -> Device:
            _require_device(devices.lock_device(session, device_id))
            devices.update_device(session, device_id, {**values, "confirmed_at": at})
            event = Event(
                "device.profile_confirmed",
                f"device:{device_id}",
                RiskLevel.MEDIUM,
                {**values, "reason": reason},
            )
            audit.record(session, caller, event, at)
            return _require_device(devices.get_device(session, device_id))

        return self._once(caller, device_id, work)

    def update_reported(self, caller: Caller, device_id: str, profile: Profile) -> Device:
        """Replace a device's self-reported profile; selection does not use it."""
        values = _reported_columns(profile)

        def work(session: Session) -> Device:
            _require_device(devices.lock_device(session, device_id))
            devices.update_device(session, device_id, values)
            event = Event("device.profile_changed", f"device:{device_id}")
            audit.record(session, caller, event, self._context.clock())
            return _require_device(devices.get_device(session, device_id))

        return self._context.database.write(work)

    def heartbeat(self, caller: Caller, device_id: str, profile: Profile | None) -> Beat:
        """Process a heartbeat: store the profile, if there is a new one, and return the device's state.

        Raises:
            DeviceNotFoundError: There is no such device.
            TooManyRequestsError: The device has used up its profile changes of the hour.
        """
        device = self.get(device_id)
        if profile is not None and not _is_reported(device, profile):
            self._profile_changes.take(device_id)
            device = self.update_reported(caller, device_id, profile)
        return Beat(self._context.clock(), device.state, device.name)

    def mark_inactive(self, before_s: float) -> int:
        """Mark devices inactive that have not called for `before_s` seconds; return their number."""
        before = self._context.clock() - timedelta(seconds=before_s)
        return self._context.database.write(lambda session: devices.mark_inactive(session, before))

    def _once(
        self, caller: Caller, device_id: str, change: Callable[[Session], Device]
    ) -> GroupedDevice:
        """Apply a change, once if the caller has a claim; return the changed device."""

        def work(session: Session) -> GroupedDevice:
            device = change(session)
            groups = membership.groups_of(session, [device_id]).get(device_id, ())
            return GroupedDevice(device, groups)

        at = self._context.clock()
        return self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )

    def _move(
        self,
        caller: Caller,
        device_id: str,
        state: DeviceState,
        reason: str,
        also: Callable[[Session, Device], None] | None = None,
    ) -> GroupedDevice:
        _check_reason(reason)

        def work(session: Session) -> Device:
            device = _require_device(devices.lock_device(session, device_id))
            if device.state == DeviceState.REVOKED.value and state is not DeviceState.REVOKED:
                raise WrongStateError("the device is revoked")
            before = device.state
            if (before, device.state_reason) == (state.value, reason):
                return device
            if also is not None:
                also(session, device)
            devices.update_device(
                session, device_id, {"state": state.value, "state_reason": reason}
            )
            event = Event(
                f"device.{state.value}",
                f"device:{device_id}",
                RiskLevel.HIGH,
                {"from": before, "reason": reason},
            )
            audit.record(session, caller, event, self._context.clock())
            return _require_device(devices.get_device(session, device_id))

        return self._once(caller, device_id, work)


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON or "\0" in reason:
        raise InvalidRequestError(
            "reason: longer than 500 characters, or holds NUL", field="reason"
        )


def _require_device(device: Device | None) -> Device:
    if device is None:
        raise DeviceNotFoundError
    return device


def _reported_columns(profile: Profile) -> dict[str, Any]:
    values = profile.columns()
    values["reported_type"] = values.pop("device_type")
    values["reported_capabilities"] = values.pop("capabilities")
    return values


def _is_reported(device: Device, profile: Profile) -> bool:
    """Return whether a device's row already holds this profile."""
    return all(getattr(device, name) == value for name, value in _reported_columns(profile).items())
