"""Experiments of the comparison: each function is one run with picklable arguments and results."""

from typing import Any, Final

from federation import Attack, even_fleet, run_rounds, uneven_fleet
from rhythm import Buffer, Timeline, synchronous

from qflare_server.strategies import PrivacyConfig, Strategy, StrategyConfig, build
from qflare_server.strategies.accounting import PrivacyLedger, Releases, spent

DEVICE_COUNT: Final = 20
HOSTILE_COUNT: Final = 4
ALPHAS: Final = (0.5, 0.1)
ATTACKS: Final[tuple[Attack, ...]] = ("none", "label flip", "sign flip")
ROUND_COUNT: Final = 50
MOMENTUM: Final[dict[str, Any]] = {"optimizer": "momentum", "momentum": 0.8}

RULES: Final[dict[str, dict[str, Any]]] = {
    "fedavg": {"name": "fedavg"},
    "fedprox": {"name": "fedprox", "proximal_mu": 0.1},
    "fedavgm": {"name": "fedavgm", "momentum": 0.8},
    "fedadam": {"name": "fedadam", "server_learning_rate": 0.03},
    "fedyogi": {"name": "fedyogi", "server_learning_rate": 0.03},
    "fedadagrad": {"name": "fedadagrad", "server_learning_rate": 0.1},
    "clipped mean": {"name": "fedavg", "clip_norm": 0.3, **MOMENTUM},
    "median": {"name": "median", **MOMENTUM},
    "trimmed_mean": {"name": "trimmed_mean", "trimmed_fraction": 0.2, **MOMENTUM},
    "geometric_median": {"name": "geometric_median", **MOMENTUM},
    "krum": {"name": "krum", "byzantine_count": HOSTILE_COUNT, **MOMENTUM},
    "multi_krum": {"name": "multi_krum", "byzantine_count": HOSTILE_COUNT, **MOMENTUM},
    "bulyan": {"name": "bulyan", "byzantine_count": HOSTILE_COUNT, **MOMENTUM},
}
"""Settings of each rule. Robust rules use momentum, to compensate for the updates that they omit."""

BUFFER_SIZES: Final = (5, 10)
MAX_STALENESS: Final = 20
TARGET: Final = 0.9
SIMULATED_TIME: Final = 160.0

NOISES: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PRIVATE_DEVICE_COUNTS: Final = (20, 200)
PRIVATE_ROUND_COUNT: Final = 30
PRIVATE_CLIP_NORM: Final = 0.3
DELTA: Final = 1e-5


def strategy(**settings: Any) -> Strategy:
    """Return a strategy for all devices."""
    return build(StrategyConfig(**{"quorum": DEVICE_COUNT, **settings}))


def rule_run(rule: str, alpha: float, attack: Attack) -> list[float]:
    """Return the accuracy after each round."""
    fleet = uneven_fleet(alpha, DEVICE_COUNT, attack, HOSTILE_COUNT)
    return run_rounds(fleet, strategy(**RULES[rule]), ROUND_COUNT)


def rhythm_run(buffer_size: int, closes_at: int) -> Timeline:
    """Return the accuracy over time, of a buffer or, if `buffer_size` is 0, of rounds."""
    fleet = uneven_fleet(ALPHAS[0], DEVICE_COUNT, "none", 0)
    if not buffer_size:
        return synchronous(fleet, strategy(name="fedavg"), SIMULATED_TIME, closes_at)
    buffered = strategy(
        name="fedbuff", quorum=buffer_size, asynchronous=True, max_staleness=MAX_STALENESS
    )
    return list(Buffer(fleet, buffered, buffer_size, MAX_STALENESS).run(SIMULATED_TIME))


def privacy_run(device_count: int, noise_multiplier: float) -> tuple[float, float]:
    """Return epsilon (0 without noise) and the final accuracy."""
    clipping: dict[str, Any] = {"weighting": "uniform", "clip_norm": PRIVATE_CLIP_NORM}
    if noise_multiplier:
        private = PrivacyConfig(
            clip_norm=PRIVATE_CLIP_NORM,
            noise_multiplier=noise_multiplier,
            epsilon_budget=1e6,
            delta=DELTA,
        )
        clipping = {"privacy": private}
    chosen = strategy(name="fedavg", quorum=device_count, **clipping, **MOMENTUM)
    accuracy = run_rounds(even_fleet(device_count), chosen, PRIVATE_ROUND_COUNT)[-1]
    if not noise_multiplier:
        return 0.0, accuracy
    ledger = PrivacyLedger((Releases(noise_multiplier, 1.0, PRIVATE_ROUND_COUNT),))
    return spent(ledger, DELTA).epsilon, accuracy
