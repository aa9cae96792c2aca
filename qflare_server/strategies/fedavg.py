"""Weighted means that fold: federated averaging and buffered asynchronous averaging."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from qflare_server.strategies.interfaces import FoldRule, Screen
from qflare_server.strategies.types import Facts

Weighting = Literal["examples", "uniform"]
"""Whether an update counts by its example count or as one."""


@dataclass(frozen=True, slots=True)
class WeightedMean(FoldRule):
    """Average of the deltas, weighted by example count or equally.

    FedProx is the same on the coordinator's side; its proximal term belongs to the device.

    Source: McMahan et al. 2017, arXiv:1602.05629, Algorithm 1; Li et al. 2020, arXiv:1812.06127,
    Algorithm 2.
    """

    weighting: Weighting = "examples"

    def share(self, facts: Facts) -> tuple[float, float]:
        """Return the example count, or one, as coefficient and weight."""
        weight = float(facts.example_count) if self.weighting == "examples" else 1.0
        return weight, weight


@dataclass(frozen=True, slots=True)
class BufferedMean(FoldRule):
    """Average a buffer of updates against several base versions, stale ones scaled down.

    The coefficient is the weight over `sqrt(1 + staleness)`; the denominator is the sum of the unscaled
    weights, the paper's K when the weighting is uniform, so a buffer of stale updates takes a shorter step.

    Source: Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1 and section 5 (staleness scaling).
    """

    weighting: Weighting = "uniform"

    def share(self, facts: Facts) -> tuple[float, float]:
        """Return the scaled coefficient and the unscaled weight."""
        weight = float(facts.example_count) if self.weighting == "examples" else 1.0
        return weight / sqrt(1.0 + facts.staleness), weight


@dataclass(frozen=True, slots=True)
class StalenessBound(Screen):
    """Refuse updates whose base version is too old.

    Attributes:
        max_staleness: Largest number of versions published since the base version.
    """

    max_staleness: int

    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:  # noqa: ARG002
        """Refuse an update staler than the bound."""
        if facts.staleness > self.max_staleness:
            return 0.0, f"staleness {facts.staleness} exceeds the bound of {self.max_staleness}"
        return 1.0, ""
