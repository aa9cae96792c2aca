"""Staleness weights: sums of masked updates that were trained from different base versions.

In an asynchronous round the elements of an update count `weight` times, an integer from a fixed table, the smaller the
more versions were published since the update's base version. The coordinator multiplies the masked elements, a helper
the masks. Slots count once: weights and metrics of updates are added up as in other rounds.

From an exact sum `16 * a + 11 * b` of integers follows b modulo 16, which tells about an update that is stale alone. So
each helper adds a *rounding* to every element of the sum: a number from 0 to the largest weight minus 1, evenly drawn,
which only the helper knows. Then every value of b is consistent with some value of a, as in a plain sum of a and b. The
rounding follows from the seeds of the masks: the same set gets the same sum, and nobody without the seeds can tell it.

Source of the weights: Nguyen et al. 2022, arXiv:2106.06639, section 5.
"""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Final

import numpy as np

from qflare.crypto.signing import tagged_hash
from qflare.masking.masks import SLICE_BYTES, Mask
from qflare.tensors import Array

MAX_STALENESS: Final = 255
"""Largest `rounds.max_staleness` with secure aggregation."""

MAX_ROUNDINGS: Final = 3
"""Most helpers that add a rounding to a sum."""

_LARGEST: Final = 256
_USUAL: Final = 64
_SPREAD: Final = 16
"""Most times that an update counts as much as another one: beyond, a sum would tell too much of the freshest."""

_ROUNDING_TAG: Final = "qflare/v1/staleness-rounding"
_WEIGHTS_TAG: Final = "qflare/v1/staleness-weights"


def usual_weights(max_staleness: int) -> list[int]:
    """Return round(64 / sqrt(1 + staleness)) for each staleness up to `max_staleness`."""
    return [round(_USUAL / sqrt(1 + staleness)) for staleness in range(max_staleness + 1)]


def find_problem(weights: Sequence[int]) -> str:
    """Return what is wrong with a table of weights; empty if nothing is."""
    if not weights:
        return ""
    if len(weights) > MAX_STALENESS + 1:
        return f"got {len(weights)} weights, want at most {MAX_STALENESS + 1}"
    if min(weights) < 1 or max(weights) > _LARGEST:
        return f"got weights from {min(weights)} to {max(weights)}, want 1 to {_LARGEST}"
    if list(weights) != sorted(weights, reverse=True):
        return "a stale update counts more than a fresher one"
    if weights[0] > _SPREAD * weights[-1]:
        return f"got {weights[0]} to {weights[-1]}, want the first at most {_SPREAD} times the last"
    return ""


def weights_digest(weights: Iterable[tuple[str, int]]) -> str:
    """Return the digest over updates with their weights.

    Args:
        weights: Statement digest, 64 hex digits, and weight of each update, in any order.
    """
    entries = sorted((bytes.fromhex(digest), weight) for digest, weight in weights)
    data = b"".join(digest + weight.to_bytes(4) for digest, weight in entries)
    return tagged_hash(_WEIGHTS_TAG, data).hex()


def weigh(values: Array, first: int, element_count: int, weight: int) -> None:
    """Multiply the elements, and not the slots, of a part of a vector by a weight, in place, modulo 2^bits.

    Args:
        values: Unsigned integers, one dimension.
        first: Index of the first one in the vector.
        element_count: Elements before the slots.
        weight: 1 or more.
    """
    part = values[: max(0, element_count - first)]
    np.multiply(part, part.dtype.type(weight), out=part)


class Rounding:
    """The numbers that a helper adds to the elements of a sum.

    Args:
        largest: Largest weight of the table, 1 or more.
        element_count: Elements before the slots, which are not rounded.
        seeds: Seed and weight of each mask in the sum, in the order of the update ids. A seed masks one update, and an
            update is in one sum: so no two sums have the same rounding.
    """

    def __init__(
        self, largest: int, element_count: int, seeds: Iterable[tuple[bytes, int]]
    ) -> None:
        self._largest = largest
        self._element_count = element_count
        parts = (seed + weight.to_bytes(4) for seed, weight in seeds)
        self._stream = Mask(tagged_hash(_ROUNDING_TAG, *parts))

    def subtract_from(self, values: Array, first: int) -> None:
        """Subtract the numbers from a part of a sum of masks, which adds them to the unmasked sum.

        Args:
            values: Unsigned integers, one dimension.
            first: Index of the first one in the vector.
        """
        count = min(len(values), max(0, self._element_count - first))
        step = SLICE_BYTES // 4
        for start in range(0, count, step):
            part = values[start : min(start + step, count)]
            drawn = np.frombuffer(self._stream.read(4 * (first + start), 4 * len(part)), "<u4")
            numbers = drawn.astype(np.uint64) * np.uint64(self._largest) >> np.uint64(32)
            np.subtract(part, numbers.astype(part.dtype), out=part)


def mean_rounding(largest: int, helper_count: int) -> float:
    """Return the mean of what helpers add to an element of a sum."""
    return helper_count * (largest - 1) / 2
