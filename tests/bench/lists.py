"""Lists of administrators on a database of 100,000 devices and 1,000,000 audit entries."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2
from qflare_server.storage.database import Database
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.figures import Figure
from tests.bench.filling import DEVICE_COUNT, ENTRY_COUNT, fill_lists
from tests.bench.load import ADMIN, Call, alternating

FEW = 1_000
TURNS = 10
ALWAYS_ACTIVE = {"QFLARE_INACTIVE_AFTER_S": "0"}
"""The devices were last seen years ago."""
GOAL_MS, GOAL_RATIO = 20.0, 1.5
REQUESTS: Mapping[str, tuple[str, Message]] = {
    "devices": ("ListDevices", pb.ListDevicesRequest()),
    "devices of a type and state": (
        "ListDevices",
        pb.ListDevicesRequest(device_type="phone", state=device_pb2.DEVICE_STATE_ACTIVE),
    ),
    "audit entries": ("ListAuditEntries", pb.ListAuditEntriesRequest()),
    "audit entries of a rare event": (
        "ListAuditEntries",
        pb.ListAuditEntriesRequest(event_type="device.revoked"),
    ),
    "audit entries of an actor": (
        "ListAuditEntries",
        pb.ListAuditEntriesRequest(actor="device:7"),
    ),
    "audit entries before a time": (
        "ListAuditEntries",
        pb.ListAuditEntriesRequest(end_time=Timestamp(seconds=1_700_000_500)),
    ),
}


def first_pages(lab: Laboratory) -> Iterator[Figure]:
    """First pages, beside the same on a thousand rows."""
    sizes = (lab.times(DEVICE_COUNT, 10_000), lab.times(ENTRY_COUNT, 100_000))
    for backend in Backend:
        with _filled(lab, backend, FEW, FEW) as small, _filled(lab, backend, *sizes) as large:
            for name in REQUESTS:
                few, many = _medians(lab, name, [small, large])
                ratio = many / few
                yield Figure(
                    f"first page of {name}, {sizes[0]:,} devices, {sizes[1]:,} entries, {backend}",
                    f"p50 {many:.2f} ms",
                    f"of {FEW:,} rows: {few:.2f} ms",
                    f"{ratio:.2f} x",
                    f"< {GOAL_MS:.0f} ms, <= {GOAL_RATIO} x",
                    many < GOAL_MS and ratio <= GOAL_RATIO,
                )


@contextmanager
def _filled(
    lab: Laboratory, backend: Backend, device_count: int, entry_count: int
) -> Iterator[Coordinator]:
    """Run a coordinator on a database with so many rows."""

    def prepare(database: Database) -> None:
        fill_lists(database, device_count, entry_count)

    with lab.coordinator(backend, ALWAYS_ACTIVE, prepare=prepare) as coordinator:
        coordinator.process.settle()
        yield coordinator


def _medians(lab: Laboratory, name: str, coordinators: Sequence[Coordinator]) -> list[float]:
    """Return the median latency of a request at each coordinator, in milliseconds; they are asked in turns."""
    method, request = REQUESTS[name]
    message = request.SerializeToString()
    addresses = [coordinator.address for coordinator in coordinators]
    calls = [Call(f"{ADMIN}{method}", (message,), one.admin.token) for one in coordinators]
    repeats = lab.times(100, 40)
    alternating(addresses, [[call] * TURNS for call in calls], 1, TURNS)  # fills the caches
    measured = alternating(addresses, [[call] * repeats for call in calls], 1, TURNS)
    return [latencies.median_ms for latencies in measured]
