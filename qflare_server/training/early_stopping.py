"""Early stopping: the rule, as a function of the metrics of versions."""

from collections.abc import Mapping, Sequence

from qflare.v1 import training_pb2
from qflare_server.training.objective import is_minimized
from qflare_server.training.reported_metrics import is_reserved


def stop_reason(
    policy: training_pb2.EarlyStopPolicy, history: Sequence[Mapping[str, float]]
) -> str:
    """Return the reason for stopping, empty if training should continue.

    Args:
        policy: The early-stopping policy; without a metric it never stops.
        history: Metrics of the latest versions, oldest first; versions without the metric do not count. A metric that
            devices report with their updates is ignored: otherwise any contributor could end the training.
    """
    if is_reserved(policy.metric):
        return ""
    values = [metrics[policy.metric] for metrics in history if policy.metric in metrics]
    if not values:
        return ""
    sign = -1.0 if is_minimized(policy) else 1.0
    ranked = [sign * value for value in values]
    if policy.HasField("target") and max(ranked) >= sign * policy.target:
        best = sign * max(ranked)
        return f"{policy.metric} reached its target: got {best:g}, want {policy.target:g}"
    since = len(ranked) - 1 - ranked.index(max(ranked))
    if policy.patience_rounds and since >= policy.patience_rounds:
        return f"{policy.metric} has not improved for {since} rounds"
    return ""
