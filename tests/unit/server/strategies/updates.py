"""Updates for the strategy tests: small, awkward, and always the same for a seed."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies import Contribution, StrategyConfig, build
from qflare_server.strategies.testkit import make_version, reader_of

Array: TypeAlias = NDArray[np.float64]
Deltas: TypeAlias = NDArray[np.floating]
Aggregate: TypeAlias = Callable[..., Array]
Maker: TypeAlias = Callable[[np.random.Generator, int, int], Deltas]


def contributions(deltas: Deltas, counts: Sequence[int] | None = None) -> list[Contribution]:
    return [
        Contribution(f"{index:03}", counts[index] if counts else 1, reader_of(delta))
        for index, delta in enumerate(deltas)
    ]


def aggregate_deltas(
    deltas: Deltas, counts: Sequence[int] | None = None, **settings: object
) -> Array:
    """Aggregate deltas around a zero base version by a configuration given as keywords."""
    config = StrategyConfig.from_mapping({"quorum": len(deltas), **settings})
    base = np.zeros(deltas.shape[1])
    return make_version(build(config), base, contributions(deltas, counts)).weights


def clustered(generator: np.random.Generator, count: int, size: int) -> Deltas:
    return generator.standard_normal(size) + 0.1 * generator.standard_normal((count, size))


def adversarial(generator: np.random.Generator, count: int, size: int) -> Deltas:
    """Two in eleven are hostile: one huge, one a flipped sign ten times over."""
    deltas = clustered(generator, count, size)
    deltas[count // 2] = 1e6 * generator.standard_normal(size)
    deltas[-1] = -10.0 * deltas[0]
    return deltas


def wide(generator: np.random.Generator, count: int, size: int) -> Deltas:
    """Magnitudes from 1e-6 to 1e6 within every update."""
    return generator.standard_normal((count, size)) * 10.0 ** generator.uniform(-6, 6, size)


def discrete(generator: np.random.Generator, count: int, size: int) -> Deltas:
    """Few distinct values and both zeros, so that ties are everywhere."""
    return generator.choice([-1.0, -0.0, 0.0, 0.5, 2.0], size=(count, size)) + 1e-3 * (
        generator.standard_normal((count, 1))
    )
