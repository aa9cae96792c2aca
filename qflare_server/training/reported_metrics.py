"""Reported metrics, example counts and epochs: validation and means."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from qflare.evidence.statements import (
    MAX_METRIC_COUNT,
    MAX_METRIC_NAME_CHARACTERS,
    TRAINING_PREFIX,
)
from qflare_server.errors import InvalidRequestError

MAX_METRICS: Final = MAX_METRIC_COUNT
MAX_METRIC_NAME: Final = MAX_METRIC_NAME_CHARACTERS
MAX_EPOCHS: Final = 2**31 - 1
MAX_EXAMPLES: Final = 2**40

TRAINING: Final = TRAINING_PREFIX
"""Prefix of a version's metrics that are means of self-reported training metrics."""

MAX_NAMES: Final = 64 * MAX_METRICS
"""Most distinct names that a round sums; further ones are ignored, which bounds memory."""


def check_example_count(example_count: int) -> None:
    """Refuse an example count of an update or an evaluation that is out of range.

    Raises:
        InvalidRequestError: It is.
    """
    if not 1 <= example_count <= MAX_EXAMPLES:
        raise InvalidRequestError(
            f"example_count: got {example_count}, want 1 to {MAX_EXAMPLES}", field="example_count"
        )


def check_metrics(metrics: dict[str, float]) -> None:
    """Reject metrics that are too many, badly named or not finite.

    Raises:
        InvalidRequestError: Names the metric.
    """
    if len(metrics) > MAX_METRICS:
        raise InvalidRequestError(f"metrics: got {len(metrics)}, want at most {MAX_METRICS}")
    for name, value in metrics.items():
        if not 1 <= len(name) <= MAX_METRIC_NAME or not name.isprintable():
            raise InvalidRequestError("metrics: a name is empty, too long or not printable")
        if not math.isfinite(value):
            raise InvalidRequestError(f"metrics: {name} is not finite", field="metrics")


def whole_epochs(metrics: Mapping[str, float]) -> int | None:
    """Return the epochs that a device reported, None if it did not or if they fit no column."""
    epochs = metrics.get("epochs")
    return int(epochs) if epochs is not None and 0 <= epochs <= MAX_EPOCHS else None


@dataclass
class Means:
    """Example-weighted means of metrics, added up in the order of the reports. Not safe for use by two threads."""

    _sums: dict[str, float] = field(default_factory=dict)
    _example_counts: dict[str, int] = field(default_factory=dict)
    _report_counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], example_count: int) -> None:
        """Add one report."""
        for name, value in metrics.items():
            if name not in self._sums and len(self._sums) >= MAX_NAMES:
                continue
            self._sums[name] = self._sums.get(name, 0.0) + value * example_count
            self._example_counts[name] = self._example_counts.get(name, 0) + example_count
            self._report_counts[name] = self._report_counts.get(name, 0) + 1

    def means(self, prefix: str = "") -> dict[str, float]:
        """Return the finite means by name, each name with a prefix."""
        return {
            prefix + name: total / self._example_counts[name]
            for name, total in sorted(self._sums.items())
            if math.isfinite(total)
        }

    def most_reported(self, prefix: str = "", wanted: Iterable[str] = ()) -> dict[str, float]:
        """Return the finite means that a version can state, by name.

        They are at most `MAX_METRICS` with names of at most `MAX_METRIC_NAME` characters, as statements have them: the
        wanted ones, then those that most devices report.

        Args:
            prefix: Prefix of every name.
            wanted: Names with their prefix that come first.
        """
        first = set(wanted)
        means = {
            name: mean for name, mean in self.means(prefix).items() if len(name) <= MAX_METRIC_NAME
        }
        ranked = sorted(
            means,
            key=lambda name: (
                name not in first,
                -self._report_counts[name.removeprefix(prefix)],
                name,
            ),
        )
        return {name: means[name] for name in sorted(ranked[:MAX_METRICS])}


def stated(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return those of a version's metrics that its statement can hold; training metrics come first."""
    fitting = [name for name in metrics if len(name) <= MAX_METRIC_NAME]
    ranked = sorted(fitting, key=lambda name: (not name.startswith(TRAINING), name))
    return {name: metrics[name] for name in ranked[:MAX_METRICS]}


def is_reserved(name: str) -> bool:
    """Return whether a metric is a mean of self-reported training metrics."""
    return name.startswith(TRAINING)


def evaluated(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a version from federated evaluation, the only ones that a release gate may use."""
    return {name: value for name, value in metrics.items() if not is_reserved(name)}
