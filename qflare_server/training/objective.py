"""Objective of a training session: the metric that compares its versions, and the best version.

With federated evaluation, only its metrics count. Without it, the metric is the mean of what devices report with their
updates, measured on training data; every display of such a value says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import training_sessions, views
from qflare_server.training.reported_metrics import TRAINING

DEFAULT_METRIC: Final = "accuracy"
HISTORY: Final = 2000
"""Latest versions that the search for the best one covers."""

MAXIMIZED: Final = frozenset(
    {"accuracy", "acc", "auc", "auroc", "auprc", "f1", "precision", "recall", "sensitivity"}
    | {"specificity", "r2", "iou", "dice", "map", "ndcg", "mrr", "mcc", "kappa", "bleu"}
)
MINIMIZED: Final = frozenset(
    {"loss", "mae", "mse", "rmse", "mape", "smape", "rmsle", "error", "perplexity", "brier"}
    | {"wer", "cer", "eer", "ece", "nll", "log_loss", "hinge", "deviance"}
)
"""Metrics of a known direction; so are names that end in one of these after an underscore, such as val_loss."""


def known_goal(metric: str) -> training_pb2.MetricGoal.ValueType:
    """Return the direction of a metric by its name, unspecified if the name is not known."""
    parts = metric.lower().replace("-", "_").split("_")
    endings = {"_".join(parts[index:]) for index in range(len(parts))}
    if endings & MINIMIZED:
        return training_pb2.METRIC_GOAL_MINIMIZE
    if endings & MAXIMIZED:
        return training_pb2.METRIC_GOAL_MAXIMIZE
    return training_pb2.METRIC_GOAL_UNSPECIFIED


def resolved_goal(
    field: str, metric: str, goal: training_pb2.MetricGoal.ValueType
) -> training_pb2.MetricGoal.ValueType:
    """Return the direction of a metric: the stated one, else derived from its name.

    Raises:
        InvalidRequestError: It is neither stated nor known.
    """
    found = goal or known_goal(metric)
    if not found:
        raise InvalidRequestError(
            f"{field}: empty; the direction of {metric!r} is not known: set METRIC_GOAL_MAXIMIZE or "
            "METRIC_GOAL_MINIMIZE",
            field=f"config.{field}",
        )
    return found


@dataclass(frozen=True)
class Objective:
    """Metric and direction for comparing the versions of a training session.

    Attributes:
        metric: Name without prefix.
        minimizes: Whether smaller values are better.
        is_held_out: Whether federated evaluation measures it; otherwise devices report it from training.
    """

    metric: str
    minimizes: bool
    is_held_out: bool

    @property
    def data(self) -> str:
        """Label of the data that the metric was measured on."""
        return "held out" if self.is_held_out else "training data only"

    @property
    def key(self) -> str:
        """Name of the metric among those of a version."""
        return self.metric if self.is_held_out else TRAINING + self.metric

    def prefers(self, value: float, other: float | None) -> bool:
        """Return whether a value is better than another, or than none."""
        if other is None:
            return True
        return value < other if self.minimizes else value > other


def objective_of(config: training_pb2.TrainingConfig) -> Objective:
    """Return the objective of a complete or stored configuration; older ones state none."""
    stated, stop = config.objective, config.early_stop
    is_held_out = bool(config.evaluation.every_rounds)
    if stated.metric:
        minimizes = stated.goal == training_pb2.METRIC_GOAL_MINIMIZE
        return Objective(stated.metric, minimizes, is_held_out)
    if stop.metric:
        return Objective(stop.metric, is_minimized(stop), is_held_out)
    return Objective(DEFAULT_METRIC, minimizes=False, is_held_out=is_held_out)


def is_minimized(policy: training_pb2.EarlyStopPolicy) -> bool:
    """Return whether an early stop watches a metric of which smaller values are better."""
    return policy.minimize or policy.goal == training_pb2.METRIC_GOAL_MINIMIZE


def best_changes(
    session: Session, training_session: TrainingSession, version: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Return the columns of a training session that change with the metrics of one version.

    Args:
        session: The transaction, in which the version has these metrics already.
        training_session: As it is before the change.
        version: The version.
        metrics: All its metrics.
    """
    objective = objective_of(training_session.config)
    value, best = metrics.get(objective.key), training_session.best_value
    if value is not None and objective.prefers(value, best):
        return {"best_value": value, "best_version": version}
    if version != training_session.best_version or value == best:
        return {}
    return _searched(session, training_session.id, objective)


def _searched(session: Session, training_session_id: str, objective: Objective) -> dict[str, Any]:
    """Search for the best version again, after further reports have changed the metrics of the previous best."""
    best_value: float | None = None
    best_version: int | None = None
    for row in views.recent_metrics(session, training_session_id, HISTORY):
        value = row.metrics.get(objective.key)
        if value is not None and objective.prefers(value, best_value):
            best_value, best_version = value, row.version
    return {"best_value": best_value, "best_version": best_version}


def update_best(
    session: Session, training_session: TrainingSession, version: int, metrics: Mapping[str, float]
) -> None:
    """Record whether a version is the best of its training session."""
    changes = best_changes(session, training_session, version, metrics)
    if changes:
        training_sessions.update_session(session, training_session.id, changes)
