"""Device selection: eligibility for a training session, and the draw for a round.

Eligible devices are active, in the training session's groups, of its device types and with its capabilities. Device
type and capabilities are those stated at enrollment or confirmed by an administrator, never those reported in a
heartbeat.
"""

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.storage.repository import devices, membership, training_sessions
from qflare_server.storage.training_configs import parsed_config


class Profile(Protocol):
    """Attributes of a device that selection uses."""

    @property
    def device_type(self) -> str:
        """Kind of device."""

    @property
    def capabilities(self) -> Mapping[str, Any]:
        """Numbers by name."""

    @property
    def confirmed_at(self) -> Any:
        """When an administrator confirmed both, None if unconfirmed."""


@dataclass(frozen=True)
class Relation:
    """Eligibility of a device for a training session.

    Attributes:
        is_started: The training session has been started.
        is_drawn: It draws no devices for its rounds, or has drawn this one.
    """

    is_started: bool
    is_drawn: bool


def find_relation(session: Session, training_session_id: str, device_id: str) -> Relation | None:
    """Return a device's eligibility for a training session, None if it is not eligible or either does not exist."""
    standing = membership.find_standing(session, training_session_id, device_id)
    return None if standing is None else _relation(session, training_session_id, standing)


def find_common_relation(session: Session, training_session_id: str) -> Relation | None:
    """Return the relation that every device has to a training session that is open to all and asks for nothing.

    Returns:
        None if the relation depends on the device, or if the training session does not exist.
    """
    found = training_sessions.get_session(session, training_session_id)
    if found is None or membership.session_groups(session, training_session_id):
        return None
    policy = found.config.selection
    if draws(policy) or policy.device_types or policy.capabilities or policy.confirmed_only:
        return None
    return Relation(found.started_at is not None, is_drawn=True)


def find_relations(
    session: Session, training_session_id: str, device_ids: Collection[str]
) -> dict[str, Relation]:
    """Return the eligibility of devices for a training session by device id; those that are not are left out."""
    standings = membership.find_standings(session, training_session_id, device_ids)
    found = {
        device_id: _relation(session, training_session_id, standing)
        for device_id, standing in standings.items()
    }
    return {device_id: relation for device_id, relation in found.items() if relation is not None}


def _relation(
    session: Session, training_session_id: str, standing: membership.Standing
) -> Relation | None:
    if not standing.in_groups:
        return None
    policy = parsed_config(session, training_session_id, standing.config).selection
    if not meets(policy, standing):
        return None
    return Relation(standing.started_at is not None, standing.was_selected or not draws(policy))


def draws(policy: training_pb2.SelectionPolicy) -> bool:
    """Return whether rounds draw some of the devices that may take part."""
    return bool(policy.fraction or policy.device_count)


def meets(policy: training_pb2.SelectionPolicy, profile: Profile) -> bool:
    """Return whether a device is of the types and has the capabilities that a training session asks for."""
    if policy.confirmed_only and profile.confirmed_at is None:
        return False
    if policy.device_types and profile.device_type not in policy.device_types:
        return False
    return _has_all(profile.capabilities, policy.capabilities)


def select_devices(
    session: Session,
    training_session_id: str,
    config: training_pb2.TrainingConfig,
    round_number: int,
    selected_count: int = 0,
) -> list[str] | None:
    """Draw the devices of a round; None means that every active device of the training session's groups may take part.

    The draw is a function of the seed, the round number, how many were drawn for it before, and the eligible
    devices, so that it can be repeated.
    """
    policy = config.selection
    if not (draws(policy) or policy.device_types or policy.capabilities or policy.confirmed_only):
        return None
    eligible = [
        profile.device_id
        for profile in devices.eligible_devices(
            session, list(policy.device_types), training_session_id if config.groups else None
        )
        if meets(policy, profile)
    ]
    count = len(eligible)
    if policy.fraction:
        count = max(1, math.ceil(len(eligible) * policy.fraction))
    if policy.device_count:
        count = min(count, policy.device_count)
    if draws(policy):
        count = min(len(eligible), math.ceil(count * (1 + policy.over_selection)))
    label = f"{policy.seed}:{round_number}" + (f":{selected_count}" if selected_count else "")
    draw = random.Random(label)  # noqa: S311 - repeatable on purpose
    return sorted(draw.sample(eligible, count))


def _has_all(
    capabilities: Mapping[str, object], conditions: Iterable[training_pb2.CapabilityFilter]
) -> bool:
    return all(_meets(capabilities, condition) for condition in conditions)


def _meets(capabilities: Mapping[str, object], condition: training_pb2.CapabilityFilter) -> bool:
    value = capabilities.get(condition.capability)
    if not isinstance(value, (int, float)):
        return False
    if condition.comparison == training_pb2.COMPARISON_AT_MOST:
        return value <= condition.value
    if condition.comparison == training_pb2.COMPARISON_EQUAL:
        return value == condition.value
    return value >= condition.value
