"""Discrete Gaussian noise of devices or helpers in a sum of quantized updates, in levels of quantization.

Each update has an L2 norm of at most `clip * scale + sqrt(d)` levels: the clipped change of d elements, and a rounding
error below one level each. The noise of a sum has `multiplier` times that as its standard deviation:

- from *devices*, each update has a share with the variance divided by `min_cohort`. The shares of the smallest allowed
  cohort are the noise; more devices add more, never less;
- from *helpers*, each adds the whole noise, so that one honest helper suffices.

The ring keeps room for the noise: `room` counts as so many further updates. It is `ROOM_DEVIATIONS` deviations of the
clipped change, and an element leaves it with a probability below `2 * exp(-10.6^2 / 2)`, all 2^40 of the largest model
together below 2^-40, as long as `sqrt(d)` is at most half of `clip * scale` (`fits`). A discrete Gaussian is
subgaussian with its own variance (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, section 2.3). An element that left
the ring would be wrong; privacy does not depend on it.

Samples are exact, by OpenDP (MIT licence, extra `device-noise`), which implements Algorithm 3 of that paper with exact
rational numbers and random bits of the operating system. It takes about 13 microseconds for a sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from math import ceil, isfinite, isqrt, sqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qflare.tensors import Array
from qflare.v1 import training_pb2

DEVICES: Final = training_pb2.NOISE_SOURCE_DEVICES
HELPER: Final = training_pb2.NOISE_SOURCE_HELPER
IN_SUM: Final = (DEVICES, HELPER)
"""Sources whose noise is in the sum before the coordinator gets it."""

ROOM_DEVIATIONS: Final = 16
"""Deviations of noise for a clipped change that the ring has room for."""

LEAST_SHARE: Final = 4.0
"""Least standard deviation of a device's share in levels: the distance tau of a sum of 10^6 of them from a discrete
Gaussian is below 2^-200 (Kairouz, Liu, Steinke 2021, arXiv:2102.06387, theorem 1)."""

MAX_ELEMENTS: Final = 2**40
"""Most elements of a model for which the stated probabilities hold."""

MAX_MULTIPLIER: Final = 1e6

_ROUNDED_UP: Final = 1 + 1e-12  # of a standard deviation, so that no rounding makes it smaller
_PIECE: Final = 2**13

DrawNoise = Callable[[int, float], NDArray[np.int64]]
"""`draw(count, stddev)` returns so many independent samples."""


class MissingSamplerError(Exception):
    """The package opendp, which draws the noise, is not installed."""


@dataclass(frozen=True)
class SumNoise:
    """Noise that devices or helpers add.

    Attributes:
        source: `DEVICES` or `HELPER`.
        multiplier: Standard deviation of the noise over the largest norm of an update, above 0, at most 10^6.
        min_cohort: Fewest updates of a sum, 1 or more.
        helper_count: Number of helpers, 1 or more if they add the noise.
    """

    source: int
    multiplier: float
    min_cohort: int
    helper_count: int

    @property
    def is_valid(self) -> bool:
        """Whether every value is in its range."""
        numbers = isfinite(self.multiplier) and 0 < self.multiplier <= MAX_MULTIPLIER
        counts = self.min_cohort >= 1 and (self.source == DEVICES or self.helper_count >= 1)
        return numbers and counts and self.source in IN_SUM

    def room(self, max_cohort: int) -> int:
        """Return the room in the ring as a number of updates.

        It is the smallest whole number whose square is not below `(16 * multiplier)^2 * n`, where n is
        `max_cohort / min_cohort` for devices, and the number of helpers for helpers.
        """
        most = (
            Fraction(max_cohort, self.min_cohort) if self.source == DEVICES else self.helper_count
        )
        square = ceil((ROOM_DEVIATIONS * Fraction(self.multiplier)) ** 2 * most)
        return isqrt(square - 1) + 1

    def stddev(self, clip_levels: float, element_count: int) -> float:
        """Return the standard deviation of what one device, or one helper, adds to each element, in levels.

        Args:
            clip_levels: Largest norm of a clipped change, in levels: `clip * scale`.
            element_count: Elements of the model, without slots.
        """
        whole = self.multiplier * (clip_levels + sqrt(element_count)) * _ROUNDED_UP
        return whole / sqrt(self.min_cohort) if self.source == DEVICES else whole


def fits(clip_levels: float, element_count: int) -> bool:
    """Return whether the ring has the stated room for the noise of a model."""
    return 2 * sqrt(element_count) <= clip_levels and element_count <= MAX_ELEMENTS


def require_sampler() -> None:
    """Check that noise can be drawn here.

    Raises:
        MissingSamplerError: It cannot.
    """
    if find_spec("opendp") is None:
        raise MissingSamplerError(
            "the noise of this task needs the package opendp: pip install 'qflare[device-noise]',"
            " or 'qflare[helper]' at a helper"
        )


def draw_exact(count: int, stddev: float) -> NDArray[np.int64]:
    """Return independent samples of the discrete Gaussian distribution around 0, drawn exactly.

    Args:
        count: Number of samples.
        stddev: Its parameter sigma, above 0; the standard deviation is not above it.

    Raises:
        MissingSamplerError: OpenDP is not installed.
    """
    measurement = _measurement(stddev)
    samples = np.empty(count, np.int64)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        samples[start : start + size] = measurement([0] * size)
    return samples


@cache
def _library() -> Any:
    require_sampler()
    import opendp.prelude as opendp  # noqa: PLC0415 - only noise needs it

    opendp.enable_features("contrib")
    return opendp


def _measurement(stddev: float) -> Any:
    library = _library()
    domain = library.vector_domain(library.atom_domain(T="i64"))
    return library.m.make_gaussian(domain, library.l2_distance(T="f64"), scale=stddev)


def add_to(levels: Array, stddev: float, draw: DrawNoise = draw_exact) -> None:
    """Add noise to elements of the ring, in place, modulo 2^bits.

    Args:
        levels: One dimension, in the dtype of the ring.
        stddev: In levels, above 0.
        draw: Draws the noise; only a simulation replaces it.

    Raises:
        MissingSamplerError: OpenDP is not installed.
    """
    for start in range(0, len(levels), _PIECE):
        part = levels[start : start + _PIECE]
        np.add(part, draw(len(part), stddev).astype(part.dtype), out=part)
