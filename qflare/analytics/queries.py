"""Queries of federated analytics: checked settings, and the layout of the answers.

An answer is a vector of an L2 norm of at most 1, so that noise of one size covers every kind of query. It is the sum
over the values of a device of a vector of norm 1 or less, divided by the number of values if that is above
`max_examples`, else by `max_examples`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt, ulp
from typing import Final, Self

from qflare.tensors import DType, Manifest, TensorSpec
from qflare.v1 import training_pb2

TENSOR: Final = "answer"
"""Name of the only tensor of an answer."""

CLIP_NORM: Final = 1.0
"""Largest L2 norm of an answer."""

MAX_BINS: Final = 10_000
MAX_LABELS: Final = 256
MAX_BOUND: Final = 1e12
MIN_SPREAD: Final = 1e-12
"""Least difference of the bounds."""
_MIN_BIN_ULPS: Final = 16.0
"""Least width of a bin, in units in the last place of the larger bound, so that float64 tells all edges apart."""
MAX_EXAMPLES: Final = 2**40

KINDS: Final = {
    "count": training_pb2.ANALYTICS_KIND_COUNT,
    "sum": training_pb2.ANALYTICS_KIND_SUM,
    "mean": training_pb2.ANALYTICS_KIND_MEAN,
    "histogram": training_pb2.ANALYTICS_KIND_HISTOGRAM,
    "quantiles": training_pb2.ANALYTICS_KIND_QUANTILES,
    "labels": training_pb2.ANALYTICS_KIND_LABELS,
}
"""Kinds of queries by name."""

_NAMES: Final = {number: name for name, number in KINDS.items()}
_UNBOUNDED: Final = frozenset({"count", "labels"})
_BINNED: Final = {"histogram": 20, "quantiles": 100}
_QUANTILES: Final = (0.25, 0.5, 0.75)
_MOMENTS: Final = 3


class InvalidQueryError(ValueError):
    """A setting of a query is out of range or contradicts another one.

    Args:
        field: Setting, below `analytics`.
        message: The fault, with got and wanted.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Query:
    """A query whose settings were checked and completed.

    Attributes:
        column: Name under which devices offer values, 1 to 100 printable characters.
        kind: Name of the kind, a key of `KINDS`.
        lower: Smallest value; 0 for kinds without bounds.
        upper: Largest value, above `lower`; 0 for kinds without bounds.
        bins: Number of bins; 0 for kinds without bins.
        quantiles: Wanted quantiles, ascending; empty for other kinds.
        labels: Labels; empty for other kinds.
        max_examples: Number of values that a device counts as at most, 1 or more.
        is_unmasked: Whether the coordinator may read single answers.
    """

    column: str
    kind: str
    lower: float
    upper: float
    bins: int
    quantiles: tuple[float, ...]
    labels: tuple[str, ...]
    max_examples: int
    is_unmasked: bool

    @classmethod
    def from_proto(cls, message: training_pb2.AnalyticsQuery) -> Self:
        """Check a query and fill in its defaults.

        Raises:
            InvalidQueryError: A setting is out of range, or of no meaning for the kind.
        """
        kind = _NAMES.get(message.kind)
        if kind is None:
            raise InvalidQueryError(
                "kind",
                f"got number {message.kind}, want one of {', '.join(KINDS)}"
                "; if a later release made it, upgrade qflare",
            )
        for check in _CHECKS:
            check(message, kind)
        wanted = tuple(sorted(set(message.quantiles))) or _QUANTILES
        return cls(
            column=message.column,
            kind=kind,
            lower=message.lower,
            upper=message.upper,
            bins=_bin_count(message, kind) if kind in _BINNED else 0,
            quantiles=wanted if kind == "quantiles" else (),
            labels=tuple(message.labels),
            max_examples=message.max_examples or 1,
            is_unmasked=message.unmasked,
        )

    def to_proto(self) -> training_pb2.AnalyticsQuery:
        """Return the message with all defaults filled in."""
        return training_pb2.AnalyticsQuery(
            column=self.column,
            kind=KINDS[self.kind],
            lower=self.lower,
            upper=self.upper,
            bins=self.bins,
            quantiles=self.quantiles,
            labels=self.labels,
            max_examples=self.max_examples,
            unmasked=self.is_unmasked,
        )

    @property
    def element_count(self) -> int:
        """Number of elements of an answer."""
        if self.kind in _BINNED:
            return self.bins + 2
        if self.kind == "labels":
            return len(self.labels) + 1
        return _MOMENTS if self.kind == "mean" else 1

    @property
    def unit(self) -> float:
        """What 1 in an element of the sum of the answers stands for, in values: the inverse of the answers' scale."""
        spread = sqrt(_MOMENTS) if self.kind == "mean" else 1.0
        return self.max_examples * spread

    def manifest(self) -> Manifest:
        """Return the layout of an answer."""
        return Manifest((TensorSpec(TENSOR, DType.FLOAT32, (self.element_count,)),))


def _check_column(message: training_pb2.AnalyticsQuery, _: str) -> None:
    if not (1 <= len(message.column) <= 100 and message.column.isprintable()):  # noqa: PLR2004
        raise InvalidQueryError(
            "column", f"got {message.column[:100]!r}, want 1 to 100 printable characters"
        )


def _check_bounds(message: training_pb2.AnalyticsQuery, kind: str) -> None:
    bounds = (message.lower, message.upper)
    if kind in _UNBOUNDED:
        if any(bounds):
            raise InvalidQueryError("upper", f"a query of kind {kind} has no bounds")
        return
    within = all(isfinite(bound) and abs(bound) <= MAX_BOUND for bound in bounds)
    if not (within and message.lower < message.upper):
        raise InvalidQueryError(
            "upper",
            f"got lower {message.lower:g} and upper {message.upper:g}, want lower < upper within 1e12",
        )
    spread = message.upper - message.lower
    least = max(MIN_SPREAD, _least_bin(message) * _bin_count(message, kind))
    if spread < least:
        raise InvalidQueryError(
            "upper",
            f"got {spread:.3g} above lower, want at least {least:.3g}, or values are not told apart",
        )


def _least_bin(message: training_pb2.AnalyticsQuery) -> float:
    return _MIN_BIN_ULPS * ulp(max(abs(message.lower), abs(message.upper)))


def _bin_count(message: training_pb2.AnalyticsQuery, kind: str) -> int:
    return message.bins or _BINNED.get(kind, 1)


def _check_bins(message: training_pb2.AnalyticsQuery, kind: str) -> None:
    most = MAX_BINS if kind in _BINNED else 0
    if not 0 <= message.bins <= most:
        raise InvalidQueryError(
            "bins", f"got {message.bins}, want 0 to {most} for a query of kind {kind}"
        )


def _check_quantiles(message: training_pb2.AnalyticsQuery, kind: str) -> None:
    if kind != "quantiles" and message.quantiles:
        raise InvalidQueryError("quantiles", f"a query of kind {kind} has none")
    if not all(0 <= value <= 1 for value in message.quantiles):
        raise InvalidQueryError("quantiles", "want numbers within 0 to 1")


def _check_labels(message: training_pb2.AnalyticsQuery, kind: str) -> None:
    labels = message.labels
    if kind != "labels":
        if labels:
            raise InvalidQueryError("labels", f"a query of kind {kind} has none")
        return
    if not 1 <= len({*labels}) == len(labels) <= MAX_LABELS:
        raise InvalidQueryError(
            "labels", f"got {len(labels)}, want 1 to {MAX_LABELS} different labels"
        )


def _check_examples(message: training_pb2.AnalyticsQuery, _: str) -> None:
    if not 0 <= message.max_examples <= MAX_EXAMPLES:
        raise InvalidQueryError("max_examples", f"got {message.max_examples}, want 0 to 2^40")


_CHECKS: Final[tuple[Callable[[training_pb2.AnalyticsQuery, str], None], ...]] = (
    _check_column,
    _check_bins,  # before the bounds, which leave room for so many
    _check_bounds,
    _check_quantiles,
    _check_labels,
    _check_examples,
)
