"""Refinement of quantiles: a second query whose bins cover only the part of the range where a quantile lies.

The number of values below each edge of a bin follows from the noisy counts. The quantile lies above an edge if that
number is below the quantile's rank by more than the noise explains, and below it if the number exceeds the rank by
more. What the first query cost in privacy is spent; choosing the bounds of the second one from its result costs
nothing more, and its own answers cost its own epsilon.
"""

from typing import Final

import numpy as np

from qflare.analytics.answers import edges
from qflare.analytics.queries import KINDS
from qflare.analytics.results import NoisySum
from qflare.v1 import training_pb2

DEVIATIONS: Final = 5.0
"""Deviations of the noise within which an edge may be on either side of the quantile. The noise of an edge exceeds them
with a probability of 6e-7."""

REFINED: Final = frozenset({"histogram", "quantiles"})
"""Kinds of queries whose results can be refined."""


class NotRefinableError(ValueError):
    """A quantile cannot be bounded more closely from the result of a query; the message says why."""


def bracket(found: NoisySum, quantile: float) -> tuple[float, float]:
    """Return bounds between which a quantile lies, narrower than those of the query.

    Args:
        found: Answers to a query of a kind in `REFINED`.
        quantile: 0 to 1.

    Raises:
        NotRefinableError: The noise is too large, the quantile lies outside the bounds, or the query has no bins.
    """
    query = found.query
    if query.kind not in REFINED:
        raise NotRefinableError(f"a query of kind {query.kind} has no bins to refine")
    if not 0 <= quantile <= 1:
        raise NotRefinableError(f"got quantile {quantile:g}, want 0 to 1")
    places, counts = edges(query), found.values
    below = np.cumsum(counts)[:-1] - quantile * np.sum(counts)
    number = np.arange(1, len(below) + 1)
    # An element adds its noise once to the number below an edge, and `quantile` times to the rank.
    variance = (1 - quantile) ** 2 * number + quantile**2 * (len(counts) - number)
    margin = DEVIATIONS * found.deviation * np.sqrt(variance)
    if below[0] > margin[0] or below[-1] < -margin[-1]:
        side, bound = ("below", query.lower) if below[0] > margin[0] else ("above", query.upper)
        raise NotRefinableError(f"quantile {quantile:g} lies {side} the bound {bound:g}")
    under, over = np.flatnonzero(below < -margin), np.flatnonzero(below > margin)
    low = float(places[under[-1]]) if len(under) else query.lower
    high = float(places[over[0]]) if len(over) else query.upper
    if not (low < high and high - low < query.upper - query.lower):
        raise NotRefinableError(
            f"the noise has a deviation of {found.deviation:.4g} in a count and leaves no narrower bounds: ask more "
            "devices, with fewer bins or a larger epsilon"
        )
    return low, high


def refined(
    config: training_pb2.TrainingConfig,
    found: NoisySum,
    quantile: float,
    *,
    epsilon: float,
    delta: float = 0.0,
    bins: int = 0,
) -> training_pb2.TrainingConfig:
    """Return the configuration of a query for a quantile, between the bounds that a result leaves.

    Devices, helpers, rounds and the number of values that a device counts as are those of the earlier query.

    Args:
        config: Complete configuration of the earlier query.
        found: The answers to it.
        quantile: 0 to 1.
        epsilon: Of the new result.
        delta: Of the new result; 0 means the default.
        bins: 0 means the default of quantiles.

    Raises:
        NotRefinableError: The result leaves no narrower bounds.
    """
    low, high = bracket(found, quantile)
    query = config.analytics
    return training_pb2.TrainingConfig(
        groups=config.groups,
        selection=config.selection,
        rounds=config.rounds,
        secure_aggregation=config.secure_aggregation,
        privacy=training_pb2.PrivacyPolicy(epsilon_budget=epsilon, delta=delta),
        analytics=training_pb2.AnalyticsQuery(
            column=query.column,
            kind=KINDS["quantiles"],
            lower=low,
            upper=high,
            bins=bins,
            quantiles=[quantile],
            max_examples=query.max_examples,
            unmasked=query.unmasked,
        ),
    )
