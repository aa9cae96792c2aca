"""When training ends before its last round: the rule, as a function of what versions have measured."""

from collections.abc import Mapping, Sequence
from typing import Final

from qflare.v1 import training_pb2

HISTORY: Final = 2000
"""Versions that are looked back at."""


def stop_reason(
    policy: training_pb2.EarlyStopPolicy, history: Sequence[Mapping[str, float]]
) -> str:
    """Return why training should end, empty if it should go on.

    Args:
        policy: What is watched; without a metric nothing is.
        history: Metrics of the latest versions, oldest first. The metric is taken under its own name where any
            version has it, else as `train_` and its name; versions without it do not count.
    """
    values = _values(policy.metric, history)
    if not values:
        return ""
    sign = -1.0 if policy.minimize else 1.0
    ranked = [sign * value for value in values]
    if policy.HasField("target") and max(ranked) >= sign * policy.target:
        best = sign * max(ranked)
        return f"{policy.metric} reached its target: got {best:g}, want {policy.target:g}"
    since = len(ranked) - 1 - ranked.index(max(ranked))
    if policy.patience_rounds and since >= policy.patience_rounds:
        return f"{policy.metric} has not improved for {since} rounds"
    return ""


def _values(metric: str, history: Sequence[Mapping[str, float]]) -> list[float]:
    if not metric:
        return []
    for name in (metric, f"train_{metric}"):
        values = [metrics[name] for metrics in history if name in metrics]
        if values:
            return values
    return []
