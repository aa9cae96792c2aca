"""Screens on single updates: clipping, norm bound, cosine bound."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from qflare_server.strategies.interfaces import Screen
from qflare_server.strategies.types import Facts

CLIP_BOUND = "clip_bound"
"""Name of the number that holds the adaptive clipping bound."""


def clip_factor(norm: float, bound: float) -> float:
    """Return `min(1, bound / norm)`; one for a zero vector."""
    return 1.0 if norm <= bound else bound / norm


@dataclass(frozen=True, slots=True)
class NormClip(Screen):
    """Scale a delta down to a largest L2 norm.

    Attributes:
        max_norm: The bound, above zero.

    Source: Sun et al. 2019, arXiv:1911.07963, section 3 (norm thresholding).
    """

    needs_norm: ClassVar[bool] = True
    max_norm: float

    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:  # noqa: ARG002
        """Return `min(1, bound / norm)`."""
        return clip_factor(facts.norm, self.max_norm), ""


@dataclass(frozen=True, slots=True)
class AdaptiveClip(Screen):
    """Scale a delta down to the bound stored with the base version.

    Source: Andrew et al. 2021, arXiv:1905.03871, Algorithm 1.
    """

    needs_norm: ClassVar[bool] = True
    initial_bound: float

    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:
        """Return `min(1, bound / norm)` for the current bound."""
        return clip_factor(facts.norm, scalars.get(CLIP_BOUND, self.initial_bound)), ""


@dataclass(frozen=True, slots=True)
class NormBound(Screen):
    """Refuse a delta whose L2 norm exceeds a bound or is not finite.

    Attributes:
        max_norm: The bound, above zero.

    Source: Lycklama et al. 2023, arXiv:2107.03311, section 3 (constraints on norms).
    """

    needs_norm: ClassVar[bool] = True
    max_norm: float

    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:  # noqa: ARG002
        """Refuse a longer delta."""
        if not isfinite(facts.norm) or facts.norm > self.max_norm:
            return 0.0, f"norm {facts.norm:.6g} exceeds the bound of {self.max_norm:.6g}"
        return 1.0, ""


@dataclass(frozen=True, slots=True)
class DirectionBound(Screen):
    """Refuse a delta that points away from the previous version's aggregate.

    Without a previous direction (the first version, or a zero vector on either side) every update passes.

    Attributes:
        min_cosine: Smallest cosine that is accepted, within [-1, 1).

    Source: the cosine criterion of Cao et al. 2021, arXiv:2012.13995, section IV (FLTrust), with the previous
    aggregate in place of a trusted update.
    """

    needs_direction: ClassVar[bool] = True
    min_cosine: float

    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:  # noqa: ARG002
        """Refuse a delta below the smallest cosine."""
        if facts.cosine is not None and facts.cosine < self.min_cosine:
            return 0.0, f"cosine {facts.cosine:.6g} is below the bound of {self.min_cosine:.6g}"
        return 1.0, ""
