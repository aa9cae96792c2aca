"""Federated evaluation: who measures which version, and what becomes of the results.

A version that is due is measured by every device before the device trains from it, so that its metrics are there
when the next version is made; the last one is measured for as long as a round may take. Means are written after
every report while there are few, then after every thirty-second part more, so that the cost of a report does not grow
with their number, and once more when the next version is made. Release gate and best accuracy look at them only once
a quorum of devices has reported: the first report alone says nothing of the fleet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.storage.repository import audit, global_models, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import Evaluation, GlobalModel, RiskLevel, TrainingSession
from qflare_server.training.config import deadline_s, stored_config
from qflare_server.training.reported_metrics import TRAINING, Means
from qflare_server.training.versions import passes_gate

SUMMARY_BITS: Final = 6
MAX_GROUPS: Final = 100
"""Groups of devices whose means a version keeps."""


@dataclass(frozen=True)
class Measurement:
    """A version that a device is asked to measure."""

    training_session_id: str
    version: int
    digest: str
    transfer: training_pb2.TransferPolicy


def is_due(policy: training_pb2.EvaluationPolicy, round_number: int) -> bool:
    """Return whether the version of a round is one that is measured; initial models and rollbacks are not."""
    return bool(policy.every_rounds and round_number and round_number % policy.every_rounds == 0)


def find_measurement(
    session: Session, training_session: TrainingSession, version: int, device_id: str
) -> Measurement | None:
    """Return what a device has to measure of a version, None if it is not due or has been done."""
    config = stored_config(training_session.id, training_session.config)
    policy = config.evaluation
    if not policy.every_rounds:
        return None
    model = global_models.get_model(session, training_session.id, version)
    if model is None or not is_due(policy, model.round_number):
        return None
    if global_models.has_evaluated(session, training_session.id, version, device_id):
        return None
    return Measurement(training_session.id, version, model.digest, config.transfer)


def find_last_measurement(
    session: Session, training_session: TrainingSession, device_id: str, at: datetime
) -> Measurement | None:
    """Return what a device has to measure of a training session that has ended, while there is time."""
    config = stored_config(training_session.id, training_session.config)
    if training_session.ended_at is None or at > training_session.ended_at + timedelta(
        seconds=deadline_s(config)
    ):
        return None
    return find_measurement(session, training_session, training_session.current_version, device_id)


def is_worth_summarising(report_count: int) -> bool:
    """Return whether the means are written after this report: always up to 63, then ever more rarely."""
    return report_count % (1 << max(0, report_count.bit_length() - SUMMARY_BITS)) == 0


def summarise(
    session: Session, training_session: TrainingSession, version: int, at: datetime
) -> None:
    """Write the example-weighted means of all reports on a version, overall and by group, and act on them."""
    reports = global_models.list_evaluations(session, training_session.id, version)
    if not reports:
        return
    model = global_models.get_model(session, training_session.id, version)
    assert model is not None
    config = stored_config(training_session.id, training_session.config)
    wanted = [config.early_stop.metric, *(bound.metric for bound in config.release.bounds)]
    measured = weighted_means([(item.example_count, item.metrics) for item in reports], wanted)
    metrics = {**model.metrics, **measured}
    values = {
        "metrics": metrics,
        "group_metrics": _by_group(reports, wanted),
        "accuracy": metrics.get("accuracy", model.accuracy),
        "loss": metrics.get("loss", model.loss),
    }
    global_models.update_model(session, training_session.id, version, values)
    if len(reports) < config.rounds.quorum:
        return
    if not model.released and passes_gate(config.release, metrics):
        _release(session, training_session, model, at)
    accuracy = measured.get("accuracy")
    if accuracy is not None and (
        training_session.best_accuracy is None or accuracy > training_session.best_accuracy
    ):
        changes = {"best_accuracy": accuracy, "best_version": version}
        training_sessions.update_session(session, training_session.id, changes)


def _release(
    session: Session, training_session: TrainingSession, model: GlobalModel, at: datetime
) -> None:
    global_models.release(session, training_session, model.version)
    details = {"version": model.version, "reason": "its metrics pass the release gate"}
    subject = f"training_session:{training_session.id}"
    event = Event("version.released", subject, RiskLevel.MEDIUM, details)
    audit.record(session, SYSTEM, event, at)


def _by_group(reports: Sequence[Evaluation], wanted: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the means of each group: of the `MAX_GROUPS` with most reports where devices name more."""
    groups: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for report in reports:
        if report.device_group:
            held = groups.setdefault(report.device_group, [])
            held.append((report.example_count, report.metrics))
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:MAX_GROUPS]
    return {group: weighted_means(groups[group], wanted) for group in sorted(largest)}


def weighted_means(
    reports: Sequence[tuple[int, Mapping[str, float]]], wanted: Sequence[str] = ()
) -> dict[str, float]:
    """Return the example-weighted means over the reports that hold a metric.

    Of the metrics there are as many as a version can state: the wanted ones, accuracy and loss, then those that most
    reports hold. What is named like a mean of training (`train_`) is not the devices' to say.

    Args:
        reports: Example count and metrics of each.
        wanted: Names that decide about release or early stop.
    """
    added = Means()
    for count, metrics in reports:
        own = {name: value for name, value in metrics.items() if not name.startswith(TRAINING)}
        added.add(own, count)
    return added.most_reported(wanted=[*wanted, "accuracy", "loss"])
