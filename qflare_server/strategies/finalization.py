"""Finalization: noise, server optimizer step, and the initial state of the next version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.assessment import Assessor
from qflare_server.strategies.errors import NotEnoughUpdatesError
from qflare_server.strategies.noise import BoundNoise, Noise, VersionNoise
from qflare_server.strategies.strategy import DIRECTION
from qflare_server.strategies.types import Outcome, UpdateAssessment, Vector, VersionSlice


@dataclass(frozen=True)
class Release:
    """Turns slices of the aggregate into slices of the version.

    Attributes:
        assessor: Strategy, base version and prior of this aggregation.
        judgements: One assessment per update, in acceptance order.
        noise_seed: The training session's secret; None without privacy.
        digests: Of the updates, by update id; where one is missing, the id stands for it.
    """

    assessor: Assessor
    judgements: tuple[UpdateAssessment, ...]
    noise_seed: bytes | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    def require_enough(self) -> None:
        """Reject too few updates, or weights that add up to zero.

        Raises:
            NotEnoughUpdatesError: The message says how many were accepted and how many are needed.
        """
        accepted = sum(entry.accepted for entry in self.judgements)
        needed = self.assessor.strategy.minimum_count
        if accepted < needed:
            raise NotEnoughUpdatesError(
                f"{self.assessor.strategy.name} needs {needed} accepted updates, got {accepted}"
            )
        if not self.weight_sum > 0.0:
            raise NotEnoughUpdatesError(f"the weights of {accepted} updates add up to zero")

    @property
    def weight_sum(self) -> float:
        """Denominator of the aggregate: the weights, or the fixed denominator of the privacy."""
        privacy = self.assessor.strategy.privacy
        if privacy is not None:
            return float(privacy.expected_update_count)
        return _sum_in_order([entry.weight for entry in self.judgements])

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise in each element of the aggregate; with noise of devices the least one."""
        privacy = self.assessor.strategy.privacy
        if privacy is None:
            return 0.0
        return privacy.noise_stddev(self.assessor.scalars, self.assessor.element_count)

    @cached_property
    def _noise(self) -> Noise:
        """Noise of this version, bound to the updates in it."""
        if self.noise_seed is None:
            raise ValueError("a strategy with privacy needs a noise seed")
        version = self.assessor.prior.version
        if self.assessor.revision == 1:
            return VersionNoise(self.noise_seed, version)
        aggregated = [
            self.digests.get(entry.update_id) or entry.update_id
            for entry in self.judgements
            if entry.contributes
        ]
        return BoundNoise(self.noise_seed, version, aggregated)

    @property
    def outcome(self) -> Outcome:
        """All facts of this aggregation."""
        accepted = [entry for entry in self.judgements if entry.accepted]
        clipped = sum(entry.factor < 1.0 for entry in accepted)
        return Outcome(
            strategy=self.assessor.strategy.name,
            judgements=self.judgements,
            weight_sum=self.weight_sum,
            scalars=self._next_scalars(),
            clipped_fraction=clipped / len(accepted) if accepted else 0.0,
            noise_stddev=self.noise_stddev,
        )

    def _next_scalars(self) -> Mapping[str, float]:
        strategy, scalars = self.assessor.strategy, self.assessor.scalars
        advanced = strategy.optimizer.advance(scalars)
        if strategy.privacy is None or strategy.privacy.adaptive is None:
            return dict(advanced)
        stddev = strategy.privacy.adaptive.count_stddev
        noise = float(self._noise.gaussian("clip count", 0, 1, stddev)[0])
        return dict(strategy.privacy.next_scalars(advanced, self.judgements, noise))

    def version_slice(self, start: int, stop: int, aggregate: Vector) -> VersionSlice:
        """Add the noise, unless it is in the updates already, and take the server step.

        Args:
            start: First element.
            stop: One past the last element.
            aggregate: The rule's aggregate, shape (stop - start,).
        """
        privacy = self.assessor.strategy.privacy
        if privacy is not None and not privacy.is_in_sum:
            sampled = self._noise.gaussian("aggregate", start, stop, self.noise_stddev)
            aggregate = self._noise.rounded(aggregate + sampled)
        return self.step(start, stop, aggregate)

    def step(self, start: int, stop: int, aggregate: Vector) -> VersionSlice:
        """Take the server step, without noise. Overflow of float64 gives infinity or NaN.

        Args:
            start: First element.
            stop: One past the last element.
            aggregate: Shape (stop - start,).
        """
        strategy = self.assessor.strategy
        scalars = strategy.optimizer.advance(self.assessor.scalars)
        base = self.assessor.wide_base(start, stop)
        before = self._vectors(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            weights, after = strategy.optimizer.step(base, aggregate, before, scalars)
        if self.assessor.revision > 1:  # minus zero and zero are equal and not the same bits
            weights = np.where(weights == base, base, weights)
        vectors = dict(after)
        if strategy.needs_direction:
            vectors[DIRECTION] = aggregate
        return VersionSlice(start=start, stop=stop, weights=weights, vectors=vectors)

    def held(self, piece: VersionSlice, fits: NDArray[np.bool_]) -> VersionSlice:
        """Keep the base where an element is out of range, and start the optimizer's state of that element anew.

        Args:
            piece: From `step` or `version_slice`.
            fits: Whether the model can hold each weight, shape (stop - start,).
        """
        base = self.assessor.wide_base(piece.start, piece.stop)
        initial = self.assessor.strategy.optimizer.initial_vectors
        vectors = {
            name: np.where(fits, vector, initial.get(name, 0.0))
            for name, vector in piece.vectors.items()
        }
        weights = np.where(fits, piece.weights, base)
        return replace(piece, weights=weights, vectors=vectors)

    def _vectors(self, start: int, stop: int) -> dict[str, Vector]:
        """Read the optimizer's state vectors, or create them with their initial values."""
        vectors = {}
        for name, value in self.assessor.strategy.optimizer.initial_vectors.items():
            reader = self.assessor.prior.vectors.get(name)
            vectors[name] = (
                np.full(stop - start, value)
                if reader is None
                else reader(start, stop).astype(np.float64, copy=False)
            )
        return vectors


def _sum_in_order(values: Sequence[float]) -> float:
    """Add left to right, the order in which the updates were accepted."""
    total = 0.0
    for value in values:
        total += value
    return total
