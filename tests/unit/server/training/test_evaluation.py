"""Which versions are measured, and what the means of reports are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.v1 import training_pb2
from qflare_server.training.evaluation import is_due, is_worth_summarising, weighted_means


@pytest.mark.parametrize(
    ("every", "round_number", "due"),
    [(0, 4, False), (1, 1, True), (2, 3, False), (2, 4, True), (1, 0, False)],
)
def test_versions_are_due_every_so_many_rounds(every: int, round_number: int, due: bool) -> None:
    assert is_due(training_pb2.EvaluationPolicy(every_rounds=every), round_number) is due


def test_means_are_weighted_by_examples() -> None:
    reports = [(1, {"accuracy": 0.0}), (3, {"accuracy": 1.0, "loss": 2.0})]
    assert weighted_means(reports) == {"accuracy": 0.75, "loss": 2.0}


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**53), st.floats(allow_nan=False, allow_infinity=False, width=32)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_mean_lies_between_the_reports(reports: list[tuple[int, float]]) -> None:
    mean = weighted_means([(count, {"m": value}) for count, value in reports])["m"]
    values = [value for _, value in reports]
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= mean <= max(values) + slack


def test_few_reports_are_all_summarised_and_many_in_proportion() -> None:
    assert all(is_worth_summarising(count) for count in range(1, 64))
    total = sum(count for count in range(1, 10_001) if is_worth_summarising(count))
    assert total < 64 * 10_000
