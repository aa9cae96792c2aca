"""Federated evaluation: assigns versions to devices and aggregates their results.

Each device of a round evaluates the base version, if it is due, before training from it, so that its metrics are known
when the next version is made. The last version is evaluated for up to one round's duration. An evaluation task holds a
nonce that only the coordinator can derive for this device and version. The signed report repeats the nonce, which
proves that the device was asked.

A metric counts once a quorum of devices has reported it: as the mean over the reports, each weighted by examples up to
a cap, the largest and smallest left out where there are enough. Release gate, early stopping and best version use only
these metrics. The means are written after every report while there are few, then each time the number has grown by
1/32, so that the cost per report stays constant, and once more when the next version is made.
"""

import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto.signing import tagged_hash
from qflare.crypto.symmetric import hkdf_expand, mac
from qflare.v1 import security_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.storage.records import Evaluation, GlobalModel, TrainingSession
from qflare_server.storage.repository import (
    audit,
    devices,
    evaluations,
    global_models,
)
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import DeviceState, RiskLevel
from qflare_server.training.config import (
    DEFAULT_TRIM_FRACTION,
    DEFAULT_TRIM_FROM_COUNT,
    deadline_s,
)
from qflare_server.training.objective import objective_of, update_best
from qflare_server.training.reported_metrics import MAX_METRICS
from qflare_server.training.rhythm import is_asynchronous
from qflare_server.training.selection import find_relation
from qflare_server.training.versions import passes_gate

SUMMARY_BITS: Final = 6
MAX_GROUPS: Final = 100
"""Groups of devices whose means a version keeps."""
Report = tuple[int, Mapping[str, float]]
"""Weight, and metrics by name."""


@dataclass(frozen=True)
class Measurement:
    """A version assigned to a device for evaluation."""

    training_session_id: str
    version: int
    digest: str
    transfer: training_pb2.TransferPolicy
    nonce: str
    """Nonce that the report repeats, 64 hex digits."""


def evaluation_nonce(
    state_key: bytes, training_session_id: str, version: int, device_id: str
) -> str:
    """Derive the nonce of a device's evaluation of a version, 64 hex digits."""
    key = hkdf_expand(state_key, b"qflare/v1/evaluation nonce")
    parts = training_session_id.encode(), str(version).encode(), device_id.encode()
    return mac(key, tagged_hash("qflare/v1/evaluation nonce", *parts)).hex()


def was_asked(context: Context, statement: security_pb2.EvaluationStatement) -> bool:
    """Check the nonce of an evaluation, under the current or an earlier state key."""
    named = statement.training_session_id, statement.version, statement.device_id
    return any(
        hmac.compare_digest(evaluation_nonce(key, *named), statement.evaluation_nonce)
        for key in (context.state_key, *context.earlier_state_keys)
    )


def is_due(policy: training_pb2.EvaluationPolicy, round_number: int) -> bool:
    """Return whether a round's version is due for evaluation; initial models and rollbacks are not."""
    return bool(policy.every_rounds and round_number and round_number % policy.every_rounds == 0)


def find_measurement(
    context: Context,
    session: Session,
    training_session: TrainingSession,
    version: int,
    device_id: str,
) -> Measurement | None:
    """Return a device's evaluation task for a version, None if it is not due or already done."""
    config = training_session.config
    policy = config.evaluation
    if not policy.every_rounds:
        return None
    model = global_models.get_model(session, training_session.id, version)
    if model is None or not is_due(policy, model.round_number):
        return None
    if evaluations.find_digest(session, training_session.id, version, device_id) is not None:
        return None
    nonce = evaluation_nonce(context.state_key, training_session.id, version, device_id)
    return Measurement(training_session.id, version, model.digest, config.transfer, nonce)


def find_last_measurement(
    context: Context,
    session: Session,
    training_session: TrainingSession,
    device_id: str,
    at: datetime,
) -> Measurement | None:
    """Return a device's evaluation task for the last version of an ended training session, until the deadline.

    Only devices that its rounds could have selected are asked.
    """
    config = training_session.config
    if training_session.ended_at is None or at > training_session.ended_at + timedelta(
        seconds=deadline_s(config)
    ):
        return None
    state = devices.states_of(session, [device_id]).get(device_id)
    relation = find_relation(session, training_session.id, device_id)
    if state != DeviceState.ACTIVE.value or relation is None or not relation.is_drawn:
        return None
    return find_measurement(
        context, session, training_session, training_session.current_version, device_id
    )


def is_worth_summarizing(report_count: int) -> bool:
    """Return whether to write the means after this report: always up to 63 reports, then less and less often."""
    return report_count % (1 << max(0, report_count.bit_length() - SUMMARY_BITS)) == 0


def awaits_evaluation(
    session: Session,
    training_session_id: str,
    config: training_pb2.TrainingConfig,
    base_version: int,
) -> bool:
    """Return whether early stopping awaits reports on the base version of a round.

    Asynchronous training sessions never wait: their rounds take updates of several versions.
    """
    policy = config.evaluation
    if not (config.early_stop.metric and policy.every_rounds) or is_asynchronous(config):
        return False
    model = global_models.get_model(session, training_session_id, base_version)
    if model is None or not is_due(policy, model.round_number):
        return False
    quorum = policy.quorum or config.rounds.quorum
    return evaluations.count(session, training_session_id, base_version) < quorum


def summarize(
    session: Session, training_session: TrainingSession, version: int, at: datetime
) -> None:
    """Write the means of the reports on a version, overall and by group, and act on them."""
    reports = evaluations.list_of_version(session, training_session.id, version)
    if not reports:
        return
    model = global_models.get_model(session, training_session.id, version)
    assert model is not None
    config = training_session.config
    wanted = [
        objective_of(config).metric,
        config.early_stop.metric,
        *(bound.metric for bound in config.release.bounds),
    ]
    quorum = config.evaluation.quorum or config.rounds.quorum
    measured = robust_means(config.evaluation, map(_report, reports), quorum, wanted)
    metrics = {**model.metrics, **measured}
    values = {
        "metrics": metrics,
        "group_metrics": _by_group(config.evaluation, reports, wanted),
        "accuracy": metrics.get("accuracy", model.accuracy),
        "loss": metrics.get("loss", model.loss),
    }
    global_models.update_model(session, training_session.id, version, values)
    if measured and not model.released and passes_gate(config.release, metrics):
        _release(session, training_session, model, at)
    update_best(session, training_session, version, metrics)


def _release(
    session: Session, training_session: TrainingSession, model: GlobalModel, at: datetime
) -> None:
    global_models.release(session, training_session, model.version)
    details = {"version": model.version, "reason": "its metrics pass the release gate"}
    subject = f"training_session:{training_session.id}"
    event = Event("version.released", subject, RiskLevel.MEDIUM, details)
    audit.record(session, SYSTEM, event, at)


def _report(row: Evaluation) -> Report:
    assert row.weight is not None
    return row.weight, row.metrics


def _by_group(
    policy: training_pb2.EvaluationPolicy, reports: Sequence[Evaluation], wanted: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the means of each group, of at most the `MAX_GROUPS` groups with the most reports."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        if report.device_group:
            groups.setdefault(report.device_group, []).append(_report(report))
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:MAX_GROUPS]
    return {group: robust_means(policy, groups[group], wanted=wanted) for group in sorted(largest)}


def robust_means(
    policy: training_pb2.EvaluationPolicy,
    reports: Iterable[Report],
    quorum: int = 1,
    wanted: Sequence[str] = (),
) -> dict[str, float]:
    """Return the trimmed, weighted mean of every metric that enough reports hold.

    Limited to the metrics that a version's statement can hold, in order of preference: wanted ones, accuracy and loss,
    then the most frequently reported.

    Args:
        policy: Trimmed fraction at either end, and the least number of reports for trimming.
        reports: Metrics of each device, with its weight.
        quorum: Least number of reports that have to hold a metric.
        wanted: Names that decide about release or early stop.
    """
    held: dict[str, list[tuple[float, int]]] = {}
    for weight, metrics in reports:
        for name, value in metrics.items():
            held.setdefault(name, []).append((value, weight))
    first = {*wanted, "accuracy", "loss"}
    counted = [name for name, values in held.items() if len(values) >= quorum]
    counted.sort(key=lambda name: (name not in first, -len(held[name]), name))
    means = {
        name: _weighted_mean(_trimmed(policy, sorted(held[name])))
        for name in sorted(counted[:MAX_METRICS])
    }
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _trimmed(
    policy: training_pb2.EvaluationPolicy, ranked: Sequence[tuple[float, int]]
) -> Sequence[tuple[float, int]]:
    """Trim values, which are in ascending order, at both ends."""
    fraction = policy.trim_fraction if policy.HasField("trim_fraction") else DEFAULT_TRIM_FRACTION
    if not fraction or len(ranked) < (policy.trim_from_count or DEFAULT_TRIM_FROM_COUNT):
        return ranked
    count = max(1, math.floor(fraction * len(ranked)))
    return ranked[count : len(ranked) - count]


def _weighted_mean(values: Sequence[tuple[float, int]]) -> float:
    """Return a mean, infinite where it is beyond float64."""
    total = sum(weight for _, weight in values)
    try:
        return math.fsum(value * (weight / total) for value, weight in values)
    except OverflowError:
        return math.inf
