import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_server.strategies import Contribution, NotEnoughUpdatesError, StrategyConfig, build
from qflare_server.strategies.cohort import CohortAggregation, slice_elements
from qflare_server.strategies.testkit import make_version, reader_of, sample


@pytest.mark.parametrize(
    ("updates", "budget", "threads"),
    [(10, 64 << 20, 1), (100, 64 << 20, 2), (1_000, 256 << 20, 2), (3, 1 << 20, 1)],
)
def test_slices_stay_within_the_budget(updates: int, budget: int, threads: int) -> None:
    length = slice_elements(updates, budget, threads)

    assert 1_024 <= length <= 262_144
    assert length * updates * 8 * threads <= budget


def test_a_slice_is_never_tiny() -> None:
    assert slice_elements(10**6, 1) == 1_024


def test_a_fold_rule_is_no_cohort_rule() -> None:
    with pytest.raises(TypeError, match="use an Accumulator"):
        CohortAggregation(build(StrategyConfig()), 1, reader_of(np.zeros(1)))


def test_refuses_the_same_update_twice() -> None:
    aggregation = CohortAggregation(build(StrategyConfig(name="median")), 1, reader_of(np.zeros(1)))
    update = Contribution("a", 1, reader_of(np.ones(1)))
    aggregation.add(update)

    with pytest.raises(ValueError, match="taken in before"):
        aggregation.add(update)


def test_no_update_gives_no_version() -> None:
    with pytest.raises(NotEnoughUpdatesError):
        make_version(build(StrategyConfig(name="median")), np.zeros(1), [])


def test_example_counts_of_zero_give_no_version() -> None:
    strategy = build(StrategyConfig(name="geometric_median", weighting="examples"))

    with pytest.raises(NotEnoughUpdatesError, match="add up to zero"):
        make_version(strategy, np.zeros(1), [Contribution("a", 0, reader_of(np.ones(1)))])


def test_an_update_that_takes_no_part_is_not_read_for_combining() -> None:
    """Krum reads everyone for the Gram matrix, and one update afterwards."""
    data = sample(update_count=5, element_count=10)
    calls: dict[str, int] = {}

    def counting(update: Contribution) -> Contribution:
        def read(start: int, stop: int) -> NDArray[np.floating]:
            calls[update.update_id] = calls.get(update.update_id, 0) + 1
            return update.read(start, stop)

        return Contribution(update.update_id, update.example_count, read)

    strategy = build(StrategyConfig(name="krum", quorum=5, byzantine_count=1))
    make_version(strategy, data.base, [counting(update) for update in data.contributions()])

    assert sorted(calls.values()) == [1, 1, 1, 1, 2]


def test_a_model_without_floating_elements_has_no_slices() -> None:
    empty = np.zeros(0)
    for name in ("fedavg", "median", "krum"):
        cohort = [Contribution(str(index), 1, reader_of(empty)) for index in range(3)]

        made = make_version(build(StrategyConfig(name=name, quorum=3)), empty, cohort)

        assert made.weights.size == 0
