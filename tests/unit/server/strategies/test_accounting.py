import json
import math
from typing import Any

import pytest

from qflare_server.strategies import (
    PrivacyBudgetExceededError,
    PrivacyConfig,
    StrategyConfig,
    StrategyConfigError,
    build,
)
from qflare_server.strategies.accounting import PrivacyLedger, Releases, spend, spent

PLAIN = PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, epsilon_budget=4.0, delta=1e-5)


def classic_epsilon(noise: float, sampling: float, steps: int, delta: float) -> float:
    """Epsilon by the moments accountant's own conversion, which the published figures used.

    Abadi et al. 2016, theorem 2.2: the best order alpha of `rdp + log(1 / delta) / (alpha - 1)`.
    """
    import dp_accounting  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    orders = [1 + index / 10.0 for index in range(1, 100)] + list(range(12, 64))
    best = math.inf
    for order in orders:
        accountant = RdpAccountant([order])
        event = dp_accounting.PoissonSampledDpEvent(sampling, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(event, steps)
        best = min(best, float(accountant._rdp[0]) + math.log(1.0 / delta) / (order - 1.0))
    return best


PUBLISHED = [
    # Abadi et al. 2016, arXiv:1607.00133, section 3.2: q = 0.01, sigma = 4, T = 10,000.
    (4.0, 0.01, 10_000, 1.26),
    # TensorFlow Privacy, tutorials/README.md: MNIST, 60,000 examples in batches of 256.
    (1.12, 256 / 60_000, 60 * 60_000 // 256, 2.92),
    (0.6, 256 / 60_000, 30 * 60_000 // 256, 9.74),
    (1.2, 256 / 60_000, 10 * 60_000 // 256, 1.20),
]
"""Noise multiplier, sampling probability, steps, and epsilon at delta 1e-5."""


@pytest.mark.parametrize(("noise", "sampling", "steps", "epsilon"), PUBLISHED)
def test_published_figures_come_out(
    noise: float, sampling: float, steps: int, epsilon: float
) -> None:
    assert classic_epsilon(noise, sampling, steps, 1e-5) == pytest.approx(epsilon, abs=0.02)


@pytest.mark.parametrize(("noise", "sampling", "steps", "epsilon"), PUBLISHED)
def test_ours_is_the_librarys_and_no_looser_than_published(
    noise: float, sampling: float, steps: int, epsilon: float
) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    library = RdpAccountant().compose(
        PoissonSampledDpEvent(sampling, GaussianDpEvent(noise)), steps
    )

    ours = spent(PrivacyLedger((Releases(noise, sampling, steps),)), 1e-5).epsilon

    assert ours == pytest.approx(library.get_epsilon(1e-5), rel=1e-12)
    assert 0.5 * epsilon < ours <= epsilon


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_gaussian_mechanism_is_bounded_by_its_exact_delta(accountant: str) -> None:
    """One release without sampling: epsilon is at or a little above the exact one."""
    from qflare_client.privacy import gaussian_delta  # noqa: PLC0415

    epsilon = spent(PrivacyLedger((Releases(2.0, 1.0, 1),)), 1e-5, accountant).epsilon

    assert gaussian_delta(epsilon, 1.0, 2.0) <= 1e-5
    assert gaussian_delta(0.85 * epsilon, 1.0, 2.0) > 1e-5


def test_loss_distributions_are_tighter_than_orders() -> None:
    ledger = PrivacyLedger((Releases(1.1, 0.01, 1000),))

    assert spent(ledger, 1e-5, "pld").epsilon < spent(ledger, 1e-5, "rdp").epsilon


LOSS_DISTRIBUTIONS = [
    (2.0, 0.01, 0.010224911209191894, 1.0),
    (2.0, 0.01, 0.022850339595771204, 0.8),
    (2.0, 0.02, 0.14991732969314892, 1.0),
    (1.0, 0.01, 0.2391763947364977, 1.0),
]
"""Noise multiplier, sampling probability, delta and epsilon after 10,000 steps, under adding or removing one.

The figures that the authors of the Fourier accountant publish with their code (DPBayes/PLD-Accountant,
tests/test_compute_delta.py): Koskela, Jaelkoe and Honkela 2020, arXiv:1906.03049.
"""


@pytest.mark.parametrize(("noise", "sampling", "delta", "epsilon"), LOSS_DISTRIBUTIONS)
def test_loss_distributions_give_the_published_figures(
    noise: float, sampling: float, delta: float, epsilon: float
) -> None:
    ours = spent(PrivacyLedger((Releases(noise, sampling, 10_000),)), delta, "pld").epsilon

    assert ours == pytest.approx(epsilon, rel=2e-4)


@pytest.mark.parametrize(("noise", "sampling", "steps"), [(4.0, 1.0, 10), (1.1, 0.01, 1000)])
def test_loss_distributions_are_the_librarys(noise: float, sampling: float, steps: int) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent  # noqa: PLC0415
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415

    event: Any = GaussianDpEvent(noise)
    if sampling < 1:
        event = PoissonSampledDpEvent(sampling, event)
    library = PLDAccountant().compose(event, steps)

    ours = spent(PrivacyLedger((Releases(noise, sampling, steps),)), 1e-5, "pld").epsilon

    assert ours == pytest.approx(library.get_epsilon(1e-5), rel=1e-12)


def test_composed_releases_are_one_exact_gaussian() -> None:
    """Without sampling, n releases of noise z are one of z / sqrt(n), whose delta is known exactly."""
    from qflare_client.privacy import gaussian_delta  # noqa: PLC0415

    epsilon = spent(PrivacyLedger((Releases(4.0, 1.0, 10),)), 1e-5, "pld").epsilon

    exact = 4.0 / math.sqrt(10.0)
    assert gaussian_delta(epsilon, 1.0, exact) <= 1e-5
    assert gaussian_delta(0.999 * epsilon, 1.0, exact) > 1e-5


def test_nothing_released_costs_nothing() -> None:
    assert spent(PrivacyLedger(), 1e-5).epsilon == 0.0


def test_spending_stops_before_the_budget_is_passed() -> None:
    affordable = [
        count
        for count in range(1, 20)
        if spent(PrivacyLedger((Releases(2.0, 1.0, count),)), 1e-5).epsilon <= 4.0
    ]
    ledger = PrivacyLedger()
    for _ in affordable:
        ledger = spend(PLAIN, ledger).ledger

    with pytest.raises(PrivacyBudgetExceededError, match="past the budget of 4"):
        spend(PLAIN, ledger)
    assert ledger.release_count == len(affordable) > 1


def test_the_refusal_repeats() -> None:
    ledger = PrivacyLedger((Releases(2.0, 1.0, 1000),))

    for _ in range(2):
        with pytest.raises(PrivacyBudgetExceededError):
            spend(PLAIN, ledger)


def test_a_ledger_survives_json() -> None:
    ledger = PrivacyLedger().with_release(0.1, 1.0).with_release(0.1, 1.0).with_release(0.3, 0.25)

    again = PrivacyLedger.from_rows(json.loads(json.dumps(ledger.as_rows())))

    assert again == ledger
    assert again.runs == (Releases(0.1, 1.0, 2), Releases(0.3, 0.25, 1))
    assert spent(again, 1e-5) == spent(ledger, 1e-5)


@pytest.mark.parametrize(
    "row", [[0.0, 1.0, 1], [1.0, 0.0, 1], [1.0, 1.1, 1], [1.0, 1.0, 0], [1.0, 1.0, 1.5], [1.0, 1.0]]
)
def test_a_row_out_of_range_is_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match=r"privacy ledger|unpack"):
        PrivacyLedger.from_rows([row])


def test_privacy_without_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qflare_server.strategies.accounting.find_spec", lambda _: None)

    with pytest.raises(StrategyConfigError, match="needs the package dp-accounting"):
        build(StrategyConfig(privacy=PLAIN))
