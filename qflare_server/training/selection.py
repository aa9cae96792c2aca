"""Selection of the devices of a round."""

import math
import random

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.storage.repository import devices


def select_devices(
    session: Session,
    policy: training_pb2.SelectionPolicy,
    round_number: int,
    selected_count: int = 0,
) -> list[str] | None:
    """Draw the devices of a round; None means that every active device may take part.

    The draw is a function of the seed, the round number, how many were drawn for it before, and the eligible
    devices, so that it can be repeated.
    """
    bounded = policy.fraction or policy.device_count
    if not (bounded or policy.device_types or policy.capabilities):
        return None
    eligible = [
        device_id
        for device_id, capabilities in devices.eligible_devices(session, list(policy.device_types))
        if all(_meets(capabilities, condition) for condition in policy.capabilities)
    ]
    count = len(eligible)
    if policy.fraction:
        count = max(1, math.ceil(len(eligible) * policy.fraction))
    if policy.device_count:
        count = min(count, policy.device_count)
    if bounded:
        count = min(len(eligible), math.ceil(count * (1 + policy.over_selection)))
    label = f"{policy.seed}:{round_number}" + (f":{selected_count}" if selected_count else "")
    draw = random.Random(label)  # noqa: S311 - repeatable on purpose
    return sorted(draw.sample(eligible, count))


def _meets(capabilities: dict[str, object], condition: training_pb2.CapabilityFilter) -> bool:
    value = capabilities.get(condition.capability)
    if not isinstance(value, (int, float)):
        return False
    if condition.comparison == training_pb2.COMPARISON_AT_MOST:
        return value <= condition.value
    if condition.comparison == training_pb2.COMPARISON_EQUAL:
        return value == condition.value
    return value >= condition.value
