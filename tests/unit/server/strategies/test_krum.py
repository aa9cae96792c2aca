import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare_server.strategies import Facts, NotEnoughUpdatesError, StrategyConfig, build
from qflare_server.strategies.interfaces import Cohort, CohortRule
from qflare_server.strategies.krum import (
    Bulyan,
    Krum,
    bulyan_selection,
    krum_scores,
    mean_around_middle,
    squared_distances,
)
from qflare_server.strategies.testkit import make_version, sample
from tests.unit.server.strategies.updates import Aggregate, Array, Deltas


def naive_scores(vectors: Array, f: int) -> list[float]:
    """Krum's scores as the paper writes them: n - f - 2 nearest others, squared distances."""
    scores = []
    for one in range(len(vectors)):
        squares = sorted(
            float(np.sum((vectors[one] - vectors[other]) ** 2))
            for other in range(len(vectors))
            if other != one
        )
        scores.append(sum(squares[: max(1, len(vectors) - f - 2)]))
    return scores


def naive_krum(vectors: Array, f: int, m: int = 1) -> Array:
    best = np.argsort(naive_scores(vectors, f), kind="stable")[:m]
    return np.asarray(vectors[best].mean(axis=0))


def naive_bulyan(vectors: Array, f: int) -> Array:
    left, chosen = list(vectors), []
    for _ in range(len(vectors) - 2 * f):
        best = 0 if len(left) == 1 else int(np.argmin(naive_scores(np.array(left), f)))
        chosen.append(left.pop(best))
    matrix = np.array(chosen)
    kept = len(matrix) - 2 * f
    result = np.empty(vectors.shape[1])
    for column in range(vectors.shape[1]):
        values = sorted(matrix[:, column])
        middle = np.median(values)
        near = sorted(values, key=lambda value: abs(value - middle))[:kept]
        result[column] = np.mean(near)
    return result


def facts_of(count: int) -> tuple[Facts, ...]:
    return tuple(Facts(f"{index:03}", 1) for index in range(count))


def close(result: Array, expected: Array, scale: float) -> None:
    assert np.max(np.abs(result - expected)) <= 1e-6 * scale


@pytest.mark.parametrize("f", [0, 2, 4])
def test_krum_is_the_naive_form(deltas: Deltas, aggregate: Aggregate, f: int) -> None:
    wide = deltas.astype(np.float64)

    result = aggregate(deltas, name="krum", byzantine_count=f)

    np.testing.assert_array_equal(result, naive_krum(wide, f))


@pytest.mark.parametrize(("f", "m"), [(2, 3), (2, 7), (4, 1), (0, 11)])
def test_multi_krum_is_the_naive_form(deltas: Deltas, aggregate: Aggregate, f: int, m: int) -> None:
    wide = deltas.astype(np.float64)

    result = aggregate(deltas, name="multi_krum", byzantine_count=f, selected_count=m)

    close(result, naive_krum(wide, f, m), np.abs(naive_krum(wide, f, m)).max())


def test_multi_krum_averages_all_but_f_and_two_by_default(
    deltas: Deltas, aggregate: Aggregate
) -> None:
    result = aggregate(deltas, name="multi_krum", byzantine_count=2)

    expected = naive_krum(deltas.astype(np.float64), 2, 7)
    close(result, expected, np.abs(expected).max())


@pytest.mark.parametrize("f", [1, 2])
def test_bulyan_is_the_naive_form(aggregate: Aggregate, f: int) -> None:
    generator = np.random.default_rng(3)
    deltas = generator.standard_normal((11, 400)).astype(np.float32)
    deltas[4] *= 1e5

    result = aggregate(deltas, name="bulyan", byzantine_count=f)

    expected = naive_bulyan(deltas.astype(np.float64), f)
    close(result, expected, np.abs(expected).max())


def test_bulyan_without_hostile_updates_is_the_mean(deltas: Deltas, aggregate: Aggregate) -> None:
    result = aggregate(deltas, name="bulyan", byzantine_count=0)

    expected = deltas.astype(np.float64).mean(axis=0)
    close(result, expected, np.abs(expected).max())


@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan"])
def test_hostile_updates_are_not_chosen(name: str, aggregate: Aggregate) -> None:
    generator = np.random.default_rng(4)
    direction = generator.standard_normal(300)
    honest = direction + 0.1 * generator.standard_normal((9, 300))
    hostile = np.stack([-5.0 * direction, 1e8 * generator.standard_normal(300)])
    updates = np.vstack([hostile, honest])

    result = aggregate(updates, name=name, byzantine_count=2)

    assert np.linalg.norm(result - direction) < 0.2 * np.linalg.norm(direction)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), count=st.integers(3, 15), size=st.integers(1, 40))
def test_distances_from_the_gram_matrix_are_the_distances(seed: int, count: int, size: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((count, size))

    distances = squared_distances(vectors @ vectors.T)

    direct = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, direct, atol=1e-12 * size)
    assert np.all(distances >= 0.0)


def test_scores_are_the_naive_scores() -> None:
    vectors = np.random.default_rng(5).standard_normal((9, 20))

    scores = krum_scores(squared_distances(vectors @ vectors.T), 2)

    np.testing.assert_allclose(scores, naive_scores(vectors, 2))


def test_ties_fall_to_the_smaller_update_id() -> None:
    gram = np.ones((3, 3))
    facts = (Facts("c", 1), Facts("a", 1), Facts("b", 1))

    assert Krum().plan(Cohort(facts, gram)) == (0.0, 1.0, 0.0)


def test_bulyan_selection_drops_two_f() -> None:
    vectors = np.vstack([np.zeros((9, 4)), 1e3 * np.eye(4)[:2]])

    chosen = bulyan_selection(squared_distances(vectors @ vectors.T), facts_of(11), 2)

    assert sorted(chosen) == [0, 1, 2, 3, 4, 5, 6]


def test_bulyan_selection_ends_with_the_last_update() -> None:
    assert bulyan_selection(np.zeros((3, 3)), facts_of(3), 0) == [0, 1, 2]


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    data=st.data(),
)
def test_mean_around_the_middle_takes_the_nearest_values(
    seed: int, count: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, count))
    ordered = np.sort(np.random.default_rng(seed).standard_normal((count, 5)), axis=0)

    result = mean_around_middle(ordered, kept)

    middle = np.median(ordered, axis=0)
    order = np.argsort(np.abs(ordered - middle), axis=0, kind="stable")[:kept]
    distance = np.take_along_axis(np.abs(ordered - middle), order, axis=0).max(axis=0)
    assert np.all(np.abs(result - middle) <= distance + 1e-12)
    if kept % 2 == count % 2:
        expected = np.take_along_axis(ordered, order, axis=0).mean(axis=0)
        np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize(("name", "needed"), [("krum", 7), ("multi_krum", 7), ("bulyan", 11)])
def test_refused_updates_may_leave_too_few(name: str, needed: int) -> None:
    data = sample(update_count=11, element_count=10)
    strategy = build(StrategyConfig(name=name, byzantine_count=2, quorum=11, max_norm=1e-9))

    with pytest.raises(NotEnoughUpdatesError, match=f"needs {needed} accepted updates, got 0"):
        make_version(strategy, data.base, data.contributions())


@pytest.mark.parametrize("rule", [Krum(), Bulyan()])
def test_a_plan_needs_the_gram_matrix(rule: CohortRule) -> None:
    with pytest.raises(TypeError, match="Gram"):
        rule.plan(Cohort(facts_of(3)))


def test_the_outcome_names_the_chosen() -> None:
    data = sample(update_count=7, element_count=50)
    config = StrategyConfig(name="multi_krum", byzantine_count=2, quorum=7, selected_count=2)

    outcome = make_version(build(config), data.base, data.contributions()).outcome

    assert sorted(outcome.coefficients.values()) == [0.0] * 5 + [0.5] * 2
    assert outcome.weight_sum == 1.0
