from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from qflare_server.strategies import (
    Accumulator,
    Contribution,
    NotEnoughUpdatesError,
    SpareTotal,
    StrategyConfig,
    UpdateAssessment,
    build,
)
from qflare_server.strategies.blocks import BLOCK
from qflare_server.strategies.fedavg import BufferedMean
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of, sample
from tests.unit.server.strategies.updates import Aggregate, Deltas

Narrow: TypeAlias = NDArray[np.float32]
FEDAVG = build(StrategyConfig(name="fedavg"))
FINITE32 = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def weighted(values: list[float], counts: list[int]) -> list[Contribution]:
    return [
        Contribution(str(index), count, reader_of(np.array([value], dtype=np.float32)))
        for index, (value, count) in enumerate(zip(values, counts, strict=True))
    ]


def test_weighs_by_example_count(deltas: Deltas, aggregate: Aggregate) -> None:
    counts = list(range(1, len(deltas) + 1))

    result = aggregate(deltas, counts, name="fedavg")

    expected = np.average(deltas.astype(np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12 * abs(deltas).max())


def test_uniform_weighting_ignores_example_counts(deltas: Deltas, aggregate: Aggregate) -> None:
    result = aggregate(deltas, list(range(11)), name="fedavg", weighting="uniform")

    np.testing.assert_allclose(
        result, deltas.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-12 * abs(deltas).max()
    )


@given(
    update=arrays(np.float32, 9, elements=FINITE32),
    base=arrays(np.float32, 9, elements=FINITE32),
    counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=20),
    full=st.booleans(),
)
def test_average_of_identical_updates_is_that_update(
    update: Narrow, base: Narrow, counts: list[int], full: bool
) -> None:
    delta = update.astype(np.float64) - base
    read = reader_of(update) if full else reader_of(delta)
    cohort = [Contribution(str(i), c, read, full_weights=full) for i, c in enumerate(counts)]

    made = make_version(FEDAVG, base, cohort)

    np.testing.assert_allclose(
        made.weights, update, rtol=1e-7, atol=2e-15 * float(np.abs(base).max(initial=1.0))
    )


@given(
    values=st.lists(FINITE32, min_size=2, max_size=12),
    factor=st.integers(1, 1000),
    seed=st.integers(0, 99),
)
def test_scaling_every_example_count_changes_nothing(
    values: list[float], factor: int, seed: int
) -> None:
    counts = [int(c) for c in np.random.default_rng(seed).integers(1, 50, len(values))]

    once = make_version(FEDAVG, np.zeros(1), weighted(values, counts)).weights
    more = make_version(FEDAVG, np.zeros(1), weighted(values, [factor * c for c in counts])).weights

    np.testing.assert_allclose(once, more, rtol=1e-12, atol=1e-9)


@given(values=st.lists(FINITE32, min_size=1, max_size=12), seed=st.integers(0, 99))
def test_order_changes_rounding_only(values: list[float], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(values))
    cohort = weighted(values, [index + 1 for index in range(len(values))])

    forward = make_version(FEDAVG, np.zeros(1), cohort).weights
    shuffled = make_version(FEDAVG, np.zeros(1), [cohort[index] for index in order]).weights

    np.testing.assert_allclose(forward, shuffled, rtol=0, atol=1e-12 * max(map(abs, values)))


@settings(max_examples=25)
@given(
    size=st.sampled_from([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]),
    threads=st.integers(1, 4),
    cut=st.integers(0, 5),
)
def test_bytes_do_not_depend_on_threads_or_grouping(size: int, threads: int, cut: int) -> None:
    data = sample(update_count=5, element_count=size)
    updates = data.contributions()
    expected = make_version(FEDAVG, data.base, updates).weights

    accumulator = Accumulator(FEDAVG, size, reader_of(data.base), thread_count=threads)
    accumulator.extend(updates[:cut])
    accumulator.extend(updates[cut:])

    made = np.concatenate([piece.weights for piece in accumulator.finish()])
    assert made.tobytes() == expected.tobytes()


@settings(max_examples=25)
@given(
    full=st.booleans(),
    threads=st.sampled_from([1, 2, 4]),
    length=st.sampled_from([1_000, BLOCK - 1, BLOCK, 2 * BLOCK]),
    resident=st.sampled_from([0, 2**30]),
    name=st.sampled_from(["fedavg", "fedadam"]),
    clip_norm=st.sampled_from([0.0, 0.5]),
)
def test_bytes_do_not_depend_on_slices(
    full: bool, threads: int, length: int, resident: int, name: str, clip_norm: float
) -> None:
    """A total in memory, or one slice of it at a time; cut anywhere, summed by any number of threads."""
    data = sample(update_count=4, element_count=3 * BLOCK + 5)
    strategy = build(StrategyConfig.from_mapping({"name": name, "clip_norm": clip_norm}))
    updates = [replace(update, full_weights=full) for update in data.contributions()]
    expected = make_version(strategy, data.base, updates).weights

    accumulator = Accumulator(
        strategy,
        data.base.size,
        reader_of(data.base),
        thread_count=threads,
        resident_bytes=resident,
        slice_elements=length,
    )
    accumulator.extend(updates)

    made = np.concatenate([piece.weights for piece in accumulator.finish()])
    assert made.tobytes() == expected.tobytes()


def test_full_weights_and_deltas_mix() -> None:
    base = np.array([1.0, 2.0], dtype=np.float32)
    cohort = [
        Contribution("a", 1, reader_of(np.array([3.0, 2.0], dtype=np.float32)), full_weights=True),
        Contribution("b", 3, reader_of(np.array([4.0, -4.0], dtype=np.float32))),
    ]

    made = make_version(FEDAVG, base, cohort)

    assert made.weights.tolist() == [1.0 + 3.5, 2.0 - 3.0]


def test_finish_may_be_repeated() -> None:
    data = sample(update_count=2, element_count=10)
    accumulator = Accumulator(FEDAVG, 10, reader_of(data.base))
    accumulator.extend(data.contributions())

    first = [piece.weights.tobytes() for piece in accumulator.finish()]

    assert [piece.weights.tobytes() for piece in accumulator.finish()] == first


def totals_in_turn(spare: SpareTotal, round_count: int) -> list[Narrow]:
    """Return the weights of rounds of one training session, one after the other."""
    made = []
    for number in range(round_count):
        accumulator = Accumulator(FEDAVG, 3, reader_of(np.ones(3, np.float32)), spare=spare)
        values = np.array([number, -0.0, 1.5], np.float32)
        accumulator.add(Contribution("a", 3, reader_of(values), full_weights=True))
        made.append(np.concatenate([piece.weights for piece in accumulator.finish()]))
        accumulator.release_total("session")
    return made


def test_a_total_that_was_used_before_does_not_change_a_bit() -> None:
    alone = [weights.tobytes() for weights in totals_in_turn(SpareTotal(), 3)]
    spare = SpareTotal()
    spare.give("session", np.full(3, np.nan))

    assert [weights.tobytes() for weights in totals_in_turn(spare, 3)] == alone


def test_a_total_is_kept_for_its_owner_only_while_that_has_rounds() -> None:
    spare, total = SpareTotal(), np.zeros(3)
    spare.give("session", total)
    spare.retain({"session", "another"})
    assert spare.take(3) is total

    spare.give("session", total)
    assert spare.take(4) is not total
    spare.give("session", total)
    spare.retain({"another"})
    assert spare.take(3) is not total


def test_updates_without_a_share_leave_nothing_of_a_total_that_was_used_before() -> None:
    spare = SpareTotal()
    spare.give("session", np.full(1, np.nan))
    buffered = build(StrategyConfig(name="fedavg", weighting="uniform"))
    accumulator = Accumulator(buffered, 1, reader_of(np.ones(1, np.float32)), spare=spare)
    zero = UpdateAssessment("a", factor=0.0, coefficient=1.0, weight=1.0, rejection="", norm=0.0)
    accumulator._judgements["a"] = zero

    (piece,) = accumulator.finish()

    assert piece.weights.tolist() == [1.0]


def test_refuses_the_same_update_twice() -> None:
    accumulator = Accumulator(FEDAVG, 1, reader_of(np.zeros(1)))
    update = weighted([1.0], [1])[0]
    accumulator.add(update)

    with pytest.raises(ValueError, match="taken in before"):
        accumulator.add(update)


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_refuses_weights_that_add_up_to_zero(counts: list[int]) -> None:
    with pytest.raises(NotEnoughUpdatesError):
        make_version(FEDAVG, np.zeros(1), weighted([1.0] * len(counts), counts))


def test_a_zero_example_count_takes_no_part() -> None:
    made = make_version(FEDAVG, np.zeros(1), weighted([5.0, 1.0], [0, 2]))

    assert made.weights.tolist() == [1.0]
    assert made.outcome.coefficients == {"0": 0.0, "1": 2.0}


def test_a_cohort_rule_cannot_fold() -> None:
    with pytest.raises(TypeError, match="cannot fold"):
        Accumulator(build(StrategyConfig(name="median")), 1, reader_of(np.zeros(1)))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"example_count": -1}, "example count"),
        ({"staleness": -1}, "staleness"),
        ({"staleness": 1, "full_weights": True}, "must be a delta"),
    ],
)
def test_a_contribution_refuses_impossible_facts(settings: dict[str, object], reason: str) -> None:
    facts: dict[str, Any] = {"update_id": "a", "example_count": 1, **settings}

    with pytest.raises(ValueError, match=reason):
        Contribution(read=reader_of(np.zeros(1)), **facts)


def test_fedbuff_scales_by_staleness_over_the_buffer_size() -> None:
    config = StrategyConfig(name="fedbuff", quorum=2, asynchronous=True, max_staleness=3)
    cohort = [
        Contribution("fresh", 5, reader_of(np.array([1.0]))),
        Contribution("stale", 9, reader_of(np.array([4.0])), staleness=3),
    ]

    made = make_version(build(config), np.zeros(1), cohort)

    assert made.weights.tolist() == [(1.0 + 4.0 / 2.0) / 2.0]


def test_fedbuff_refuses_updates_past_the_maximum_staleness() -> None:
    config = StrategyConfig(name="fedbuff", quorum=2, asynchronous=True, max_staleness=3)
    cohort = [
        Contribution("fresh", 1, reader_of(np.array([1.0]))),
        Contribution("ancient", 1, reader_of(np.array([100.0])), staleness=4),
    ]

    made = make_version(build(config), np.zeros(1), cohort)

    assert made.weights.tolist() == [1.0]
    assert made.outcome.rejected == {"ancient": "staleness 4 exceeds the bound of 3"}


def test_fedbuff_may_weigh_by_examples() -> None:
    facts = build(
        StrategyConfig(name="fedbuff", quorum=1, asynchronous=True, weighting="examples")
    ).rule

    assert facts == BufferedMean("examples")


@pytest.mark.parametrize("wide", [False, True])
def test_leaves_what_it_reads_alone(wide: bool) -> None:
    data = sample(update_count=3, element_count=100)
    before = data.deltas.copy()

    make_version(FEDAVG, data.base, data.contributions(wide=wide), RunOptions(thread_count=2))

    assert np.array_equal(data.deltas, before)
