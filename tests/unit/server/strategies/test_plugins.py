"""A distribution with an entry point, made in a folder and put on the path."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qflare_server.strategies import Contribution, StrategyConfig, StrategyConfigError, build
from qflare_server.strategies.plugins import installed_names
from qflare_server.strategies.testkit import check_strategy, make_version, reader_of

CODE = """
from dataclasses import dataclass

from qflare_server.strategies import FoldRule


@dataclass(frozen=True)
class Powered(FoldRule):
    power: float

    def share(self, facts):
        weight = float(facts.example_count) ** self.power
        return weight, weight


def make(config):
    return Powered(config.options["power"])


@dataclass(frozen=True)
class Short(FoldRule):
    needs_norm = True

    def share(self, facts):
        return 1.0 / (1.0 + facts.norm), 1.0


def make_short(config):
    return Short()


def make_nothing(config):
    return None
"""

Installer = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """Install a distribution whose entry points are given."""

    def run(entry_points: str) -> None:
        (tmp_path / "powered_mean.py").write_text(CODE)
        info = tmp_path / "powered_mean-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: powered-mean\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qflare.strategies]\n{entry_points}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "powered_mean", raising=False)

    return run


def test_a_rule_of_another_distribution_is_found_by_name(install: Installer) -> None:
    install("powered = powered_mean:make")
    strategy = build(StrategyConfig(name="powered", options={"power": 0.5}))
    cohort = [
        Contribution("a", 1, reader_of(np.array([0.0]))),
        Contribution("b", 4, reader_of(np.array([3.0]))),
    ]

    made = make_version(strategy, np.zeros(1), cohort)

    assert made.weights.tolist() == [2.0]
    assert "powered" in installed_names()


def test_it_goes_through_the_test_kit(install: Installer) -> None:
    install("powered = powered_mean:make")

    check_strategy(build(StrategyConfig(name="powered", options={"power": 0.5})))


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("broken = powered_mean:missing", "cannot be loaded"),
        ("broken = no_such_module:make", "cannot be loaded"),
        ("broken = powered_mean:make_nothing", "gave a NoneType, not a rule"),
    ],
)
def test_a_broken_entry_point_is_refused(install: Installer, entry_point: str, reason: str) -> None:
    install(entry_point)

    with pytest.raises(StrategyConfigError, match=reason):
        build(StrategyConfig(name="broken"))


def test_own_names_cannot_be_taken(install: Installer) -> None:
    install("fedavg = powered_mean:make_nothing")

    assert build(StrategyConfig(name="fedavg")).folds


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"secure_aggregation": True}, "short looks at single updates"),
        (
            {
                "privacy": {
                    "clip_norm": 1.0,
                    "noise_multiplier": 1.0,
                    "epsilon_budget": 8.0,
                    "delta": 1e-5,
                }
            },
            "mean with uniform weighting",
        ),
    ],
)
def test_contradictions_reach_rules_of_others(
    install: Installer, settings: dict[str, object], reason: str
) -> None:
    install("short = powered_mean:make_short")

    with pytest.raises(StrategyConfigError, match=reason):
        build(StrategyConfig.from_mapping({"name": "short", **settings}))


def test_a_fold_rule_of_others_may_run_asynchronously_within_the_bound(install: Installer) -> None:
    install("short = powered_mean:make_short")
    strategy = build(StrategyConfig(name="short", asynchronous=True, max_staleness=1))
    cohort = [
        Contribution("a", 1, reader_of(np.array([1.0])), staleness=1),
        Contribution("b", 1, reader_of(np.array([9.0])), staleness=2),
    ]

    made = make_version(strategy, np.zeros(1), cohort)

    assert made.weights.tolist() == [0.5]
    assert list(made.outcome.rejected) == ["b"]
