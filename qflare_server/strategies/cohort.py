"""Aggregation by cohort rules, slice by slice: memory is bounded by a budget, whatever the model and the cohort.

Updates are only registered on arrival and read at the end. A pass for statistics runs over fixed
blocks (see `blocks`); the combining pass runs over slices as long as the budget allows. A rule computes each element
from its own column, so the slice length never changes a bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.accumulator import add_scaled, add_scaled_delta
from qflare_server.strategies.assessment import Assessor, excess_of
from qflare_server.strategies.blocks import (
    blocks,
    gram_matrix,
    gram_products,
    in_order,
    norm_and_cosine,
    norm_figures,
    sum_products,
)
from qflare_server.strategies.finalization import Release
from qflare_server.strategies.interfaces import Cohort, CohortRule, SliceRule
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.types import (
    REVISION,
    Contribution,
    Facts,
    Outcome,
    PassName,
    PassRunner,
    Prior,
    Reader,
    UpdateAssessment,
    Vector,
    VersionSlice,
)

DEFAULT_BUDGET_BYTES: Final = 64 * 1024 * 1024
_BYTES_PER_ELEMENT: Final = 24
"""The slice as read, as a matrix, and the transposed copy a rule makes of it, eight bytes each at most."""
_SMALLEST_SLICE: Final = 1_024
_LARGEST_SLICE: Final = 262_144


def slice_elements(update_count: int, budget_bytes: int, thread_count: int = 1) -> int:
    """Return the slice length at which one slice of every update stays within the budget.

    Args:
        update_count: Updates that are read side by side.
        budget_bytes: Bound for all threads together. A slice is never shorter than 1,024 elements.
        thread_count: Slices under way at once.
    """
    length = budget_bytes // (_BYTES_PER_ELEMENT * max(1, update_count) * thread_count)
    return max(_SMALLEST_SLICE, min(_LARGEST_SLICE, length))


Assessed: TypeAlias = tuple[Facts, UpdateAssessment]


@dataclass(frozen=True, slots=True)
class Row:
    """One participating update: its reader, its delta's factor and the rule's coefficient."""

    contribution: Contribution
    factor: float
    coefficient: float


class CohortAggregation:
    """An aggregation by a cohort rule. Not thread-safe."""

    def __init__(
        self,
        strategy: Strategy,
        element_count: int,
        base: Reader,
        prior: Prior | None = None,
        *,
        noise_seed: bytes | None = None,
        thread_count: int = 1,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        recorded: Mapping[str, UpdateAssessment] | None = None,
        excluded: Mapping[str, str] | None = None,
        revision: int = REVISION,
        runner: PassRunner | None = None,
    ) -> None:
        """Start with no update.

        Args:
            strategy: One whose rule needs all updates.
            element_count: `n`.
            base: The base version.
            prior: State persisted with the base version; by default that of version 0.
            noise_seed: The training session's secret, needed when the strategy has privacy.
            thread_count: Threads that share the work. With more than one, readers are called from several
                threads at once; with one, by the caller's only.
            budget_bytes: Memory for slices.
            recorded: Judgements of an earlier run, to recompute it from.
            excluded: Reasons by update id of updates that are refused without being measured.
            revision: Number of the rules to aggregate by.
            runner: Divides the passes over all updates; None means that they are not divided.

        Raises:
            TypeError: The rule folds.
        """
        if not isinstance(strategy.rule, CohortRule):
            raise TypeError(f"{strategy.name} folds; use an Accumulator")
        self._rule = strategy.rule
        self._assessor = Assessor(
            strategy,
            element_count,
            base,
            prior or Prior(),
            recorded,
            excluded or {},
            revision,
            thread_count,
        )
        self._noise_seed = noise_seed
        self._thread_count = thread_count
        self._budget_bytes = budget_bytes
        self._runner = runner
        self._contributions: dict[str, Contribution] = {}
        self._decided: tuple[UpdateAssessment, ...] | None = None

    def add(self, contribution: Contribution) -> None:
        """Register one update; it is read when the aggregation is finished.

        Raises:
            ValueError: The update was added before.
        """
        if contribution.update_id in self._contributions:
            raise ValueError(f"update {contribution.update_id} was taken in before")
        self._contributions[contribution.update_id] = contribution
        self._decided = None

    def extend(self, contributions: Sequence[Contribution]) -> None:
        """Register updates in order."""
        for contribution in contributions:
            self.add(contribution)

    def _judgements(self) -> tuple[UpdateAssessment, ...]:
        """Judge every update, then let the rule plan over the accepted ones; once for a cohort."""
        if self._decided is None:
            recalled = [self._assessor.recall(entry) for entry in self._contributions.values()]
            known = tuple(judgement for judgement in recalled if judgement is not None)
            self._decided = known or self._judge()
        return self._decided

    def _judge(self) -> tuple[UpdateAssessment, ...]:
        measured = self._measured()
        assessed = [
            self._assessor.assess(entry, measured.get(entry.update_id))
            for entry in self._contributions.values()
        ]
        gram = None
        if self._rule.needs_gram and self._enough(assessed):
            assessed, gram = self._compare(assessed)
        judgements = tuple(judgement for _, judgement in assessed)
        if not self._enough(assessed):
            return judgements
        accepted = tuple(facts for facts, judgement in assessed if judgement.accepted)
        shares = self._rule.plan(Cohort(facts=accepted, gram=gram))
        chosen = dict(zip((facts.update_id for facts in accepted), shares, strict=True))
        return tuple(
            replace(judgement, coefficient=share, weight=share)
            for judgement in judgements
            for share in [chosen.get(judgement.update_id, 0.0)]
        )

    def _enough(self, assessed: Sequence[Assessed]) -> bool:
        accepted_count = sum(judgement.accepted for _, judgement in assessed)
        return accepted_count >= self._rule.minimum_count

    def _compare(
        self, assessed: Sequence[Assessed]
    ) -> tuple[list[Assessed], NDArray[np.float64] | None]:
        """Compute the inner products of the accepted updates; refuse those that are too long for them."""
        accepted = [judgement for _, judgement in assessed if judgement.accepted]
        gram = self._gram([judgement for _, judgement in assessed], accepted)
        norms = [sqrt(square) for square in np.diagonal(gram)]
        refused = {
            judgement.update_id: replace(
                judgement, factor=0.0, rejection=excess_of(norm), norm=norm
            )
            for judgement, norm in zip(accepted, norms, strict=True)
            if excess_of(norm)
        }
        kept = [index for index, norm in enumerate(norms) if not excess_of(norm)]
        judged = [(facts, refused.get(facts.update_id, judgement)) for facts, judgement in assessed]
        return judged, gram[np.ix_(kept, kept)]

    def _measured(self) -> Mapping[str, tuple[float, float | None]]:
        """Return norms and cosines by update id, where the pass for them is divided."""
        if self._runner is None or not self._assessor.measures:
            return {}
        excluded = self._assessor.excluded
        unjudged = tuple(
            UpdateAssessment(name, 0.0, 0.0, 0.0, rejection=excluded.get(name, ""))
            for name in self._contributions
        )
        wanted = [entry for entry in unjudged if entry.accepted]

        def compute(start: int, stop: int) -> Iterator[NDArray[np.float64]]:
            return self._norms(wanted, start, stop)

        parts = self._runner.run("norms", unjudged, compute)
        if parts is None:
            return {}
        figures = np.concatenate([part.reshape(-1, len(wanted), 3) for part in parts])
        return {
            entry.update_id: norm_and_cosine(figures[:, row].tolist())
            for row, entry in enumerate(wanted)
        }

    def _norms(
        self, wanted: Sequence[UpdateAssessment], start: int, stop: int
    ) -> Iterator[NDArray[np.float64]]:
        return norm_figures(
            [self._contributions[entry.update_id] for entry in wanted],
            self._assessor.base,
            self._assessor.direction,
            start,
            stop,
            self._thread_count,
        )

    def _gram(
        self, judgements: Sequence[UpdateAssessment], accepted: Sequence[UpdateAssessment]
    ) -> NDArray[np.float64]:
        """Compute the inner products of the accepted updates."""

        def compute(start: int, stop: int) -> Iterator[NDArray[np.float64]]:
            return self._products(accepted, start, stop)

        runner = self._runner
        parts = None if runner is None else runner.run("products", judgements, compute)
        if parts is not None:
            return sum_products(parts, len(accepted))
        return gram_matrix(
            [self._contributions[judgement.update_id] for judgement in accepted],
            [judgement.factor for judgement in accepted],
            self._assessor.base,
            self._assessor.element_count,
            self._thread_count,
        )

    def _products(
        self, accepted: Sequence[UpdateAssessment], start: int, stop: int
    ) -> Iterator[NDArray[np.float64]]:
        return gram_products(
            [self._contributions[judgement.update_id] for judgement in accepted],
            [judgement.factor for judgement in accepted],
            self._assessor.base,
            start,
            stop,
            self._thread_count,
        )

    def compute(self, name: PassName, start: int, stop: int) -> Iterator[NDArray[np.float64]]:
        """Yield a pass's results over a slice, for an aggregation with recorded judgements."""
        if name == "aggregate":
            return self._aggregates(self._rows(), start, stop)
        accepted = [entry for entry in self._judgements() if entry.accepted]
        if name == "norms":
            return self._norms(accepted, start, stop)
        return self._products(accepted, start, stop)

    def _rows(self) -> tuple[Row, ...]:
        """Return the participating updates."""
        return tuple(
            Row(self._contributions[entry.update_id], entry.factor, entry.coefficient)
            for entry in self._judgements()
            if entry.accepted and entry.coefficient != 0.0
        )

    @property
    def release(self) -> Release:
        """Finalization of the updates added so far."""
        digests = {entry.update_id: entry.digest for entry in self._contributions.values()}
        return Release(self._assessor, self._judgements(), self._noise_seed, digests)

    @property
    def outcome(self) -> Outcome:
        """Outcome of the updates added so far; reads the updates if the rule's plan needs them."""
        return self.release.outcome

    def finish(self) -> Iterator[VersionSlice]:
        """Yield the version slice by slice. Repeated calls yield the same slices.

        Raises:
            NotEnoughUpdatesError: Too few updates were accepted.
        """
        release = self.release
        release.require_enough()
        return self._slices(release, self._rows())

    def _slices(self, release: Release, rows: tuple[Row, ...]) -> Iterator[VersionSlice]:
        """Read and combine slices, and yield them in order."""

        def compute(start: int, stop: int) -> Iterator[Vector]:
            return self._aggregates(rows, start, stop)

        runner, start = self._runner, 0
        parts = None if runner is None else runner.run("aggregate", release.judgements, compute)
        for aggregate in parts or compute(0, self._assessor.element_count):
            yield release.version_slice(start, start + aggregate.size, aggregate)
            start += aggregate.size

    def _aggregates(self, rows: tuple[Row, ...], start: int, stop: int) -> Iterator[Vector]:
        """Yield consecutive parts of the aggregate, made in parallel if there are several threads."""
        length = slice_elements(len(rows), self._budget_bytes, self._thread_count)

        def work(first: int, last: int) -> Vector:
            return self._aggregate(rows, first, last)

        for _, _, aggregate in in_order(work, blocks(stop, length, start), self._thread_count):
            yield aggregate

    def _aggregate(self, rows: tuple[Row, ...], start: int, stop: int) -> Vector:
        slices = [row.contribution.read(start, stop) for row in rows]
        with np.errstate(over="ignore", invalid="ignore"):
            return combine(
                self._rule,
                rows,
                slices,
                self._assessor.wide_base(start, stop),
                self._assessor.revision,
            )


def combine(
    rule: CohortRule,
    rows: Sequence[Row],
    slices: Sequence[NDArray[np.floating]],
    base: Vector,
    revision: int = REVISION,
) -> Vector:
    """Turn one slice of every update into a slice of the aggregate.

    Args:
        rule: Called when it is no linear combination.
        rows: The updates that take part, `s` of them.
        slices: Their elements as read, each of shape (m,).
        base: The base version's elements, shape (m,).
        revision: Number of the rules to aggregate by.

    Returns:
        Float64, shape (m,).
    """
    if not isinstance(rule, SliceRule):
        return _linear(rows, slices, base, revision)
    whole = all(row.contribution.full_weights and row.factor == 1.0 for row in rows)
    # A mean of equal float32 is exact in float64; one of equal float64 is not, so those become deltas first.
    exact = revision == 1 or all(part.dtype == np.float32 for part in slices)
    if whole and exact and rule.translation_equivariant:
        return rule.combine(_matrix(rows, slices, None)) - base
    return rule.combine(_matrix(rows, slices, base))


def _linear(
    rows: Sequence[Row], slices: Sequence[NDArray[np.floating]], base: Vector, revision: int
) -> Vector:
    """Add `coefficient * factor * delta` up in order."""
    total, shared = np.zeros(base.size), 0.0
    scratch = np.empty(base.size), np.empty(base.size)
    for row, values in zip(rows, slices, strict=True):
        factor = row.factor * row.coefficient
        if row.contribution.full_weights and revision > 1:
            add_scaled_delta(total, values, base, factor, scratch)
            continue
        add_scaled(total, values, factor, scratch[0])
        shared += factor if row.contribution.full_weights else 0.0
    if shared:
        total -= shared * base
    return total


def _matrix(
    rows: Sequence[Row],
    slices: Sequence[NDArray[np.floating]],
    base: Vector | None,
) -> NDArray[np.floating]:
    """Stack a slice of every scaled delta, or of the unchanged updates when `base` is None.

    Float32 when that holds every value exactly, because the rules are twice as fast on it.
    """
    touched = any(row.factor != 1.0 for row in rows)
    shifted = base is not None and any(row.contribution.full_weights for row in rows)
    narrow = all(part.dtype == np.float32 for part in slices) and not touched and not shifted
    matrix = np.empty((len(rows), slices[0].size), dtype=np.float32 if narrow else np.float64)
    for target, row, part in zip(matrix, rows, slices, strict=True):
        target[:] = part
        if base is not None and row.contribution.full_weights:
            np.subtract(target, base, out=target)
        if row.factor != 1.0:
            np.multiply(target, row.factor, out=target)
    return matrix
