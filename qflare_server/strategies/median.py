"""Coordinate-wise robust rules: median and trimmed mean.

Both take the order statistics of each element on its own, so they need every update side by side but only a slice of
each. Columns are put in order tile by tile, small enough for a cache: a few updates by a sorting network whose
exchanges are whole-row minima and maxima, many by sorting rows of the transposed tile. Both give the same values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.blocks import blocks
from qflare_server.strategies.interfaces import SliceRule
from qflare_server.strategies.types import Vector

TILE: Final = 4_096
"""Columns ordered at once: 100 updates of them in float32 are 1.6 MB."""
_NETWORK_ROWS: Final = 12
"""Up to here the network is faster; its exchanges grow faster than the number of rows."""


@lru_cache(maxsize=_NETWORK_ROWS)
def exchanges(count: int) -> tuple[tuple[int, int], ...]:
    """Return the compare-exchange pairs of Batcher's merge exchange for any number of keys.

    Source: Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M.
    """
    top = 1 << max(0, (count - 1).bit_length() - 1)
    pairs: list[tuple[int, int]] = []
    stride = top if count > 1 else 0
    while stride > 0:
        reach, remainder, distance = top, 0, stride
        while distance > 0:
            pairs += [
                (low, low + distance)
                for low in range(count - distance)
                if low & stride == remainder
            ]
            distance, reach, remainder = reach - stride, reach // 2, stride
        stride //= 2
    return tuple(pairs)


def _by_network(tile: NDArray[np.floating]) -> NDArray[np.floating]:
    """Order each column in place."""
    spare = np.empty(tile.shape[1], dtype=tile.dtype)
    for low, high in exchanges(tile.shape[0]):
        np.minimum(tile[low], tile[high], out=spare)
        np.maximum(tile[low], tile[high], out=tile[high])
        tile[low] = spare
    return tile


def ordered_tiles(
    matrix: NDArray[np.floating],
) -> Iterator[tuple[int, int, NDArray[np.floating]]]:
    """Yield the columns tile by tile, each column in ascending order; the matrix may be overwritten.

    Args:
        matrix: Shape (s, m), finite.

    Yields:
        First column, one past the last, and an array of shape (s, columns) whose row j holds the j-th smallest.
    """
    for start, stop in blocks(matrix.shape[1], TILE):
        tile = matrix[:, start:stop]
        if matrix.shape[0] <= _NETWORK_ROWS:
            yield start, stop, _by_network(tile)
            continue
        rows = np.ascontiguousarray(tile.T)
        rows.sort(axis=1)
        yield start, stop, rows.T


def middle(ordered: NDArray[np.floating]) -> Vector:
    """Return the median of each ordered column: the middle one, or the mean of the middle two.

    Minus zero becomes zero, because the order of equal values must not affect the bytes.
    """
    count = ordered.shape[0]
    low = ordered[(count - 1) // 2].astype(np.float64)
    result: Vector = (low + ordered[count // 2]) / 2.0 + 0.0
    return result


@dataclass(frozen=True, slots=True)
class CoordinateMedian(SliceRule):
    """The median of each element over all updates.

    Source: Yin et al. 2018, arXiv:1803.01498, definition 1 and algorithm 1, option I.
    """

    translation_equivariant: ClassVar[bool] = True

    @property
    def minimum_count(self) -> int:
        """One update is its own median."""
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        """Take the middle of every column."""
        result = np.empty(matrix.shape[1])
        for start, stop, ordered in ordered_tiles(matrix):
            result[start:stop] = middle(ordered)
        return result


@dataclass(frozen=True, slots=True)
class TrimmedMean(SliceRule):
    """The mean of each element without its largest and smallest values.

    Attributes:
        fraction: Share cut off at *either* end, within [0, 0.5); `floor(fraction * k)` updates.

    Source: Yin et al. 2018, arXiv:1803.01498, definition 2 and algorithm 1, option II.
    """

    translation_equivariant: ClassVar[bool] = True
    fraction: float = 0.1

    @property
    def minimum_count(self) -> int:
        """One update: below one half, at least one value always remains."""
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        """Average the remaining values of every column, added smallest first."""
        count = matrix.shape[0]
        cut = int(self.fraction * count)
        result: Vector = np.zeros(matrix.shape[1])
        for start, stop, ordered in ordered_tiles(matrix):
            for row in ordered[cut : count - cut]:
                result[start:stop] += row
        result /= count - 2 * cut
        return result
