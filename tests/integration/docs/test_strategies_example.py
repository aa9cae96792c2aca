"""The comparison of strategies in `examples/strategies` runs, in small."""

# ruff: noqa: PLC0415 - the example's modules are on the path in these tests only

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def example_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    for name in ("digits", "strategies"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / name))


def test_devices_train_in_rounds() -> None:
    from experiments import RULES, strategy
    from federation import run_rounds, uneven_fleet

    fleet = uneven_fleet(0.5, 20, "label flip", 4)
    accuracies = run_rounds(fleet, strategy(**RULES["fedadam"]), 5)

    assert len(accuracies) == 5
    assert accuracies[-1] > 0.4


@pytest.mark.parametrize("rule", ["median", "multi_krum", "geometric_median"])
def test_robust_rules_hold_where_the_mean_breaks(rule: str) -> None:
    from experiments import RULES, strategy
    from federation import run_rounds, uneven_fleet

    fleet = uneven_fleet(0.5, 20, "sign flip", 4)
    mean = run_rounds(fleet, strategy(**RULES["fedavg"]), 12)[-1]
    robust = run_rounds(fleet, strategy(**RULES[rule]), 12)[-1]

    assert mean < 0.3
    assert robust > 0.6


def test_a_buffer_is_ahead_of_rounds_that_wait_for_slow_devices() -> None:
    from experiments import strategy
    from federation import uneven_fleet
    from rhythm import Buffer, synchronous

    fleet = uneven_fleet(0.5, 20, "none", 0)
    buffered = strategy(name="fedbuff", quorum=5, asynchronous=True, max_staleness=20)
    waiting = synchronous(fleet, strategy(name="fedavg"), 12.0, 20)
    buffer = list(Buffer(fleet, buffered, 5, 20).run(12.0))

    assert buffer[-1][1] > waiting[-1][1] + 0.2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_labels_are_apart_and_in_order(places: list[float]) -> None:
    from plots import apart

    moved = apart(places, 0.1)

    order = sorted(range(len(places)), key=lambda index: places[index])
    shown = [moved[index] for index in order]
    assert all(later - earlier > 0.0999 for earlier, later in pairwise(shown))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)
