"""The comparison of strategies in `examples/strategies` runs, in small."""

# ruff: noqa: PLC0415 - the example's modules are on the path in these tests only

import pytest

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
