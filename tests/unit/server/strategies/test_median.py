import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import trim_mean

from qflare_server.strategies import Contribution, StrategyConfig, build
from qflare_server.strategies.median import (
    TILE,
    CoordinateMedian,
    TrimmedMean,
    exchanges,
    ordered_tiles,
)
from qflare_server.strategies.testkit import make_version, reader_of
from tests.unit.server.strategies.updates import Aggregate, Deltas

MATRICES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=30),
    elements=st.floats(-1e6, 1e6, width=32),
)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts_every_sequence_of_zeros_and_ones(count: int) -> None:
    """A network that sorts these sorts everything (Knuth, theorem Z)."""
    columns = np.array(list(itertools.product([0, 1], repeat=count))).T.copy()
    expected = np.sort(columns, axis=0)

    for low, high in exchanges(count):
        columns[low], columns[high] = (
            np.minimum(columns[low], columns[high]),
            np.maximum(columns[low], columns[high]),
        )

    assert np.array_equal(columns, expected)


@given(matrix=MATRICES)
def test_tiles_are_ordered_columns(matrix: Deltas) -> None:
    expected = np.sort(matrix, axis=0)

    for start, stop, ordered in ordered_tiles(matrix.copy()):
        np.testing.assert_array_equal(ordered, expected[:, start:stop])


def test_more_columns_than_a_tile() -> None:
    matrix = np.random.default_rng(0).standard_normal((13, 2 * TILE + 3))

    result = CoordinateMedian().combine(matrix.copy())

    np.testing.assert_array_equal(result, np.median(matrix, axis=0))


def test_median_is_numpys(deltas: Deltas, aggregate: Aggregate) -> None:
    result = aggregate(deltas, name="median")

    np.testing.assert_array_equal(result, np.median(deltas.astype(np.float64), axis=0))


def test_median_of_an_even_number(deltas: Deltas, aggregate: Aggregate) -> None:
    result = aggregate(deltas[:10], name="median")

    np.testing.assert_array_equal(result, np.median(deltas[:10].astype(np.float64), axis=0))


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.2, 0.3, 0.49])
def test_trimmed_mean_is_scipys(deltas: Deltas, aggregate: Aggregate, fraction: float) -> None:
    result = aggregate(deltas, name="trimmed_mean", trimmed_fraction=fraction)

    wide = deltas.astype(np.float64)
    scale = np.sort(np.abs(wide), axis=0)[-1 - int(fraction * 11)]
    error = np.abs(result - trim_mean(wide, fraction, axis=0))
    assert np.all(error <= 1e-14 * scale + 1e-300)


@given(matrix=MATRICES, fraction=st.floats(0.0, 0.499))
def test_trimmed_mean_lies_between_the_extremes(matrix: Deltas, fraction: float) -> None:
    result = TrimmedMean(fraction).combine(matrix.copy())

    slack = 1e-12 * np.abs(matrix).max()
    assert np.all(result >= matrix.min(axis=0) - slack)
    assert np.all(result <= matrix.max(axis=0) + slack)


@given(matrix=MATRICES, seed=st.integers(0, 99))
def test_order_of_updates_changes_no_bit(matrix: Deltas, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(matrix, axis=0)

    for rule in (CoordinateMedian(), TrimmedMean(0.2)):
        assert rule.combine(matrix.copy()).tobytes() == rule.combine(shuffled.copy()).tobytes()


@given(matrix=MATRICES, width=st.integers(1, 7))
def test_slicing_changes_no_bit(matrix: Deltas, width: int) -> None:
    for rule in (CoordinateMedian(), TrimmedMean(0.2)):
        pieces = [
            rule.combine(matrix[:, start : start + width].copy())
            for start in range(0, matrix.shape[1], width)
        ]
        assert np.concatenate(pieces).tobytes() == rule.combine(matrix.copy()).tobytes()


@given(matrix=MATRICES)
def test_float64_gives_the_bytes_of_float32(matrix: Deltas) -> None:
    for rule in (CoordinateMedian(), TrimmedMean(0.2)):
        wide = rule.combine(matrix.astype(np.float64))
        assert wide.tobytes() == rule.combine(matrix.copy()).tobytes()


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("name", ["median", "trimmed_mean", "bulyan", "geometric_median", "krum"])
def test_full_weights_give_the_version_of_deltas(name: str, clip: float) -> None:
    generator = np.random.default_rng(1)
    base = generator.standard_normal(500).astype(np.float32)
    weights = base + 0.01 * generator.standard_normal((7, 500)).astype(np.float32)
    full = [
        Contribution(str(i), 1, reader_of(row), full_weights=True) for i, row in enumerate(weights)
    ]
    deltas = [
        Contribution(str(i), 1, reader_of(row.astype(np.float64) - base))
        for i, row in enumerate(weights)
    ]
    strategy = build(StrategyConfig(name=name, quorum=7, clip_norm=clip))

    one = make_version(strategy, base, full).weights
    other = make_version(strategy, base, deltas).weights

    np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))


def test_a_minority_of_any_size_cannot_move_the_median_out_of_the_rest() -> None:
    honest = np.random.default_rng(2).standard_normal((6, 100))
    hostile = np.full((5, 100), 1e30)

    result = CoordinateMedian().combine(np.vstack([honest, hostile]))

    assert np.all(result <= honest.max(axis=0))
