"""Devices as dictionaries, in the shape of the earlier in-memory registry.

    {"device_id": str, "status": str, "registered_at": str, "last_seen": str | None,
     "public_keys": {"kem_public_key": str | None, "sig_public_key": str | None},
     "metadata": {"device_type": str, "hardware": dict, "network": dict, "capabilities": dict | list},
     "training_config": {"local_epochs": int, "batch_size": int, "learning_rate": float}}

The output is JSON: times are ISO 8601 in UTC, keys base64. In the input only the id is required. Input keys may be
bytes, base64 or hex, and capabilities may be a list of names. Keys other than ML-DSA and X-Wing (the earlier registry
kept FrodoKEM keys) are not usable: `read_record` can skip them and lists the skipped ones.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import Algorithm, InvalidKeyError, PublicKey
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.records import Device
from qflare_server.storage.tables import DeviceState
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, PublicKeys

STATES: Final = {state.value: state for state in DeviceState} | {
    "training": DeviceState.ACTIVE,
    "approved": DeviceState.ACTIVE,
    "pending": DeviceState.SUSPENDED,
}
"""Device states by status name of the earlier registry; training is a property of rounds, not of devices."""

UNKNOWN_TYPE: Final = "unknown"
MAX_INTEGER: Final = 2**31 - 1
Key = TypeVar("Key")


@dataclass(frozen=True)
class Record:
    """An imported device, and the names of its skipped keys."""

    known: KnownDevice
    unusable_keys: tuple[str, ...] = ()


def write_record(device: Device) -> dict[str, Any]:
    """Return a device as a dictionary."""
    return {
        "device_id": device.id,
        "status": device.state,
        "registered_at": device.registered_at.isoformat(),
        "last_seen": _iso(device.last_seen_at),
        "public_keys": {
            "kem_public_key": _base64(device.kem_public_key),
            "sig_public_key": _base64(device.signature_public_key),
        },
        "metadata": {
            "device_type": device.device_type or UNKNOWN_TYPE,
            "hardware": device.hardware_info,
            "network": device.network_info,
            "capabilities": device.capabilities,
        },
        "training_config": {
            "local_epochs": device.local_epochs,
            "batch_size": device.batch_size,
            "learning_rate": device.learning_rate,
        },
        "key_rotation_count": device.key_rotation_count,
    }


def write_summary(device: Device) -> dict[str, Any]:
    """Return a device's summary for a list."""
    return {
        "device_id": device.id,
        "last_seen": _iso(device.last_seen_at),
        "device_type": device.device_type or UNKNOWN_TYPE,
        "capabilities": device.capabilities,
        "status": device.state,
    }


def read_record(device_id: object, record: object) -> Record:
    """Read a device.

    Raises:
        InvalidRequestError: A field is invalid; the error names it.
    """
    if not isinstance(device_id, str):
        raise InvalidRequestError("device_id: not text", field="device_id")
    fields = _mapping("record", record)
    keys, unusable = _read_usable_keys(_mapping("public_keys", fields.get("public_keys")))
    known = KnownDevice(
        device_id,
        _read_profile(fields),
        keys,
        read_state(fields.get("status", DeviceState.ACTIVE.value)),
        _time("registered_at", fields.get("registered_at")),
        _time("last_seen", fields.get("last_seen")),
    )
    known.profile.columns()
    return Record(known, unusable)


def read_state(name: object) -> DeviceState:
    """Return the device state for a status name.

    Raises:
        InvalidRequestError: The status is unknown.
    """
    state = STATES.get(name) if isinstance(name, str) else None
    if state is None:
        wanted = ", ".join(sorted(STATES))
        raise InvalidRequestError(f"status: got {str(name)[:64]!r}, want {wanted}", field="status")
    return state


def read_keys(fields: Mapping[str, object]) -> PublicKeys:
    """Read public keys; a missing key is None.

    Raises:
        InvalidRequestError: A key's type is not supported.
    """
    try:
        return PublicKeys(
            _key(fields, "sig_public_key", _signature_key),
            _key(fields, "kem_public_key", KemPublicKey),
        )
    except InvalidKeyError as error:
        raise InvalidRequestError(f"public_keys: {error}", field="public_keys") from error


def _read_usable_keys(fields: Mapping[str, object]) -> tuple[PublicKeys, tuple[str, ...]]:
    """Read the usable keys; return the names of the others too."""
    usable: dict[str, object] = {}
    unusable = []
    for name in ("sig_public_key", "kem_public_key"):
        try:
            read_keys({name: fields.get(name)})
        except InvalidRequestError:
            unusable.append(name)
        else:
            usable[name] = fields.get(name)
    return read_keys(usable), tuple(unusable)


def _key(fields: Mapping[str, object], name: str, make: Callable[[bytes], Key]) -> Key | None:
    value = fields.get(name)
    if value is None or value in ("", b""):
        return None
    return make(_bytes(name, value))


def _bytes(name: str, value: object) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str):
        raise InvalidKeyError(f"{name}: neither bytes nor text")
    try:
        return bytes.fromhex(value)
    except ValueError:
        pass
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise InvalidKeyError(f"{name}: neither base64 nor hex") from error


def _signature_key(data: bytes) -> PublicKey:
    for algorithm in Algorithm:
        try:
            return PublicKey(algorithm, data)
        except InvalidKeyError:
            continue
    raise InvalidKeyError(f"sig_public_key: {len(data)} bytes are no ML-DSA key")


def _read_profile(fields: Mapping[str, object]) -> Profile:
    metadata = _mapping("metadata", fields.get("metadata"))
    settings = _mapping("training_config", fields.get("training_config"))
    device_type = metadata.get("device_type", UNKNOWN_TYPE)
    if not isinstance(device_type, str):
        raise InvalidRequestError("device_type: not text", field="device_type")
    return Profile(
        device_type,
        _json_mapping("hardware", metadata.get("hardware")),
        _json_mapping("network", metadata.get("network")),
        _json_mapping("capabilities", _named(metadata.get("capabilities"))),
        int(_number("local_epochs", settings.get("local_epochs", 0))),
        int(_number("batch_size", settings.get("batch_size", 0))),
        _number("learning_rate", settings.get("learning_rate", 0.0)),
    )


def _named(capabilities: object) -> object:
    """Return a list of names as a mapping."""
    if isinstance(capabilities, (list, tuple, set, frozenset)):
        return {str(name): True for name in capabilities}
    return capabilities


def _mapping(name: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name}: not a mapping", field=name)
    return value


def _json_mapping(name: str, value: object) -> dict[str, Any]:
    """Return a mapping after a JSON round trip, so that it reads back unchanged."""
    try:
        text = json.dumps(dict(_mapping(name, value)), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name}: cannot be written as JSON", field=name) from error
    if "\\u0000" in text:
        raise InvalidRequestError(f"{name}: holds a NUL character", field=name)
    return dict(json.loads(text))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name}: not a number", field=name)
    if not -MAX_INTEGER <= value <= MAX_INTEGER:  # false for NaN as well
        raise InvalidRequestError(f"{name}: out of range", field=name)
    return value


def _time(name: str, value: object) -> datetime | None:
    """Read ISO 8601, UTC where it names no zone, or seconds since 1970."""
    try:
        if value is None:
            return None
        if isinstance(value, datetime):
            at = value
        elif isinstance(value, str):
            at = datetime.fromisoformat(value)
        else:
            at = datetime.fromtimestamp(_number(name, value), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidRequestError(f"{name}: not a time", field=name) from error
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()
