"""Which versions are measured, and what the means of reports are."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.v1 import training_pb2
from qflare_server.training.evaluation import (
    evaluation_nonce,
    is_due,
    is_worth_summarizing,
    robust_means,
)


@pytest.mark.parametrize(
    ("every", "round_number", "due"),
    [(0, 4, False), (1, 1, True), (2, 3, False), (2, 4, True), (1, 0, False)],
)
def test_versions_are_due_every_so_many_rounds(every: int, round_number: int, due: bool) -> None:
    assert is_due(training_pb2.EvaluationPolicy(every_rounds=every), round_number) is due


def means(
    *reports: tuple[int, dict[str, float]], quorum: int = 1, **policy: Any
) -> dict[str, float]:
    return robust_means(training_pb2.EvaluationPolicy(**policy), reports, quorum)


def test_means_are_weighted_by_examples() -> None:
    reports = [(1, {"accuracy": 0.0}), (3, {"accuracy": 1.0, "loss": 2.0})]
    assert means(*reports) == {"accuracy": 0.75, "loss": 2.0}


def test_a_metric_counts_once_a_quorum_holds_it() -> None:
    reports = [(1, {"accuracy": 0.5}), (1, {"accuracy": 0.5, "rare": 1.0})]
    assert means(*reports, quorum=2) == {"accuracy": 0.5}
    assert means(*reports[1:], quorum=2) == {}


@pytest.mark.parametrize("liar", [(2**40, -1e300), (2**40, 1e300), (1, 1e300)])
def test_from_five_reports_on_one_liar_stays_without_effect(liar: tuple[int, float]) -> None:
    honest = [(10 + number, {"accuracy": 0.5 + number / 100}) for number in range(4)]
    mean = means(*honest, (liar[0], {"accuracy": liar[1]}))["accuracy"]
    assert 0.5 <= mean <= 0.53


def test_how_much_is_left_out_is_a_setting() -> None:
    reports = [(1, {"m": value}) for value in (0.0, 1.0, 1.0, 1.0, 6.0)]
    assert means(*reports)["m"] == 1.0
    assert means(*reports, trim_fraction=0.0)["m"] == pytest.approx(1.8)
    assert means(*reports, trim_from_count=6)["m"] == pytest.approx(1.8)
    assert means(*reports[2:], trim_from_count=3)["m"] == 1.0


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**53), st.floats(allow_nan=False, allow_infinity=False, width=32)
        ),
        min_size=1,
        max_size=20,
    ),
    st.lists(st.tuples(st.integers(1, 2**53), st.floats(-1e300, 1e300)), max_size=4),
)
def test_a_mean_lies_between_the_honest_reports(
    honest: list[tuple[int, float]], liars: list[tuple[int, float]]
) -> None:
    """Whatever a fifth of the reports says, where so many are left out at either end."""
    count = len(honest) + len(liars)
    outnumbered = not liars or (count >= 5 and len(liars) <= max(1, count // 5))
    reports = [(weight, {"m": value}) for weight, value in honest + liars]
    mean = means(*reports)["m"]
    values = [value for _, value in honest]
    slack = 1e-9 * max(1.0, *map(abs, values))
    if outnumbered:
        assert min(values) - slack <= mean <= max(values) + slack


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**40), st.sampled_from([1.7976931348623157e308, -1.7e308, 0.0, 5e-324])
        ),
        min_size=1,
    )
)
def test_no_report_is_too_large_to_be_added_up(reports: list[tuple[int, float]]) -> None:
    found = means(*((weight, {"m": value}) for weight, value in reports))
    assert all(math.isfinite(mean) for mean in found.values())


@given(st.text(), st.integers(0, 2**31 - 1), st.text())
def test_a_nonce_is_that_of_one_device_and_version(
    session_id: str, version: int, device_id: str
) -> None:
    key = bytes(range(32))
    nonce = evaluation_nonce(key, session_id, version, device_id)
    others = {
        evaluation_nonce(bytes(32), session_id, version, device_id),
        evaluation_nonce(key, session_id + "x", version, device_id),
        evaluation_nonce(key, session_id, version + 1, device_id),
        evaluation_nonce(key, session_id, version, device_id + "x"),
    }
    assert len(nonce) == 64
    assert nonce not in others


def test_few_reports_are_all_summarized_and_many_in_proportion() -> None:
    assert all(is_worth_summarizing(count) for count in range(1, 64))
    total = sum(count for count in range(1, 10_001) if is_worth_summarizing(count))
    assert total < 64 * 10_000
