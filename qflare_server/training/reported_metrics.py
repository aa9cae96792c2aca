"""Checks of what devices report: metrics, example counts, epochs."""

import math
from collections.abc import Mapping

from qflare_server.errors import InvalidRequestError

MAX_METRICS = 64


MAX_METRIC_NAME = 100


MAX_EPOCHS = 2**31 - 1


MAX_EXAMPLES = 2**40


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
    """Refuse metrics that are too many, badly named or not finite.

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
