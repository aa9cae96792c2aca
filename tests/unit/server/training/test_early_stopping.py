"""When training ends before its last round."""

import pytest

from qflare.v1 import training_pb2
from qflare_server.training.early_stopping import stop_reason


def history(name: str, *values: float) -> list[dict[str, float]]:
    return [{name: value} for value in values]


def test_without_a_metric_training_goes_on() -> None:
    policy = training_pb2.EarlyStopPolicy(target=0.0, patience_rounds=1)
    assert not stop_reason(policy, history("accuracy", 1.0, 1.0, 1.0))


@pytest.mark.parametrize(("values", "stops"), [((0.5, 0.89), False), ((0.5, 0.9), True)])
def test_a_target_that_is_reached_ends_training(values: tuple[float, ...], stops: bool) -> None:
    policy = training_pb2.EarlyStopPolicy(metric="accuracy", target=0.9)
    assert bool(stop_reason(policy, history("accuracy", *values))) is stops


def test_a_loss_reaches_its_target_from_above() -> None:
    policy = training_pb2.EarlyStopPolicy(metric="loss", target=0.1, minimize=True)
    assert not stop_reason(policy, history("loss", 2.0, 0.5))
    assert stop_reason(policy, history("loss", 2.0, 0.05))


@pytest.mark.parametrize(
    ("values", "stops"), [((1.0, 3.0, 2.0), False), ((1.0, 3.0, 2.0, 3.0), True)]
)
def test_patience_ends_training(values: tuple[float, ...], stops: bool) -> None:
    policy = training_pb2.EarlyStopPolicy(metric="accuracy", patience_rounds=2)
    assert bool(stop_reason(policy, history("accuracy", *values))) is stops


@pytest.mark.parametrize("metric", ["accuracy", "train_accuracy"])
def test_what_devices_report_with_their_updates_ends_nothing(metric: str) -> None:
    policy = training_pb2.EarlyStopPolicy(metric=metric, target=0.5, patience_rounds=1)
    assert not stop_reason(policy, history("train_accuracy", 0.6, 0.6, 0.6))
    assert not stop_reason(policy, [{"accuracy": 0.4, "train_accuracy": 0.6}])


def test_versions_without_the_metric_do_not_count() -> None:
    policy = training_pb2.EarlyStopPolicy(metric="accuracy", patience_rounds=1)
    assert not stop_reason(policy, [{"accuracy": 0.4}, {}, {}, {}])
