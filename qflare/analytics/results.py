"""Results of queries, from the noisy sum of the answers.

Noise may make counts negative; they are shown as they are, since rounding up would bias sums of them. Quantiles and
shares are computed from counts that are not below 0.
"""

from dataclasses import dataclass
from math import nan, sqrt
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qflare.analytics.answers import edges
from qflare.analytics.queries import Query
from qflare.masking.parameters import MaskingParameters
from qflare.v1 import training_pb2

Cell: TypeAlias = str | float
Vector: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """The table of a query.

    Attributes:
        columns: Names of the columns.
        rows: Cells in the order of the columns; NaN where the noise leaves no value.
        error: Standard deviation of the noise in a count, or in the sum of a `sum`; 0 without noise.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    error: float


@dataclass(frozen=True, eq=False)
class NoisySum:
    """The noisy sum of the answers to a query.

    Attributes:
        query: What was asked.
        total: The sum, shape (query.element_count,).
        stddev: Standard deviation of the noise in each element of `total`; it covers the rounding of answers too.
    """

    query: Query
    total: Vector
    stddev: float

    def __post_init__(self) -> None:
        """Refuse a sum of another shape.

        Raises:
            ValueError: It is not that of the query's answers.
        """
        if self.total.shape != (self.query.element_count,):
            raise ValueError(
                f"total: got shape {self.total.shape}, want ({self.query.element_count},)"
            )

    @classmethod
    def of_version(cls, config: training_pb2.TrainingConfig, data: bytes) -> Self:
        """Return the sum that the version of a query holds as a mean.

        Args:
            config: Complete configuration of the query.
            data: Payload of the version.

        Raises:
            ValueError: The payload is not that of the query.
        """
        query = Query.from_proto(config.analytics)
        mean = np.frombuffer(data, "<f4").astype(np.float64)
        return cls(query, mean * config.rounds.target, _noise_deviation(config, query))

    @property
    def values(self) -> Vector:
        """The sum in values instead of answers: counts of values, except for a `sum` and the moments of a `mean`."""
        return self.total * self.query.unit

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in each element of `values`."""
        return self.stddev * self.query.unit

    def result(self) -> Result:
        """Return the result of the query."""
        query = self.query
        columns, rows = _TABLES[query.kind](query, self.values)
        largest = max(abs(query.lower), abs(query.upper)) if query.kind == "sum" else 1.0
        return Result(columns, rows, self.deviation * largest)


def _noise_deviation(config: training_pb2.TrainingConfig, query: Query) -> float:
    privacy, sensitivity = config.privacy, config.privacy.clip_norm
    if config.secure_aggregation.mode:
        scale = MaskingParameters.of(config.secure_aggregation, 1).scale
        sensitivity += sqrt(query.element_count) / scale
    return privacy.noise_multiplier * sensitivity


_Table: TypeAlias = tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]


def _count(_: Query, total: Vector) -> _Table:
    return ("count",), ((float(total[0]),),)


def _sum(query: Query, total: Vector) -> _Table:
    return ("sum",), ((float(total[0]) * max(abs(query.lower), abs(query.upper)),),)


def _mean(query: Query, total: Vector) -> _Table:
    count, first, second = (float(value) for value in total)
    mean = variance = nan
    if count > 0:
        middle, half = (query.lower + query.upper) / 2, (query.upper - query.lower) / 2
        placed = min(max(first / count, -1.0), 1.0)
        mean = middle + half * placed
        variance = half * half * max(second / count - placed * placed, 0.0)
    return ("count", "mean", "variance", "deviation"), ((count, mean, variance, sqrt(variance)),)


def _histogram(query: Query, total: Vector) -> _Table:
    bounds = [-np.inf, *edges(query), np.inf]
    rows = tuple(
        (float(low), float(high), float(count))
        for low, high, count in zip(bounds, bounds[1:], total, strict=False)
    )
    return ("from", "to", "count"), rows


def _quantiles(query: Query, total: Vector) -> _Table:
    counts = np.maximum(total, 0.0)
    reached = np.cumsum(counts)
    if not reached[-1] > 0:
        return ("quantile", "value"), tuple((wanted, nan) for wanted in query.quantiles)
    # What is below the bounds is at the lower bound, what is above them at the upper bound.
    places = edges(query)
    rows = []
    for wanted in query.quantiles:
        value = np.interp(wanted * reached[-1], reached[:-1], places)
        rows.append((wanted, float(value)))
    return ("quantile", "value"), tuple(rows)


def _labels(query: Query, total: Vector) -> _Table:
    counts = np.maximum(total, 0.0)
    whole = float(counts.sum())
    names = [*query.labels, "(others)"]
    rows = tuple(
        (name, float(count), float(kept) / whole if whole else nan)
        for name, count, kept in zip(names, total, counts, strict=True)
    )
    return ("label", "count", "share"), rows


_TABLES = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "histogram": _histogram,
    "quantiles": _quantiles,
    "labels": _labels,
}
