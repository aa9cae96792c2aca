import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.strategies import Contribution, StrategyConfig, begin, build
from qflare_server.strategies.noise import (
    NOISE_BLOCK,
    BoundNoise,
    Noise,
    VersionNoise,
    _normal,
    noise_key,
)
from qflare_server.strategies.privacy import (
    AdaptiveBound,
    CentralPrivacy,
    heuristic_count_stddev,
)
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of, sample
from tests.unit.server.strategies.updates import Array, contributions

SEED = b"sixteen bytes or more"
UPDATES = ("ab" * 32, "cd" * 32)
BOUND = BoundNoise(SEED, 3, UPDATES)
BEFORE = VersionNoise(SEED, 3)
"""Noise of versions that were made by revision 1."""

EITHER = pytest.mark.parametrize("noise", [BOUND, BEFORE], ids=["bound", "revision 1"])
TOTAL = 4 * NOISE_BLOCK + 10


@pytest.fixture(scope="module")
def whole() -> dict[Noise, Array]:
    return {noise: noise.gaussian("test", 0, TOTAL, 2.0) for noise in (BOUND, BEFORE)}


@EITHER
@given(start=st.integers(0, 3 * NOISE_BLOCK), length=st.integers(0, NOISE_BLOCK + 5))
def test_a_slice_is_a_part_of_the_whole(
    whole: dict[Noise, Array], noise: Noise, start: int, length: int
) -> None:
    part = noise.gaussian("test", start, start + length, 2.0)

    assert part.tobytes() == whole[noise][start : start + length].tobytes()


def test_the_order_of_updates_does_not_change_the_noise() -> None:
    """The sum of the same updates in another order is the same but for rounding."""
    other = BoundNoise(SEED, 3, UPDATES[::-1])

    assert other.gaussian("test", 0, 9, 1.0).tolist() == BOUND.gaussian("test", 0, 9, 1.0).tolist()


@EITHER
def test_noise_is_normal(noise: Noise) -> None:
    samples = noise.gaussian("test", 0, 400_000, 3.0)

    assert abs(samples.mean()) < 0.03
    assert samples.std() == pytest.approx(3.0, rel=0.01)
    for bound, share in ((1.959964, 0.05), (2.575829, 0.01), (3.290527, 0.001)):
        assert np.mean(np.abs(samples) > bound * 3.0) == pytest.approx(share, rel=0.15)


@EITHER
def test_neighbors_are_independent(noise: Noise) -> None:
    samples = noise.gaussian("test", 0, 2 * NOISE_BLOCK, 1.0)

    for distance in (1, 2, 3, NOISE_BLOCK):
        assert abs(np.corrcoef(samples[:-distance], samples[distance:])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("noise", "purpose"),
    [
        (BoundNoise(SEED, 4, UPDATES), "test"),
        (BoundNoise(b"another seed altogether", 3, UPDATES), "test"),
        (BoundNoise(SEED, 3, UPDATES[:1]), "test"),
        (BoundNoise(SEED, 3, ["".join(UPDATES)]), "test"),
        (BOUND, "another"),
        (BEFORE, "test"),
    ],
)
def test_seed_version_purpose_and_updates_each_change_the_noise(noise: Noise, purpose: str) -> None:
    one, other = BOUND.gaussian("test", 0, 4000, 1.0), noise.gaussian(purpose, 0, 4000, 1.0)

    assert not np.intersect1d(one, other).size
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


DIGESTS = st.lists(st.text("0a:,", min_size=0, max_size=3), max_size=4)


@given(one=DIGESTS, other=DIGESTS, version=st.integers(1, 3), number=st.integers(1, 3))
def test_no_two_sets_of_updates_share_their_noise(
    one: list[str], other: list[str], version: int, number: int
) -> None:
    """However their digests are cut, joined or repeated: the difference of two versions keeps both noises."""
    first = BoundNoise(SEED, version, one).gaussian("aggregate", 0, 64, 1.0)
    second = BoundNoise(SEED, number, other).gaussian("aggregate", 0, 64, 1.0)

    is_same = (version, sorted(one)) == (number, sorted(other))
    assert np.array_equal(first, second) == is_same
    assert is_same or not np.intersect1d(first, second).size


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (BOUND, "e89ef7a449818f5e400b15740c48c549f9b08f80dec44e181b94869960404b9e"),
        (BEFORE, "8cfc756188162109846793d41d206e46d6e003b3b6ae1c5d7cb1206b1bcdb171"),
    ],
)
def test_noise_of_published_versions_never_changes(noise: Noise, expected: str) -> None:
    samples = noise.gaussian("aggregate", 70_001, 70_100, 0.25).astype(np.float32)

    assert hashlib.sha256(samples.tobytes()).hexdigest() == expected


@pytest.mark.parametrize(
    "make", [lambda: BoundNoise(b"x" * 15, 1, ()), lambda: noise_key(b"x" * 15, 1, "")]
)
def test_a_short_seed_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="15 bytes is shorter than 16"):
        make()


def test_samples_in_the_tails_keep_their_resolution() -> None:
    """One float32 in the tail stands for many samples, so none of them is a mark."""
    words = np.arange(2**24, dtype=np.uint64) * np.uint64(2)

    tail = _normal(words)

    assert tail.min() < -9.0
    assert np.isfinite(tail).all()


def test_low_bits_tell_nothing_of_who_changed_what() -> None:
    """Released numbers are floats of 32 bits, whether anything was added to the noise or not."""
    deltas = np.zeros((8, 1_000))
    deltas[:, ::2] = 1e-3 / 3

    made = make_version(build(private()), np.zeros(1_000), contributions(deltas)).weights

    assert np.array_equal(made, made.astype(np.float32))


def test_an_update_that_cannot_be_measured_is_clipped_to_nothing() -> None:
    """To refuse it would change the number of contributors by what is in it."""
    deltas = np.zeros((8, 10))
    deltas[3] = 1e306

    outcome = make_version(build(private()), np.zeros(10), contributions(deltas)).outcome

    assert not outcome.rejected
    assert outcome.judgements[3].factor == 0.0
    assert outcome.judgements[3].contributes


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

    def with_the_same_noise(updates: list[Contribution]) -> Array:
        aggregation = begin(
            strategy, 1_000, reader_of(np.zeros(1_000)), noise_seed=SEED, revision=1
        )
        aggregation.extend(updates)
        return np.concatenate([piece.weights for piece in aggregation.finish()])

    with_all = with_the_same_noise(data.contributions())
    without = with_the_same_noise(data.contributions()[1:])

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
        strategy, np.zeros(100), data.contributions(), RunOptions(prior=first.prior(2))
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
        running = RunOptions(prior=prior) if prior else RunOptions()
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
