"""What secure aggregation with neighbors costs a device, and the coordinator that opens the sum of a group."""

import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from qflare.masking.graph_parameters import practical_parameters
from tests.bench.coordinator import Laboratory
from tests.bench.figures import Figure, milliseconds
from tests.support.neighbors import Device, Group

DEVICES: Final = 100
DROPPED: Final = 10
DEVICE_GOAL_S: Final = 0.1
COORDINATOR_GOAL_S: Final = 1.0


def neighbors(lab: Laboratory) -> Iterator[Figure]:
    """CPU time in a group of 100 of which 10 drop out after they have sent shares, with parameters for 20 % liars."""
    size = lab.times(10**6, 10**5)
    group = Group.of(map(Device, range(DEVICES)), practical_parameters(DEVICES, 0.2, 0.1))
    begun = time.process_time()
    group.share(group.devices)
    shared = time.process_time()
    update = np.ones(size, np.uint32)
    group.upload(dict.fromkeys(sorted(group.devices)[DROPPED:], update))
    masked = time.process_time()
    reveals = group.reveals(group.updates)
    revealed = time.process_time()
    total = group.unmask(reveals)
    opened = time.process_time() - revealed
    if not np.array_equal(total, (DEVICES - DROPPED) * update):
        raise AssertionError("the sum is wrong")
    steps = ((shared - begun) / DEVICES, (revealed - masked) / len(reveals))
    masks = (masked - shared) / len(reveals)
    device = sum(steps) + masks
    parameters = group.graph.parameters
    yield Figure(
        f"CPU of a device beyond its update, {DEVICES} devices, {size:,} parameters",
        milliseconds(device),
        f"masks {milliseconds(masks)}; {parameters.neighbor_count} neighbors",
        goal=f"<= {milliseconds(DEVICE_GOAL_S)}",
        reached=device <= DEVICE_GOAL_S,
    )
    yield Figure(
        f"CPU of the coordinator to open the sum, {DEVICES} devices, {DROPPED} dropped out",
        milliseconds(opened),
        f"shares of {parameters.threshold} neighbors open each secret",
        goal=f"<= {milliseconds(COORDINATOR_GOAL_S)}",
        reached=opened <= COORDINATOR_GOAL_S,
    )
