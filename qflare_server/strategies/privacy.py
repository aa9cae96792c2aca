"""Central differential privacy: clipping, size of the noise, and the adaptive clipping bound.

The guarantee is per device and per version: a released aggregate is the sum of clipped deltas plus Gaussian noise,
over a *fixed* denominator (the expected number of updates, not the number received), so adding or removing one
device changes the sum by at most the clipping bound. Under secure aggregation the devices clip and then round each
element, which adds at most the rounding error times the square root of the number of elements to that bound. The
sampling of devices and the total cost of all versions are covered by `accounting`.

Sources: McMahan et al. 2018, arXiv:1710.06963, section 3 (fixed denominator); Andrew et al. 2021,
arXiv:1905.03871, Algorithm 1 (adaptive clipping).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt

from qflare_server.strategies.screening import CLIP_BOUND, AdaptiveClip, NormClip
from qflare_server.strategies.types import UpdateAssessment


@dataclass(frozen=True, slots=True)
class AdaptiveBound:
    """Adaptive clipping bound that follows a quantile of the norms.

    Attributes:
        quantile: Share of norms that should lie within the bound, the paper's gamma.
        learning_rate: Geometric step, the paper's eta_C.
        count_stddev: Standard deviation of the noise in the count of norms within the bound, sigma_b.
    """

    quantile: float
    learning_rate: float
    count_stddev: float

    def next_bound(self, bound: float, noisy_fraction: float) -> float:
        """Return `bound * exp(-learning_rate * (noisy_fraction - quantile))`."""
        return bound * exp(-self.learning_rate * (noisy_fraction - self.quantile))


@dataclass(frozen=True, slots=True)
class CentralPrivacy:
    """Clipping and noise of one training session.

    Attributes:
        clip_norm: The clipping bound, or the first one when it adapts.
        noise_multiplier: Standard deviation of the noise over the sensitivity, of the whole release: the sum and,
            when the bound adapts, the count together. The accountant uses this value.
        expected_update_count: The fixed denominator.
        adaptive: Adaptation of the bound, or None.
        rounding: Bound of the rounding error of each element of a clipped delta.
        is_in_sum: Whether the noise is in the sum of the updates already.
    """

    clip_norm: float
    noise_multiplier: float
    expected_update_count: int
    adaptive: AdaptiveBound | None = None
    rounding: float = 0.0
    is_in_sum: bool = False

    @property
    def screen(self) -> NormClip | AdaptiveClip:
        """The clipping screen."""
        return AdaptiveClip(self.clip_norm) if self.adaptive else NormClip(self.clip_norm)

    @property
    def initial_scalars(self) -> Mapping[str, float]:
        """The first clipping bound, when it adapts."""
        return {CLIP_BOUND: self.clip_norm} if self.adaptive else {}

    @property
    def sum_noise_multiplier(self) -> float:
        """Noise multiplier of the sum alone.

        With an adaptive bound the sum and the count share the budget:
        `(z ** -2 - (2 * sigma_b) ** -2) ** -0.5`, above z (Andrew et al. 2021, theorem 1).
        """
        if self.adaptive is None:
            return self.noise_multiplier
        own = self.noise_multiplier**-2 - (2.0 * self.adaptive.count_stddev) ** -2
        return float(own**-0.5)

    def bound(self, scalars: Mapping[str, float]) -> float:
        """Return the clipping bound of the version being made."""
        return scalars.get(CLIP_BOUND, self.clip_norm) if self.adaptive else self.clip_norm

    def sensitivity(self, scalars: Mapping[str, float], element_count: int) -> float:
        """Return the largest L2 norm of one device's share in the sum of so many elements."""
        return self.bound(scalars) + self.rounding * sqrt(element_count)

    def noise_stddev(self, scalars: Mapping[str, float], element_count: int) -> float:
        """Return the standard deviation of the noise in each element of the aggregate."""
        sensitivity = self.sensitivity(scalars, element_count)
        return self.sum_noise_multiplier * sensitivity / self.expected_update_count

    def next_scalars(
        self, scalars: Mapping[str, float], judgements: Sequence[UpdateAssessment], noise: float
    ) -> Mapping[str, float]:
        """Move the clipping bound by the noisy share of norms within it.

        A refused update counts as half, which is a contribution of zero.

        Args:
            scalars: The numbers in force while this version was made.
            judgements: One for each update.
            noise: A sample of the noise of the count.
        """
        if self.adaptive is None:
            return scalars
        bound = self.bound(scalars)
        signs = [(0.5 if entry.norm <= bound else -0.5) for entry in judgements if entry.accepted]
        fraction = (sum(signs) + noise) / self.expected_update_count + 0.5
        return {**scalars, CLIP_BOUND: self.adaptive.next_bound(bound, fraction)}


def heuristic_count_stddev(expected_update_count: int) -> float:
    """Return the paper's recommendation for sigma_b, a twentieth of the updates (section 4.1)."""
    return expected_update_count / 20.0


def smallest_noise_multiplier(count_stddev: float) -> float:
    """Return the bound the noise multiplier must stay below: `2 * sigma_b`.

    At or above it, the count alone would spend the whole budget.
    """
    return 2.0 * count_stddev
