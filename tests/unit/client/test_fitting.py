"""What training returns is sent as it is meant, or refused: nothing wraps around, overflows or loses its fraction."""

import math
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qflare.tensors import Array, DType, Manifest, NonFiniteError, TensorSpec, check_elements
from qflare_client.errors import TrainingFunctionError
from qflare_client.models.fitting import fitted

NUMBERS = [
    np.dtype(name)
    for name in "bool i1 i2 i4 i8 u1 u2 u4 u8 >i2 >i8 >u4 f2 f4 f8 >f4 >f8".split()  # noqa: SIM905
]
SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3)]


def manifest(dtype: DType, shape: tuple[int, ...]) -> Manifest:
    return Manifest((TensorSpec("t", dtype, shape),))


def same_number(got: Any, given_value: Any, dtype: DType) -> bool:
    """Whether an element is what was given: exactly for integers, within rounding for floating types."""
    if dtype.is_float:
        wanted = float(given_value)
        form = ml_dtypes.finfo(dtype.numpy)  # type: ignore[no-untyped-call]
        digits, least = float(form.eps), float(form.smallest_subnormal)
        return math.isclose(float(got), wanted, rel_tol=digits, abs_tol=least)
    return int(got) == int(given_value)


@st.composite
def given_arrays(draw: st.DrawFn) -> Array:
    dtype, shape = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(SHAPES))
    array = draw(hnp.arrays(dtype, shape))
    if draw(st.booleans()) and array.ndim > 1:
        return np.asarray(array.copy(order="F")[::-1, ...])
    return array


@given(array=given_arrays(), dtype=st.sampled_from(list(DType)))
def test_numbers_are_sent_as_they_are_or_refused(array: Array, dtype: DType) -> None:
    try:
        got = fitted({"t": array}, manifest(dtype, array.shape))["t"]
        check_elements("t", got)
    except (TrainingFunctionError, NonFiniteError):
        return

    assert (DType.from_numpy(got.dtype), got.shape) == (dtype, array.shape)
    for element, value in zip(got.reshape(-1), array.reshape(-1), strict=True):
        assert same_number(element, value, dtype)


@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (DType.INT8, 300, "got 300"),
        (DType.UINT8, -1, "got -1"),
        (DType.UINT64, -1, "got -1"),
        (DType.INT64, np.array(2**64 - 1, np.uint64), "got 18446744073709551615"),
        (DType.INT32, 2**64, "elements of object"),
        (DType.INT32, 1.5, "elements of float64"),
        (DType.INT32, math.nan, "elements of float64"),
        (DType.INT32, True, "elements of bool"),
        (DType.BOOL, 1, "elements of int64"),
        (DType.FLOAT16, 65_520.0, "got 65520.0"),
        (DType.FLOAT32, 1e39, r"got 1e\+39"),
        (DType.FLOAT32, math.nan, "got nan"),
        (DType.BFLOAT16, 3.4e38 * 2, r"got 6.8e\+38"),
        (DType.FLOAT32, 1 + 2j, "elements of complex128"),
        (DType.FLOAT32, "1.5", "elements of <U3"),
        (DType.FLOAT32, None, "elements of object"),
        (DType.FLOAT32, np.ma.masked_array(1.0, mask=True), "masked"),
    ],
)
def test_a_value_that_does_not_fit_is_named(dtype: DType, value: Any, shown: str) -> None:
    with pytest.raises(TrainingFunctionError, match=f"tensor 't'.*{shown}"):
        fitted({"t": value}, manifest(dtype, ()))


def test_arrays_are_fitted_without_loading_masked_ones() -> None:
    check = (
        "import sys; import numpy as np; from qflare.tensors import DType, Manifest, TensorSpec; "
        "from qflare_client.models.fitting import fitted; "
        "fitted({'t': np.zeros(3)}, Manifest((TensorSpec('t', DType.FLOAT32, (3,)),))); "
        "sys.exit('numpy.ma' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", check], check=False)

    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arrays", "shown"),
    [
        ([np.zeros(3, np.float32)], "got list, want a mapping of tensor names to arrays, of 't'"),
        (None, "got NoneType"),
        (np.zeros(3), "got ndarray"),
        ({1: np.zeros(3)}, "names that are no str"),
        ({"x\udc80": np.zeros(3)}, "not wanted"),
        ({}, "missing"),
        ({"t": [[1.0], [1.0, 2.0]]}, "tensor 't': got list"),
        ({"t": np.zeros(4)}, r"got FLOAT32 \(4,\), wanted FLOAT32 \(3,\)"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_wanted(arrays: object, shown: str) -> None:
    with pytest.raises(TrainingFunctionError, match=shown):
        fitted(arrays, manifest(DType.FLOAT32, (3,)))
