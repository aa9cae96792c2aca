"""Verification of devices and their keys against the signed receipts and the audit log.

An enrollment receipt or a rotation introduces a key, and the receipt states the profile that selection uses. Later
changes by an administrator, to groups and confirmed profiles, are in the audit log: the rows have to match the last
entry.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.evidence.statements import require_equal
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.storage.records import Device, DeviceKey
from qflare_server.storage.repository import evidence, membership
from qflare_server.verification.findings import (
    BATCH,
    Finding,
    Tally,
    differences,
    faults,
    walk,
)

REGISTERED: Final = "device.registered"
GROUPS_CHANGED: Final = "device.groups_changed"
PROFILE_CONFIRMED: Final = "device.profile_confirmed"
_DECIDING: Final = (REGISTERED, GROUPS_CHANGED, PROFILE_CONFIRMED)


class DeviceVerification:
    """One pass over devices and their keys.

    Args:
        context: The coordinator's dependencies.
        identities: Proves whose a key is.
        tally: Counts of what was checked.
    """

    def __init__(self, context: Context, identities: DeviceIdentities, tally: Tally) -> None:
        self._context = context
        self._identities = identities
        self._tally = tally

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        yield from self._device_keys()
        yield from self._devices()

    def _device_keys(self) -> Iterator[Finding]:
        rows = walk(self._context.database, evidence.keys_after, "", _key_id)
        yield from faults("device_key", rows, self._check_key, _key_id, self._tally)

    def _check_key(self, row: DeviceKey) -> None:
        key = PublicKey(algorithm_of(row.algorithm), row.public_key)
        require_equal("key_id", row.key_id, key.key_id)
        self._identities.require(row.device_id, row.key_id)

    def _devices(self) -> Iterator[Finding]:
        after = ""
        while True:
            with self._context.database.read() as session:
                rows = evidence.devices_after(session, after, BATCH)
                ids = [row.id for row in rows]
                keys = evidence.keys_of(session, ids)
                groups = membership.groups_of(session, ids)
                entries = evidence.last_events(session, _DECIDING, [f"device:{i}" for i in ids])
            if not rows:
                return
            after = rows[-1].id
            current = {key.key_id: key for key in keys}
            profiles = _enrolled_profiles(keys)
            for row in rows:
                self._tally.checked["device"] += 1
                changed = _compare_key(row, current)
                if changed:
                    yield Finding("device", row.id, f"not its key's: {', '.join(changed)}")
                events = {kind: entries.get((kind, f"device:{row.id}")) for kind in _DECIDING}
                changed = _compare_profile(row, profiles.get(row.id), events[PROFILE_CONFIRMED])
                if changed:
                    problem = f"not as it enrolled, or was confirmed: {', '.join(changed)}"
                    yield Finding("device", row.id, problem)
                if list(groups.get(row.id, ())) != _logged_groups(events):
                    yield Finding("device", row.id, "its groups are not those that the log names")


def _compare_key(row: Device, keys: Mapping[str, DeviceKey]) -> list[str]:
    if row.signature_key_id is None:
        return []
    key = keys.get(row.signature_key_id)
    if key is None:
        return ["signature_key_id"]
    return differences(
        {
            "device_id": (row.id, key.device_id),
            "signature_algorithm": (row.signature_algorithm, key.algorithm),
            "signature_public_key": (row.signature_public_key, key.public_key),
            "kem_public_key": (row.kem_public_key, key.kem_public_key),
        }
    )


def _enrolled_profiles(keys: Sequence[DeviceKey]) -> dict[str, security_pb2.EnrolledProfile]:
    """Return the profile in the last receipt of each device; devices without one are omitted."""
    found: dict[str, security_pb2.EnrolledProfile] = {}
    for key in keys:  # by device, then in order
        envelope = security_pb2.SignedEnvelope.FromString(key.statement or b"")
        if len(envelope.signatures) == 1:
            receipt = security_pb2.EnrollmentReceipt.FromString(envelope.payload)
            if receipt.HasField("profile"):
                found[key.device_id] = receipt.profile
    return found


def _compare_profile(
    row: Device, enrolled: security_pb2.EnrolledProfile | None, confirmed: Any
) -> list[str]:
    """Return the columns used for selection that match neither the enrollment nor the last confirmation."""
    if enrolled is None:
        return []
    if row.confirmed_at is None:
        want = (enrolled.device_type, dict(enrolled.capabilities))
    elif confirmed is None:
        return ["confirmed_at"]
    else:
        want = (confirmed.details.get("device_type"), confirmed.details.get("capabilities"))
    return differences(
        {
            "device_type": (row.device_type, want[0]),
            "capabilities": (row.capabilities, want[1]),
        }
    )


def _logged_groups(events: Mapping[str, Any]) -> list[str]:
    """Return a device's groups according to the audit log: the last assignment, or else those of its enrollment."""
    entry = events[GROUPS_CHANGED] or events[REGISTERED]
    named = "" if entry is None else entry.details.get("groups", "")
    return named.split(",") if named else []


def _key_id(row: DeviceKey) -> str:
    return row.key_id
