"""Assessment of single updates: norm and cosine where the strategy needs them, then its screens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan

import numpy as np

from qflare_server.strategies.blocks import LARGEST_NORM, cosine_of, norm_of
from qflare_server.strategies.strategy import DIRECTION, Strategy
from qflare_server.strategies.types import (
    REVISION,
    Contribution,
    Facts,
    Prior,
    Reader,
    UpdateAssessment,
    Vector,
)


@dataclass(frozen=True, slots=True)
class Assessor:
    """Measures updates in at most one pass each, and applies the screens.

    Attributes:
        strategy: Decides which facts are needed.
        element_count: `n`.
        base: The base version.
        prior: State persisted with the base version.
        recorded: Judgements of an earlier run by update id; if given, nothing is judged again.
        excluded: Reasons by update id of updates that are refused without being measured.
        revision: Number of the rules to aggregate by (`types.REVISION`).
        thread_count: Threads that share a pass over an update.
    """

    strategy: Strategy
    element_count: int
    base: Reader
    prior: Prior
    recorded: Mapping[str, UpdateAssessment] | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)
    revision: int = REVISION
    thread_count: int = 1

    @property
    def scalars(self) -> Mapping[str, float]:
        """Scalars in effect: those of the base version, or the initial ones."""
        first = self.strategy.initial_scalars
        return {name: self.prior.scalars.get(name, value) for name, value in first.items()}

    def wide_base(self, start: int, stop: int) -> Vector:
        """Read the base version as float64: a factor times float32 would round to float32."""
        return self.base(start, stop).astype(np.float64, copy=False)

    @property
    def direction(self) -> Reader | None:
        """The previous aggregate, where cosines to it are needed and there is one."""
        return self.prior.vectors.get(DIRECTION) if self.strategy.needs_direction else None

    @property
    def measures(self) -> bool:
        """Whether updates are read to be assessed."""
        return self.strategy.needs_norm or self.direction is not None

    def assess(
        self, contribution: Contribution, measured: tuple[float, float | None] | None = None
    ) -> tuple[Facts, UpdateAssessment]:
        """Measure one update and apply the screens; coefficient and weight stay zero for the rule to set.

        Args:
            contribution: The update.
            measured: Norm and cosine, where they are known already.
        """
        excluded = self.excluded.get(contribution.update_id, "")
        norm, cosine = (None, None) if excluded else self._measure(contribution, measured)
        facts = Facts(
            update_id=contribution.update_id,
            example_count=contribution.example_count,
            staleness=contribution.staleness,
            norm=nan if norm is None else norm,
            cosine=cosine,
        )
        reason = excluded if norm is None else excess_of(norm)
        factor, rejection = (0.0, reason) if reason else self._screen(facts)
        if reason and self.strategy.privacy and self.revision > 1:
            rejection = ""  # clipped to zero: a refusal would disclose a fact about this device
        judgement = UpdateAssessment(
            update_id=facts.update_id,
            factor=factor,
            coefficient=0.0,
            weight=0.0,
            rejection=rejection,
            norm=facts.norm,
            cosine=cosine,
        )
        return facts, judgement

    def recall(self, contribution: Contribution) -> UpdateAssessment | None:
        """Return the recorded judgement, or None if this run has no record.

        Raises:
            ValueError: There is a record, but not of this update.
        """
        if self.recorded is None:
            return None
        if contribution.update_id not in self.recorded:
            raise ValueError(f"the record holds no judgement of update {contribution.update_id}")
        return self.recorded[contribution.update_id]

    def _measure(
        self, contribution: Contribution, measured: tuple[float, float | None] | None
    ) -> tuple[float | None, float | None]:
        """Return norm and cosine; None for those that are not needed."""
        direction = self.direction
        if direction is not None:
            return measured or cosine_of(
                contribution, self.base, direction, self.element_count, self.thread_count
            )
        if not self.strategy.needs_norm:
            return None, None
        if contribution.norm is not None:
            return contribution.norm, None
        if measured is not None:
            return measured[0], None
        return norm_of(contribution, self.base, self.element_count, self.thread_count), None

    def _screen(self, facts: Facts) -> tuple[float, str]:
        """Apply the screens in order: the product of their factors, or the first refusal."""
        scalars = self.scalars
        product = 1.0
        for screen in self.strategy.screens:
            factor, reason = screen.judge(facts, scalars)
            if reason:
                return 0.0, reason
            product *= factor
        return product, ""


def excess_of(norm: float) -> str:
    """Return the reason to refuse a delta that is too long to be compared with others; empty otherwise."""
    if norm <= LARGEST_NORM:
        return ""
    return f"norm {norm:.6g} exceeds {LARGEST_NORM:g}, the longest that float64 compares"
