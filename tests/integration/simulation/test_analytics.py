"""Queries of federated analytics in simulations: functions of virtual devices, and the results of real queries."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare.analytics.queries import Query
from qflare_client import LocalPrivacy
from qflare_simulation import History, SimulationError, ready, simulate

EPSILON = 600.0
"""So much that the noise is far below a value, and results can be compared."""

MASKED = {"secure_aggregation.mode": "SECURE_AGGREGATION_MODE_HELPER"}
GROUPS = {
    "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_NEIGHBORS",
    "secure_aggregation.corrupt_fraction": 0.1,
}
AGES = [np.arange(20, 20 + 5 * count) % 97 for count in range(1, 6)]
PROGRAM = """
def labels(query, data):
    return data.labels
"""
CONFIG = """
[rounds]
quorum = 10

[analytics]
column = "label"
kind = "ANALYTICS_KIND_LABELS"
labels = ["0", "1"]
max_examples = 200
unmasked = true

[privacy]
epsilon_budget = 500.0

[simulation]
devices = 10
workers = -1
analytics = { label = "columns.py:labels" }
"""


def ages(query: Query, data: NDArray[Any]) -> NDArray[Any]:
    """Return the ages of a device, as real devices do that offer the column."""
    assert query.column == "age"
    return data


def ask(question: Mapping[str, Any], *, masks: Mapping[str, Any], **virtual: Any) -> History:
    query = {"column": "age", "max_examples": 30, "unmasked": not masks, **question}
    return simulate(
        None,
        AGES,
        {
            "rounds.quorum": 5,
            "privacy.epsilon_budget": EPSILON,
            **{f"analytics.{name}": value for name, value in query.items()},
            **masks,
            "simulation": {"workers": -1} | virtual,
        },
        analytics={"age": ages},
    )


@pytest.mark.parametrize("masks", [MASKED, GROUPS, {}], ids=["helper", "groups", "unmasked"])
def test_the_result_is_that_of_all_values(masks: Mapping[str, Any]) -> None:
    done = ask({"kind": "histogram", "lower": 20, "upper": 40, "bins": 4}, masks=masks)

    assert done.state == "completed"
    assert done.result is not None
    counts = [row[2] for row in done.result.rows]
    whole, _ = np.histogram(np.concatenate(AGES), 4, (20, 40))
    above = sum(int((own > 40).sum()) for own in AGES)
    assert counts == pytest.approx([0, *whole, above], abs=6 * done.result.error)
    assert 0 < done.result.error < 2
    assert done.history("versions")[1]["epsilon"] <= EPSILON
    assert "from" in str(done)


def test_equal_queries_repeat_to_the_byte() -> None:
    question = {"kind": "mean", "lower": 0, "upper": 100}
    first, again = ask(question, masks=MASKED), ask(question, masks=MASKED, workers=1)

    assert first.result == again.result is not None
    assert first.result is not None
    assert ask(question, masks=MASKED, seed=2).result != first.result


def test_groups_lose_devices_and_the_result_is_that_of_the_others() -> None:
    """Devices drop out at every step of two groups; the result counts those that are in the sums."""
    done = simulate(
        None,
        [np.full(10, 30.0)] * 24,
        {
            "rounds.quorum": 8,
            "rounds.target": 24,
            "analytics.column": "age",
            "analytics.kind": "count",
            "analytics.max_examples": 10,
            "privacy.epsilon_budget": EPSILON,
            **GROUPS,
            "secure_aggregation.group_size": 12,
            "simulation": {"workers": -1, "drop_out": 0.15, "seed": 4},
        },
        analytics={"age": ages},
    )
    assert done.result is not None
    answers = done.history("versions")[1]["examples"]
    assert 8 <= answers < 24
    assert done.result.rows[0][0] == pytest.approx(10 * answers, abs=6 * done.result.error)


def test_a_column_that_raises_fails_its_device() -> None:
    def unreadable(query: Query, data: int) -> list[float]:
        if data == 0:
            raise OSError(f"{query.column} cannot be read")
        return [float(data)]

    done = simulate(
        None,
        range(4),
        {
            "rounds.quorum": 3,
            "rounds.target": 3,
            "analytics.column": "age",
            "analytics.kind": "count",
            "analytics.unmasked": True,
            "privacy.epsilon_budget": EPSILON,
            "simulation": {"workers": -1},
        },
        analytics={"age": unreadable},
    )
    assert [row["failed"] for row in done.history()] == [1]
    assert done.result is not None
    assert done.result.rows[0][0] == pytest.approx(3, abs=6 * done.result.error)


def test_a_file_names_the_functions_of_columns(tmp_path: Path) -> None:
    (tmp_path / "columns.py").write_text(PROGRAM)
    (tmp_path / "config.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "qflare_simulation", "run", str(tmp_path / "config.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    labels = {line.split()[0]: line.split() for line in done.stdout.splitlines()[3:] if line}
    data, _ = ready("digits", devices=10)
    for label in ("0", "1"):
        held = sum(int((data[index].labels == int(label)).sum()) for index in range(10))
        assert float(labels[label][1]) == pytest.approx(held, abs=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"analytics.column": "height"}, "analytics: devices have no column 'height'"),
        ({"analytics.bins": 5}, r"analytics\.bins: got 5, want 0 to 0"),
        ({"total_rounds": 3}, "total_rounds: has no meaning in a query"),
        (MASKED, r"analytics\.unmasked: set together with secure_aggregation"),
        (
            {"simulation": {"local_privacy": LocalPrivacy(clip_norm=1.0, noise_multiplier=1.0)}},
            r"simulation\.local_privacy: has no meaning in a query",
        ),
        ({"simulation": {"analytics": ["age"]}}, r"simulation\.analytics: got \['age'\]"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], message: str) -> None:
    query = {
        "rounds.quorum": 2,
        "analytics.column": "age",
        "analytics.kind": "count",
        "analytics.unmasked": True,
        "privacy.epsilon_budget": 1.0,
    }
    with pytest.raises(SimulationError, match=message):
        simulate(None, AGES, query | settings, analytics={"age": ages})


def test_a_model_needs_a_training_function() -> None:
    with pytest.raises(SimulationError, match="train: got none"):
        simulate(None, AGES, {"rounds.quorum": 2}, model={"weight": np.zeros(2, np.float32)})
