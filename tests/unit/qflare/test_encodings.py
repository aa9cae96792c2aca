"""Encodings of floating tensors."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qflare.tensors import (
    Array,
    DType,
    FiniteCheck,
    InvalidManifestError,
    InvalidPayloadError,
    Manifest,
    NonFiniteError,
    TensorSpec,
    chunks,
)
from qflare.tensors.encodings import (
    Encoding,
    decode,
    encode,
    encoding_rules,
    narrow,
    top_k_count,
    wire_manifest,
)

LOSSY = [Encoding.FLOAT16, Encoding.BFLOAT16, Encoding.INT8, Encoding.TOP_K]
FLOAT32_MAX = float(np.finfo(np.float32).max)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


def float_arrays(limit: float, width: int = 32) -> st.SearchStrategy[Array]:
    bound = float(np.dtype(f"f{width // 8}").type(limit))
    elements = st.floats(-bound, bound, width=32 if width == 32 else 64)
    return hnp.arrays(f"f{width // 8}", SHAPES, elements=elements)


def round_trip(array: Array, encoding: Encoding, fraction: float = 1.0) -> Array:
    base = Manifest.from_arrays({"w": array})
    return decode(encode({"w": array}, base, encoding, fraction), base, encoding, fraction)["w"]


class TestWireManifest:
    BASE = Manifest(
        (
            TensorSpec("w", DType.FLOAT32, (5, 2)),
            TensorSpec("step", DType.INT64, ()),
            TensorSpec("h", DType.FLOAT16, (3,)),
            TensorSpec("mask", DType.BOOL, (4,)),
        )
    )

    @pytest.mark.parametrize(
        ("encoding", "w", "h"),
        [
            (Encoding.FULL_PRECISION, [("w", "F32", (5, 2))], [("h", "F16", (3,))]),
            (Encoding.FLOAT16, [("w", "F16", (5, 2))], [("h", "F16", (3,))]),
            (Encoding.BFLOAT16, [("w", "BF16", (5, 2))], [("h", "F16", (3,))]),
            (
                Encoding.INT8,
                [("w", "I8", (5, 2)), ("w#scale", "F32", ())],
                [("h", "I8", (3,)), ("h#scale", "F32", ())],
            ),
            (
                Encoding.TOP_K,
                [("w#index", "I32", (3,)), ("w#value", "F32", (3,))],
                [("h#index", "I32", (1,)), ("h#value", "F32", (1,))],
            ),
        ],
    )
    def test_each_encoding(
        self,
        encoding: Encoding,
        w: list[tuple[str, str, tuple[int, ...]]],
        h: list[tuple[str, str, tuple[int, ...]]],
    ) -> None:
        wire = wire_manifest(self.BASE, encoding, 0.3)

        got = [(spec.name, spec.dtype.safetensors_name, spec.shape) for spec in wire.tensors]
        assert got == [*w, ("step", "I64", ()), *h, ("mask", "BOOL", (4,))]

    @pytest.mark.parametrize(
        ("encoding", "taken"),
        [(Encoding.INT8, "w#scale"), (Encoding.TOP_K, "w#index"), (Encoding.TOP_K, "w#value")],
    )
    def test_a_name_that_is_taken_is_refused(self, encoding: Encoding, taken: str) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, ()), TensorSpec(taken, DType.INT8, ())))

        with pytest.raises(InvalidManifestError, match=f"'{taken}' twice"):
            wire_manifest(base, encoding)

    def test_a_name_that_becomes_too_long_is_refused(self) -> None:
        base = Manifest((TensorSpec("w" * 256, DType.FLOAT32, ()),))

        with pytest.raises(InvalidManifestError, match="got 262 bytes"):
            wire_manifest(base, Encoding.INT8)

    def test_a_large_tensor_has_int64_indices(self) -> None:
        base = Manifest(
            (TensorSpec("a", DType.FLOAT32, (2**31 - 1,)), TensorSpec("b", DType.FLOAT32, (2**31,)))
        )

        wire = wire_manifest(base, Encoding.TOP_K, 0.01)

        assert [spec.dtype for spec in wire.tensors[::2]] == [DType.INT32, DType.INT64]

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan, math.inf])
    def test_impossible_fractions_are_refused(self, fraction: float) -> None:
        with pytest.raises(InvalidManifestError, match="fraction"):
            wire_manifest(self.BASE, Encoding.TOP_K, fraction)

    @pytest.mark.parametrize(
        ("fraction", "count", "wanted"),
        [(1.0, 7, 7), (0.5, 7, 4), (1e-9, 7, 1), (0.5, 0, 0), (0.1, 10, 1)],
    )
    def test_top_k_count(self, fraction: float, count: int, wanted: int) -> None:
        assert top_k_count(fraction, count) == wanted


class TestEncoding:
    def test_not_set_is_full_precision(self) -> None:
        assert Encoding.from_number(0) is Encoding.FULL_PRECISION

    @pytest.mark.parametrize("number", [-1, 6])
    def test_unknown_numbers_are_refused(self, number: int) -> None:
        with pytest.raises(InvalidManifestError, match=f"got number {number}"):
            Encoding.from_number(number)


class TestErrorBounds:
    @given(float_arrays(65519))
    def test_float16(self, array: Array) -> None:
        error = np.abs(round_trip(array, Encoding.FLOAT16) - array)

        assert (error <= np.maximum(np.abs(array) * 2.0**-11, 2.0**-25)).all()

    @given(float_arrays(3.38e38))
    def test_bfloat16(self, array: Array) -> None:
        error = np.abs(round_trip(array, Encoding.BFLOAT16).astype("f8") - array)

        assert (error <= np.maximum(np.abs(array.astype("f8")) * 2.0**-8, 2.0**-134)).all()

    @given(float_arrays(FLOAT32_MAX * 0.99))
    def test_int8(self, array: Array) -> None:
        base = Manifest.from_arrays({"w": array})
        encoded = encode({"w": array}, base, Encoding.INT8)
        scale = float(encoded["w#scale"][()])
        largest = float(np.abs(array).max(initial=0))

        error = np.abs(decode(encoded, base, Encoding.INT8)["w"].astype("f8") - array)

        assert (error <= 0.5001 * scale).all()
        assert largest / 127 * (1 - 2**-22) <= scale <= largest / 127 * (1 + 2**-22) + 2.0**-149

    @given(float_arrays(FLOAT32_MAX * 0.99, width=64))
    def test_int8_of_float64(self, array: Array) -> None:
        base = Manifest.from_arrays({"w": array})
        encoded = encode({"w": array}, base, Encoding.INT8)

        error = np.abs(decode(encoded, base, Encoding.INT8)["w"] - array)

        assert (error <= 0.5001 * float(encoded["w#scale"][()])).all()

    @given(float_arrays(FLOAT32_MAX), st.floats(0.01, 1))
    def test_top_k(self, array: Array, fraction: float) -> None:
        base = Manifest.from_arrays({"w": array})
        encoded = encode({"w": array}, base, Encoding.TOP_K, fraction)
        got = decode(encoded, base, Encoding.TOP_K, fraction)["w"].reshape(-1)

        kept = encoded["w#index"]
        dropped = np.delete(np.abs(array.reshape(-1)), kept)
        assert (got[kept] == array.reshape(-1)[kept]).all()
        assert np.count_nonzero(got) <= len(kept) == top_k_count(fraction, array.size)
        assert dropped.max(initial=0) <= np.abs(array.reshape(-1)[kept]).min(initial=math.inf)

    @pytest.mark.parametrize("encoding", [Encoding.FULL_PRECISION, Encoding.TOP_K])
    @given(array=float_arrays(FLOAT32_MAX))
    def test_all_elements_of_float32_are_exact(self, encoding: Encoding, array: Array) -> None:
        assert round_trip(array, encoding).tobytes() == array.tobytes() or (
            encoding is Encoding.TOP_K and (round_trip(array, encoding) == array).all()
        )

    @pytest.mark.parametrize("encoding", list(Encoding))
    @pytest.mark.parametrize(
        "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4"]
    )
    def test_every_element_type(self, encoding: Encoding, dtype: str) -> None:
        array = np.array([[0.5, -1.0], [0.25, 0.0]]).astype(dtype)

        got = round_trip(array, encoding)

        assert got.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_allclose(got.astype("f8"), array.astype("f8"), atol=0.005)


class TestEncode:
    def test_integers_and_booleans_are_left_alone(self) -> None:
        arrays = {"n": np.arange(3), "b": np.array([True, False]), "w": np.ones(2, np.float32)}
        base = Manifest.from_arrays(arrays)

        encoded = encode(arrays, base, Encoding.INT8)

        assert encoded["n"] is arrays["n"]
        assert encoded["b"] is arrays["b"]

    @pytest.mark.parametrize("encoding", list(Encoding))
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_elements_that_are_not_finite_are_refused(self, encoding: Encoding, bad: float) -> None:
        arrays = {"w": np.array([0, 1, bad])}

        with pytest.raises(NonFiniteError, match="tensor 'w', element 2"):
            encode(arrays, Manifest.from_arrays(arrays), encoding)

    @pytest.mark.parametrize(
        ("encoding", "value"),
        [
            (Encoding.FLOAT16, 65520.0),
            (Encoding.BFLOAT16, 3.4e38),
            (Encoding.INT8, 3.4e38),
            (Encoding.INT8, 1e300),
            (Encoding.TOP_K, 1e300),
        ],
    )
    def test_elements_out_of_range_are_refused(self, encoding: Encoding, value: float) -> None:
        arrays = {"w": np.array([value])}

        with pytest.raises(NonFiniteError, match="tensor 'w"):
            encode(arrays, Manifest.from_arrays(arrays), encoding)

    @pytest.mark.parametrize("encoding", LOSSY)
    @given(array=float_arrays(60000))
    def test_what_is_encoded_keeps_the_rules(self, encoding: Encoding, array: Array) -> None:
        base = Manifest.from_arrays({"w": array})
        wire = wire_manifest(base, encoding, 0.5)
        check = FiniteCheck(wire, encoding_rules(base, encoding))

        for chunk in chunks(encode({"w": array}, base, encoding, 0.5), wire):
            check.feed(chunk)

        check.finish()

    def test_other_arrays_are_refused(self) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (2,)),))

        with pytest.raises(InvalidManifestError):
            encode({"w": np.zeros(2)}, base, Encoding.INT8)


class TestRules:
    @pytest.mark.parametrize("scale", [-1e-30, FLOAT32_MAX / 127, math.nan, math.inf])
    def test_scales_that_could_overflow_are_refused(self, scale: float) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (1,)),))
        check = FiniteCheck(wire_manifest(base, Encoding.INT8), encoding_rules(base, Encoding.INT8))

        with pytest.raises(InvalidPayloadError, match="'w#scale', element 0"):
            check.feed(b"\x01" + np.float32(scale).tobytes())

    @pytest.mark.parametrize("level", [-128, 127])
    def test_the_largest_scale_gives_finite_elements(self, level: int) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (1,)),))
        arrays: dict[str, Array] = {
            "w": np.array([level], np.int8),
            "w#scale": np.array(FLOAT32_MAX / 128, np.float32),
        }

        assert np.isfinite(decode(arrays, base, Encoding.INT8)["w"]).all()

    @pytest.mark.parametrize(
        ("indices", "element"),
        [([0, 1, 1], 2), ([1, 0, 2], 1), ([-1, 0, 1], 0), ([0, 1, 9], 2), ([0, 2**31 - 1, 3], 1)],
    )
    @pytest.mark.parametrize("step", [1, 4, 5, 100])
    def test_indices_must_ascend_within_the_tensor(
        self, indices: list[int], element: int, step: int
    ) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (9,)),))
        wire = wire_manifest(base, Encoding.TOP_K, 0.3)
        check = FiniteCheck(wire, encoding_rules(base, Encoding.TOP_K))
        payload = np.array(indices, np.int32).tobytes()

        def feed_all() -> None:
            for start in range(0, len(payload), step):
                check.feed(payload[start : start + step])

        with pytest.raises(
            InvalidPayloadError, match=f"'w#index', element {element}: got .*, wanted ascending"
        ):
            feed_all()

    def test_rules_serve_several_payloads_at_once(self) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (9,)),))
        wire = wire_manifest(base, Encoding.TOP_K, 0.3)
        rules = encoding_rules(base, Encoding.TOP_K)
        one, two = FiniteCheck(wire, rules), FiniteCheck(wire, rules)

        for value in (5, 6, 8):
            one.feed(np.int32(value).tobytes())
            two.feed(np.int32(value - 5).tobytes())

        one.feed(bytes(12))
        two.feed(bytes(12))
        one.finish()
        two.finish()

    def test_decode_keeps_them_too(self) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (2,)),))
        arrays = {"w#index": np.array([0, 5], np.int32), "w#value": np.ones(2, np.float32)}

        with pytest.raises(InvalidPayloadError, match="'w#index', element 1: got 5"):
            decode(arrays, base, Encoding.TOP_K)

    def test_decode_refuses_what_its_element_type_cannot_hold(self) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT16, (1,)),))
        arrays: dict[str, Array] = {
            "w": np.array([127], np.int8),
            "w#scale": np.array(1e6, np.float32),
        }

        with pytest.raises(NonFiniteError, match="tensor 'w', element 0"):
            decode(arrays, base, Encoding.INT8)


def nearest_bfloat16(value: float) -> float:
    """The bfloat16 nearest to a number, ties to even, by exact arithmetic."""
    below = np.array([value], np.float32).view(np.uint32) & 0xFFFF0000
    candidates = [
        float(np.array([bits], np.uint32).view(np.float32)[0])
        for bits in (below[0] - 0x10000, below[0], below[0] + 0x10000)
    ]
    return min(
        candidates,
        key=lambda candidate: (
            abs(Fraction(candidate) - Fraction(value)),
            int(np.array([candidate], np.float32).view(np.uint32)[0]) >> 16 & 1,
        ),
    )


class TestNarrow:
    @given(st.floats(2.0**-120, 2.0**120), st.booleans())
    def test_float64_to_bfloat16_is_rounded_once(self, value: float, negative: bool) -> None:
        signed = -value if negative else value

        got = narrow(np.array([signed]), DType.BFLOAT16)

        assert float(got[0]) == nearest_bfloat16(signed)

    @given(st.integers(0, 127), st.sampled_from([-1, 0, 1]), st.integers(24, 40))
    def test_near_ties_too(self, mantissa: int, direction: int, exponent: int) -> None:
        value = 1 + mantissa / 128 + 1 / 256 + direction * 2.0**-exponent

        assert float(narrow(np.array([value]), DType.BFLOAT16)[0]) == nearest_bfloat16(value)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            (DType.FLOAT16, 65520.0),
            (DType.BFLOAT16, 3.4e38),
            (DType.BFLOAT16, 1e300),
            (DType.FLOAT32, 1e300),
        ],
    )
    def test_values_out_of_range_become_infinite(self, dtype: DType, value: float) -> None:
        assert narrow(np.array([value, -value]), dtype).astype(float).tolist() == [
            math.inf,
            -math.inf,
        ]

    @given(st.floats(width=32))
    def test_float32_is_exact_in_float64(self, value: float) -> None:
        assume(not math.isnan(value))

        assert float(narrow(np.array([value]), DType.FLOAT32)[0]) == value
