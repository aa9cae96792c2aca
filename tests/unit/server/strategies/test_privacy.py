import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.strategies import Contribution, StrategyConfig, begin, build
from qflare_server.strategies.noise import NOISE_BLOCK, gaussian_slice, noise_key
from qflare_server.strategies.privacy import (
    AdaptiveBound,
    CentralPrivacy,
    heuristic_count_stddev,
)
from qflare_server.strategies.testkit import Running, make_version, reader_of, sample

KEY = noise_key(b"sixteen bytes or more", 3, "test")


@given(start=st.integers(0, 3 * NOISE_BLOCK), length=st.integers(0, NOISE_BLOCK + 5))
def test_a_slice_is_a_part_of_the_whole(start: int, length: int) -> None:
    whole = gaussian_slice(KEY, 0, 4 * NOISE_BLOCK + 10, 2.0)

    part = gaussian_slice(KEY, start, start + length, 2.0)

    assert part.tobytes() == whole[start : start + length].tobytes()


def test_noise_is_normal() -> None:
    samples = gaussian_slice(KEY, 0, 400_000, 3.0)

    assert abs(samples.mean()) < 0.03
    assert samples.std() == pytest.approx(3.0, rel=0.01)
    assert np.mean(np.abs(samples) > 1.959964 * 3.0) == pytest.approx(0.05, abs=0.002)


def test_blocks_are_independent() -> None:
    samples = gaussian_slice(KEY, 0, 2 * NOISE_BLOCK, 1.0)

    correlation = np.corrcoef(samples[:NOISE_BLOCK], samples[NOISE_BLOCK:])[0, 1]

    assert abs(correlation) < 0.02


@pytest.mark.parametrize(
    "other",
    [
        noise_key(b"sixteen bytes or more", 4, "test"),
        noise_key(b"sixteen bytes or more", 3, "another"),
        noise_key(b"another seed altogether", 3, "test"),
    ],
)
def test_seed_version_and_purpose_each_change_the_noise(other: bytes) -> None:
    assert not np.intersect1d(
        gaussian_slice(KEY, 0, 1000, 1.0), gaussian_slice(other, 0, 1000, 1.0)
    ).size


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes is shorter than 16"):
        noise_key(b"x" * 15, 1, "test")


def private(**settings: object) -> StrategyConfig:
    privacy = {
        "clip_norm": 1.0,
        "noise_multiplier": 0.5,
        "epsilon_budget": 50.0,
        "delta": 1e-5,
        **settings,
    }
    return StrategyConfig.from_mapping({"quorum": 8, "privacy": privacy})


def test_noise_has_the_announced_size() -> None:
    data = sample(update_count=8, element_count=200_000)

    made = make_version(build(private()), np.zeros(200_000), data.contributions())

    factors = [entry.factor for entry in made.outcome.judgements]
    clean = (np.array(factors)[:, None] * data.deltas).sum(axis=0) / 8
    assert made.outcome.noise_stddev == 0.5 * 1.0 / 8
    assert (made.weights - clean).std() == pytest.approx(0.5 / 8, rel=0.01)


def test_one_update_moves_the_sum_by_no_more_than_the_bound() -> None:
    """The denominator is fixed: leaving one update out does not scale the others."""
    data = sample(update_count=8, element_count=1_000)
    strategy = build(private())

    with_all = make_version(strategy, np.zeros(1_000), data.contributions()).weights
    without = make_version(strategy, np.zeros(1_000), data.contributions()[1:]).weights

    assert np.linalg.norm(with_all - without) <= 1.0 / 8 * (1 + 1e-9)


def test_the_denominator_may_be_set() -> None:
    strategy = build(private(expected_update_count=100))
    data = sample(update_count=8, element_count=100)

    outcome = make_version(strategy, np.zeros(100), data.contributions()).outcome

    assert (outcome.weight_sum, outcome.noise_stddev) == (100.0, 0.005)


def test_weights_are_uniform_under_privacy() -> None:
    cohort = [
        Contribution("a", 1, reader_of(np.array([0.5]))),
        Contribution("b", 10**9, reader_of(np.array([0.5]))),
    ]

    outcome = make_version(build(private()), np.zeros(1), cohort).outcome

    assert outcome.coefficients == {"a": 1.0, "b": 1.0}


def test_every_version_has_noise_of_its_own() -> None:
    data = sample(update_count=8, element_count=100)
    strategy = build(private(noise_multiplier=2.0))
    first = make_version(strategy, np.zeros(100), data.contributions())

    second = make_version(
        strategy, np.zeros(100), data.contributions(), Running(prior=first.prior(2))
    )

    assert not np.intersect1d(first.weights, second.weights).size


def test_privacy_without_a_seed_is_refused() -> None:
    aggregation = begin(build(private()), 1, reader_of(np.zeros(1)))
    aggregation.add(Contribution("a", 1, reader_of(np.zeros(1))))

    with pytest.raises(ValueError, match="needs a noise seed"):
        list(aggregation.finish())


@pytest.mark.parametrize("start", [1e-3, 100.0])
def test_the_adaptive_bound_finds_the_quantile(start: float) -> None:
    """Norms are spread evenly over (0, 2): the 0.75 quantile is 1.5."""
    norms = np.linspace(0.0, 2.0, 201)[1:]
    config = private(clip_norm=start, adaptive_quantile=0.75, expected_update_count=200)
    strategy, prior = build(config), None
    cohort = [Contribution(str(i), 1, reader_of(np.array([norm]))) for i, norm in enumerate(norms)]

    for version in range(1, 121):
        running = Running(prior=prior) if prior else Running()
        made = make_version(strategy, np.zeros(1), cohort, running)
        prior = made.prior(version + 1)

    assert made.outcome.scalars["clip_bound"] == pytest.approx(1.5, rel=0.15)


def test_the_bound_moves_by_the_papers_step() -> None:
    adaptive = AdaptiveBound(quantile=0.5, learning_rate=0.2, count_stddev=1.0)

    assert adaptive.next_bound(3.0, 0.9) == pytest.approx(3.0 * math.exp(-0.2 * 0.4))


def test_sum_and_count_share_the_noise_multiplier() -> None:
    privacy = CentralPrivacy(1.0, 0.7, 100, AdaptiveBound(0.5, 0.2, heuristic_count_stddev(100)))

    split = privacy.sum_noise_multiplier

    assert split > 0.7
    assert 1.0 / math.sqrt(split**-2 + (2.0 * 5.0) ** -2) == pytest.approx(0.7)


def test_a_fixed_bound_keeps_no_numbers() -> None:
    data = sample(update_count=8, element_count=10)

    outcome = make_version(build(private()), np.zeros(10), data.contributions()).outcome

    assert outcome.scalars == {}
