"""Formatting of numbers, sizes and times."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

NONE: Final = "\N{EN DASH}"
TEN_MS_S: Final = 0.01
MINUTE_S: Final = 60
KIB: Final = 1024
SHARES: Final = frozenset({"accuracy", "auc", "auroc", "f1", "precision", "recall", "sensitivity"})
"""Metrics that people read as percentages."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BYTES: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Moment:
    """A point in time.

    Attributes:
        iso: RFC 3339, machine-readable.
        text: Date and time in UTC, to the second.
        distance: Relative to now, such as `3 min ago` or `in 40 s`.
    """

    iso: str
    text: str
    distance: str


def moment(at: datetime | None, now: datetime) -> Moment | None:
    """Format a time; None for none."""
    if at is None:
        return None
    at = at.astimezone(UTC)
    away_s = (now - at).total_seconds()
    distance = f"{span(away_s)} ago" if away_s >= 0 else f"in {span(-away_s)}"
    return Moment(at.isoformat(timespec="seconds"), f"{at:%Y-%m-%d %H:%M:%S}", distance)


def span(seconds: float) -> str:
    """Format a time span in its largest unit."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def duration(seconds: float | None) -> str:
    """Format a duration with two or three significant digits."""
    if seconds is None:
        return NONE
    if seconds < TEN_MS_S:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: float | None) -> str:
    """Format a number of bytes in binary units."""
    if count is None:
        return NONE
    power = 0
    while count >= KIB and power < len(_BYTES) - 1:
        count /= KIB
        power += 1
    return f"{count:.0f} B" if power == 0 else f"{count:.1f} {_BYTES[power]}"


def number(value: int | None) -> str:
    """Format a count with a thousands separator."""
    return NONE if value is None else f"{value:,}"


def share(value: float | None) -> str:
    """Format a fraction as a percentage, and any other value unchanged."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.1%}".replace("%", " %") if 0 <= value <= 1 else measure(value)


def metric(value: float | None, name: str) -> str:
    """Return a value of a metric as people read it: a percentage or a measure."""
    return share(value) if name.lower() in SHARES else measure(value)


def has(rows: Iterable[object], name: str) -> bool:
    """Return whether an attribute says something in at least one row; a column is shown only if so."""
    return any(getattr(row, name) not in (None, 0, "") for row in rows)


def short(name: str) -> str:
    """Return the first eight digits of a UUID, which tell it apart in a list; other names as they are."""
    return name[:8] if _UUID.fullmatch(name) else name


def measure(value: float | None) -> str:
    """Format a measured value with four significant digits."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4g}"
