"""Kinds of virtual devices: the type, groups and capabilities that selection and evaluation go by."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

from qflare_simulation.errors import SimulationError

TOLERANCE: Final = 1e-9


@dataclass(frozen=True)
class DeviceKind:
    """A kind of virtual devices.

    Attributes:
        share: Share of the devices that are of this kind, above 0 and at most 1.
        device_type: Their type, as in `selection.device_types`.
        groups: Their groups, as in `groups`.
        capabilities: Their capabilities by name, as in `selection.capabilities` and `evaluation.group_by`.

    Raises:
        SimulationError: A field is out of its range.
    """

    share: float = 1.0
    device_type: str = ""
    groups: tuple[str, ...] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        share: Any = self.share
        groups: Any = self.groups
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not 0.0 < self.share <= 1.0:
            raise SimulationError(
                f"simulation.kinds.share: got {self.share!r}, want a number above 0, at most 1"
            )
        if not isinstance(self.device_type, str):
            raise SimulationError(f"simulation.kinds.device_type: got {self.device_type!r}")
        if not isinstance(groups, tuple) or not all(isinstance(name, str) for name in groups):
            raise SimulationError(
                f"simulation.kinds.groups: got {self.groups!r}, want a list of names"
            )
        if not isinstance(self.capabilities, Mapping):
            raise SimulationError(
                f"simulation.kinds.capabilities: got {self.capabilities!r}, want a table"
            )

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Return a kind given as such or as a table.

        Raises:
            SimulationError: A field is unknown or out of its range.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise SimulationError(f"simulation.kinds: got {value!r}, want a list of tables")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise SimulationError(
                f"there is no setting simulation.kinds.{unknown[0]}; want one of {', '.join(known)}"
            )
        groups = value.get("groups", ())
        return cls(**{**value, "groups": tuple(groups) if isinstance(groups, list) else groups})


def checked_kinds(values: object) -> tuple[DeviceKind, ...]:
    """Return kinds given as a list of tables.

    Raises:
        SimulationError: It is no such list, or the shares add up to more than 1.
    """
    if not isinstance(values, list | tuple):
        raise SimulationError(f"simulation.kinds: got {values!r}, want a list of tables")
    kinds = tuple(map(DeviceKind.from_value, values))
    total = sum(kind.share for kind in kinds)
    if total > 1 + TOLERANCE:
        raise SimulationError(f"simulation.kinds: shares add up to {total:g}, want at most 1")
    return kinds


def dealt(kinds: Sequence[DeviceKind], devices: int, seed: int) -> list[DeviceKind]:
    """Return the kind of each device; those beyond the shares have no type, group or capability.

    Args:
        kinds: With their shares, which are met to the nearest device.
        devices: Number of devices.
        seed: Decides which device is of which kind.
    """
    result = [DeviceKind()] * devices
    order = list(range(devices))
    random.Random(f"{seed}:kinds").shuffle(order)  # noqa: S311 - repeatable on purpose
    start, share = 0, 0.0
    for kind in kinds:
        share += kind.share
        end = min(devices, round(share * devices))
        for device in order[start:end]:
            result[device] = kind
        start = end
    return result
