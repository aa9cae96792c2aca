"""What secure aggregation with neighbors costs a device, and the coordinator that opens the sums of groups."""

import time
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from qflare.masking.graph_parameters import GraphParameters, practical_parameters
from qflare.masking.masks import SLICE_BYTES, Mask, new_buffer, new_seed
from qflare.v1 import security_pb2
from qflare_server.storage.repository.neighbors import StoredMember
from qflare_server.training.neighbor_opening import GroupContents, open_group
from tests.bench.coordinator import Laboratory
from tests.bench.figures import Figure, milliseconds
from tests.support.neighbors import Device, Group

DEVICES: Final = 100
MANY: Final = 1000
DROPPED: Final = 10
"""One device of so many drops out."""
DEVICE_GOAL_S: Final = 0.1
COORDINATOR_GOAL_S: Final = 1.0
MANY_GOAL_S: Final = 7.0
GROUPS_GOAL_S: Final = 2.5


class Round:
    """A round of one group with parameters for 20 % liars, of which a tenth drops out after it has sent shares.

    Attributes:
        parameters: Of the group.
        device_s: CPU of a device beyond its update, in seconds.
        masking_s: The part of it that adds masks.
        opening_s: CPU of the coordinator to open the sum.
        streams_s: CPU of the key streams alone that the coordinator adds and subtracts.
    """

    def __init__(self, count: int, size: int) -> None:
        group = Group.of(map(Device, range(count)), practical_parameters(count, 0.2, 0.1))
        begun = time.process_time()
        group.share(group.devices)
        shared = time.process_time()
        update = np.ones(size, np.uint32)
        present = sorted(group.devices)[count // DROPPED :]
        group.upload(dict.fromkeys(present, update))
        masked = time.process_time()
        reveals = group.reveals(group.updates)
        revealed = time.process_time()
        contents = _contents(group, reveals)
        total = sum(group.updates.values(), np.zeros_like(update))
        received = time.process_time()
        for seed, sign in open_group(contents).masks():
            mask = Mask(seed)
            (mask.subtract_from if sign > 0 else mask.add_to)(total, 0)
        self.opening_s = time.process_time() - received
        if not np.array_equal(total, len(present) * update):
            raise AssertionError("the sum is wrong")
        self.parameters: GraphParameters = group.graph.parameters
        self.masking_s = (masked - shared) / len(present)
        steps_s = (shared - begun) / count + (revealed - masked) / len(present)
        self.device_s = steps_s + self.masking_s
        leftovers = len(present) + sum(
            neighbor in group.updates
            for digest in group.devices
            if digest not in group.updates
            for neighbor in group.graph.neighbors(digest)
        )
        self.streams_s = _key_stream(4 * size) * leftovers


def _contents(group: Group, reveals: Mapping[str, security_pb2.NeighborReveal]) -> GroupContents:
    """Return what the coordinator has of a group."""
    members = [
        StoredMember(
            device_id=device.device_id,
            digest=digest,
            group_number=1,
            is_sharer=digest in group.sharers,
            update_digest="ef" * 32 if digest in group.updates else None,
            shares_digest="ab" * 32,
            has_confirmed=digest in reveals,
            has_revealed=digest in reveals,
            is_active=True,
        )
        for digest, device in sorted(group.devices.items())
    ]
    advertisements = {digest: device.advertisement for digest, device in group.devices.items()}
    return GroupContents(group.graph, members, advertisements, group.sent, {}, reveals)


def _key_stream(size_bytes: int) -> float:
    """Return the CPU seconds of one key stream."""
    mask, buffer, repeats = Mask(new_seed()), new_buffer(), 20
    begun = time.process_time()
    for _ in range(repeats):
        stream = mask.stream(size_bytes)
        for offset in range(0, size_bytes, SLICE_BYTES):
            stream.write_to(buffer, min(SLICE_BYTES, size_bytes - offset))
    return (time.process_time() - begun) / repeats


def neighbors(lab: Laboratory) -> Iterator[Figure]:
    """CPU time in a group of 100, and in groups of 1,000 devices."""
    size = lab.times(10**6, 10**5)
    group = Round(DEVICES, size)
    yield Figure(
        f"CPU of a device beyond its update, {DEVICES} devices, {size:,} parameters",
        milliseconds(group.device_s),
        f"masks {milliseconds(group.masking_s)}; {group.parameters.neighbor_count} neighbors",
        goal=f"<= {milliseconds(DEVICE_GOAL_S)}",
        reached=group.device_s <= DEVICE_GOAL_S,
    )
    what = f"{size:,} parameters, {DEVICES} devices, {DEVICES // DROPPED} dropped out"
    yield _opening(what, [group], COORDINATOR_GOAL_S)
    size = 10**5
    group_count = MANY // DEVICES
    measured = [Round(DEVICES, size) for _ in range(lab.times(group_count, 1))]
    groups = measured * (group_count // len(measured))
    what = f"{size:,} parameters, {group_count} groups of {DEVICES}, a tenth dropped out"
    yield _opening(what, groups, GROUPS_GOAL_S)
    if not lab.quick:
        what = f"{size:,} parameters, one group of {MANY:,}, a tenth dropped out"
        yield _opening(what, [Round(MANY, size)], MANY_GOAL_S)


def _opening(what: str, groups: list[Round], goal_s: float) -> Figure:
    opening_s = sum(group.opening_s for group in groups)
    streams_s = sum(group.streams_s for group in groups)
    parameters = groups[0].parameters
    return Figure(
        f"CPU of the coordinator to open the sum, {what}",
        milliseconds(opening_s),
        f"key streams alone: {milliseconds(streams_s)}; shares of {parameters.threshold} of "
        f"{parameters.neighbor_count} neighbors open each secret",
        f"{opening_s / streams_s:.1f} x",
        f"<= {milliseconds(goal_s)}",
        opening_s <= goal_s,
    )
