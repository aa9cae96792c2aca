"""Masked updates: the change of the weights is quantized, masked, and its seed sealed to the helpers of the task.

A seed masks one payload and is not kept: the payload with its sealed seed is kept until the coordinator settles it, so
that a repeated upload sends the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qflare.evidence.unmasking import Masking
from qflare.masking.masks import Mask, new_seed
from qflare.masking.noise import DEVICES, DrawNoise, MissingSamplerError, add_to, draw_exact
from qflare.masking.parameters import TENSOR
from qflare.masking.quantization import PIECE, Quantizer, quantize_slots
from qflare.masking.seeds import seal_seed
from qflare.tensors import Array, Manifest
from qflare.tensors.vectors import float_count
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import TrainingFunctionError, UnsupportedTaskError
from qflare_client.models.upload import Payload


@dataclass(frozen=True)
class QuantizedUpdate:
    """A quantized update, to be masked in place before it leaves the device.

    Attributes:
        layout: Of its payload.
        vector: Elements and slots in the ring.
    """

    layout: Manifest
    vector: Array = field(repr=False)

    def payload(self) -> Payload:
        """Return the payload with what the vector holds now."""
        return Payload(self.layout, {TENSOR: self.vector})


def quantize_update(
    masking: Masking,
    manifest: Manifest,
    arrays: Mapping[str, Array],
    base: Mapping[str, Array],
    example_count: int,
    metrics: Mapping[str, float],
    *,
    draw_seed: Callable[[], bytes] = new_seed,
    draw_noise: DrawNoise = draw_exact,
) -> QuantizedUpdate:
    """Quantize an update, and add this device's share of the noise if the task wants it.

    Args:
        masking: Required by the task.
        manifest: Layout of the model.
        arrays: The trained tensors, finite.
        base: The tensors of the base version.
        example_count: Number of local examples.
        metrics: Metrics by name; those that the task does not name stay on the device.
        draw_seed: Draws the key of the rounding, 32 bytes; only a simulation replaces it.
        draw_noise: Draws the noise; only a simulation replaces it.

    Raises:
        TrainingFunctionError: A value is not finite, or a metric that the task names is missing.
        UnsupportedTaskError: The task wants noise, and its sampler is not installed.
    """
    parameters = masking.parameters
    missing = sorted(parameters.metrics.keys() - metrics.keys())
    if missing:
        raise TrainingFunctionError(f"metrics: {missing[0]!r} is missing, which the task requires")
    weight = min(example_count, parameters.max_weight)
    norm = _norm(manifest, arrays, base)
    layout = parameters.manifest(manifest)
    vector = np.empty(layout.tensors[0].element_count, parameters.dtype)
    quantizer, position = Quantizer(parameters, weight, norm, draw_seed), 0
    for piece in _changes(manifest, arrays, base):
        quantizer.write(piece, vector[position : position + len(piece)])
        position += len(piece)
    assert position == float_count(manifest)
    if parameters.noise is not None and parameters.noise.source == DEVICES:
        try:
            add_to(vector[:position], parameters.noise_stddev(position), draw_noise)
        except MissingSamplerError as error:
            raise UnsupportedTaskError(str(error)) from error
    vector[position:] = quantize_slots(parameters, weight, metrics)
    return QuantizedUpdate(layout, vector)


def add_masks(
    masking: Masking, update: QuantizedUpdate, *, draw_seed: Callable[[], bytes] = new_seed
) -> tuple[bytes, ...]:
    """Add a mask for each helper of the task to a quantized update, and return their seeds.

    Args:
        masking: Required by the task.
        update: Masked in place.
        draw_seed: Draws the seeds, 32 bytes each; only a simulation replaces it.
    """
    seeds = tuple(draw_seed() for _ in masking.helpers)
    for seed in seeds:
        Mask(seed).add_to(update.vector, 0)
    return seeds


def seal_seeds(
    masking: Masking, seeds: tuple[bytes, ...], statement: security_pb2.UpdateStatement
) -> None:
    """Complete the statement of a masked update with its sealed seeds.

    Args:
        masking: Required by the task.
        seeds: In the order of the helpers.
        statement: Complete except for masking, key id and signature; changed in place.
    """
    statement.kind = training_pb2.UPDATE_KIND_DELTA
    statement.encoding = training_pb2.ENCODING_MASKED
    statement.example_count = 1
    statement.metrics.clear()
    statement.masking.task_digest = masking.task_digest
    statement.masking.noise_multiplier = masking.noise_multiplier
    for helper, seed in zip(masking.helpers, seeds, strict=True):
        sealed = seal_seed(seed, helper.helper_id, helper.kem_key, statement)
        statement.masking.seeds.append(sealed)


def _changes(
    manifest: Manifest, arrays: Mapping[str, Array], base: Mapping[str, Array]
) -> Iterator[NDArray[np.float64]]:
    """Yield the change of the floating-point tensors in pieces that overwrite one another, in manifest order."""
    # Converting first and then subtracting takes half the time of a subtraction that converts.
    changes, origins = np.empty(PIECE, np.float64), np.empty(PIECE, np.float64)
    for spec in manifest.tensors:
        if not spec.dtype.is_float:
            continue
        trained, origin = arrays[spec.name].reshape(-1), base[spec.name].reshape(-1)
        for start in range(0, spec.element_count, PIECE):
            piece = trained[start : start + PIECE]
            change, subtracted = changes[: len(piece)], origins[: len(piece)]
            np.copyto(change, piece)
            np.copyto(subtracted, origin[start : start + PIECE])
            np.subtract(change, subtracted, out=change)
            yield change


def _norm(manifest: Manifest, arrays: Mapping[str, Array], base: Mapping[str, Array]) -> float:
    total = sum(float(np.dot(piece, piece)) for piece in _changes(manifest, arrays, base))
    if not np.isfinite(total):
        raise TrainingFunctionError("trained arrays: the change is not finite")
    return float(np.sqrt(total))
