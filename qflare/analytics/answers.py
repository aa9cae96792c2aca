"""Answers of devices: vectors that are computed from the values of a column.

Element by element, summed over the values x of a device, before the division that `queries` describes:

* `count`: 1.
* `sum`: x clipped to the bounds, over the larger magnitude of the bounds.
* `mean`: (1, t, t^2) / sqrt(3), with t = x clipped to the bounds and mapped to -1 to 1.
* `histogram`, `quantiles`: 1 in the element of x: below the bounds, the bins, above the bounds. A bin includes its
  lower edge; the last one includes the upper bound as well.
* `labels`: 1 in the element of x: the labels in their order, then others.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qflare.analytics.queries import Query

Vector = NDArray[np.float64]


class InvalidValuesError(ValueError):
    """The values of a column cannot be used to answer a query."""


def answer(query: Query, values: Iterable[Any]) -> NDArray[np.float32]:
    """Return the answer of a device, shape (query.element_count,).

    Args:
        query: What is asked.
        values: Numbers of any shape, of which NaN counts as missing; for `labels`, labels as str or what str() makes
            one of.

    Raises:
        InvalidValuesError: They are no numbers.
    """
    if isinstance(values, str | bytes):
        raise InvalidValuesError("values: got one text, want a number or a label for each value")
    if query.kind == "labels":
        total, count = _labels(query, values)
    else:
        numbers = _numbers(values)
        total, count = _TOTALS[query.kind](query, numbers), len(numbers)
    divisor = max(count, query.max_examples)
    spread = query.unit / query.max_examples
    return (total / (divisor * spread)).astype(np.float32)


def _numbers(values: Iterable[Any]) -> Vector:
    try:
        numbers = np.asarray(
            values if isinstance(values, np.ndarray) else list(values), np.float64
        ).reshape(-1)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidValuesError(f"values: want numbers: {error}") from error
    return numbers[~np.isnan(numbers)]


def _count(_: Query, numbers: Vector) -> Vector:
    return np.array([float(len(numbers))])


def _sum(query: Query, numbers: Vector) -> Vector:
    largest = max(abs(query.lower), abs(query.upper))
    return np.array([float(np.sum(np.clip(numbers, query.lower, query.upper) / largest))])


def _mean(query: Query, numbers: Vector) -> Vector:
    middle, half = (query.lower + query.upper) / 2, (query.upper - query.lower) / 2
    placed = np.clip((np.clip(numbers, query.lower, query.upper) - middle) / half, -1.0, 1.0)
    return np.array([len(placed), np.sum(placed), np.sum(placed * placed)], np.float64)


def edges(query: Query) -> Vector:
    """Return the edges of the bins, ascending, shape (bins + 1,)."""
    return np.linspace(query.lower, query.upper, query.bins + 1)


def _histogram(query: Query, numbers: Vector) -> Vector:
    bounds = edges(query)
    places = np.searchsorted(bounds, numbers, side="right")
    places[numbers == query.upper] = query.bins
    return np.bincount(places, minlength=query.bins + 2).astype(np.float64)


def _labels(query: Query, values: Iterable[Any]) -> tuple[Vector, int]:
    try:
        given = [str(value) for value in values]
    except TypeError as error:
        raise InvalidValuesError(f"values: want one label for each value: {error}") from error
    places = {label: place for place, label in enumerate(query.labels)}
    total = np.zeros(len(query.labels) + 1)
    for label in given:
        total[places.get(label, len(query.labels))] += 1
    return total, len(given)


_TOTALS = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "histogram": _histogram,
    "quantiles": _histogram,
}
