"""Which versions are better: any metric, in the direction that is stated or known by its name."""

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.training.config import complete
from qflare_server.training.objective import MAXIMIZED, MINIMIZED, known_goal, objective_of

Config = training_pb2.TrainingConfig
Objective = training_pb2.Objective
Stop = training_pb2.EarlyStopPolicy
EVALUATED = training_pb2.EvaluationPolicy(every_rounds=1)
UP, DOWN = training_pb2.METRIC_GOAL_MAXIMIZE, training_pb2.METRIC_GOAL_MINIMIZE
ROUNDS = training_pb2.RoundPolicy(quorum=1)


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("accuracy", UP),
        ("AUC", UP),
        ("top5_accuracy", UP),
        ("loss", DOWN),
        ("val_loss", DOWN),
        ("mae", DOWN),
        ("log-loss", DOWN),
        ("relative_error", DOWN),
        ("flossy", 0),
        ("score", 0),
    ],
)
def test_directions_are_known_by_name(name: str, goal: int) -> None:
    assert known_goal(name) == goal


def test_no_name_has_two_directions() -> None:
    assert not MAXIMIZED & MINIMIZED


@pytest.mark.parametrize(
    ("config", "metric", "minimizes", "is_held_out"),
    [
        (Config(), "accuracy", False, False),
        (Config(evaluation=EVALUATED), "accuracy", False, True),
        (Config(objective=Objective(metric="mae")), "mae", True, False),
        (Config(objective=Objective(metric="score", goal=DOWN)), "score", True, False),
        (
            Config(evaluation=EVALUATED, early_stop=Stop(metric="loss", patience_rounds=2)),
            "loss",
            True,
            True,
        ),
        (
            Config(
                evaluation=EVALUATED,
                early_stop=Stop(metric="score", goal=UP, target=1),
                objective=Objective(metric="score"),
            ),
            "score",
            False,
            True,
        ),
    ],
)
def test_an_objective_is_complete(
    config: Config, metric: str, minimizes: bool, is_held_out: bool
) -> None:
    config.rounds.CopyFrom(ROUNDS)

    found = objective_of(complete(config))

    assert (found.metric, found.minimizes, found.is_held_out) == (metric, minimizes, is_held_out)


def test_an_early_stop_watches_the_objective() -> None:
    config = Config(
        rounds=ROUNDS,
        evaluation=EVALUATED,
        objective=Objective(metric="mae"),
        early_stop=Stop(patience_rounds=3),
    )
    stop = complete(config).early_stop
    assert (stop.metric, stop.goal, stop.minimize) == ("mae", DOWN, True)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Config(objective=Objective(metric="score")), "objective.goal"),
        (Config(objective=Objective(metric="train_loss")), "objective.metric"),
        (Config(objective=Objective(metric="a\n")), "objective.metric"),
        (
            Config(evaluation=EVALUATED, early_stop=Stop(metric="score", target=1)),
            "early_stop.goal",
        ),
        (
            Config(
                evaluation=EVALUATED,
                early_stop=Stop(metric="loss", target=1, minimize=True, goal=UP),
            ),
            "early_stop.goal",
        ),
    ],
)
def test_an_objective_without_a_direction_is_refused(config: Config, field: str) -> None:
    config.rounds.CopyFrom(ROUNDS)
    with pytest.raises(InvalidRequestError) as refused:
        complete(config)
    assert refused.value.field == f"config.{field}"


def test_a_known_name_may_be_turned() -> None:
    config = Config(rounds=ROUNDS, objective=Objective(metric="loss", goal=UP))
    assert not objective_of(complete(config)).minimizes
