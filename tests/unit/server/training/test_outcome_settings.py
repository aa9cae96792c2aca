"""Settings of early stop and release that say nothing, or nothing sensible, are refused by name."""

import math

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.training.config import complete

Bound = training_pb2.MetricBound
Stop = training_pb2.EarlyStopPolicy
Evaluation = training_pb2.EvaluationPolicy
EVALUATED = Evaluation(every_rounds=1)


@pytest.mark.parametrize(
    ("bound", "field"),
    [
        (Bound(min_value=1), "config.release.bounds[0].metric"),
        (Bound(metric="accuracy"), "config.release.bounds[0]"),
        (Bound(metric="accuracy", min_value=math.nan), "config.release.bounds[0].min_value"),
        (Bound(metric="accuracy", max_value=math.inf), "config.release.bounds[0].max_value"),
        (Bound(metric="train_accuracy", min_value=0.5), "config.release.bounds[0].metric"),
    ],
)
def test_a_gate_without_a_bound_is_refused(bound: Bound, field: str) -> None:
    config = training_pb2.TrainingConfig(release=training_pb2.ReleasePolicy(bounds=[bound]))
    with pytest.raises(InvalidRequestError) as refused:
        complete(config)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Stop(target=0.9), "config.early_stop.metric"),
        (Stop(patience_rounds=3), "config.early_stop.metric"),
        (Stop(metric="accuracy", target=math.nan), "config.early_stop.target"),
        (Stop(metric="accuracy", patience_rounds=-1), "config.early_stop.patience_rounds"),
        (Stop(metric="train_loss", patience_rounds=1), "config.early_stop.metric"),
    ],
)
def test_an_early_stop_without_a_metric_is_refused(policy: Stop, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        complete(training_pb2.TrainingConfig(early_stop=policy, evaluation=EVALUATED))
    assert refused.value.field == field


def test_an_early_stop_needs_evaluations() -> None:
    with pytest.raises(InvalidRequestError, match="federated evaluation"):
        complete(training_pb2.TrainingConfig(early_stop=Stop(metric="accuracy", target=0.9)))


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Evaluation(quorum=-1), "quorum"),
        (Evaluation(max_example_count=-1), "max_example_count"),
        (Evaluation(max_example_count=2**41), "max_example_count"),
        (Evaluation(trim_fraction=0.5), "trim_fraction"),
        (Evaluation(trim_fraction=math.nan), "trim_fraction"),
        (Evaluation(trim_fraction=-0.1), "trim_fraction"),
        (Evaluation(trim_from_count=2), "trim_from_count"),
        (Evaluation(trim_from_count=-3), "trim_from_count"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(policy: Evaluation, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        complete(training_pb2.TrainingConfig(evaluation=policy))
    assert refused.value.field == f"config.evaluation.{field}"


def test_an_evaluation_has_defaults() -> None:
    rounds = training_pb2.RoundPolicy(quorum=7)
    done = complete(training_pb2.TrainingConfig(rounds=rounds)).evaluation
    assert (done.quorum, done.trim_fraction, done.trim_from_count) == (7, 0.2, 5)
    off = complete(training_pb2.TrainingConfig(evaluation=Evaluation(trim_fraction=0)))
    assert off.evaluation.trim_fraction == 0


def test_sensible_settings_are_kept() -> None:
    config = training_pb2.TrainingConfig(
        early_stop=Stop(metric="loss", target=0.1, minimize=True),
        evaluation=EVALUATED,
        release=training_pb2.ReleasePolicy(bounds=[Bound(metric="loss", max_value=0.2)]),
    )
    done = complete(config)
    assert done.early_stop == config.early_stop
    assert done.release == config.release
