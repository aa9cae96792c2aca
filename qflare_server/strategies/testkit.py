"""Checks for any strategy, QFLARE's own and those of other distributions.

    check_strategy(build(StrategyConfig(name="my_rule", quorum=8)))

runs a strategy on made-up updates and raises `StrategyContractError` at the first promise it breaks. Every strategy
guarantees: bytes that do not depend on slices, threads or the readers' dtype; bytes that a restart from persisted
state repeats; no writes to its inputs; finite results from finite updates. Guarantees that only most rules make
are selected by `Promises`.

Nothing here needs a test framework.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.catalogue import begin
from qflare_server.strategies.errors import StrategyContractError
from qflare_server.strategies.serialization import by_update, outcome_from_data, outcome_to_data
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.types import (
    Contribution,
    Outcome,
    Prior,
    Reader,
    UpdateAssessment,
    Vector,
)

_SEED_BYTES: Final = b"a seed that is no secret"
_TOLERANCE: Final = 1e-9
"""Relative; reordered float64 sums differ by far less."""


@dataclass(frozen=True, slots=True)
class Promises:
    """Guarantees of a strategy beyond those that every strategy makes.

    Attributes:
        permutation: The order of acceptance changes the result by no more than rounding.
        scaling: Scaling every delta scales the aggregate; checked with a plain server step. Bounds on norms
            and smoothing constants break it.
        unanimity: The aggregate of identical deltas is that delta; checked with a plain server step.
    """

    permutation: bool = True
    scaling: bool = True
    unanimity: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """Synthetic updates of a synthetic model.

    Attributes:
        base: Float32 weights of the base version, shape (n,).
        deltas: Float32, shape (k, n).
        example_counts: One for each update.
    """

    base: NDArray[np.float32]
    deltas: NDArray[np.float32]
    example_counts: tuple[int, ...]

    def contributions(self, *, wide: bool = False) -> list[Contribution]:
        """Return the updates in order, read as float32 or float64."""
        return [
            Contribution(f"update-{index:03}", count, reader_of(_typed(delta, wide=wide)))
            for index, (delta, count) in enumerate(
                zip(self.deltas, self.example_counts, strict=True)
            )
        ]


@dataclass(frozen=True, slots=True)
class MadeVersion:
    """A version made by a strategy: weights, state vectors and outcome."""

    weights: Vector
    vectors: Mapping[str, Vector]
    outcome: Outcome

    def prior(self, version: int) -> Prior:
        """Return what the next version starts from, after a round trip through bytes."""
        stored = {name: np.frombuffer(vector.tobytes()) for name, vector in self.vectors.items()}
        return Prior(
            scalars={name: float(repr(value)) for name, value in self.outcome.scalars.items()},
            vectors={name: reader_of(vector) for name, vector in stored.items()},
            version=version,
        )


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How an aggregation is run."""

    thread_count: int = 1
    budget_bytes: int = 64 * 1024 * 1024
    prior: Prior = field(default_factory=Prior)
    recorded: Mapping[str, UpdateAssessment] | None = None


def _typed(values: NDArray[np.float32], *, wide: bool) -> NDArray[np.floating]:
    return values.astype(np.float64) if wide else values


def reader_of(values: NDArray[np.floating]) -> Reader:
    """Return a reader of an array in memory; its slices are read-only."""
    values = values.view()
    values.setflags(write=False)

    def read(start: int, stop: int) -> NDArray[np.floating]:
        return values[start:stop]

    return read


def sample(
    update_count: int = 11, element_count: int = 70_001, seed: int = 0, spread: float = 0.1
) -> Sample:
    """Create distinct updates around one direction.

    Args:
        update_count: `k`; enough for the strategy's rule.
        element_count: `n`; the default crosses a block boundary.
        seed: Of the random generator.
        spread: Size of the differences beside a direction of size one.
    """
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(element_count)
    own = spread * generator.standard_normal((update_count, element_count))
    return Sample(
        base=generator.standard_normal(element_count).astype(np.float32),
        deltas=((direction + own) / np.sqrt(element_count)).astype(np.float32),
        example_counts=tuple(int(count) for count in generator.integers(1, 100, update_count)),
    )


def make_version(
    strategy: Strategy,
    base: NDArray[np.floating],
    contributions: Iterable[Contribution],
    running: RunOptions | None = None,
) -> MadeVersion:
    """Run one aggregation to its end and check that its slices cover the model once, in order."""
    how = running or RunOptions()
    aggregation = begin(
        strategy,
        base.size,
        reader_of(base),
        how.prior,
        noise_seed=_SEED_BYTES,
        thread_count=how.thread_count,
        budget_bytes=how.budget_bytes,
        recorded=how.recorded,
    )
    aggregation.extend(list(contributions))
    weights, position = np.empty(base.size), 0
    vectors = {name: np.empty(base.size) for name in strategy.initial_vectors}
    for piece in aggregation.finish():
        _require(piece.start == position, f"a slice starts at {piece.start}, not {position}")
        weights[piece.start : piece.stop] = piece.weights
        _require(
            set(piece.vectors) == set(vectors),
            f"a slice holds state vectors {sorted(piece.vectors)}, declared are {sorted(vectors)}",
        )
        for name, vector in piece.vectors.items():
            vectors[name][piece.start : piece.stop] = vector
        position = piece.stop
    _require(position == base.size, f"the slices end at {position} of {base.size} elements")
    return MadeVersion(weights, vectors, aggregation.outcome)


def _require(held: bool, message: str) -> None:
    if not held:
        raise StrategyContractError(message)


def _same_bytes(one: MadeVersion, other: MadeVersion, what: str) -> None:
    """Compare weights, state vectors and numbers byte by byte."""
    _require(one.weights.tobytes() == other.weights.tobytes(), f"the weights depend on {what}")
    for name, vector in one.vectors.items():
        _require(
            vector.tobytes() == other.vectors[name].tobytes(),
            f"state vector {name} depends on {what}",
        )
    _require(one.outcome.scalars == other.outcome.scalars, f"the scalars depend on {what}")


def check_slicing(strategy: Strategy, data: Sample) -> None:
    """Check that slice length, threads and the readers' dtype never change a bit.

    Raises:
        StrategyContractError: The message names what changed the bytes.
    """
    plain = make_version(strategy, data.base, data.contributions())
    small = RunOptions(budget_bytes=1)
    threads = RunOptions(thread_count=3, budget_bytes=4 * 1024 * 1024)
    _same_bytes(plain, make_version(strategy, data.base, data.contributions(), small), "the slice")
    _same_bytes(
        plain, make_version(strategy, data.base, data.contributions(), threads), "the threads"
    )
    wide = make_version(strategy, data.base, data.contributions(wide=True))
    _same_bytes(plain, wide, "the readers' dtype")
    _require(bool(np.isfinite(plain.weights).all()), "finite updates gave a result that is not")


def check_crash_exactness(strategy: Strategy, data: Sample, version_count: int = 3) -> None:
    """Check that a pass that starts over, from persisted state alone, repeats the bytes.

    Raises:
        StrategyContractError: The message says which version differed.
    """
    prior, base = Prior(), data.base.astype(np.float64)
    for version in range(1, version_count + 1):
        updates = _rotated(data, version)
        running = RunOptions(prior=prior)
        first = make_version(strategy, base, updates, running)
        again = make_version(strategy, base, updates, running)
        _same_bytes(first, again, f"whether version {version} was begun before")
        record = outcome_from_data(json.loads(json.dumps(outcome_to_data(first.outcome))))
        replayed = replace(running, recorded=by_update(record))
        replay = make_version(strategy, base, updates, replayed)
        _same_bytes(first, replay, f"whether version {version} was recomputed from its record")
        prior, base = first.prior(version + 1), np.frombuffer(first.weights.tobytes())


def _rotated(data: Sample, by: int) -> list[Contribution]:
    """Return the updates in order, rotated by a number of places."""
    updates = data.contributions()
    return updates[by % len(updates) :] + updates[: by % len(updates)]


def _aggregate(strategy: Strategy, base: Vector, updates: Iterable[Contribution]) -> Vector:
    """Run the rule alone, with a plain step from zero, so that the version is the aggregate."""
    bare = Strategy(name=strategy.name, rule=strategy.rule)
    return make_version(bare, np.zeros_like(base), updates).weights


def _close(one: Vector, other: Vector, message: str) -> None:
    scale = max(float(np.max(np.abs(one))), float(np.max(np.abs(other))))
    _require(bool(np.max(np.abs(one - other)) <= _TOLERANCE * scale), message)


def check_permutation(strategy: Strategy, data: Sample) -> None:
    """Check that the order of acceptance changes the result by no more than rounding.

    Raises:
        StrategyContractError: It changed more.
    """
    forward = make_version(strategy, data.base, data.contributions())
    backward = make_version(strategy, data.base, data.contributions()[::-1])
    _close(forward.weights, backward.weights, "the order of acceptance changes the result")


def check_scaling(strategy: Strategy, data: Sample, factor: float = 4.0) -> None:
    """Check that the rule's aggregate scales with the deltas.

    Args:
        strategy: Its rule alone is run.
        data: The updates.
        factor: A power of two, so that scaling itself does not round.

    Raises:
        StrategyContractError: It does not scale.
    """
    base = np.zeros(data.base.size)
    scaled = Sample(data.base, data.deltas * np.float32(factor), data.example_counts)
    once = _aggregate(strategy, base, data.contributions())
    more = _aggregate(strategy, base, scaled.contributions())
    _close(factor * once, more, f"{factor} times the deltas is not {factor} times the aggregate")


def check_unanimity(strategy: Strategy, data: Sample) -> None:
    """Check that the rule's aggregate of identical deltas is that delta, in every float32 bit.

    Raises:
        StrategyContractError: It is not.
    """
    alike = np.broadcast_to(data.deltas[0], data.deltas.shape)
    unanimous = Sample(data.base, alike, data.example_counts)
    result = _aggregate(strategy, np.zeros(data.base.size), unanimous.contributions())
    _require(
        bool(np.array_equal(result.astype(np.float32), data.deltas[0])),
        "the aggregate of identical updates is another update",
    )


def check_strategy(
    strategy: Strategy, promises: Promises | None = None, data: Sample | None = None
) -> None:
    """Check every promise of a strategy.

    Args:
        strategy: From `build`, or put together by hand.
        promises: By default all of them.
        data: By default a sample of eleven updates, or as many as the rule needs.

    Raises:
        StrategyContractError: The first promise that was broken.
    """
    chosen = promises or Promises()
    updates = data or sample(update_count=max(11, strategy.minimum_count))
    checks: Sequence[tuple[bool, Callable[[Strategy, Sample], None]]] = (
        (True, check_slicing),
        (True, check_crash_exactness),
        (chosen.permutation, check_permutation),
        (chosen.scaling, check_scaling),
        (chosen.unanimity, check_unanimity),
    )
    for wanted, check in checks:
        if wanted:
            check(strategy, updates)
