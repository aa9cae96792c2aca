from typing import Any

import numpy as np
import pytest

from qflare_server.strategies import Contribution, Facts, Prior, StrategyConfig, build
from qflare_server.strategies.blocks import BLOCK, cosine_of, gram_matrix, norm_of
from qflare_server.strategies.screening import AdaptiveClip, DirectionBound, NormBound, NormClip
from qflare_server.strategies.testkit import (
    MadeVersion,
    RunOptions,
    make_version,
    reader_of,
    sample,
)


def run(deltas: list[list[float]], prior: Prior | None = None, **settings: Any) -> MadeVersion:
    cohort = [
        Contribution(str(index), 1, reader_of(np.array(delta)))
        for index, delta in enumerate(deltas)
    ]
    strategy = build(StrategyConfig(quorum=len(deltas), **settings))
    return make_version(strategy, np.zeros(2), cohort, RunOptions(prior=prior or Prior()))


def test_a_long_delta_is_scaled_to_the_bound() -> None:
    made = run([[3.0, 4.0], [0.3, 0.4]], clip_norm=1.0)

    np.testing.assert_allclose(made.weights, [(0.6 + 0.3) / 2, (0.8 + 0.4) / 2])
    assert made.outcome.clipped_fraction == 0.5


def test_clipping_reaches_cohort_rules_too() -> None:
    made = run([[3.0, 4.0]], name="median", clip_norm=1.0)

    np.testing.assert_allclose(made.weights, [0.6, 0.8])


def test_a_delta_past_the_bound_is_refused_with_the_reason() -> None:
    made = run([[3.0, 4.0], [0.5, 0.5]], max_norm=2.0)

    assert made.weights.tolist() == [0.5, 0.5]
    assert made.outcome.rejected == {"0": "norm 5 exceeds the bound of 2"}


def test_refusing_comes_before_clipping() -> None:
    made = run([[3.0, 4.0], [0.0, 1.5]], max_norm=2.0, clip_norm=1.0)

    assert made.weights.tolist() == [0.0, 1.0]


def test_without_a_previous_direction_every_update_passes() -> None:
    made = run([[1.0, 0.0], [-1.0, 0.0]], min_cosine=0.5)

    assert made.outcome.rejected == {}
    assert made.vectors["direction"].tolist() == [0.0, 0.0]


def test_an_update_against_the_previous_direction_is_refused() -> None:
    first = run([[1.0, 0.0]], min_cosine=0.5)

    second = run([[2.0, 0.1], [-1.0, 0.0]], prior=first.prior(2), min_cosine=0.5)

    assert second.outcome.rejected == {"1": "cosine -1 is below the bound of 0.5"}
    assert second.vectors["direction"].tolist() == [2.0, 0.1]


def test_direction_and_optimizer_state_live_side_by_side() -> None:
    made = run([[1.0, 2.0]], name="fedadam", min_cosine=0.0)

    assert sorted(made.vectors) == ["direction", "m", "v"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_norm_that_is_not_finite_is_refused(bad: float) -> None:
    with np.errstate(over="ignore"):
        made = run([[bad, 0.0], [1.0, 1.0]], clip_norm=10.0)

    assert list(made.outcome.rejected) == ["0"]
    assert made.weights.tolist() == [1.0, 1.0]


def test_a_known_norm_is_not_computed_again() -> None:
    strategy = build(StrategyConfig(clip_norm=1.0))
    update = Contribution("a", 1, reader_of(np.array([8.0])), norm=2.0)

    assert make_version(strategy, np.zeros(1), [update]).weights.tolist() == [4.0]


@pytest.mark.parametrize(
    ("screen", "facts", "expected"),
    [
        (NormClip(2.0), Facts("a", 1, norm=4.0), 0.5),
        (NormClip(2.0), Facts("a", 1, norm=2.0), 1.0),
        (NormClip(2.0), Facts("a", 1, norm=0.0), 1.0),
        (NormBound(2.0), Facts("a", 1, norm=2.0), 1.0),
        (NormBound(2.0), Facts("a", 1, norm=2.1), 0.0),
        (AdaptiveClip(2.0), Facts("a", 1, norm=4.0), 0.5),
        (DirectionBound(0.0), Facts("a", 1, cosine=0.0), 1.0),
        (DirectionBound(0.0), Facts("a", 1, cosine=None), 1.0),
        (DirectionBound(0.0), Facts("a", 1, cosine=-0.1), 0.0),
    ],
)
def test_screens_at_their_edges(
    screen: NormClip | NormBound | AdaptiveClip | DirectionBound, facts: Facts, expected: float
) -> None:
    assert screen.judge(facts, {})[0] == expected


def test_the_adaptive_bound_comes_from_the_base_version() -> None:
    assert AdaptiveClip(2.0).judge(Facts("a", 1, norm=4.0), {"clip_bound": 1.0}) == (0.25, "")


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_statistics_agree_with_numpy(size: int) -> None:
    data = sample(update_count=4, element_count=size)
    base, direction = reader_of(data.base), reader_of(data.deltas[0])
    full = [
        Contribution(str(i), 1, reader_of(data.base + delta), full_weights=True)
        for i, delta in enumerate(data.deltas)
    ]
    wide = np.array([(data.base + delta).astype(np.float64) - data.base for delta in data.deltas])

    norm, cosine = cosine_of(full[1], base, direction, size)
    gram = gram_matrix(full, [1.0, 0.5, 1.0, 1.0], base, size)

    scaled = wide * np.array([[1.0], [0.5], [1.0], [1.0]])
    first = data.deltas[0].astype(np.float64)
    assert norm == pytest.approx(np.linalg.norm(wide[1]), rel=1e-12)
    assert norm == norm_of(full[1], base, size)
    assert cosine == pytest.approx(wide[1] @ first / norm / np.linalg.norm(first), rel=1e-9)
    np.testing.assert_allclose(gram, scaled @ scaled.T, rtol=1e-12, atol=1e-15)


def test_the_cosine_of_a_zero_vector_is_unknown() -> None:
    zero = Contribution("a", 1, reader_of(np.zeros(3)))

    assert cosine_of(zero, reader_of(np.zeros(3)), reader_of(np.ones(3)), 3) == (0.0, None)
