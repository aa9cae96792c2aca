"""Data types of an aggregation: contributions in, version slices and an outcome out.

A model is seen here as one vector: the elements of its floating tensors in manifest order, `n` elements, worked
on in float64. Integer tensors never reach a strategy.

The working space is the *delta*, the update's weights minus the weights of its base version. Norms, clipping,
cosines, staleness and noise are statements about deltas; updates against different base versions can only be
averaged as deltas; and deltas are small beside the weights, so float64 rounding falls far below the last float32
bit: the average of identical updates is that update. An update that holds full weights may be handed in
as it is (`Contribution.full_weights`); the base version is subtracted where it matters.

Invariants: everything here is a value. Nothing reads a clock, a file or a random source.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

REVISION: Final = 3
"""Number of the rules by which this release aggregates. A version keeps the number of those that it was made by, so
that it can be recomputed where later ones differ:

1. (versions without a number) Updates that were refused or left out counted in example counts and metrics, could give
   the integers, and were among the contributors where it was the rule that left them out.
2. Only updates with a share in the aggregate count; a private version keeps the integers of its base, and its noise is
   bound to the updates in it (`noise.BoundNoise`). Full weights become deltas before they are scaled and added up, so
   that elements that no update changes stay the same to the last bit.
3. The noise of a masked sum is bound to ids and masked payloads of its updates instead of to their statements, so that
   it does not depend on how seeds were sealed.
"""

Vector: TypeAlias = NDArray[np.float64]
"""A float64 array of one dimension."""

Reader: TypeAlias = Callable[[int, int], NDArray[np.floating]]
"""`read(start, stop)` gives elements `start <= i < stop` as a float32 or float64 array of one dimension.

The same bounds give the same values on every call, at any bounds and in any order. The caller never writes into
the array, so a view is fine; the array must not change afterwards (no buffer that the next call reuses).
It is called with slices of 1,024 elements (a cohort of thousands) to 2 Mi (`blocks.SLICE`) at ascending positions in
each pass; a reader over larger chunks keeps the chunk it is in. With `thread_count` one it is called by one thread
only.
"""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One accepted update, as a strategy sees it.

    Attributes:
        update_id: Unique in its cohort; names the update in the outcome and breaks ties.
        example_count: Number of local examples, zero or more.
        read: Gives the update's elements. Must stay usable until the aggregation is finished.
        staleness: Versions published between the update's base version and the current one, zero or more.
        norm: L2 norm of the delta, when it is known from receiving; computed by one more pass if needed.
            Hand in a figure computed by `blocks.norm_of`, or the bytes depend on who computed it.
        digest: Digest of everything that its device signed; the noise of a private version is bound to it.
        full_weights: Whether `read` gives weights trained from the *current* base version, not a delta. An
            update against an older version must be handed in as a delta.
    """

    update_id: str
    example_count: int
    read: Reader
    staleness: int = 0
    norm: float | None = None
    full_weights: bool = False
    digest: str = ""

    def __post_init__(self) -> None:
        """Reject impossible values."""
        if self.example_count < 0:
            raise ValueError(f"example count {self.example_count} of {self.update_id} is negative")
        if self.staleness < 0:
            raise ValueError(f"staleness {self.staleness} of {self.update_id} is negative")
        if self.full_weights and self.staleness:
            raise ValueError(
                f"stale update {self.update_id} holds full weights; it must be a delta"
            )


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about one update that a rule or a screen may use without reading its elements.

    Attributes:
        update_id: As in the contribution.
        example_count: As in the contribution.
        staleness: As in the contribution.
        norm: L2 norm of the delta; NaN when nothing in the strategy asked for it.
        cosine: Cosine between the delta and the previous direction; None when nothing asked for it, when
            there is no previous direction, or when either vector is zero.
    """

    update_id: str
    example_count: int
    staleness: int = 0
    norm: float = float("nan")
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class UpdateAssessment:
    """Assessment of one update: accepted or not, and its share.

    Attributes:
        update_id: As in the contribution.
        factor: Factor by which the screens scaled the delta, `0 <= factor <= 1`; below one when it was clipped.
        coefficient: Factor of the scaled delta in the aggregate's numerator. For a rule that is
            not a linear combination (median, trimmed mean, Bulyan) one if the update took part, else zero.
        weight: Summand of the update in the aggregate's denominator; for a cohort rule its coefficient.
        rejection: Why a screen refused the update; empty when it was accepted.
        norm: L2 norm of the delta, NaN when it was not needed.
        cosine: As in `Facts`.
    """

    update_id: str
    factor: float
    coefficient: float
    weight: float
    rejection: str = ""
    norm: float = float("nan")
    cosine: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether no screen refused the update; the rule may still have left it out (`contributes`)."""
        return not self.rejection

    @property
    def contributes(self) -> bool:
        """Whether the update has a share in the aggregate: it was accepted and the rule gave it a share."""
        return self.accepted and (self.coefficient != 0.0 or self.weight != 0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The facts of a finished aggregation, enough to recompute it from the same updates.

    The facts describe single updates. The guarantee of central privacy covers the versions and the scalars, not the
    other facts: disclose those only to parties that are trusted with the updates themselves.

    Attributes:
        strategy: Name of the rule.
        judgements: One for each contribution, in acceptance order.
        weight_sum: The denominator of the aggregate.
        scalars: The numbers the next version's aggregation starts from; persist them with the version.
        clipped_fraction: Share of the accepted updates that were clipped, 0 to 1.
        noise_stddev: Standard deviation of the noise in each element of the aggregate; zero without privacy.
    """

    strategy: str
    judgements: tuple[UpdateAssessment, ...]
    weight_sum: float
    scalars: Mapping[str, float] = field(default_factory=dict)
    clipped_fraction: float = 0.0
    noise_stddev: float = 0.0

    @property
    def rejected(self) -> dict[str, str]:
        """Reasons by update id, of the updates that were refused."""
        return {entry.update_id: entry.rejection for entry in self.judgements if entry.rejection}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Ids of the accepted updates that have no share in the aggregate."""
        return tuple(
            entry.update_id for entry in self.judgements if entry.accepted and not entry.contributes
        )

    @property
    def coefficients(self) -> dict[str, float]:
        """Factor times coefficient by update id, of the updates that were accepted."""
        return {
            entry.update_id: entry.factor * entry.coefficient
            for entry in self.judgements
            if entry.accepted
        }


@dataclass(frozen=True, slots=True)
class Prior:
    """State persisted with the base version, from which the next aggregation starts.

    Attributes:
        scalars: `Outcome.scalars` of the base version; empty for version 0.
        vectors: One reader for each state vector the base version persisted, float64, exactly as
            persisted; empty for version 0.
        version: Number of the version that is being made; addresses the noise.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    vectors: Mapping[str, Reader] = field(default_factory=dict)
    version: int = 1


@dataclass(frozen=True, slots=True)
class VersionSlice:
    """Elements `start <= i < stop` of a finished version.

    Attributes:
        start: First element.
        stop: One past the last element.
        weights: Float64, the version's weights; round them to the tensors' own dtypes when storing.
        vectors: Float64 by name, the same elements of every state vector; persist them exactly.
    """

    start: int
    stop: int
    weights: Vector
    vectors: Mapping[str, Vector]


PassName = Literal["aggregate", "products", "norms"]
"""A pass over all updates that can be divided by slices of the vector: the elements of the aggregate, before noise and
server step; the inner products of the updates over blocks of `blocks.GRAM_BLOCK` elements, shape (m, k, k); or the
summands of their norms and cosines over blocks of `blocks.BLOCK` elements, shape (m, k, 3)."""

Compute: TypeAlias = Callable[[int, int], Iterator[NDArray[np.float64]]]
"""`compute(start, stop)` yields a pass's results over elements `start <= i < stop`, in order; `start` is a multiple of
`blocks.BLOCK`. The results of several slices, one after the other, are those of the whole vector, bit for bit."""


class PassRunner(Protocol):
    """Divides passes over all updates among several processes."""

    def run(
        self, name: PassName, judgements: Sequence[UpdateAssessment], compute: Compute
    ) -> Iterator[NDArray[np.float64]] | None:
        """Yield a pass's results over the whole vector, in order; None if it is not worth dividing.

        Args:
            name: The pass.
            judgements: Of all updates, in acceptance order; all that another process needs besides the updates.
            compute: Computes a slice in this process.
        """


class Aggregation(Protocol):
    """An aggregation in progress: updates are added in acceptance order, then it is finished once."""

    def add(self, contribution: Contribution) -> None:
        """Add one update."""

    def extend(self, contributions: Sequence[Contribution]) -> None:
        """Add updates in order, with the same bytes; a fold is faster for several than one by one."""

    def finish(self) -> Iterator[VersionSlice]:
        """Yield the finished version slice by slice, in order, covering every element once.

        Raises:
            NotEnoughUpdatesError: Too few updates were accepted.
        """

    def compute(self, name: PassName, start: int, stop: int) -> Iterator[NDArray[np.float64]]:
        """Yield a pass's results over a slice (`Compute`), for an aggregation with recorded judgements."""

    @property
    def outcome(self) -> Outcome:
        """The facts; complete once `finish` has yielded its first slice."""
