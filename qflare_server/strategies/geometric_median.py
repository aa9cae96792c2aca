"""Geometric median (RFA), computed on coefficients.

Weiszfeld's iterates are weighted means of the updates, so only their coefficients are stored: distances follow from the
Gram matrix, and the elements are read again only for the final coefficients.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.interfaces import Cohort, CohortRule

_TOLERANCE: Final = 1e-11
"""Step, over the size of the iterate, at which the iteration has converged. Coefficients would be the wrong measure:
a hostile update of size 1e9 matters with a coefficient of 1e-12."""


def distances_to_mean(
    gram: NDArray[np.float64], coefficients: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return every update's distance to the weighted mean, from inner products.

    Args:
        gram: Shape (k, k).
        coefficients: Shape (k,), adding up to one.
    """
    towards = gram @ coefficients
    squared = float(coefficients @ towards) - 2.0 * towards + np.diagonal(gram)
    return np.sqrt(np.maximum(squared, 0.0))


def _length(gram: NDArray[np.float64], coefficients: NDArray[np.float64]) -> float:
    """Return the norm of a combination of the updates."""
    return sqrt(max(0.0, float(coefficients @ gram @ coefficients)))


def weiszfeld(
    gram: NDArray[np.float64],
    weights: NDArray[np.float64],
    smoothing: float,
    max_iterations: int,
) -> NDArray[np.float64]:
    """Iterate to the coefficients of the smoothed geometric median.

    Args:
        gram: Inner products of the updates, shape (k, k).
        weights: One for each update, adding up to one.
        smoothing: Smallest distance that is divided by, the paper's nu.
        max_iterations: Bound on the iterations.

    Returns:
        Shape (k,), adding up to one.

    Source: Pillutla et al. 2022, arXiv:1912.13445, algorithm 2 (smoothed Weiszfeld).
    """
    current = weights
    for _ in range(max_iterations):
        scaled = weights / np.maximum(distances_to_mean(gram, current), smoothing)
        following = scaled / np.add.reduce(scaled)
        step = _length(gram, following - current)
        current = following
        if step <= _TOLERANCE * _length(gram, current):
            break
    return current


@dataclass(frozen=True, slots=True)
class GeometricMedian(CohortRule):
    """The point with the smallest weighted sum of distances to the updates (RFA).

    Attributes:
        smoothing: The paper's nu, above zero.
        max_iterations: Bound on Weiszfeld's iterations.
        by_examples: Whether updates weigh by example count instead of equally.

    Source: Pillutla et al. 2022, arXiv:1912.13445, section 3.
    """

    needs_gram: ClassVar[bool] = True
    weighs_examples: ClassVar[bool] = True
    smoothing: float = 1e-6
    max_iterations: int = 1_000
    by_examples: bool = False

    @property
    def minimum_count(self) -> int:
        """One update is its own median."""
        return 1

    def plan(self, cohort: Cohort) -> tuple[float, ...]:
        """Find the coefficients."""
        if cohort.gram is None:
            raise TypeError("the driver must give the Gram matrix")
        counts = [float(entry.example_count) if self.by_examples else 1.0 for entry in cohort.facts]
        total = sum(counts)
        if total == 0.0:
            return (0.0,) * len(counts)
        weights = np.array(counts) / total
        found = weiszfeld(cohort.gram, weights, self.smoothing, self.max_iterations)
        return tuple(float(value) for value in found)
