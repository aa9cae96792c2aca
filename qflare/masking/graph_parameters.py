"""Parameters of the graph of neighbors: how many neighbors a device has, and how many shares open a secret.

In a group of n devices each has k neighbors, and of the shares of its secrets t are necessary. A fraction of the
devices may be corrupt, that is, collude with the coordinator, and another fraction may drop out. The parameters hold
with these probabilities of failure:

- below 2^-40, that the coordinator learns more than the sum: t shares of both secrets of a device, which needs 2t - k
  corrupt neighbors or more, or a sum of some of the honest devices, which needs two gaps of k/2 devices in the ring;
- below 2^-20, that fewer than t neighbors of a device remain, so that the group is aborted.

Small groups, and those in which no smaller graph suffices, are complete graphs, for which all of this is certain.

Source: Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", eprint 2020/704,
section 3; the bounds are sums of hypergeometric probabilities instead of tail inequalities.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import floor, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SECURITY_BITS: Final = 40
"""Statistical security: what the coordinator may learn more than the sum has a probability below 2^-40."""

CORRECTNESS_BITS: Final = 20
"""The probability that a group is aborted although no more than the stated fraction drops out is below 2^-20."""

MIN_GROUP: Final = 3
"""Fewest devices of a group: of two, each could subtract its own update from the sum."""

MAX_GROUP: Final = 10_000
"""Most devices of a group."""

MAX_NEIGHBORS: Final = 200
"""Most neighbors of a device: what it is shown of more would not fit into a message. In groups of up to 10,000 devices
that suffices against 20 % of corrupt devices and 10 % of drop-outs."""

COMPLETE_UP_TO: Final = 32
"""Groups up to this size are complete graphs: they withstand the most drop-outs, and more masks cost little there."""

_EVENT_BITS: Final = SECURITY_BITS + 1  # half of the probability for each of the two events
_MOST_BAD: Final = 0.9
_ROUNDING: Final = (
    1e-9  # a fraction of a size that is a whole number must not round to the next one
)


class InfeasibleGroupError(ValueError):
    """No graph protects a group of this size against this many corrupt devices and drop-outs."""


@dataclass(frozen=True)
class GraphParameters:
    """Parameters of the graph of a group.

    Attributes:
        size: Number of devices, n.
        neighbor_count: Number of neighbors of each device, k; even, or n - 1.
        threshold: Number of shares that open a secret, t; above k/2.
        max_dropouts: Most devices of the group that may be missing from its sum. With more, no device reveals shares.
    """

    size: int
    neighbor_count: int
    threshold: int
    max_dropouts: int


@lru_cache(maxsize=256)
def group_parameters(size: int, corrupt: float, dropout: float) -> GraphParameters:
    """Return the parameters of a group.

    Args:
        size: Devices in the group, `MIN_GROUP` to `MAX_GROUP`.
        corrupt: Fraction of the devices that may collude with the coordinator, 0 or more; if above 0, at least one may.
        dropout: Fraction of the devices that may drop out, 0 or more; `corrupt + 2 * dropout` is at most 0.9.

    Raises:
        InfeasibleGroupError: A value is out of range, or the group is too small for these fractions.
    """
    if not MIN_GROUP <= size <= MAX_GROUP:
        raise InfeasibleGroupError(f"group of {size} devices: want {MIN_GROUP} to {MAX_GROUP}")
    if not (corrupt >= 0 and dropout >= 0 and corrupt + 2 * dropout <= _MOST_BAD):
        raise InfeasibleGroupError(
            f"fractions: got {corrupt:g} corrupt and {dropout:g} dropping out, "
            f"want corrupt + 2 * dropout of at most {_MOST_BAD}"
        )
    least = 1 if corrupt else 0
    finder = _Finder(size, max(least, _share(corrupt, size)), _share(dropout, size))
    found = None if size <= COMPLETE_UP_TO else finder.smallest()
    return found or finder.complete()


def practical_parameters(size: int, corrupt: float, dropout: float) -> GraphParameters:
    """Return the parameters of a group whose devices have at most `MAX_NEIGHBORS` neighbors. Arguments as above.

    Raises:
        InfeasibleGroupError: As above, or the devices would need more neighbors.
    """
    found = group_parameters(size, corrupt, dropout)
    if found.neighbor_count > MAX_NEIGHBORS:
        raise InfeasibleGroupError(
            f"group of {size} devices: each would need {found.neighbor_count} neighbors, at most {MAX_NEIGHBORS} are "
            "possible; want smaller fractions or groups"
        )
    return found


def smallest_graph(size: int, corrupt: float, dropout: float) -> GraphParameters | None:
    """Return the parameters with the fewest neighbors below a complete graph, as published; None if there are none.

    Args:
        size: Devices in the group, 3 or more.
        corrupt: Fraction of corrupt devices.
        dropout: Fraction of drop-outs.
    """
    return _Finder(size, _share(corrupt, size), _share(dropout, size)).smallest()


def _share(fraction: float, size: int) -> int:
    return floor(fraction * size + _ROUNDING)


class _Finder:
    """Finds the parameters of one group.

    Args:
        size: Number of devices.
        corrupt: Most corrupt ones.
        dropouts: Most drop-outs.
    """

    def __init__(self, size: int, corrupt: int, dropouts: int) -> None:
        self.size = size
        self.corrupt = corrupt
        self.dropouts = dropouts
        self._log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])

    def smallest(self) -> GraphParameters | None:
        """Return the parameters with the fewest neighbors below those of a complete graph; None if there are none."""
        for count in range(2, self.size - 1, 2):
            threshold = self._threshold(count)
            if threshold is not None:
                certain = count - self.corrupt - 1
                return GraphParameters(self.size, count, threshold, max(self.dropouts, certain))
        return None

    def complete(self) -> GraphParameters:
        """Return the parameters of the complete graph, which hold in every case.

        Raises:
            InfeasibleGroupError: There are none.
        """
        count = self.size - 1
        threshold = max((count + self.corrupt) // 2 + 1, 2)
        if threshold > count - self.dropouts:
            raise InfeasibleGroupError(
                f"group of {self.size} devices: too small to withstand {self.corrupt} corrupt devices "
                f"and {self.dropouts} drop-outs"
            )
        return GraphParameters(self.size, count, threshold, count - threshold)

    def _threshold(self, count: int) -> int | None:
        """Return the smallest threshold for a number of neighbors; None if there is none."""
        if self._log_gap_probability(count) >= -_EVENT_BITS * log(2):
            return None
        corrupt = self._most(self.corrupt, count, 2.0**-_EVENT_BITS / self.size)
        missing = self._most(self.dropouts, count, 2.0**-CORRECTNESS_BITS / self.size)
        threshold = max((count + corrupt) // 2 + 1, 2)
        return threshold if threshold <= count - missing else None

    def _log_gap_probability(self, count: int) -> float:
        """Return the logarithm of a bound of the probability that corrupt devices and drop-outs cut the ring in two.

        They do if they are at k/2 places in a row, twice. It is the union bound over all pairs of such rows.
        """
        bad = self.corrupt + self.dropouts
        if count > bad:
            return -np.inf
        pairs = log(self.size) + log(self.size - count - 1) - log(2)
        logs = self._log_factorials
        ratio = logs[bad] + logs[self.size - count] - logs[self.size] - logs[bad - count]
        return pairs + float(ratio)

    def _most(self, marked: int, drawn: int, probability: float) -> int:
        """Return the smallest m such that more than m of the drawn devices are marked with less than a probability."""
        low, high = max(0, drawn + marked - self.size), min(drawn, marked)
        tails = np.cumsum(self._densities(marked, drawn, low, high)[::-1])
        return high - int(np.searchsorted(tails, probability, side="left"))

    def _densities(self, marked: int, drawn: int, low: int, high: int) -> NDArray[Any]:
        """Return the hypergeometric probabilities of low to high marked devices among the drawn ones."""
        logs, values = self._log_factorials, np.arange(low, high + 1)
        rest = self.size - marked
        exponents = (
            logs[marked]
            - logs[values]
            - logs[marked - values]
            + logs[rest]
            - logs[drawn - values]
            - logs[rest - drawn + values]
            - (logs[self.size] - logs[drawn] - logs[self.size - drawn])
        )
        densities: NDArray[Any] = np.exp(exponents)
        return densities
