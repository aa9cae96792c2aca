import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from qflare_server.strategies import Contribution, Prior, StrategyConfig, build
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of

DELTAS = [0.5, -0.25, 0.0, 2.0]


def versions(deltas: Sequence[float] = DELTAS, **settings: Any) -> list[float]:
    """Make one version after another from one update each; one element."""
    strategy = build(StrategyConfig(**settings))
    weights, prior, made = np.array([1.0]), Prior(), []
    for number, delta in enumerate(deltas, start=1):
        update = Contribution("only", 1, reader_of(np.array([delta])))
        result = make_version(strategy, weights, [update], RunOptions(prior=prior))
        weights, prior = result.weights, result.prior(number + 1)
        made.append(float(weights[0]))
    return made


def test_plain_step_adds_the_aggregate() -> None:
    assert versions(name="fedavg") == [1.5, 1.25, 1.25, 3.25]


def test_plain_step_takes_a_learning_rate() -> None:
    assert versions(name="fedavg", server_learning_rate=0.5) == [1.25, 1.125, 1.125, 2.125]


def test_momentum_follows_its_recurrence() -> None:
    velocity, weight, expected = 0.0, 1.0, []
    for delta in DELTAS:
        velocity = 0.9 * velocity + delta
        weight += 0.5 * velocity
        expected.append(weight)

    made = versions(name="fedavgm", momentum=0.9, server_learning_rate=0.5)

    assert made == pytest.approx(expected, rel=1e-14)


def adam_moment(moment: float, squared: float) -> float:
    return 0.99 * moment + 0.01 * squared


def yogi_moment(moment: float, squared: float) -> float:
    return moment - 0.01 * squared * ((moment > squared) - (moment < squared))


def adagrad_moment(moment: float, squared: float) -> float:
    return moment + squared


@pytest.mark.parametrize(
    ("name", "second_moment"),
    [("fedadam", adam_moment), ("fedyogi", yogi_moment), ("fedadagrad", adagrad_moment)],
)
def test_adaptive_steps_follow_the_paper(
    name: str, second_moment: Callable[[float, float], float]
) -> None:
    tau, first, second, weight, expected = 1e-3, 0.0, 1e-6, 1.0, []
    for delta in DELTAS:
        first = 0.9 * first + 0.1 * delta
        second = second_moment(second, delta * delta)
        weight += 0.1 * first / (math.sqrt(second) + tau)
        expected.append(weight)

    made = versions(name=name, beta1=0.9, beta2=0.99, tau=tau)

    assert made == pytest.approx(expected, rel=1e-12)


def test_adam_corrects_its_bias_when_asked() -> None:
    """With correction, and tau beside nothing, the first step is the learning rate."""
    made = versions(
        [3.0], name="fedadam", bias_correction=True, tau=1e-12, initial_second_moment=0.0
    )

    assert made == pytest.approx([1.1], rel=1e-9)


def test_the_step_count_travels_with_the_version() -> None:
    strategy = build(StrategyConfig(name="fedadam", bias_correction=True))
    update = Contribution("only", 1, reader_of(np.array([1.0])))

    first = make_version(strategy, np.zeros(1), [update])
    second = make_version(strategy, np.zeros(1), [update], RunOptions(prior=first.prior(2)))

    assert (first.outcome.scalars, second.outcome.scalars) == (
        {"step_count": 1.0},
        {"step_count": 2.0},
    )


def test_any_rule_takes_any_optimizer() -> None:
    made = versions(name="median", optimizer="momentum", momentum=0.0)

    assert made == [1.5, 1.25, 1.25, 3.25]


def test_zero_aggregate_leaves_the_weights() -> None:
    assert versions([0.0, 0.0], name="fedyogi") == [1.0, 1.0]
