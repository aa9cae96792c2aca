"""What training returned, made to fit the version that it was trained from: names, shapes, element types, ranges.

Numpy promotes float32 to float64 easily, so floating tensors are rounded to the element types of the version, and
integers are taken as integers of another width. A value that does not survive that is refused with its tensor, element
and value: nothing wraps around, becomes infinite or loses its fraction.

What it does not do: check that floating values are finite where nothing is converted (see
`qflare_client.models.upload`).
"""

import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qflare.tensors import Array, DType, InvalidManifestError, Manifest, TensorSpec, check_arrays
from qflare.tensors.encodings import narrow
from qflare_client.errors import TrainingFunctionError

_SHOWN_NAMES: Final = 5
_INTEGERS: Final = "iu"
_NOT_AN_ARRAY: Final = (TypeError, ValueError, OverflowError, RuntimeError, AttributeError)
"""What objects raise that are asked for an array: PyTorch raises RuntimeError for tensors that require gradients."""


def fitted(arrays: object, manifest: Manifest) -> dict[str, Array]:
    """Return arrays as a manifest describes them.

    Args:
        arrays: What the training function returned, expected to be a mapping of tensor names to arrays.
        manifest: Of the version.

    Raises:
        TrainingFunctionError: It is no such mapping, or a tensor has another shape, an element type that cannot be
            taken for that of the version, or a value beyond its range.
    """
    named = _named(arrays, manifest)
    specs = {spec.name: spec for spec in manifest.tensors}
    try:
        with np.errstate(all="ignore"):
            result = {
                name: _fitted_one(specs[name], value) if name in specs else np.empty(0)
                for name, value in named.items()
            }
        check_arrays(result, manifest)
    except InvalidManifestError as error:
        raise TrainingFunctionError(f"trained arrays: {error}") from error
    return result


def _named(arrays: object, manifest: Manifest) -> Mapping[str, Any]:
    if isinstance(arrays, Mapping) and all(isinstance(name, str) for name in arrays):
        return arrays
    names = ", ".join(repr(spec.name) for spec in manifest.tensors[:_SHOWN_NAMES])
    more = ", ..." if len(manifest.tensors) > _SHOWN_NAMES else ""
    got = type(arrays).__name__
    if isinstance(arrays, Mapping):
        got += " with names that are no str"
    raise TrainingFunctionError(
        f"trained arrays: got {got}, want a mapping of tensor names to arrays, of {names}{more}"
    )


def _fitted_one(spec: TensorSpec, value: object) -> Array:
    array = _array(spec, value)
    if array.dtype.newbyteorder("<") == spec.dtype.numpy:
        return array
    if spec.dtype.is_float and _is_number(array.dtype):
        return _rounded(spec, array)
    if spec.dtype.numpy.kind in _INTEGERS and array.dtype.kind in _INTEGERS:
        return _of_width(spec, array)
    raise TrainingFunctionError(
        f"tensor {spec.name!r}: got elements of {array.dtype}, want {spec.dtype.name.lower()}"
    )


def _array(spec: TensorSpec, value: object) -> Array:
    if _is_masked(value):
        raise TrainingFunctionError(f"tensor {spec.name!r}: got a masked array, want an array")
    try:
        return np.asarray(value)
    except _NOT_AN_ARRAY as error:
        raise TrainingFunctionError(
            f"tensor {spec.name!r}: got {type(value).__name__}, want an array: {error}"
        ) from error


def _is_masked(value: object) -> bool:
    """Return whether a value is a masked array of numpy's.

    Numpy loads them when they are first asked for. Who has none spares a device the time and the memory.
    """
    return isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def _is_number(dtype: np.dtype[Any]) -> bool:
    # bfloat16 is kind "V" to numpy.
    return dtype.kind in "fiub" or dtype == DType.BFLOAT16.numpy


def _rounded(spec: TensorSpec, array: Array) -> Array:
    """Round to the floating type of a tensor; a value beyond its range is refused."""
    floats = array if array.dtype.kind not in "iub" else array.astype(np.float64)
    result = narrow(floats, spec.dtype)
    bad = ~np.isfinite(result)
    if bad.any():
        raise _refused(spec, array, bad)
    return result


def _of_width(spec: TensorSpec, array: Array) -> Array:
    """Take integers for those of another width or sign; one that does not fit is refused."""
    result = array.astype(spec.dtype.numpy)
    if not np.can_cast(array.dtype, spec.dtype.numpy, "safe"):
        # The sign tells what wraps around and back, between int64 and uint64.
        bad = (result.astype(array.dtype) != array) | ((result < 0) != (array < 0))
        if bad.any():
            raise _refused(spec, array, bad)
    return result


def _refused(spec: TensorSpec, array: Array, bad: Array) -> TrainingFunctionError:
    element = int(np.argmax(bad.reshape(-1)))
    return TrainingFunctionError(
        f"tensor {spec.name!r}, element {element}: got {array.reshape(-1)[element]}, "
        f"want a finite {spec.dtype.name.lower()}"
    )
