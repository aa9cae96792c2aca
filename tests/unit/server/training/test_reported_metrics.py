"""What devices report and what of it a version states: always what every device takes."""

import math

from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto.signing import SigningContext
from qflare.evidence.forms import check_form
from qflare.v1 import security_pb2
from qflare_server.training.reported_metrics import (
    MAX_METRICS,
    MAX_NAMES,
    TRAINING,
    Means,
    check_metrics,
    stated,
)
from tests.support.statements import statement_of

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=100)
REPORTS = st.dictionaries(
    NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=MAX_METRICS
)
COUNTS = st.integers(1, 2**40)


def with_metrics(metrics: dict[str, float]) -> bytes:
    statement = security_pb2.ModelStatement.FromString(statement_of(security_pb2.KEY_ROLE_MODEL))
    statement.metrics.update(metrics)
    return statement.SerializeToString(deterministic=True)


@given(st.lists(st.tuples(REPORTS, COUNTS), max_size=5), st.lists(NAMES, max_size=3))
def test_whatever_devices_report_the_version_can_be_signed(
    reports: list[tuple[dict[str, float], int]], wanted: list[str]
) -> None:
    means = Means()
    for metrics, count in reports:
        check_metrics(metrics)
        means.add(metrics, count)

    chosen = means.most_reported(TRAINING, [TRAINING + name for name in wanted])

    check_form(SigningContext.MODEL, with_metrics(chosen))
    assert stated(chosen) == chosen
    assert chosen.items() <= means.means(TRAINING).items()


@given(st.dictionaries(st.text(max_size=150), st.just(1.0), max_size=90))
def test_whatever_a_version_has_gathered_its_rollback_can_be_signed(
    metrics: dict[str, float],
) -> None:
    chosen = {name: value for name, value in stated(metrics).items() if name}

    check_form(SigningContext.MODEL, with_metrics(chosen))


def test_the_longest_name_that_a_version_states() -> None:
    means = Means()
    means.add({"x" * 94: 1.0, "y" * 95: 2.0}, 10)

    assert means.most_reported(TRAINING) == {TRAINING + "x" * 94: 1.0}


def test_what_most_devices_report_stays() -> None:
    """Two devices name forty metrics each that no one else has; their examples do not help them."""
    means = Means()
    for device in range(2):
        means.add({f"{device}-{number:02}": 1.0 for number in range(40)}, 2**40)
    for _ in range(3):
        means.add({"accuracy": 0.5}, 1)

    chosen = means.most_reported(TRAINING)

    assert len(chosen) == MAX_METRICS
    assert chosen["train_accuracy"] == 0.5


def test_what_decides_comes_first() -> None:
    means = Means()
    means.add({f"metric-{number:02}": 1.0 for number in range(64)}, 10)
    means.add({f"metric-{number:02}": 1.0 for number in range(64)}, 10)
    means.add({"recall": 0.25}, 10)

    assert "train_recall" not in means.most_reported(TRAINING)
    assert means.most_reported(TRAINING, ["train_recall"])["train_recall"] == 0.25


def test_names_without_end_fill_no_memory() -> None:
    means = Means()
    for device in range(100):
        means.add({f"{device}-{number}": 1.0 for number in range(64)}, 1)

    assert len(means.means()) == MAX_NAMES


def test_a_mean_beyond_float64_is_left_out() -> None:
    means = Means()
    means.add({"loss": 1.7e308, "accuracy": 0.5}, 3)
    means.add({"loss": -1.7e308, "accuracy": 0.5}, 2**40)

    assert means.means() == {"accuracy": 0.5}
    assert math.isfinite(means.means()["accuracy"])
