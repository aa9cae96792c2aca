"""Queries of federated analytics: the norm of answers, and results from exact sums of them."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.analytics.answers import InvalidValuesError, answer, edges
from qflare.analytics.queries import KINDS, InvalidQueryError, Query
from qflare.analytics.refinement import NotRefinableError, bracket, refined
from qflare.analytics.results import NoisySum, Result
from qflare.v1 import training_pb2

LABELS = ("a", "b")
NUMBERS = st.lists(
    st.floats(-50, 150) | st.sampled_from([0.0, 100.0, float("nan"), float("inf")]), max_size=40
)


def query_of(kind: str, **settings: Any) -> Query:
    values: dict[str, Any] = {"column": "age", "kind": KINDS[kind]}
    if kind == "labels":
        values["labels"] = LABELS
    elif kind != "count":
        values |= {"lower": 0.0, "upper": 100.0}
    return Query.from_proto(training_pb2.AnalyticsQuery(**values | settings))


def result(query: Query, cohort: list[list[Any]]) -> Result:
    """Return the result without noise."""
    total = sum((answer(query, values).astype(float) for values in cohort), start=np.zeros(1))
    return NoisySum(query, np.broadcast_to(total, query.element_count), 0.0).result()


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), values=NUMBERS, most=st.sampled_from([1, 5, 1000]))
def test_an_answer_has_a_norm_of_at_most_one(kind: str, values: list[float], most: int) -> None:
    """The noise is calibrated for this norm."""
    query = query_of(kind, max_examples=most)
    given: list[Any] = (
        [LABELS[int(bool(value))] for value in values] if kind == "labels" else values
    )
    vector = answer(query, given)
    assert vector.shape == (query.element_count,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector.astype(float)) <= 1 + 1e-6


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 100), max_size=30), min_size=1, max_size=5))
def test_results_are_those_of_all_values_together(cohort: list[list[int]]) -> None:
    whole = np.array([value for values in cohort for value in values], float)

    def row(kind: str, **more: Any) -> tuple[Any, ...]:
        return result(query_of(kind, max_examples=30, **more), cohort).rows[0]

    assert row("count")[0] == pytest.approx(len(whole), abs=1e-3)
    assert row("sum")[0] == pytest.approx(whole.sum(), abs=1e-2)
    found = result(query_of("histogram", max_examples=30, bins=7), cohort)
    wanted = [0, *np.histogram(whole, 7, (0, 100))[0], 0]
    assert [cell[2] for cell in found.rows] == pytest.approx(wanted, abs=1e-3)
    if len(whole):
        count, mean, variance, deviation = row("mean")
        assert count == pytest.approx(len(whole), abs=1e-3)
        assert mean == pytest.approx(whole.mean(), abs=1e-2)
        assert variance == pytest.approx(whole.var(), abs=0.5)
        assert deviation == pytest.approx(variance**0.5)
        width = 100 / 200
        median = row("quantiles", bins=200, quantiles=[0.5])[1]
        assert np.mean(whole < median - 2 * width) <= 0.5 + 1e-6
        assert np.mean(whole > median + 2 * width) <= 0.5 + 1e-6


def test_values_below_and_above_the_bounds_are_counted_apart() -> None:
    values = [-1.0, 0.0, 49.9, 50.0, 100.0, 100.1, float("inf"), float("nan")]
    rows = result(query_of("histogram", max_examples=9, bins=2), [values]).rows
    assert [row[2] for row in rows] == pytest.approx([1, 2, 2, 2], abs=1e-5)
    assert rows[0][0] == -np.inf
    assert rows[-1][1] == np.inf


def test_a_device_with_more_values_is_scaled_down() -> None:
    """With the default every device counts as one, whatever the number of its values."""
    rows = result(query_of("labels"), [["a"] * 900 + ["b"] * 100, ["b"], []]).rows
    assert [row[1] for row in rows] == pytest.approx([0.9, 1.1, 0.0])
    assert [row[2] for row in rows] == pytest.approx([0.45, 0.55, 0.0])


def test_noise_that_leaves_no_value_gives_none() -> None:
    mean = NoisySum(query_of("mean"), np.array([-1.0, 0.0, 0.0]), 1.0).result()
    assert np.isnan([float(cell) for cell in mean.rows[0][1:]]).all()
    median = NoisySum(query_of("quantiles"), np.full(102, -1.0), 1.0).result()
    assert all(np.isnan(float(row[1])) for row in median.rows)
    assert median.error == 1.0


@pytest.mark.parametrize(
    "values", [None, 5, "text", b"text", [object()], ["x"], [1j], [[1], [1, 2]]]
)
def test_values_that_are_no_numbers_are_refused(values: Any) -> None:
    with pytest.raises(InvalidValuesError):
        answer(query_of("sum"), values)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("column", {"column": ""}),
        ("column", {"column": "a\nb"}),
        ("kind", {"kind": 0}),
        ("kind", {"kind": 77}),
        ("upper", {"upper": float("nan")}),
        ("upper", {"lower": -1e13}),
        ("upper", {"lower": 100.0}),
        ("bins", {"bins": -1}),
        ("bins", {"bins": 10_001}),
        ("quantiles", {"quantiles": [0.5]}),
        ("labels", {"labels": ["a"]}),
        ("max_examples", {"max_examples": -1}),
        ("upper", {"kind": KINDS["labels"], "labels": ["a"]}),
        ("labels", {"kind": KINDS["labels"], "upper": 0.0}),
        ("labels", {"kind": KINDS["labels"], "upper": 0.0, "labels": ["a", "a"]}),
        ("quantiles", {"kind": KINDS["quantiles"], "quantiles": [1.5]}),
    ],
)
def test_a_query_out_of_range_is_refused(field: str, settings: dict[str, Any]) -> None:
    question: dict[str, Any] = {"column": "age", "kind": KINDS["histogram"], "upper": 100.0}
    message = training_pb2.AnalyticsQuery(**question | settings)
    with pytest.raises(InvalidQueryError) as caught:
        Query.from_proto(message)
    assert caught.value.field == field


BOUNDS = st.floats(-1e12, 1e12) | st.sampled_from([0.0, 1.0, 1e11, 5e-324, -5e-324, 1e-300])


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["sum", "mean", "histogram", "quantiles"]),
    lower=BOUNDS,
    steps=st.integers(1, 50_000) | st.floats(1e-320, 1e12),
    bins=st.sampled_from([0, 1, 7, 10_000]),
)
def test_bounds_that_are_accepted_tell_values_apart(
    kind: str, lower: float, steps: float, bins: int
) -> None:
    # the next floats above the lower bound, or any distance from it
    upper = lower + (steps * np.spacing(abs(lower)) if isinstance(steps, int) else steps)
    counted = {"bins": bins} if kind in {"histogram", "quantiles"} else {}
    try:
        query = query_of(kind, lower=lower, upper=upper, **counted)
    except InvalidQueryError:
        return
    if counted:
        assert np.all(np.diff(edges(query)) > 0)
    with np.errstate(all="raise", under="ignore"):
        answers = answer(query, [lower, upper, 0.0, (lower + upper) / 2, -1e300, np.inf])
    assert np.all(np.isfinite(answers))
    assert np.linalg.norm(answers.astype(float)) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("kind", "lower", "upper"),
    [("mean", 0.0, 5e-324), ("histogram", 0.0, 5e-324), ("histogram", 1e11, 1e11 + 1e-4)],
)
def test_bounds_between_which_no_values_are_told_apart_are_refused(
    kind: str, lower: float, upper: float
) -> None:
    with pytest.raises(InvalidQueryError, match="told apart"):
        query_of(kind, lower=lower, upper=upper)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_completed_query_is_complete(kind: str) -> None:
    query = query_of(kind)
    assert Query.from_proto(query.to_proto()) == query


def noisy(cohort: Any, stddev: float = 0.0, bins: int = 50, **settings: Any) -> NoisySum:
    """Return the sum of answers in which every device counts as one, with noise of a fixed generator."""
    query = query_of("histogram", bins=bins, **settings)
    total = sum(answer(query, values).astype(float) for values in cohort)
    random = np.random.default_rng(5)
    return NoisySum(query, total + random.normal(0, stddev, query.element_count), stddev)


@settings(max_examples=60, deadline=None)
@given(
    quantile=st.floats(0, 1),
    stddev=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 20),
    bins=st.integers(2, 60),
)
def test_a_quantile_lies_between_the_bounds_of_its_refinement(
    quantile: float, stddev: float, seed: int, bins: int
) -> None:
    """Of 2000 devices with one value each; the noise of fixed generators stays within its margin.

    The quantile is the least value that the wanted share of values does not exceed, without interpolation.
    """
    values = np.random.default_rng(seed).beta(2, 5, 2000) * 100
    found = noisy(values.reshape(-1, 1), stddev, bins)
    wanted = np.quantile(values, quantile, method="inverted_cdf")
    bounds = None
    with suppress(NotRefinableError):
        bounds = bracket(found, quantile)
    if bounds is None:
        assert stddev or bins == 2
        return
    low, high = bounds
    assert low <= wanted <= high
    assert high - low < 100
    if not stddev:
        width = 100 / bins
        assert high - low <= 3 * width or quantile in (0, 1)


def test_a_refined_query_asks_the_same_devices_between_the_bounds() -> None:
    found = noisy([[20.0]] * 500 + [[60.0]] * 500, 1.0)
    config = training_pb2.TrainingConfig(analytics=found.query.to_proto(), groups=["ward"])
    config.rounds.quorum = config.rounds.target = 7
    config.secure_aggregation.helpers.append("helper")
    made = refined(config, found, 0.25, epsilon=2.0)
    assert (made.groups, made.rounds, made.secure_aggregation) == (
        config.groups,
        config.rounds,
        config.secure_aggregation,
    )
    query = Query.from_proto(made.analytics)
    assert (query.kind, query.quantiles, query.column) == ("quantiles", (0.25,), "age")
    assert 14 <= query.lower <= 20 <= query.upper <= 26
    assert made.privacy == training_pb2.PrivacyPolicy(epsilon_budget=2.0)


@pytest.mark.parametrize(
    ("found", "quantile", "told"),
    [
        (noisy([[20.0]] * 10, 100.0), 0.5, "the noise has a deviation of 100"),
        (noisy([[-1.0]] * 100), 0.5, "lies below the bound 0"),
        (noisy([[101.0]] * 100), 0.5, "lies above the bound 100"),
        (noisy([[20.0]] * 10), 1.5, "want 0 to 1"),
        (noisy([[20.0]] * 10), float("nan"), "want 0 to 1"),
        (NoisySum(query_of("count"), np.ones(1), 0.0), 0.5, "has no bins"),
        (NoisySum(query_of("histogram"), np.full(22, -1.0), 0.0), 0.5, "no narrower bounds|lies"),
    ],
)
def test_what_cannot_be_refined_is_refused(found: NoisySum, quantile: float, told: str) -> None:
    with pytest.raises(NotRefinableError, match=told):
        bracket(found, quantile)
