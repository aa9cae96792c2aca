"""Device pages: counts by state and type, the list, and the details of one device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.storage.records import Device
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.storage.tables import DeviceState

ROWS: Final = 50
SHOWN_TYPES: Final = 12


@dataclass(frozen=True)
class Slice:
    """A count with its bar; `percent` is relative to the largest count."""

    name: str
    count: int
    percent: float


@dataclass(frozen=True)
class DeviceRow:
    """A device in the list."""

    device_id: str
    device_name: str
    state: str
    state_reason: str
    device_type: str
    seen: Moment | None
    registered: Moment | None
    rotation_count: int
    key_id: str


def slices(counts: Mapping[str, int], names: Sequence[str]) -> Sequence[Slice]:
    """Return counts sorted by name, with the lengths of their bars."""
    largest = max((counts.get(name, 0) for name in names), default=0) or 1
    return [
        Slice(name, counts.get(name, 0), round(100 * counts.get(name, 0) / largest, 1))
        for name in names
    ]


def build_list(visit: PageContext) -> Mapping[str, Any]:
    """Build the list of devices."""
    state, kind = visit.one_of("state", DeviceState), visit.text("type")
    page = visit.use_cases.devices.list(
        visit.rows(ROWS), DeviceFilter(state=state, device_type=kind)
    )
    by_state, by_type = visit.recent.device_counts()
    types = sorted(by_type, key=lambda name: (-by_type[name], name))
    return {
        "rows": [_row(device, visit) for device in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
        "state": state,
        "kind": kind,
        "states": slices(by_state, [item.value for item in DeviceState]),
        "types": slices(by_type, types[:SHOWN_TYPES]),
        "more_types": max(0, len(types) - SHOWN_TYPES),
        "device_count": sum(by_state.values()),
    }


def build_device(visit: PageContext) -> Mapping[str, Any]:
    """Build the page of one device."""
    device = visit.use_cases.devices.get(visit.text("id"))
    return {
        "row": _row(device, visit),
        "settings": {
            "Local epochs": device.local_epochs,
            "Batch size": device.batch_size,
            "Learning rate": f"{device.learning_rate:g}",
        },
        "profiles": [
            ("Capabilities", dict(device.capabilities)),
            ("Hardware", dict(device.hardware_info)),
            ("Network", dict(device.network_info)),
        ],
    }


def _row(device: Device, visit: PageContext) -> DeviceRow:
    return DeviceRow(
        device_id=device.id,
        device_name=device.name,
        state=device.state,
        state_reason=device.state_reason,
        device_type=device.device_type,
        seen=moment(device.last_seen_at, visit.at),
        registered=moment(device.registered_at, visit.at),
        rotation_count=device.key_rotation_count,
        key_id=device.signature_key_id or "",
    )
