"""Payload encodings: compressed forms of floating tensors for transfer.

The encoded form is again a manifest and a payload (the *wire* manifest and its arrays), so digests,
signatures, limits and element checks apply as to any payload. Encodings change floating tensors only;
integers and booleans are transferred unchanged.

Wire form of a floating tensor `w` of n elements, and the error of an element x:

* FULL_PRECISION: `w` as it is. No error.
* FLOAT16: `w`, float16. At most 2^-11 |x|, or 2^-25 where |x| < 2^-14; |x| must be below 65,520.
* BFLOAT16: `w`, bfloat16. At most 2^-8 |x|, or 2^-134 where |x| < 2^-126. Like FLOAT16, it leaves 16-bit
  tensors as they are.
* INT8: `w`, int8, and `w#scale`, a float32 scalar; x is level times scale. The scale is max|x| / 127, rounded
  up to a float32 where needed; the error is at most 0.5001 of it.
* TOP_K: `w#index`, int32 (int64 where n exceeds an int32), and `w#value`, float32, of k = ceil(fraction * n)
  elements each: those of the largest magnitude, indices ascending. The others become zero, so their error
  is at most the smallest magnitude kept. Meant for deltas, not for weights.

A decoded tensor is rounded once more to its element type in the base manifest; what a slice of
`qflare.tensors.vectors` gives is not.

Invariants: rounding is to nearest, ties to even; nothing that travels is NaN or infinite; what an
encoding makes satisfies `encoding_rules`.

Sources: Seide et al. 2014 (quantized gradients); Aji and Heafield 2017, arXiv:1704.05021 (top-k).
"""

import enum
import math
from collections.abc import Mapping

import numpy as np

from qflare.tensors.elements import ElementRule, InvalidPayloadError, NonFiniteError, check_elements
from qflare.tensors.manifest import Array, DType, InvalidManifestError, Manifest, TensorSpec
from qflare.tensors.payload import check_arrays

SCALE_SUFFIX = "#scale"
INDEX_SUFFIX = "#index"
VALUE_SUFFIX = "#value"

_INT8_LEVELS = 127
_MAX_INT32 = 2**31 - 1
_MAX_SCALE = np.finfo(np.float32).max / 128  # -128 is in the wire's int8 too


class Encoding(enum.IntEnum):
    """Encoding of floating tensors; the value is the number of the proto enum `qflare.v1.Encoding`.

    ENCODING_MASKED of the enum is none of these: a masked update is one vector (`qflare.masking.parameters`).
    """

    FULL_PRECISION = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    TOP_K = 5

    @staticmethod
    def from_number(number: int) -> "Encoding":
        """Return the encoding with a number of the proto enum, where 0 (unset) means full precision.

        Raises:
            InvalidManifestError: The number is unknown.
        """
        try:
            return Encoding(number or Encoding.FULL_PRECISION)
        except ValueError:
            raise InvalidManifestError(
                f"encoding: got number {number}, wanted 0 to 5"
                "; if a later release made it, upgrade qflare"
            ) from None


def top_k_count(fraction: float, element_count: int) -> int:
    """Return how many elements of a tensor are transferred: ceil(fraction * n) in IEEE 754 double precision.

    Args:
        fraction: Within (0, 1].
        element_count: Elements of the tensor, n.

    Raises:
        InvalidManifestError: The fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise InvalidManifestError(f"top-k fraction: got {fraction}, wanted within (0, 1]")
    return min(element_count, math.ceil(fraction * element_count))


def wire_manifest(base: Manifest, encoding: Encoding, top_k_fraction: float = 1.0) -> Manifest:
    """Return the wire manifest of a base manifest under an encoding.

    Args:
        base: The manifest of the model.
        encoding: How its floating tensors travel.
        top_k_fraction: Within (0, 1]; read for TOP_K only.

    Raises:
        InvalidManifestError: A name made by the encoding is too long or belongs to another tensor, or
            the fraction is out of range.
    """
    specs: list[TensorSpec] = []
    for spec in base.tensors:
        specs += _wire_specs(spec, encoding, top_k_fraction) if spec.dtype.is_float else [spec]
    return Manifest(tuple(specs))


def _wire_specs(spec: TensorSpec, encoding: Encoding, top_k_fraction: float) -> list[TensorSpec]:
    if encoding is Encoding.INT8:
        return [
            TensorSpec(spec.name, DType.INT8, spec.shape),
            TensorSpec(spec.name + SCALE_SUFFIX, DType.FLOAT32, ()),
        ]
    if encoding is Encoding.TOP_K:
        count = top_k_count(top_k_fraction, spec.element_count)
        index_dtype = DType.INT32 if spec.element_count <= _MAX_INT32 else DType.INT64
        return [
            TensorSpec(spec.name + INDEX_SUFFIX, index_dtype, (count,)),
            TensorSpec(spec.name + VALUE_SUFFIX, DType.FLOAT32, (count,)),
        ]
    return [TensorSpec(spec.name, narrow_dtype(spec.dtype, encoding), spec.shape)]


def narrow_dtype(dtype: DType, encoding: Encoding) -> DType:
    """Return the wire element type under the encodings that only round."""
    if dtype.itemsize > DType.FLOAT16.itemsize:
        if encoding is Encoding.FLOAT16:
            return DType.FLOAT16
        if encoding is Encoding.BFLOAT16:
            return DType.BFLOAT16
    return dtype


def narrow(values: Array, dtype: DType) -> Array:
    """Round floating-point values to an element type, to nearest, ties to even.

    A value beyond the range becomes infinite, which `check_elements` finds; there is no clipping.

    Args:
        values: Of any floating-point type and shape.
        dtype: A floating-point type. Nothing is copied when the values have it already.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype is DType.BFLOAT16 and values.dtype.itemsize > np.dtype(np.float32).itemsize:
            values = _to_odd_float32(values)
        return values.astype(dtype.numpy, copy=False)


def _to_odd_float32(values: Array) -> Array:
    """Round float64 to float32 so that rounding on to bfloat16 gives what one rounding would.

    `ml_dtypes` goes by way of float32, and rounding twice to nearest can be wrong at ties. Rounding to
    odd in between cannot: Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819, theorem 1.
    """
    rounded = values.astype(np.float32)
    widened = rounded.astype(np.float64)
    bits = rounded.view(np.uint32)
    bits -= np.abs(widened) > np.abs(values)  # toward zero; infinity becomes the largest finite
    bits |= widened != values
    return rounded


def encode(
    arrays: Mapping[str, Array], base: Manifest, encoding: Encoding, top_k_fraction: float = 1.0
) -> dict[str, Array]:
    """Encode the arrays of a model or update.

    Args:
        arrays: As the base manifest describes them.
        base: The manifest of the model.
        encoding: How floating tensors travel; the module says with which error.
        top_k_fraction: Within (0, 1]; read for TOP_K only.

    Returns:
        Arrays as `wire_manifest` describes them, in its order.

    Raises:
        InvalidManifestError: The arrays are not those of the base manifest, or it cannot be encoded.
        NonFiniteError: An element is NaN or infinite, or too large for the encoding.
    """
    check_arrays(arrays, base)
    wire = wire_manifest(base, encoding, top_k_fraction)
    encoded: dict[str, Array] = {}
    for spec in base.tensors:
        array = arrays[spec.name]
        check_elements(spec.name, array)
        if spec.dtype.is_float:
            encoded |= _encode_one(spec, array, encoding, top_k_fraction)
        else:
            encoded[spec.name] = array
    check_arrays(encoded, wire)
    return encoded


def _encode_one(
    spec: TensorSpec, array: Array, encoding: Encoding, top_k_fraction: float
) -> dict[str, Array]:
    if encoding is Encoding.INT8:
        return _quantize(spec, array)
    if encoding is Encoding.TOP_K:
        return _select(spec, array, top_k_count(top_k_fraction, spec.element_count))
    return {spec.name: _narrow_checked(spec.name, array, narrow_dtype(spec.dtype, encoding))}


def _narrow_checked(name: str, values: Array, dtype: DType) -> Array:
    narrowed = narrow(values, dtype)
    check_elements(name, narrowed)
    return narrowed


def _quantize(spec: TensorSpec, array: Array) -> dict[str, Array]:
    wide = array.astype(np.float64 if spec.dtype is DType.FLOAT64 else np.float32, copy=False)
    largest = float(max(np.max(wide, initial=0), -np.min(wide, initial=0)))
    scale = np.float32(min(largest / _INT8_LEVELS, float(_MAX_SCALE)))
    # Rounded up where rounding was down, so that no level exceeds 127: it matters for subnormals.
    if float(scale) * _INT8_LEVELS < largest:
        scale = np.nextafter(scale, np.float32(np.inf))
    if scale > _MAX_SCALE:
        raise NonFiniteError(
            f"tensor {spec.name!r}: got magnitude {largest}, wanted a float32 scale"
        )
    levels = np.asarray(np.divide(wide, scale or np.float32(1)))
    np.rint(levels, out=levels)
    return {
        spec.name: levels.astype(np.int8),
        spec.name + SCALE_SUFFIX: np.array(scale, np.float32),
    }


def dequantize(levels: Array, scale: Array, out: Array | None = None) -> Array:
    """Return `levels * scale`, rounded to float32.

    Args:
        levels: Int8.
        scale: A float32 scalar.
        out: Float32 or float64 of the shape of the levels, to be filled and returned.
    """
    return np.asarray(np.multiply(levels, scale, out=out, dtype=np.float32))


def _select(spec: TensorSpec, array: Array, count: int) -> dict[str, Array]:
    flat = array.reshape(-1)
    size = spec.element_count
    # 16-bit floats are widened because bfloat16 has no partition.
    magnitudes = np.abs(flat.astype(np.float64 if spec.dtype is DType.FLOAT64 else np.float32))
    kept = np.argpartition(magnitudes, size - count)[size - count :] if count else np.arange(0)
    kept.sort()
    index_dtype = np.int32 if size <= _MAX_INT32 else np.int64
    values = _narrow_checked(spec.name + VALUE_SUFFIX, flat[kept], DType.FLOAT32)
    return {spec.name + INDEX_SUFFIX: kept.astype(index_dtype), spec.name + VALUE_SUFFIX: values}


def decode(
    arrays: Mapping[str, Array], base: Manifest, encoding: Encoding, top_k_fraction: float = 1.0
) -> dict[str, Array]:
    """Decode the output of `encode`.

    Args:
        arrays: As `wire_manifest` describes them; their elements need not be trusted.
        base: The manifest of the model.
        encoding: How floating tensors traveled.
        top_k_fraction: As it was for `encode`.

    Returns:
        Arrays as the base manifest describes them, in its order. A tensor that traveled as it is comes
        back as the same array.

    Raises:
        InvalidManifestError: The arrays are not those of the wire manifest.
        InvalidPayloadError: An element breaks the rules of the encoding.
        NonFiniteError: An element is NaN or infinite, or is so in its element type.
    """
    wire = wire_manifest(base, encoding, top_k_fraction)
    check_arrays(arrays, wire)
    rules = encoding_rules(base, encoding)
    for name, array in arrays.items():
        check_elements(name, array, rules.get(name))
    decoded: dict[str, Array] = {}
    for spec in base.tensors:
        if spec.dtype.is_float:
            wide = _decode_one(arrays, spec, encoding)
            decoded[spec.name] = _narrow_checked(spec.name, wide, spec.dtype)
        else:
            decoded[spec.name] = arrays[spec.name]
    return decoded


def _decode_one(arrays: Mapping[str, Array], spec: TensorSpec, encoding: Encoding) -> Array:
    if encoding is Encoding.INT8:
        return dequantize(arrays[spec.name], arrays[spec.name + SCALE_SUFFIX])
    if encoding is Encoding.TOP_K:
        values = np.zeros(spec.element_count, np.float32)
        values[arrays[spec.name + INDEX_SUFFIX]] = arrays[spec.name + VALUE_SUFFIX]
        return values.reshape(spec.shape)
    return arrays[spec.name]


class ScaleRule:
    """A scale by which every int8 gives a finite float32: within [0, largest float32 / 128]."""

    error = InvalidPayloadError
    wanted = f"0 to {_MAX_SCALE:g}"

    def first_bad(self, elements: Array, previous: Array | None = None) -> int | None:  # noqa: ARG002
        """See `ElementRule`."""
        good = (elements >= 0) & (elements <= _MAX_SCALE)
        return None if good.all() else int(np.argmin(good))


class IndexRule:
    """Indices into a tensor: within range and ascending, so none comes twice.

    Args:
        element_count: Elements of the tensor.
    """

    error = InvalidPayloadError

    def __init__(self, element_count: int) -> None:
        self._element_count = element_count
        self.wanted = f"ascending indices below {element_count}"

    def first_bad(self, elements: Array, previous: Array | None = None) -> int | None:
        """See `ElementRule`."""
        good = elements < self._element_count
        good[0] &= elements[0] > (-1 if previous is None else previous[0])
        good[1:] &= elements[1:] > elements[:-1]
        return None if good.all() else int(np.argmin(good))


def encoding_rules(base: Manifest, encoding: Encoding) -> dict[str, ElementRule]:
    """Return what an encoding demands of single wire tensors, for a `FiniteCheck` of the wire manifest.

    A payload that keeps these rules decodes to finite float32 values and cannot make a reader fail. The rules
    keep no state and may be shared.
    """
    floats = [spec for spec in base.tensors if spec.dtype.is_float]
    if encoding is Encoding.INT8:
        return {spec.name + SCALE_SUFFIX: ScaleRule() for spec in floats}
    if encoding is Encoding.TOP_K:
        return {spec.name + INDEX_SUFFIX: IndexRule(spec.element_count) for spec in floats}
    return {}
