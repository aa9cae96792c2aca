"""Streaming aggregation: each update is added to one float64 vector, the total, and is not kept.

A total of up to `RESIDENT_BYTES` stays in memory, and each update is added on arrival. Of a larger model only the
factors of the updates are kept; the version is made slice by slice: of each slice a total is summed over all updates,
which are read once more for it. Memory is then a few slices for each thread, whatever the model.

The bytes depend on the order of acceptance only: each element is summed separately, in that order, so slices, threads
and the grouping into calls do not change a bit. After a crash the same updates are folded again.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.assessment import Assessor
from qflare_server.strategies.blocks import SLICE, blocks, in_order
from qflare_server.strategies.finalization import Release
from qflare_server.strategies.interfaces import FoldRule
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.types import (
    REVISION,
    Contribution,
    Outcome,
    PassName,
    PassRunner,
    Prior,
    Reader,
    UpdateAssessment,
    Vector,
    VersionSlice,
)

PIECE: Final = 32_768
"""Elements added at once: inputs, scratch and total are 1 MiB, which a second-level cache holds."""
READ: Final = 262_144
"""Elements read of an update at once: one chunk of float32, which is not copied. A multiple of `PIECE`."""
BATCH: Final = 16
"""Updates folded in one sweep over the total."""
RESIDENT_BYTES: Final = 256 * 1024 * 1024
"""Largest total that is held in memory from the first update to the last."""

Scratch: TypeAlias = tuple[Vector, Vector]
"""Float64 arrays that a sum overwrites: of the update's elements, and of the base version's."""


def add_scaled(total: Vector, values: NDArray[np.floating], factor: float, scratch: Vector) -> None:
    """Add `factor * values` to `total`, in float64; infinite or NaN where that is exceeded.

    Args:
        total: Float64, shape (m,); changed in place.
        values: Float32 or float64, shape (m,).
        factor: Finite.
        scratch: Float64, shape (m,) or more; overwritten.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if factor == 1.0:
            np.add(total, values, out=total)
            return
        spare = scratch[: total.size]
        np.copyto(spare, values)
        np.multiply(spare, factor, out=spare)
        np.add(total, spare, out=total)


def add_scaled_delta(
    total: Vector,
    values: NDArray[np.floating],
    base: NDArray[np.floating],
    factor: float,
    scratch: Scratch,
) -> None:
    """Add `factor * (values - base)` to `total`, in float64; infinite or NaN where that is exceeded.

    Args:
        total: Float64, shape (m,); changed in place.
        values: Float32 or float64, shape (m,).
        base: Float32 or float64, shape (m,).
        factor: Finite.
        scratch: Two float64 arrays, shape (m,) or more; overwritten.
    """
    spare, wide_base = (part[: total.size] for part in scratch)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(spare, values)
        np.copyto(wide_base, base)
        np.subtract(spare, wide_base, out=spare)
        if factor != 1.0:
            np.multiply(spare, factor, out=spare)
        np.add(total, spare, out=total)


@dataclass(frozen=True, slots=True)
class Addend:
    """One update on its way into the total: its reader, its factor, and whether the base version is subtracted."""

    read: Reader
    factor: float
    subtracts_base: bool = False


def fold_slice(total: Vector, addends: Sequence[Addend], base: Reader, start: int) -> None:
    """Fold every update into one slice of the total.

    Args:
        total: The slice; float64, shape (m,); changed in place.
        addends: In order of acceptance. Of each, the slice is read once, in ascending parts of `READ` elements.
        base: The base version.
        start: Element of the vector that the slice begins with.
    """
    scratch = np.empty(min(PIECE, total.size)), np.empty(min(PIECE, total.size))
    needs_base = any(addend.subtracts_base for addend in addends)
    bounds = list(blocks(total.size, READ))
    # As read, mostly views: float64 copies of a slice would be fresh memory, which costs as much as the sums.
    origins = [base(start + begin, start + end) for begin, end in bounds] if needs_base else []
    for addend in addends:
        for number, (begin, end) in enumerate(bounds):
            values = addend.read(start + begin, start + end)
            for first, last in blocks(end - begin, PIECE):
                piece, part = total[begin + first : begin + last], values[first:last]
                if addend.subtracts_base:
                    origin = origins[number][first:last]
                    add_scaled_delta(piece, part, origin, addend.factor, scratch)
                else:
                    add_scaled(piece, part, addend.factor, scratch[0])


def is_held(element_count: int, resident_bytes: int | None = None) -> bool:
    """Return whether the total of a model is held in memory.

    Args:
        element_count: `n`.
        resident_bytes: Largest total that is; None means `RESIDENT_BYTES`.
    """
    return 8 * element_count <= (RESIDENT_BYTES if resident_bytes is None else resident_bytes)


class SpareTotal:
    """Keeps the total of an aggregation that has ended for the next one of the same owner. Not thread-safe.

    Fresh memory of the size of a model costs as much as folding an update into it, and several times as much in a
    virtual machine.
    """

    def __init__(self) -> None:
        self._owner = ""
        self._total: Vector | None = None

    def take(self, element_count: int) -> Vector:
        """Return the total that is kept if it fits, otherwise a new one; its values are arbitrary."""
        total, self._total = self._total, None
        return (
            total if total is not None and total.size == element_count else np.empty(element_count)
        )

    def give(self, owner: str, total: Vector) -> None:
        """Keep a total that nothing uses any more, instead of the one that is kept."""
        self._owner, self._total = owner, total

    def retain(self, owners: Container[str]) -> None:
        """Free the total if its owner is none of these."""
        if self._owner not in owners:
            self._total = None


class Accumulator:
    """An aggregation by a fold rule. Not thread-safe."""

    def __init__(
        self,
        strategy: Strategy,
        element_count: int,
        base: Reader,
        prior: Prior | None = None,
        *,
        noise_seed: bytes | None = None,
        thread_count: int = 1,
        recorded: Mapping[str, UpdateAssessment] | None = None,
        excluded: Mapping[str, str] | None = None,
        revision: int = REVISION,
        resident_bytes: int | None = None,
        slice_elements: int | None = None,
        runner: PassRunner | None = None,
        spare: SpareTotal | None = None,
    ) -> None:
        """Start with no update.

        Args:
            strategy: One whose rule folds.
            element_count: `n`.
            base: The base version.
            prior: State persisted with the base version; by default that of version 0.
            noise_seed: The training session's secret, needed when the strategy has privacy.
            thread_count: Threads that share the work. With more than one, readers are called from several
                threads at once; with one, by the caller's only.
            recorded: Judgements of an earlier run, to recompute it from.
            excluded: Reasons by update id of updates that are refused without being measured.
            revision: Number of the rules to aggregate by.
            resident_bytes: Largest total that is held in memory; None means `RESIDENT_BYTES`.
            slice_elements: Elements that a thread folds at once; None means `SLICE`.
            runner: Divides the summation of a total that is not held in memory; None means that it is not divided.
            spare: Where a total that is held in memory comes from, and where `release_total` leaves it.

        Raises:
            TypeError: The rule does not fold.
        """
        if not isinstance(strategy.rule, FoldRule):
            raise TypeError(f"{strategy.name} needs all updates at once and cannot fold")
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
        self._slice_elements = slice_elements or SLICE
        self._thread_count = thread_count
        self._runner = runner
        is_resident = is_held(element_count, resident_bytes)
        self._spare = SpareTotal() if spare is None else spare
        self._total = self._spare.take(element_count) if is_resident else None
        self._is_blank = (
            True  # the total holds arbitrary values: the first sweep zeroes it, slice by slice
        )
        self._addends: list[Addend] = []  # where there is no total
        self._judgements: dict[str, UpdateAssessment] = {}
        self._digests: dict[str, str] = {}
        self._base_factor = 0.0

    def add(self, contribution: Contribution) -> None:
        """Add one update."""
        self.extend([contribution])

    def extend(self, contributions: Sequence[Contribution]) -> None:
        """Add updates in order; faster than adding them one by one, with the same bytes.

        An exception, from a reader or here, leaves the accumulator unusable: start again with a new one.

        Raises:
            ValueError: An update was added before.
        """
        for start in range(0, len(contributions), BATCH):
            self._take(contributions[start : start + BATCH])

    def _take(self, batch: Sequence[Contribution]) -> None:
        addends: list[Addend] = []
        for contribution in batch:
            if contribution.update_id in self._judgements:
                raise ValueError(f"update {contribution.update_id} was taken in before")
            judgement = self._judge(contribution)
            self._judgements[contribution.update_id] = judgement
            if self._noise_seed is not None:
                self._digests[contribution.update_id] = contribution.digest
            factor = judgement.factor * judgement.coefficient
            if factor == 0.0:
                continue
            exact = contribution.full_weights and self._assessor.revision > 1
            addends.append(Addend(contribution.read, factor, exact))
            if contribution.full_weights and not exact:
                self._base_factor += factor
        if self._total is None:
            self._addends += addends
        elif addends:
            self._sweep(self._total, addends)

    def _judge(self, contribution: Contribution) -> UpdateAssessment:
        recalled = self._assessor.recall(contribution)
        if recalled is not None:
            return recalled
        facts, judgement = self._assessor.assess(contribution)
        if not judgement.accepted:
            return judgement
        coefficient, weight = self._rule.share(facts)
        return replace(judgement, coefficient=coefficient, weight=weight)

    def _sweep(self, total: Vector, addends: Sequence[Addend]) -> None:
        """Fold one batch into the total, slice by slice, side by side if there are several threads."""
        is_blank, self._is_blank = self._is_blank, False

        def work(start: int, stop: int) -> None:
            if is_blank:
                total[start:stop] = 0.0
            fold_slice(total[start:stop], addends, self._assessor.base, start)

        for _ in in_order(work, blocks(total.size, self._slice_elements), self._thread_count):
            pass

    def _totals(self) -> Iterator[tuple[int, int, Vector]]:
        """Yield the slices of the total with their bounds, in order; sums them up if they are not in memory."""
        if self._total is not None:
            if self._is_blank:
                self._total[:] = 0.0
                self._is_blank = False
            yield 0, self._total.size, self._total
            return
        parts = None
        if self._runner is not None:
            judgements = tuple(self._judgements.values())
            parts = self._runner.run("aggregate", judgements, self._sums)
        start = 0
        for part in parts or self._sums(0, self._assessor.element_count):
            yield start, start + part.size, part
            start += part.size

    def _sums(self, start: int, stop: int) -> Iterator[Vector]:
        """Yield consecutive parts of a total that is not in memory."""

        def work(first: int, last: int) -> Vector:
            total = np.zeros(last - first)
            fold_slice(total, self._addends, self._assessor.base, first)
            return total

        ranges = blocks(stop, self._slice_elements, start)
        for _, _, total in in_order(work, ranges, self._thread_count):
            yield total

    def compute(self, name: PassName, start: int, stop: int) -> Iterator[Vector]:
        """Yield the sums of a slice, of a total that is not in memory.

        Raises:
            ValueError: There is no such pass, or the total is in memory.
        """
        if name != "aggregate" or self._total is not None:
            raise ValueError(f"no pass {name} over slices")
        return self._sums(start, stop)

    @property
    def is_resident(self) -> bool:
        """Whether the total is in memory: the updates that were added are not read again to make the version."""
        return self._total is not None

    def release_total(self, owner: str) -> None:
        """Leave the total for the owner's next aggregation; only the judgements of this one can be used afterwards."""
        if self._total is not None:
            self._spare.give(owner, self._total)
            self._total = np.empty(0)

    @property
    def release(self) -> Release:
        """Finalization of the updates added so far."""
        judgements = tuple(self._judgements.values())
        return Release(self._assessor, judgements, self._noise_seed, self._digests)

    def judgement_of(self, update_id: str) -> UpdateAssessment:
        """Return the assessment of an added update."""
        return self._judgements[update_id]

    @property
    def outcome(self) -> Outcome:
        """Outcome of the updates added so far."""
        return self.release.outcome

    def finish(self) -> Iterator[VersionSlice]:
        """Yield the version slice by slice. Repeated calls yield the same slices.

        Raises:
            NotEnoughUpdatesError: Too few updates were accepted.
        """
        release = self.release
        release.require_enough()
        return self._slices(release)

    def _slices(self, release: Release) -> Iterator[VersionSlice]:
        weight_sum = release.weight_sum
        for begin, end, total in self._totals():
            for first, last in blocks(end - begin):
                aggregate, start, stop = total[first:last], begin + first, begin + last
                if self._base_factor:
                    aggregate = aggregate - self._base_factor * self._assessor.wide_base(
                        start, stop
                    )
                yield release.version_slice(start, stop, aggregate / weight_sum)
