"""Devices of a running round, one by one: who has sent an update, and for whom the round still waits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from qflare_server.serving.dashboard import formatting
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import Device, Round, TrainingSession
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.storage.tables import DeviceState, RoundState, UpdateState

SHOWN: Final = 60
SILENT: Final = timedelta(minutes=2)


@dataclass(frozen=True)
class Place:
    """A device in a running round: `state` is `sent`, `rejected`, `waiting` or `silent`."""

    device_id: str
    device_name: str
    device_type: str
    state: str
    after: str
    seen: Moment | None


def roll(owner: TrainingSession, row: Round | None, visit: PageContext) -> Sequence[Place]:
    """Return the devices of the open round, those without an update first; empty if none is open."""
    if row is None or row.state != RoundState.OPEN.value:
        return []
    page = visit.use_cases.training.list_updates(owner.id, row.number, PageRequest(SHOWN))
    names = visit.use_cases.devices.names_of(item.device_id for item in page.rows)
    sent = [
        Place(
            item.device_id,
            names.get(item.device_id, item.device_id),
            "",
            "rejected" if item.state == UpdateState.REJECTED.value else "sent",
            formatting.duration((item.accepted_at - row.opened_at).total_seconds()),
            None,
        )
        for item in page.rows
    ]
    known = {place.device_id for place in sent}
    absent = [_absent(device, visit) for device in _wanted(owner, row, visit, known)]
    return [*absent[:SHOWN], *sent]


def _wanted(
    owner: TrainingSession, row: Round, visit: PageContext, known: set[str]
) -> Iterator[Device]:
    """Yield the devices without an update: the selected ones, or the active ones where all may take part."""
    devices = visit.use_cases.devices
    if row.selected_count > 0:
        ids = visit.use_cases.training.participation(owner.id, row.number).absent_ids
        yield from (devices.get(device_id) for device_id in ids[:SHOWN])
        return
    wanted = DeviceFilter(state=DeviceState.ACTIVE.value)
    rows = [
        item for item in devices.list(PageRequest(2 * SHOWN), wanted).rows if item.id not in known
    ]
    open_to = set(owner.config.groups)
    groups = devices.groups_of([item.id for item in rows]) if open_to else {}
    yield from (item for item in rows if not open_to or open_to & set(groups.get(item.id, ())))


def _absent(device: Device, visit: PageContext) -> Place:
    seen = device.last_seen_at
    is_silent = seen is None or visit.at - seen > SILENT
    return Place(
        device.id,
        device.name,
        device.device_type,
        "silent" if is_silent else "waiting",
        "",
        moment(seen, visit.at),
    )
