import numpy as np
import pytest
from scipy.optimize import minimize

from qflare_server.strategies.geometric_median import GeometricMedian, distances_to_mean, weiszfeld
from qflare_server.strategies.interfaces import Cohort
from tests.unit.server.strategies.updates import Aggregate, Array, Deltas


def naive_weiszfeld(
    vectors: Array, weights: Array, smoothing: float = 1e-6, iterations: int = 2_000
) -> Array:
    """Weiszfeld on the vectors themselves."""
    point = np.average(vectors, axis=0, weights=weights)
    for _ in range(iterations):
        scaled = weights / np.maximum(np.linalg.norm(vectors - point, axis=1), smoothing)
        point = np.average(vectors, axis=0, weights=scaled)
    return point


def test_is_the_naive_form(deltas: Deltas, aggregate: Aggregate) -> None:
    wide = deltas.astype(np.float64)

    result = aggregate(deltas, name="geometric_median")

    expected = naive_weiszfeld(wide, np.full(11, 1 / 11))
    assert np.linalg.norm(result - expected) <= 1e-6 * np.linalg.norm(expected)


def test_weighs_by_examples_when_asked(aggregate: Aggregate) -> None:
    vectors = np.random.default_rng(0).standard_normal((6, 40))
    counts = [1, 2, 3, 4, 5, 6]

    result = aggregate(vectors, counts, name="geometric_median", weighting="examples")

    expected = naive_weiszfeld(vectors, np.array(counts) / 21)
    assert np.linalg.norm(result - expected) <= 1e-6 * np.linalg.norm(expected)


def test_minimizes_the_sum_of_distances(aggregate: Aggregate) -> None:
    vectors = np.random.default_rng(1).standard_normal((7, 5))

    result = aggregate(vectors, name="geometric_median")

    def objective(point: Array) -> float:
        return float(np.linalg.norm(vectors - point, axis=1).sum())

    best = minimize(objective, vectors.mean(axis=0), method="BFGS", options={"gtol": 1e-10})
    assert objective(result) <= best.fun * (1 + 1e-9)


def test_the_median_of_a_triangle_is_its_fermat_point(aggregate: Aggregate) -> None:
    """An equilateral triangle's is its centre."""
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])

    result = aggregate(triangle, name="geometric_median")

    np.testing.assert_allclose(result, [0.5, np.sqrt(0.75) / 3], atol=1e-9)


def test_a_majority_in_one_place_wins(aggregate: Aggregate) -> None:
    vectors = np.array([[1.0, 2.0]] * 4 + [[1e9, -1e9]] * 3)

    result = aggregate(vectors, name="geometric_median")

    np.testing.assert_allclose(result, [1.0, 2.0], rtol=1e-5)


def test_distances_come_from_inner_products() -> None:
    vectors = np.random.default_rng(2).standard_normal((5, 9))
    weights = np.full(5, 0.2)

    distances = distances_to_mean(vectors @ vectors.T, weights)

    np.testing.assert_allclose(distances, np.linalg.norm(vectors - vectors.mean(axis=0), axis=1))


def test_iterations_are_bounded() -> None:
    vectors = np.random.default_rng(3).standard_normal((5, 9))
    weights = np.full(5, 0.2)

    once = weiszfeld(vectors @ vectors.T, weights, 1e-6, 1)

    scaled = weights / np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
    np.testing.assert_allclose(once, scaled / scaled.sum())


def test_a_plan_needs_the_gram_matrix() -> None:
    with pytest.raises(TypeError, match="Gram"):
        GeometricMedian().plan(Cohort(()))
