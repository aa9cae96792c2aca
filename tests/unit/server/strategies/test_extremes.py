"""Updates at the ends of float64: no rule is led by one, and no rule stumbles over one."""

import numpy as np
import pytest

from qflare_server.strategies import Contribution, Outcome, StrategyConfig, begin, build
from qflare_server.strategies.blocks import LARGEST_NORM, cosine_of, gram_matrix, norm_of
from qflare_server.strategies.testkit import make_version, reader_of
from tests.unit.server.strategies.updates import Array, clustered, contributions

HUGE = [1e149, -1e149, 1e151, 1e155, -1e155, 1e306, 1.7e308, -1.7e308]
COMPARING: dict[str, dict[str, float]] = {
    "krum": {"byzantine_count": 2},
    "multi_krum": {"byzantine_count": 2},
    "bulyan": {"byzantine_count": 1},
    "geometric_median": {},
}
ORDERING: dict[str, dict[str, float]] = {"median": {}, "trimmed_mean": {"trimmed_fraction": 0.2}}


def with_hostile(value: float, place: int, size: int = 1_000) -> tuple[Array, Array]:
    """Seven honest deltas, one hostile among them; and the honest alone."""
    honest = clustered(np.random.default_rng(3), 7, size).astype(np.float64)
    deltas: Array = np.insert(honest, place, np.full(size, value), axis=0)
    return deltas, honest


def run(deltas: Array, name: str, **settings: float) -> tuple[Array, Outcome]:
    config = StrategyConfig.from_mapping({"name": name, "quorum": len(deltas), **settings})
    made = make_version(build(config), np.zeros(deltas.shape[1]), contributions(deltas))
    return made.weights, made.outcome


def is_among(result: Array, honest: Array) -> bool:
    """Whether every element is among those of the honest updates, but for rounding."""
    low, high = honest.min(axis=0), honest.max(axis=0)
    slack = 1e-6 * np.max(np.abs(honest))
    return bool(np.all((result >= low - slack) & (result <= high + slack)))


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("name", [*COMPARING, *ORDERING])
def test_one_hostile_update_leads_no_robust_rule(name: str, place: int, value: float) -> None:
    deltas, honest = with_hostile(value, place)

    result, _ = run(deltas, name, **{**COMPARING, **ORDERING}[name])

    assert is_among(result, honest)


@pytest.mark.parametrize("name", COMPARING)
def test_what_cannot_be_compared_is_refused_with_its_name(name: str) -> None:
    deltas, honest = with_hostile(1e306, 0)

    result, outcome = run(deltas, name, **COMPARING[name])

    assert list(outcome.rejected) == ["000"]
    assert "exceeds 1e+150" in outcome.rejected["000"]
    alone, _ = run(honest, name, **COMPARING[name])
    assert np.allclose(result, alone, rtol=1e-9)


@pytest.mark.parametrize("name", COMPARING)
def test_an_update_of_several_blocks_of_which_each_is_finite_is_refused(name: str) -> None:
    """Every block's square is within float64, their sum is not."""
    deltas, _ = with_hostile(5e151, 2, size=70_000)

    assert list(run(deltas, name, **COMPARING[name])[1].rejected) == ["002"]


@pytest.mark.parametrize(
    "screen", [{"max_norm": 100.0}, {"clip_norm": 1.0}, {"min_cosine": 0.0}], ids=str
)
def test_screens_refuse_what_they_cannot_measure(screen: dict[str, float]) -> None:
    deltas, _ = with_hostile(1e306, 0)
    strategy = build(StrategyConfig.from_mapping({"quorum": 8, **screen}))
    first = make_version(strategy, np.zeros(1_000), contributions(deltas[1:]))
    aggregation = begin(strategy, 1_000, reader_of(np.zeros(1_000)), first.prior(2))

    aggregation.extend(contributions(deltas))

    assert list(aggregation.outcome.rejected) == ["000"]
    assert all(np.isfinite(piece.weights).all() for piece in aggregation.finish())


@pytest.mark.parametrize("value", [1e155, 1e308])
@pytest.mark.parametrize("size", [10, 200_000])
def test_norms_and_products_beyond_float64_are_infinite(value: float, size: int) -> None:
    hostile = Contribution("a", 1, reader_of(np.full(size, value)))
    zero = reader_of(np.zeros(size))

    assert norm_of(hostile, zero, size) == np.inf
    assert cosine_of(hostile, zero, hostile.read, size) == (np.inf, None)


def test_the_difference_of_full_weights_may_exceed_float64() -> None:
    low, high = np.full(10, -1.7e308), np.full(10, 1.7e308)
    full = Contribution("a", 1, reader_of(high), full_weights=True)

    assert norm_of(full, reader_of(low), 10) == np.inf


def test_products_of_the_others_are_untouched() -> None:
    deltas, honest = with_hostile(1e306, 4)
    cohort = contributions(deltas)
    others = [0, 1, 2, 3, 5, 6, 7]

    gram = gram_matrix(cohort, [1.0] * 8, reader_of(np.zeros(1_000)), 1_000)

    assert np.allclose(gram[np.ix_(others, others)], honest @ honest.T)
    assert not gram[4, 4] <= LARGEST_NORM**2
