"""Settings of early stop and release that say nothing, or nothing sensible, are refused by name."""

import math

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.training.config import complete

Bound = training_pb2.MetricBound
Stop = training_pb2.EarlyStopPolicy


@pytest.mark.parametrize(
    ("bound", "field"),
    [
        (Bound(min_value=1), "config.release.bounds[0].metric"),
        (Bound(metric="accuracy"), "config.release.bounds[0]"),
        (Bound(metric="accuracy", min_value=math.nan), "config.release.bounds[0].min_value"),
        (Bound(metric="accuracy", max_value=math.inf), "config.release.bounds[0].max_value"),
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
    ],
)
def test_an_early_stop_without_a_metric_is_refused(policy: Stop, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        complete(training_pb2.TrainingConfig(early_stop=policy))
    assert refused.value.field == field


def test_sensible_settings_are_kept() -> None:
    config = training_pb2.TrainingConfig(
        early_stop=Stop(metric="loss", target=0.1, minimize=True),
        release=training_pb2.ReleasePolicy(bounds=[Bound(metric="loss", max_value=0.2)]),
    )
    done = complete(config)
    assert done.early_stop == config.early_stop
    assert done.release == config.release
