"""Device registry for programs that embed the coordinator.

Module-level functions on the coordinator's database (`qflare_server.serving.embedded` documents the database and how it
is opened). Devices are shared with the coordinator: an administrator can list, suspend or revoke a device registered
here over gRPC, and these functions see devices enrolled there.

A refusal returns False or None, as in the in-memory registry that these functions replace, and logs its reason as a
WARNING. Every other failure (database unreachable, disk full) raises. The dictionaries are
documented in `use_cases.in_process.records`. Call `close` at the end of the program.

    register_device("ward-3", {"metadata": {"device_type": "workstation"}})
    update_device_status("ward-3", "suspended")
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from qflare_server.errors import DeviceNotFoundError, InvalidRequestError
from qflare_server.serving.embedded import CALLER, ForkedError, close, configure, current, refused
from qflare_server.storage.tables import DeviceState
from qflare_server.use_cases.in_process.records import (
    UNKNOWN_TYPE,
    read_keys,
    read_record,
    read_state,
    write_record,
    write_summary,
)

__all__ = [
    "ForkedError",
    "check_device_health",
    "cleanup_inactive_devices",
    "close",
    "configure",
    "get_device_capabilities",
    "get_device_count",
    "get_device_info",
    "get_registered_devices",
    "get_registry_stats",
    "list_active_devices",
    "register_device",
    "remove_device",
    "update_device_keys",
    "update_device_status",
]

logger = logging.getLogger(__name__)

HOUR_S: Final = 3600.0
HEALTHY_WITHIN_S: Final = 24 * HOUR_S
REASON: Final = "by the program"


def register_device(device_id: str, device_info: Mapping[str, Any] | None = None) -> bool:
    """Register a device; return False if the id is taken or the information is invalid.

    Args:
        device_id: 1 to 255 printable characters.
        device_info: `metadata`, `public_keys` and `training_config` as in `use_cases.in_process.records`; all
            optional. A public key that is neither ML-DSA nor X-Wing is skipped with a WARNING.
    """

    def work() -> None:
        fields = {name: value for name, value in (device_info or {}).items() if name != "status"}
        record = read_record(device_id, fields)
        for name in record.unusable_keys:
            logger.warning("device %s: %s is of no use here and is left out", device_id, name)
        current().known_devices.add(CALLER, record.known)

    return _granted("register_device", work)


def get_device_info(device_id: str) -> dict[str, Any] | None:
    """Return a device as in `use_cases.in_process.records`, None if there is none. Reading changes nothing."""
    try:
        return write_record(current().devices.get(device_id))
    except DeviceNotFoundError:
        return None


def update_device_status(device_id: str, status: str) -> bool:
    """Change a device's status and record it as seen; return False if the transition is not allowed.

    Args:
        device_id: Id of a registered device.
        status: `active` (or `training`, `approved`), `inactive`, `suspended` (or `pending`), or `revoked`, which
            is permanent.
    """

    def work() -> None:
        state = read_state(status)
        devices = current().devices
        moves: dict[DeviceState, Callable[..., Any]] = {
            DeviceState.ACTIVE: devices.reinstate,
            DeviceState.INACTIVE: devices.deactivate,
            DeviceState.SUSPENDED: devices.suspend,
            DeviceState.REVOKED: devices.revoke,
        }
        if state not in moves:
            raise InvalidRequestError("status: a device is quarantined by its rounds only")
        moves[state](CALLER, device_id, REASON)
        current().known_devices.note_seen(device_id)

    return _granted("update_device_status", work)


def update_device_keys(device_id: str, public_keys: Mapping[str, Any]) -> bool:
    """Replace a device's public keys; return False if the device is unknown or a key is invalid.

    Args:
        device_id: Id of a registered device that is not revoked.
        public_keys: `sig_public_key` (ML-DSA) and `kem_public_key` (X-Wing) as bytes, base64 or hex; an
            omitted key is unchanged. A new signature key counts as a rotation.
    """

    def work() -> None:
        keys = read_keys(public_keys)
        if keys.signature_key is None and keys.kem_key is None:
            raise InvalidRequestError("public_keys: names no key", field="public_keys")
        current().known_devices.replace_keys(CALLER, device_id, keys)

    return _granted("update_device_keys", work)


def remove_device(device_id: str) -> bool:
    """Deactivate a device; return False if it is unknown or revoked. Its history is kept."""
    return _granted(
        "remove_device", lambda: current().devices.deactivate(CALLER, device_id, "removed")
    )


def cleanup_inactive_devices(hours_threshold: float = 24) -> dict[str, int]:
    """Deactivate devices not seen for a number of hours; return `cleaned` and `total`.

    Raises:
        ValueError: The threshold is negative.
    """
    if not hours_threshold >= 0:
        raise ValueError(f"hours_threshold: got {hours_threshold}, want 0 or more")
    cleaned = current().devices.mark_inactive(hours_threshold * HOUR_S)
    by_state, _ = current().devices.counts()
    return {"cleaned": cleaned, "total": sum(by_state.values())}


def list_active_devices() -> list[dict[str, Any]]:
    """Return the active devices by id: `device_id`, `last_seen`, `device_type`, `capabilities`, `status`."""
    return [write_summary(device) for device in current().devices.list_active()]


def get_device_count() -> int:
    """Return the number of active devices."""
    by_state, _ = current().devices.counts()
    return by_state.get(DeviceState.ACTIVE.value, 0)


def get_registry_stats() -> dict[str, Any]:
    """Return `total`, `active` and `inactive` (in any other state) devices, `by_type` of all, `last_updated`."""
    by_state, by_type = current().devices.counts()
    total = sum(by_state.values())
    active = by_state.get(DeviceState.ACTIVE.value, 0)
    return {
        "total": total,
        "active": active,
        "inactive": total - active,
        "last_updated": current().context.clock().isoformat(),
        "by_type": {name or UNKNOWN_TYPE: count for name, count in by_type.items()},
    }


def check_device_health() -> dict[str, Any]:
    """Return the number of devices by health, with `total_devices` and `last_check`.

    A device is `healthy` if it is active and was seen within a day, `unknown` if it is active and was not, and
    `unhealthy` if it is not active.
    """
    stats = get_registry_stats()
    healthy = min(current().known_devices.count_seen(HEALTHY_WITHIN_S), stats["active"])
    return {
        "total_devices": stats["total"],
        "healthy": healthy,
        "unhealthy": stats["inactive"],
        "unknown": stats["active"] - healthy,
        "last_check": stats["last_updated"],
    }


def get_device_capabilities() -> dict[str, list[str]]:
    """Return the names of each active device's capabilities by device id."""
    return {device.id: sorted(device.capabilities) for device in current().devices.list_active()}


def get_registered_devices() -> dict[str, dict[str, Any]]:
    """Return the active devices by id, each as `get_device_info`; `qflare-server registry import` reads it."""
    return {device.id: write_record(device) for device in current().devices.list_active()}


def _granted(what: str, work: Callable[[], object]) -> bool:
    with refused(logger, what) as refusal:
        work()
    return not refusal
