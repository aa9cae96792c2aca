"""Parameters of masking: the ring, the scale of quantization, and the layout of a masked update.

A masked update is one vector of unsigned integers of `bits` bits, little-endian. Its first elements are the quantized
elements of the model's floating-point tensors, in manifest order; integer tensors are not in it. *Slots* follow: the
weight of the update, then for each metric its level times the weight. A slot value is a number without sign, in digits
of `digit_bits` bits, the least significant first, one element each. Digits are so short that their sums over
`max_cohort` updates do not wrap: these sums are exact.

Invariants: an element of an update is at most `limit` in magnitude, and `max_cohort * limit < 2^(bits - 1)`, so that no
sum of at most `max_cohort` updates leaves the signed range of the ring. With noise of devices or helpers, `limit` also
leaves the room that `noise.SumNoise.room` states; slots have no noise. In asynchronous
rounds this holds for the sum with staleness weights and the helpers' rounding (`masking.staleness`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isfinite
from typing import Any, Final, Self

import numpy as np

from qflare.masking.noise import IN_SUM, LEAST_SHARE, SumNoise
from qflare.masking.staleness import MAX_ROUNDINGS, find_problem
from qflare.tensors import DType, Manifest, TensorSpec
from qflare.tensors.vectors import float_count
from qflare.v1 import security_pb2, training_pb2

DTYPES: Final[Mapping[int, DType]] = {16: DType.UINT16, 32: DType.UINT32, 64: DType.UINT64}
"""Element type of a masked update by number of bits."""

DEFAULT_BITS: Final = 32
METRIC_BITS: Final = 24
"""Bits of a metric's level: 0 stands for minus its bound, 2^24 - 1 for its bound."""

MAX_WEIGHT: Final = 2**40
TENSOR: Final = "masked"
"""Name of the only tensor of a masked update."""

Mode: Final = training_pb2.SecureAggregationMode


class InvalidMaskingError(ValueError):
    """Settings of secure aggregation are out of range or contradict each other.

    Args:
        field: Setting, below `secure_aggregation`.
        message: The fault, with got and wanted.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class MaskingParameters:
    """Parameters of the masked updates of a training session.

    Attributes:
        bits: Bits of an element: 16, 32 or 64.
        clip: L2 norm to which the change of the weights is clipped, above 0.
        max_cohort: Most updates of a sum.
        max_weight: Largest weight of an update, 1 to 2^40.
        metrics: Bound of each metric by name, in the order of their slots.
        noise: Noise that devices or helpers add; None without it. With noise every update has the weight 1, and there
            are no metrics.
        staleness_weights: With asynchronous rounds: weight by staleness; empty otherwise.

    Raises:
        InvalidMaskingError: A value is out of range.
    """

    bits: int
    clip: float
    max_cohort: int
    max_weight: int
    metrics: Mapping[str, float]
    noise: SumNoise | None = None
    staleness_weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges, and that the ring has room for the cohort."""
        if self.bits not in DTYPES:
            raise InvalidMaskingError("bits", f"got {self.bits}, want 16, 32 or 64")
        if not (isfinite(self.clip) and self.clip > 0):
            raise InvalidMaskingError("clip", f"got {self.clip:g}, want a number above 0")
        if self.max_cohort < 1:
            raise InvalidMaskingError("max_cohort", f"got {self.max_cohort}, want 1 or more")
        if not 1 <= self.max_weight <= MAX_WEIGHT:
            raise InvalidMaskingError("max_weight", f"got {self.max_weight}, want 1 to 2^40")
        for name, bound in self.metrics.items():
            if not (name and isfinite(bound) and bound > 0):
                raise InvalidMaskingError("metrics", f"got {name!r} within {bound:g}, want above 0")
        if self.noise is not None:
            self._check_noise(self.noise)
        problem = find_problem(self.staleness_weights)
        if problem:
            raise InvalidMaskingError("staleness_weights", problem)
        if self.scale < 1:
            noise = "" if self.noise is None else " with its noise"
            raise InvalidMaskingError(
                "bits",
                f"{self.bits} bits hold no sum of {self.max_cohort} updates of norm {self.clip:g}{noise}: want more "
                "bits, a smaller clip or a smaller max_cohort",
            )

    def _check_noise(self, noise: SumNoise) -> None:
        if not noise.is_valid:
            raise InvalidMaskingError("noise", "its source or its multiplier is out of range")
        if self.max_weight != 1 or self.metrics:
            raise InvalidMaskingError(
                "noise", "with it every update has the weight 1, and there are no metrics"
            )
        share = noise.stddev(self.clip_levels, 0)
        if share < LEAST_SHARE:
            raise InvalidMaskingError(
                "bits",
                f"with {self.bits} bits the noise has {share:.3g} levels of quantization, want at least "
                f"{LEAST_SHARE:g}: want more bits, more noise or a smaller max_cohort",
            )

    @classmethod
    def of(
        cls,
        policy: training_pb2.SecureAggregationPolicy,
        max_weight: int,
        noise_multiplier: float = 0.0,
    ) -> Self:
        """Return the parameters of a policy whose defaults are filled in.

        Args:
            policy: The policy.
            max_weight: As in `MaskingParameters`.
            noise_multiplier: Of the noise of the sum; without effect if the coordinator adds it.

        Raises:
            InvalidMaskingError: A value is out of range.
        """
        metrics = {metric.name: metric.bound for metric in policy.metrics}
        if len(metrics) != len(policy.metrics):
            raise InvalidMaskingError("metrics", "a metric is listed twice")
        noise, weights = None, tuple(policy.staleness_weights)
        if policy.noise in IN_SUM:
            noise = SumNoise(policy.noise, noise_multiplier, policy.min_cohort, len(policy.helpers))
        return cls(policy.bits, policy.clip, policy.max_cohort, max_weight, metrics, noise, weights)

    @classmethod
    def of_task(cls, masking: security_pb2.MaskingTask) -> Self:
        """Return the parameters of a signed task.

        Raises:
            InvalidMaskingError: A value is out of range.
        """
        policy = policy_of(masking)
        is_noisy = masking.HasField("noisy")
        if is_noisy == masking.HasField("policy") or is_noisy != (policy.noise in IN_SUM):
            raise InvalidMaskingError("noise", "its source is not the one of the settings")
        if policy.staleness_weights:
            if masking.max_weight or is_noisy:
                raise InvalidMaskingError(
                    "max_weight", f"got {masking.max_weight} with staleness weights, want 0"
                )
            return cls.of(policy, 1)
        return cls.of(policy, masking.max_weight, masking.noisy.noise_multiplier)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy dtype of the ring's elements, unsigned and little-endian."""
        return DTYPES[self.bits].numpy

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def modulus(self) -> int:
        """Size of the ring: 2^bits."""
        return 1 << self.bits

    @property
    def largest_staleness_weight(self) -> int:
        """Largest weight by which a masked element is multiplied; 1 without staleness weights."""
        return max(self.staleness_weights, default=1)

    @property
    def room(self) -> int:
        """Largest magnitude of a sum of quantized elements of weight 1 that the ring holds."""
        half, largest = self.modulus // 2 - 1, self.largest_staleness_weight
        return (half - MAX_ROUNDINGS * largest) // largest if self.staleness_weights else half

    @property
    def limit(self) -> int:
        """Largest magnitude of a quantized element."""
        return self.room // self._share_count

    @cached_property
    def _share_count(self) -> int:
        """Updates that the ring has room for: `max_cohort`, and the noise."""
        return self.max_cohort + (self.noise.room(self.max_cohort) if self.noise else 0)

    @cached_property
    def scale(self) -> int:
        """Levels of quantization in a change of 1: floor(room / (updates in the ring * clip))."""
        return int(Fraction(self.room) / (self._share_count * Fraction(self.clip)))

    @property
    def clip_levels(self) -> float:
        """Largest norm of a clipped change in levels."""
        return self.clip * self.scale

    def noise_stddev(self, element_count: int) -> float:
        """Return the standard deviation of what one device, or one helper, adds to each element, in levels.

        Args:
            element_count: Elements of the model.
        """
        return self.noise.stddev(self.clip_levels, element_count) if self.noise else 0.0

    @property
    def digit_bits(self) -> int:
        """Bits of a digit of a slot value, 1 or more."""
        return ((self.modulus - 1) // self.max_cohort + 1).bit_length() - 1

    @property
    def weight_digits(self) -> int:
        """Number of digits of a weight."""
        return -(-self.max_weight.bit_length() // self.digit_bits)

    @property
    def metric_digits(self) -> int:
        """Number of digits of a metric's level times the weight."""
        return -(-(self.max_weight.bit_length() + METRIC_BITS) // self.digit_bits)

    @property
    def slot_count(self) -> int:
        """Number of elements after the model's."""
        return self.weight_digits + len(self.metrics) * self.metric_digits

    def manifest(self, base: Manifest) -> Manifest:
        """Return the layout of a masked update of a model."""
        count = float_count(base) + self.slot_count
        return Manifest((TensorSpec(TENSOR, DTYPES[self.bits], (count,)),))


def policy_of(masking: security_pb2.MaskingTask) -> training_pb2.SecureAggregationPolicy:
    """Return the settings of a task, which have another place with noise of devices or helpers."""
    return masking.noisy.policy if masking.HasField("noisy") else masking.policy
