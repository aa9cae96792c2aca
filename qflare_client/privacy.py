"""Local differential privacy for devices: clipping and Gaussian noise before an update leaves the device.

Numpy only, no I/O. The coordinator sees only noisy updates, so the device does not have to trust it. Noise of this size
hurts accuracy far more than noise added once to the mean: use local privacy when the coordinator is not trusted, and
central privacy otherwise.

The noise of a device comes from the operating system's cryptographic generator and is never repeated: a retry resends
the first update instead of drawing new noise. `Client.submit` and `run` ensure this and enforce the budget
(`qflare_client.models.privacy_ledger`); `protect` alone is stateless.

Noisy deltas are rounded to float32: sums of float64 samples reach only some of the numbers around them (Mironov 2012,
doi:10.1145/2382196.2382264), which reveals what a sample was added to. After rounding, each number stands for many.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import erfc, exp, inf, isfinite, sqrt
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError

MAX_EPSILON: Final = 700.0
"""Largest finite epsilon: its exponential is near the maximum of float64."""

_PAIRS_AT_ONCE: Final = 131_072
"""Pairs of samples made at once: 2 MiB of random bytes, and as much of each intermediate result."""


class NormalSource(Protocol):
    """Standard normal samples; `numpy.random.Generator` is one, for tests and simulations."""

    def standard_normal(self, size: tuple[int, ...], /) -> NDArray[np.float64]:
        """Return independent samples of a shape."""


class SystemNoise:
    """Standard normal samples from the operating system's cryptographic generator.

    Source: Box and Muller 1958, doi:10.1214/aoms/1177706645: two uniform numbers become two samples. Uniform numbers
    of 64 bits reach magnitudes of 9.4.
    """

    def standard_normal(self, size: tuple[int, ...], /) -> NDArray[np.float64]:
        """Return independent samples of a shape."""
        samples = np.empty(size)
        flat = samples.reshape(-1)
        for start in range(0, flat.size, 2 * _PAIRS_AT_ONCE):
            part = flat[start : start + 2 * _PAIRS_AT_ONCE]
            part[:] = normal_samples(os.urandom(16 * -(-part.size // 2)))[: part.size]
        return samples


def normal_samples(random_bytes: bytes) -> NDArray[np.float64]:
    """Turn uniform bytes, 16 for each pair, into standard normal samples."""
    words = np.frombuffer(random_bytes, "<u8").reshape(2, -1)
    # Middles of the 2^64 intervals: never 0, whose logarithm is infinite.
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-64
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0])), 2.0 * np.pi * uniform[1]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))


@dataclass(frozen=True, slots=True)
class LocalPrivacy:
    """Local differential privacy of a device's updates.

    Attributes:
        clip_norm: Largest L2 norm of the delta over all floating-point tensors, above zero.
        noise_multiplier: Standard deviation of the noise in each element, divided by `clip_norm`. Zero or more; zero
            only clips.
        max_epsilon: Epsilon budget of all releases of the device together, above 0; None sets no limit.
        delta: The delta for which epsilon is computed, within (0, 1).

    A release is a Gaussian mechanism of sensitivity `2 * clip_norm`: any update may replace any other. Releases compose
    to one whose cost, in units of (sensitivity / standard deviation) squared, is the sum of their costs (Dong, Roth, Su
    2022, arXiv:1905.02383, corollary 3.3).
    """

    clip_norm: float
    noise_multiplier: float = 0.0
    max_epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: A field is out of range, or not a number.
        """
        for name in ("clip_norm", "noise_multiplier", "delta", "max_epsilon"):
            if name != "max_epsilon" or self.max_epsilon is not None:
                _check_number(name, getattr(self, name))
        if not (isfinite(self.clip_norm) and self.clip_norm > 0.0):
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}")
        if not (isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ValueError(f"noise_multiplier must be 0 or above, got {self.noise_multiplier}")
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"delta must be within (0, 1), got {self.delta}")
        if self.max_epsilon is None:
            return
        if not 0.0 < self.max_epsilon <= MAX_EPSILON:
            raise ValueError(
                f"max_epsilon must be within (0, {MAX_EPSILON}], got {self.max_epsilon}"
            )
        if self.is_without_noise:
            raise ValueError("max_epsilon needs noise: noise_multiplier is 0")

    @property
    def is_without_noise(self) -> bool:
        """Whether updates are clipped without noise."""
        return self.noise_multiplier == 0.0

    @property
    def cost(self) -> float:
        """(sensitivity / standard deviation) squared of one release; 0 if there is no noise."""
        ratio = 0.0 if self.is_without_noise else 2.0 / self.noise_multiplier
        return ratio * ratio  # infinite where a power would raise

    def protect(
        self,
        weights: Mapping[str, NDArray[np.generic]],
        base: Mapping[str, NDArray[np.generic]],
        generator: NormalSource | None = None,
    ) -> dict[str, NDArray[np.generic]]:
        """Clip the delta of trained weights, add noise, and return weights.

        Args:
            weights: Trained tensors by name.
            base: The same tensors of the base version.
            generator: Source of the noise; by default the system's cryptographic generator. Only tests and simulations
                pass one.

        Returns:
            Tensors of the same names, shapes and dtypes. Tensors of other than floating-point types are unchanged and
            unprotected: they must not contain private data.

        Raises:
            ValueError: Names or shapes differ, an argument holds no arrays, or a delta is not finite.
        """
        deltas = floating_deltas(
            arguments.tensors("weights", weights), arguments.tensors("base", base)
        )
        noisy = add_gaussian_noise(
            clip_by_global_norm(deltas, self.clip_norm),
            self.noise_multiplier * self.clip_norm,
            generator,
        )
        protected = dict(weights)
        for name, delta in noisy.items():
            protected[name] = (base[name].astype(np.float64) + delta).astype(weights[name].dtype)
        return protected


def _check_number(name: str, value: object) -> None:
    try:
        arguments.number(name, value)
    except InvalidArgumentError:
        raise InvalidArgumentError(f"{name} must be a finite number, got {value!r}") from None


def floating_deltas(
    weights: Mapping[str, NDArray[np.generic]], base: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.float64]]:
    """Subtract the base version from the floating-point tensors, in float64.

    Raises:
        ValueError: Names or shapes differ.
    """
    if weights.keys() != base.keys():
        raise ValueError(
            f"tensors differ from the base version: {sorted(weights.keys() ^ base.keys())}"
        )
    deltas = {}
    for name, tensor in weights.items():
        if tensor.shape != base[name].shape:
            raise ValueError(
                f"{name} has shape {tensor.shape}, the base version {base[name].shape}"
            )
        if _floating(tensor):
            deltas[name] = tensor.astype(np.float64) - base[name].astype(np.float64)
    return deltas


def _floating(tensor: NDArray[np.generic]) -> bool:
    """Return whether a tensor is floating-point; ml_dtypes' bfloat16 has kind V and casts to float64 safely."""
    return tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16"


def global_norm(deltas: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the L2 norm of all tensors as one vector."""
    return sqrt(sum(float(np.add.reduce(np.square(delta), axis=None)) for delta in deltas.values()))


def clip_by_global_norm(
    deltas: Mapping[str, NDArray[np.float64]], clip_norm: float
) -> dict[str, NDArray[np.float64]]:
    """Scale all tensors together so that their global norm is at most `clip_norm`.

    Raises:
        ValueError: The norm is not finite.
    """
    norm = global_norm(deltas)
    if not isfinite(norm):
        raise ValueError(f"the norm of the update is {norm}")
    factor = 1.0 if norm <= clip_norm else clip_norm / norm
    return {name: delta * factor for name, delta in deltas.items()}


def add_gaussian_noise(
    deltas: Mapping[str, NDArray[np.float64]],
    stddev: float,
    generator: NormalSource | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Add independent Gaussian noise to every element, and round the sum to float32.

    Args:
        deltas: Tensors by name.
        stddev: Standard deviation, zero or more; with zero nothing is rounded either.
        generator: Source of the noise; by default the system's cryptographic generator.

    Raises:
        ValueError: A sum is beyond the range of float32.
    """
    if not stddev:
        return dict(deltas)
    source = generator if generator is not None else SystemNoise()
    return {name: _noisy(name, delta, stddev, source) for name, delta in deltas.items()}


def _noisy(
    name: str, delta: NDArray[np.float64], stddev: float, source: NormalSource
) -> NDArray[np.float64]:
    noisy = source.standard_normal(delta.shape)
    noisy *= stddev
    noisy += delta
    with np.errstate(over="ignore"):
        rounded = noisy.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name}: delta and noise are beyond the range of float32")
    return rounded.astype(np.float64)


def _normal_cdf(value: float) -> float:
    return 0.5 * erfc(-value / sqrt(2.0))


def gaussian_delta(epsilon: float, sensitivity: float, stddev: float) -> float:
    """Return the exact delta of the Gaussian mechanism at an epsilon.

    Source: Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    """
    half, slope = sensitivity / (2.0 * stddev), epsilon * stddev / sensitivity
    return _normal_cdf(half - slope) - exp(epsilon) * _normal_cdf(-half - slope)


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Return the smallest epsilon at which a Gaussian mechanism is (epsilon, delta)-private.

    Args:
        ratio: Sensitivity divided by standard deviation, zero or more.
        delta: Within (0, 1).

    Returns:
        Epsilon, rounded up; infinite above `MAX_EPSILON`.

    Raises:
        ValueError: A number is out of its range.
    """
    if not (ratio >= 0.0 and 0.0 < delta < 1.0):
        raise ValueError(f"got ratio {ratio}, delta {delta}")
    if ratio == 0.0 or gaussian_delta(0.0, ratio, 1.0) <= delta:
        return 0.0
    if not gaussian_delta(MAX_EPSILON, ratio, 1.0) <= delta:
        return inf
    low, high = 0.0, MAX_EPSILON
    while (middle := (low + high) / 2.0) not in {low, high}:
        if gaussian_delta(middle, ratio, 1.0) > delta:
            low = middle
        else:
            high = middle
    return high


def gaussian_stddev(epsilon: float, delta: float, sensitivity: float) -> float:
    """Return the smallest standard deviation with which one release is (epsilon, delta)-private.

    Args:
        epsilon: Above zero, at most `MAX_EPSILON`.
        delta: Within (0, 1).
        sensitivity: Largest L2 distance between two possible releases. For a clipped update under local privacy this is
            `2 * clip_norm`: any update may replace any other.

    Raises:
        ValueError: A number is out of its range.
    """
    if not (0.0 < epsilon <= MAX_EPSILON and 0.0 < delta < 1.0 and sensitivity > 0.0):
        raise ValueError(f"got epsilon {epsilon}, delta {delta}, sensitivity {sensitivity}")
    low, high = 0.0, sensitivity
    while gaussian_delta(epsilon, sensitivity, high) > delta:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in {low, high}:
            break
        if gaussian_delta(epsilon, sensitivity, middle) > delta:
            low = middle
        else:
            high = middle
    return high
