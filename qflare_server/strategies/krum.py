"""Distance-based rules: Krum, Multi-Krum, Bulyan.

All distances come from the Gram matrix, `|a - b|^2 = <a, a> + <b, b> - 2 <a, b>`, which takes one pass over the
updates; selection does not read the elements again. Relative to the longer of two deltas a distance is exact to
about 1e-8, so updates that close to each other are equals; ties fall to the smaller update id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.interfaces import Cohort, CohortRule, SliceRule
from qflare_server.strategies.median import middle, ordered_tiles
from qflare_server.strategies.types import Facts, Vector


def squared_distances(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all squared distances from inner products, shape (k, k), zero or more."""
    squares = np.diagonal(gram)
    distances = squares[:, None] + squares[None, :] - 2.0 * gram
    np.fill_diagonal(distances, 0.0)
    return np.maximum(distances, 0.0)


def krum_scores(distances: NDArray[np.float64], byzantine_count: int) -> NDArray[np.float64]:
    """Sum each update's squared distances to its `k - f - 2` nearest others.

    Args:
        distances: Squared, shape (k, k), k of at least two.
        byzantine_count: The paper's f. Where `k - f - 2` falls below one, one neighbor counts.

    Returns:
        Shape (k,); small is central.

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """
    count = distances.shape[0]
    nearest = max(1, count - byzantine_count - 2)
    others = np.sort(distances, axis=1)[:, 1 : nearest + 1]
    return np.asarray(np.add.reduce(others, axis=1))


def _ranked(scores: NDArray[np.float64], facts: Sequence[Facts]) -> list[int]:
    """Order the updates by score, then by id."""
    return sorted(range(len(facts)), key=lambda index: (scores[index], facts[index].update_id))


def _chosen(cohort: Cohort, indices: Sequence[int], coefficient: float) -> tuple[float, ...]:
    """Return the coefficient to the chosen ones and zero to the others."""
    chosen = set(indices)
    return tuple(coefficient if index in chosen else 0.0 for index in range(len(cohort.facts)))


def _distances(cohort: Cohort) -> NDArray[np.float64]:
    if cohort.gram is None:
        raise TypeError("the driver must give the Gram matrix")
    return squared_distances(cohort.gram)


@dataclass(frozen=True, slots=True)
class Krum(CohortRule):
    """The update that is closest to its neighbors, or the mean of several such.

    Attributes:
        byzantine_count: Hostile updates withstood, the paper's f; needs 2f + 3 updates.
        selected_count: How many of the best scores are averaged (Multi-Krum's m); 0 stands for k - f - 2, the
            largest number with a proof (Damaskinos et al. 2019, AggregaThor).

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4 (Krum) and section 5 (Multi-Krum).
    """

    needs_gram: ClassVar[bool] = True
    byzantine_count: int = 0
    selected_count: int = 1

    @property
    def minimum_count(self) -> int:
        """Return 2f + 3, the bound of the paper's proposition 4.2."""
        return 2 * self.byzantine_count + 3

    def plan(self, cohort: Cohort) -> tuple[float, ...]:
        """Average the updates with the best scores."""
        count = len(cohort.facts)
        most = max(1, count - self.byzantine_count - 2)
        selected = self.selected_count or most
        selected = min(selected, count - self.byzantine_count)
        scores = krum_scores(_distances(cohort), self.byzantine_count)
        best = _ranked(scores, cohort.facts)[:selected]
        return _chosen(cohort, best, 1.0 / selected)


def bulyan_selection(
    distances: NDArray[np.float64], facts: Sequence[Facts], byzantine_count: int
) -> list[int]:
    """Choose `k - 2f` updates, each time the Krum winner among those that are left.

    Source: El Mhamdi et al. 2018, arXiv:1802.07927, section 4, first step.
    """
    left = list(range(len(facts)))
    chosen: list[int] = []
    while len(chosen) < len(facts) - 2 * byzantine_count:
        if len(left) == 1:
            chosen.append(left[0])
            break
        scores = krum_scores(distances[np.ix_(left, left)], byzantine_count)
        best = _ranked(scores, [facts[index] for index in left])[0]
        chosen.append(left.pop(best))
    return chosen


@dataclass(frozen=True, slots=True)
class Bulyan(SliceRule):
    """Choose by repeated Krum, then average the values of each element that lie nearest the median.

    Of `theta = k - 2f` chosen updates, each element keeps the `theta - 2f` values closest to their median.

    Attributes:
        byzantine_count: Hostile updates withstood, the paper's f; needs 4f + 3 updates.

    Source: El Mhamdi et al. 2018, arXiv:1802.07927, section 4.
    """

    needs_gram: ClassVar[bool] = True
    translation_equivariant: ClassVar[bool] = True
    byzantine_count: int = 0

    @property
    def minimum_count(self) -> int:
        """Return 4f + 3, the paper's bound."""
        return 4 * self.byzantine_count + 3

    def plan(self, cohort: Cohort) -> tuple[float, ...]:
        """Choose the updates that reach the second step."""
        chosen = bulyan_selection(_distances(cohort), cohort.facts, self.byzantine_count)
        return _chosen(cohort, chosen, 1.0)

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        """Average the values around the median of every column."""
        kept = matrix.shape[0] - 2 * self.byzantine_count
        result = np.empty(matrix.shape[1])
        for start, stop, ordered in ordered_tiles(matrix):
            result[start:stop] = mean_around_middle(ordered, kept)
        return result


def mean_around_middle(ordered: NDArray[np.floating], kept: int) -> Vector:
    """Average the `kept` values of each ordered column that lie nearest its median.

    In an ordered column they are neighbors, the run of that length whose farther end is nearest the median;
    of two equally far runs the lower is taken.
    """
    middles = middle(ordered)
    starts = ordered.shape[0] - kept + 1
    first = np.zeros(ordered.shape[1], dtype=np.intp)
    nearest = np.full(ordered.shape[1], np.inf)
    for start in range(starts):
        reach = np.maximum(middles - ordered[start], ordered[start + kept - 1] - middles)
        closer = reach < nearest
        first[closer] = start
        np.minimum(nearest, reach, out=nearest)
    total = np.zeros(ordered.shape[1])
    for row in range(kept):
        total += _in_run(ordered, kept, first, row)
    return total / kept


def _in_run(
    ordered: NDArray[np.floating], kept: int, first: NDArray[np.intp], row: int
) -> NDArray[np.floating]:
    """Return each column's one value of its run whose row number is `row` modulo `kept`.

    A run holds exactly one such row, so all of them together are the run, without a gather.
    """
    values: NDArray[np.floating] = ordered[row]
    for later in range(row + kept, ordered.shape[0], kept):
        values = np.where(first > later - kept, ordered[later], values)
    return values
