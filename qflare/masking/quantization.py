"""Quantization of updates to a ring, and back from a sum.

An update's change is clipped to an L2 norm, multiplied by `scale * weight / max_weight` and rounded stochastically:
`floor(x + u)` with `u` uniform in [0, 1). The error of an element is below one level, and its mean is zero. Negative
numbers are in two's complement.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nextafter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qflare.masking.masks import SLICE_BYTES, Mask, new_buffer, new_seed
from qflare.masking.parameters import METRIC_BITS, MaskingParameters
from qflare.tensors import Array

PIECE: Final = 2**13
"""Elements that are worked on at once: their numbers in float64 stay in cache, and a scalar product of so few is not
spread over threads, which costs more than it saves."""

_LEVELS = 2**METRIC_BITS - 1


class Quantizer:
    """Quantizes the change of one update. Not thread-safe.

    The random numbers of the rounding are the key stream of AES-256-CTR under a fresh key, 32 bits per element: the
    mean of the error is below 2^-32 of a level. Memory is that of two slices, whatever the size of the change.

    Args:
        parameters: Of the training session.
        weight: Weight of the update, 1 to `max_weight`.
        norm: L2 norm of the change, finite.
        draw_seed: Draws the key of the rounding, 32 bytes; only a simulation replaces it.
    """

    def __init__(
        self,
        parameters: MaskingParameters,
        weight: int,
        norm: float,
        draw_seed: Callable[[], bytes] = new_seed,
    ) -> None:
        _check_weight(parameters, weight)
        if not (isfinite(norm) and norm >= 0):
            raise ValueError(f"norm: got {norm}, want a finite number")
        clipped = min(1.0, parameters.clip / norm) if norm else 1.0
        self._parameters = parameters
        self._factor = parameters.scale * clipped * (weight / parameters.max_weight)
        self._limit = _float_below(parameters.limit)
        # Margin for the rounding error of the norm of a piece.
        self._limit_squared = self._limit**2 * (1 - 2.0**-20)
        self._random = Mask(draw_seed()).stream(SLICE_BYTES)
        self._buffer = new_buffer()
        self._drawn: Array = np.empty(0, "<u4")
        self._scaled = np.empty(PIECE, np.float64)
        self._noise = np.empty(PIECE, np.float64)

    def quantize(self, change: NDArray[np.floating]) -> Array:
        """Return elements of the change in the ring; shape and order stay.

        Args:
            change: Finite, one dimension.
        """
        levels = np.empty(change.shape, self._parameters.dtype)
        self.write(change, levels)
        return levels

    def write(self, change: NDArray[np.floating], levels: Array) -> None:
        """Write elements of the change in the ring to an array.

        Args:
            change: Finite, one dimension.
            levels: Of the same length, in the dtype of the ring.
        """
        signed = levels.view(f"<i{levels.itemsize}")
        for start in range(0, len(change), PIECE):
            part = change[start : start + PIECE]
            self._write_piece(part, signed[start : start + PIECE])

    def _write_piece(self, change: NDArray[np.floating], levels: Array) -> None:
        # Operations that convert their operands are slower than a conversion and an operation.
        scaled, noise = self._scaled[: len(change)], self._noise[: len(change)]
        np.multiply(change, self._factor, out=scaled)
        np.copyto(noise, self._draw(len(change)))
        np.multiply(noise, 2.0**-32, out=noise)
        np.add(scaled, noise, out=scaled)
        np.floor(scaled, out=scaled)
        # Rounding of the multiplication may exceed the limit by a level; a sum would then wrap. The norm bounds every
        # element: pieces of a model hardly ever come near the limit.
        if not np.dot(scaled, scaled) < self._limit_squared:
            np.clip(scaled, -self._limit, self._limit, out=scaled)
        np.copyto(levels, scaled, casting="unsafe")

    def _draw(self, count: int) -> Array:
        """Return random 32-bit numbers, `PIECE` at most, which the next call may overwrite."""
        if len(self._drawn) < count:
            data = self._random.write_to(self._buffer, SLICE_BYTES)
            self._drawn = data.view("<u4")
        drawn, self._drawn = self._drawn[:count], self._drawn[count:]
        return drawn


def quantize_slots(
    parameters: MaskingParameters, weight: int, metrics: Mapping[str, float]
) -> Array:
    """Return the slots of an update in the ring.

    Args:
        parameters: Of the training session.
        weight: 1 to `max_weight`.
        metrics: Every metric of the parameters; others are ignored.

    Raises:
        KeyError: A metric is missing.
    """
    _check_weight(parameters, weight)
    digits = _digits(weight, parameters.weight_digits, parameters.digit_bits)
    for name, bound in parameters.metrics.items():
        value = _level(metrics[name], bound) * weight
        digits += _digits(value, parameters.metric_digits, parameters.digit_bits)
    return np.array(digits, parameters.dtype)


def slot_totals(parameters: MaskingParameters, slots: Array) -> tuple[int, dict[str, float]]:
    """Return the sum of the weights, and the weighted mean of each metric, from the slots of a sum.

    Raises:
        ValueError: The slots are those of no sum of updates.
    """
    numbers = [int(value) for value in slots]
    if len(numbers) != parameters.slot_count:
        raise ValueError(f"slots: got {len(numbers)}, want {parameters.slot_count}")
    weight = _value(numbers[: parameters.weight_digits], parameters.digit_bits)
    if not 1 <= weight <= parameters.max_cohort * parameters.max_weight:
        raise ValueError(
            "the sum of the weights is out of range: an update does not keep the layout"
        )
    means = {}
    start = parameters.weight_digits
    for name, bound in parameters.metrics.items():
        value = _value(numbers[start : start + parameters.metric_digits], parameters.digit_bits)
        start += parameters.metric_digits
        if value > weight * _LEVELS:
            raise ValueError(f"metric {name}: its sum is out of range")
        means[name] = (2 * (value / (weight * _LEVELS)) - 1) * bound
    return weight, means


def mean_change(
    parameters: MaskingParameters, total: Array, weight_sum: int, rounding: float = 0.0
) -> NDArray[np.float64]:
    """Return the weighted mean of the changes from elements of their sum.

    With staleness weights a change counts by the share of its weight in the largest one, and still as one in the
    denominator: the mean of stale updates is a shorter step.

    Args:
        parameters: Of the training session.
        total: Elements of the sum in the ring.
        weight_sum: Sum of the weights, 1 or more.
        rounding: Mean of what helpers have added to an element (`staleness.mean_rounding`).
    """
    signed = total.view(f"<i{parameters.itemsize}").astype(np.float64)
    levels = parameters.scale * parameters.largest_staleness_weight
    factor = parameters.max_weight / (levels * weight_sum)
    return (signed - rounding) * factor if rounding else signed * factor


def _float_below(number: int) -> float:
    """Return the largest float that is not above a whole number of 0 or more."""
    value = float(number)
    return value if value <= number else nextafter(value, 0.0)


def _check_weight(parameters: MaskingParameters, weight: int) -> None:
    if not 1 <= weight <= parameters.max_weight:
        raise ValueError(f"weight: got {weight}, want 1 to {parameters.max_weight}")


def _level(value: float, bound: float) -> int:
    clipped = min(max(value, -bound), bound)
    return round((clipped / bound + 1) / 2 * _LEVELS)


def _digits(value: int, count: int, bits: int) -> list[int]:
    return [value >> (bits * place) & (2**bits - 1) for place in range(count)]


def _value(digits: Sequence[int], bits: int) -> int:
    return sum(digit << (bits * place) for place, digit in enumerate(digits))
