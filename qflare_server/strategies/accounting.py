"""Privacy accounting: the epsilon of all released versions, and the check against the budget.

The `dp-accounting` library, an optional dependency of the coordinator, computes epsilon. The ledger records how many
versions were released with which noise and sampling. Epsilon is computed from the whole ledger each
time, so a restart, another replica or an auditor gets the same figure.

The relation is add-or-remove of one device with all its updates of a version. Sampling amplifies only when it is
Poisson sampling and secret; a sampling probability of one claims nothing and is right otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import pi, sqrt
from typing import Any, Final, Self

import numpy as np

from qflare_server.strategies.config import NoiseShares, PrivacyConfig
from qflare_server.strategies.errors import PrivacyBudgetExceededError, StrategyConfigError

ACCOUNTANTS: Final = ("rdp", "pld")
_LEAST_SIGMA: Final = 0.5


@dataclass(frozen=True, slots=True)
class Releases:
    """A run of versions released in the same way.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        sampling_probability: Probability of each device to be in a round.
        count: Number of versions.
    """

    noise_multiplier: float
    sampling_probability: float
    count: int


@dataclass(frozen=True, slots=True)
class PrivacyLedger:
    """All versions a training session has released, in order. Immutable; persist it with each version."""

    runs: tuple[Releases, ...] = ()

    @property
    def release_count(self) -> int:
        """Number of versions."""
        return sum(run.count for run in self.runs)

    def with_release(self, noise_multiplier: float, sampling_probability: float) -> "PrivacyLedger":
        """Return the ledger with one more version."""
        last = self.runs[-1] if self.runs else None
        key = (noise_multiplier, sampling_probability)
        if last is not None and (last.noise_multiplier, last.sampling_probability) == key:
            return PrivacyLedger((*self.runs[:-1], Releases(*key, last.count + 1)))
        return PrivacyLedger((*self.runs, Releases(*key, 1)))

    def as_rows(self) -> list[list[float]]:
        """Return JSON-ready rows; `from_rows` is the inverse."""
        return [[run.noise_multiplier, run.sampling_probability, run.count] for run in self.runs]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> Self:
        """Read the output of `as_rows`.

        Raises:
            ValueError: A row is not three numbers within their ranges.
        """
        runs = []
        for row in rows:
            noise, sampling, count = (float(value) for value in row)
            if not (noise > 0 and 0 < sampling <= 1 and count >= 1 and count.is_integer()):
                raise ValueError(f"not a row of a privacy ledger: {list(row)}")
            runs.append(Releases(noise, sampling, int(count)))
        return cls(tuple(runs))


@dataclass(frozen=True, slots=True)
class PrivacySpent:
    """The guarantee that holds after a version.

    Attributes:
        epsilon: Epsilon of all versions together.
        delta: The delta at which epsilon is stated.
        ledger: Ledger from which epsilon is computed; persist it with the version.
    """

    epsilon: float
    delta: float
    ledger: PrivacyLedger


def require_library() -> None:
    """Require the privacy accountant to be installed.

    Raises:
        StrategyConfigError: The message names the package.
    """
    if find_spec("dp_accounting") is None:
        raise StrategyConfigError("privacy needs the package dp-accounting, which is not installed")


def spent(ledger: PrivacyLedger, delta: float, accountant: str = "rdp") -> PrivacySpent:
    """Compute epsilon of everything in the ledger.

    Args:
        ledger: The released versions.
        delta: Within (0, 1).
        accountant: `rdp` or `pld`.
    """
    if not ledger.runs:
        return PrivacySpent(epsilon=0.0, delta=delta, ledger=ledger)
    return PrivacySpent(_epsilon(ledger.runs, delta, accountant), delta, ledger)


@lru_cache(maxsize=64)
def _epsilon(runs: tuple[Releases, ...], delta: float, accountant: str) -> float:
    """Compute epsilon with the library; cached, because every version needs its own figure and the next one."""
    machine = _accountant(accountant)
    for run in runs:
        machine.compose(_event(run), run.count)
    return float(machine.get_epsilon(delta))


def with_version(config: PrivacyConfig, ledger: PrivacyLedger) -> PrivacyLedger:
    """Return the ledger with one more version of a training session."""
    multiplier = config.noise_multiplier
    if config.shares is not None:
        multiplier = discrete_multiplier(multiplier, config.shares)
    return ledger.with_release(multiplier, config.sampling_probability)


def discrete_multiplier(multiplier: float, shares: NoiseShares) -> float:
    """Return the multiplier of Gaussian noise whose Renyi divergences bound those of noise in discrete shares.

    The sum of n discrete Gaussian shares of sigma has epsilon^2 / 2 concentrated differential privacy with epsilon =
    `1 / multiplier + tau * sqrt(d)`, where tau is `10 * sum(exp(-2 pi^2 sigma^2 k / (k + 1)), k = 1..n-1)` and
    `multiplier` is `sqrt(n) * sigma` over the sensitivity. That is a Renyi divergence of at most
    `alpha * epsilon^2 / 2` at every order alpha, as Gaussian noise with the multiplier `1 / epsilon` has it. A single
    share has tau = 0.

    Sources: Kairouz, Liu, Steinke 2021, arXiv:2102.06387, theorem 1 and proposition 14, their last bound; Canonne,
    Kamath, Steinke 2020, arXiv:2004.00010, theorem 4, for a single share.

    Args:
        multiplier: Standard deviation of the sum of the shares over the sensitivity, above zero.
        shares: Their number, sigma and the number of elements.

    Raises:
        ValueError: Sigma is below the 0.5 that the theorem requires.
    """
    if shares.count > 1 and not shares.stddev >= _LEAST_SIGMA:
        raise ValueError(f"shares of sigma {shares.stddev:g}: want 0.5 or more")
    places = np.arange(1, shares.count, dtype=np.float64)
    exponents = -2 * (pi * shares.stddev) ** 2 * places / (places + 1)
    tau = 10 * float(np.exp(exponents).sum())
    return multiplier / (1 + multiplier * tau * sqrt(shares.element_count))


def spend(config: PrivacyConfig, ledger: PrivacyLedger) -> PrivacySpent:
    """Account for one more version, before it is released.

    Args:
        config: The training session's privacy.
        ledger: The versions released so far.

    Returns:
        The guarantee after this version, with the ledger to persist in the transaction that publishes it.

    Raises:
        PrivacyBudgetExceededError: The version must not be released; the ledger is unchanged.
    """
    following = with_version(config, ledger)
    after = spent(following, config.delta, config.accountant)
    if not after.epsilon <= config.epsilon_budget:
        raise PrivacyBudgetExceededError(
            f"version {following.release_count} under privacy would raise epsilon to "
            f"{after.epsilon:.6g}, past the budget of {config.epsilon_budget:.6g} at delta {config.delta:.3g}"
        )
    return after


def _accountant(name: str) -> Any:
    """Create the library's accountant; imported here because the library is optional."""
    if name == "rdp":
        from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

        return RdpAccountant()
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415

    return PLDAccountant()


def _event(run: Releases) -> Any:
    """Return the privacy event of one version, as the library represents it."""
    import dp_accounting  # noqa: PLC0415

    gaussian = dp_accounting.GaussianDpEvent(run.noise_multiplier)
    if run.sampling_probability == 1.0:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(run.sampling_probability, gaussian)
