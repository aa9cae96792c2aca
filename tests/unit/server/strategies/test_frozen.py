"""What nobody changed stays the same to the last bit, whatever rule and optimizer step over it."""

from typing import Any

import numpy as np
import pytest

from qflare_server.strategies import Contribution, StrategyConfig, begin, build
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of

SIZE = 5_000
SETTINGS: list[dict[str, Any]] = [
    {"name": "fedavg"},
    {"name": "fedavg", "clip_norm": 0.5},
    {"name": "fedavgm"},
    {"name": "fedadam"},
    {"name": "fedyogi"},
    {"name": "fedadagrad"},
    {"name": "median"},
    {"name": "trimmed_mean", "trimmed_fraction": 0.2},
    {"name": "krum", "byzantine_count": 1},
    {"name": "multi_krum", "byzantine_count": 1},
    {"name": "bulyan", "byzantine_count": 1},
    {"name": "geometric_median"},
]


def trained(base: Any, generator: np.random.Generator, dtype: str) -> list[Contribution]:
    """Seven devices train the second half of a model; the first half is frozen."""
    updates = []
    for number in range(7):
        weights = base.copy()
        weights[SIZE // 2 :] += generator.standard_normal(SIZE - SIZE // 2).astype(dtype)
        reader = reader_of(weights)
        updates.append(Contribution(f"{number}", 3 * number + 1, reader, full_weights=True))
    return updates


@pytest.mark.parametrize("dtype", ["<f8", "<f4"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frozen_tensors_do_not_drift(settings: dict[str, Any], dtype: str) -> None:
    generator = np.random.default_rng(5)
    strategy = build(StrategyConfig.from_mapping({"quorum": 7, **settings}))
    base: Any = generator.standard_normal(SIZE).astype(dtype)
    base[:10] = -0.0
    first, running = base, RunOptions()

    for version in range(2, 5):
        made = make_version(strategy, base, trained(base, generator, dtype), running)
        running = RunOptions(prior=made.prior(version))
        base = made.weights.astype(dtype)

    half = SIZE // 2
    assert base[:half].tobytes() == first[:half].tobytes()
    assert not np.array_equal(base[half:], first[half:])


def test_versions_of_before_are_added_up_as_before() -> None:
    """Revision 1 subtracted the base version once, after the weights were added up."""
    generator = np.random.default_rng(6)
    base = generator.standard_normal(SIZE)
    updates = trained(base, generator, "<f8")
    aggregation = begin(
        build(StrategyConfig(name="fedavg", quorum=7)), SIZE, reader_of(base), revision=1
    )

    aggregation.extend(updates)
    weights = np.concatenate([piece.weights for piece in aggregation.finish()])

    total, factors = np.zeros(SIZE), 0.0
    for update in updates:
        total += update.read(0, SIZE) * float(update.example_count)
        factors += update.example_count
    assert weights.tobytes() == (base + (total - factors * base) / factors).tobytes()
    assert not np.array_equal(weights[: SIZE // 2], base[: SIZE // 2])
