"""Vectors: slices of payloads, and payloads from slices."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.tensors import (
    CHUNK_BYTES,
    Array,
    BytesLike,
    DType,
    InvalidPayloadError,
    Manifest,
    NonFiniteError,
    PayloadSizeError,
    TensorSpec,
    assemble,
    chunks,
)
from qflare.tensors.encodings import Encoding, decode, encode, wire_manifest
from qflare.tensors.vectors import (
    VectorLayout,
    VectorReader,
    float_count,
    integer_ranges,
    vector_dtype,
    write_payload,
)


class Payload:
    """A payload in memory that counts how often each byte is read."""

    def __init__(self, arrays: dict[str, Array], manifest: Manifest) -> None:
        self.data = b"".join(chunks(arrays, manifest))
        self.read_counts: Counter[int] = Counter()

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data)
        self.read_counts.update(range(offset, offset + length))
        return self.data[offset : offset + length]


SIZES = st.integers(0, 60)
DTYPES = st.sampled_from(DType)


@st.composite
def models(draw: st.DrawFn, dtypes: st.SearchStrategy[DType] = DTYPES) -> dict[str, Array]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays: dict[str, Array] = {}
    for number, (size, dtype) in enumerate(draw(st.lists(st.tuples(SIZES, dtypes), max_size=6))):
        values = rng.standard_normal(size) * 3
        arrays[f"t{number}"] = (values > 0 if dtype is DType.BOOL else values).astype(dtype.numpy)
    return {name: np.abs(a) if a.dtype.kind == "u" else a for name, a in arrays.items()}


ENCODINGS = st.sampled_from(Encoding)


def open_vector(
    arrays: dict[str, Array], encoding: Encoding, fraction: float = 0.4
) -> tuple[VectorReader, Array, Payload]:
    """A reader over the encoded arrays, the vector it should give, and the payload."""
    base = Manifest.from_arrays(arrays)
    wire = wire_manifest(base, encoding, fraction)
    encoded = encode(arrays, base, encoding, fraction)
    payload = Payload(encoded, wire)
    wide_base = Manifest(
        tuple(
            TensorSpec(spec.name, DType.FLOAT64 if spec.dtype.is_float else spec.dtype, spec.shape)
            for spec in base.tensors
        )
    )
    decoded = encoded
    if encoding in {Encoding.INT8, Encoding.TOP_K}:
        decoded = decode(encoded, wide_base, encoding, fraction)
    floats = [
        decoded[spec.name].astype("f8").reshape(-1) for spec in base.tensors if spec.dtype.is_float
    ]
    wanted = np.concatenate([np.empty(0), *floats])
    # Few entries a block, so that small tensors have many.
    layout = VectorLayout(base, encoding, wire, sparse_block_count=4)
    return VectorReader(layout, payload.read), wanted, payload


class TestVectorReader:
    @given(models(), ENCODINGS, st.floats(0.01, 1), st.lists(st.tuples(SIZES, SIZES), max_size=8))
    def test_any_slice_in_any_order(
        self,
        arrays: dict[str, Array],
        encoding: Encoding,
        fraction: float,
        bounds: list[tuple[int, int]],
    ) -> None:
        reader, wanted, _ = open_vector(arrays, encoding, fraction)

        for one, two in bounds:
            start, stop = sorted((min(5 * one, len(wanted)), min(5 * two, len(wanted))))
            np.testing.assert_array_equal(reader.read(start, stop), wanted[start:stop])

    @given(models(), ENCODINGS, st.floats(0.01, 1), st.integers(1, 40))
    def test_consecutive_slices_touch_every_byte_once(
        self, arrays: dict[str, Array], encoding: Encoding, fraction: float, step: int
    ) -> None:
        reader, wanted, payload = open_vector(arrays, encoding, fraction)

        for start in range(0, len(wanted), step):
            stop = min(start + step, len(wanted))
            np.testing.assert_array_equal(reader.read(start, stop), wanted[start:stop])

        assert set(payload.read_counts.values()) <= {1}

    @given(models(), ENCODINGS)
    def test_slices_have_the_dtype_of_the_vector(
        self, arrays: dict[str, Array], encoding: Encoding
    ) -> None:
        reader, wanted, _ = open_vector(arrays, encoding)

        got = reader.read(0, len(wanted))

        holds_float64 = any(array.dtype == np.float64 for array in arrays.values())
        assert got.dtype == (np.float64 if holds_float64 else np.float32)
        assert got.flags.aligned

    def test_the_last_entry_of_an_earlier_block_is_found_again(self) -> None:
        reader, wanted, _ = open_vector(
            {"w": np.arange(1, 21, dtype=np.float32)}, Encoding.TOP_K, 1.0
        )

        reader.read(0, 6)

        np.testing.assert_array_equal(reader.read(3, 6), wanted[3:6])

    def test_float32_tensors_are_read_at_once(self) -> None:
        arrays = {f"t{i}": np.full(10, i, np.float32) for i in range(50)}
        reader, wanted, _ = open_vector(arrays, Encoding.FULL_PRECISION)
        calls: list[tuple[int, int]] = []
        data = b"".join(chunks(arrays, Manifest.from_arrays(arrays)))

        def read(offset: int, length: int) -> bytes:
            calls.append((offset, length))
            return data[offset : offset + length]

        reader = VectorReader(VectorLayout(Manifest.from_arrays(arrays)), read)

        np.testing.assert_array_equal(reader.read(3, 495), wanted[3:495])
        assert calls == [(12, 492 * 4)]

    def test_a_large_sparse_tensor_is_not_read_whole(self) -> None:
        rng = np.random.default_rng(1)
        arrays = {"w": rng.standard_normal(20_000).astype(np.float32)}
        reader, wanted, payload = open_vector(arrays, Encoding.TOP_K, 0.5)

        np.testing.assert_array_equal(reader.read(15_000, 15_010), wanted[15_000:15_010])
        np.testing.assert_array_equal(reader.read(40, 50), wanted[40:50])
        assert sum(payload.read_counts.values()) < 500

    @pytest.mark.parametrize("bounds", [(-1, 2), (0, 11), (3, 2), (11, 11)])
    def test_other_bounds_are_refused(self, bounds: tuple[int, int]) -> None:
        reader, _, _ = open_vector({"w": np.zeros(10, np.float32)}, Encoding.INT8)

        with pytest.raises(IndexError, match="slice: got"):
            reader.read(*bounds)

    def test_short_reads_are_noticed(self) -> None:
        layout = VectorLayout(Manifest.from_arrays({"w": np.zeros(10, np.float32)}))
        reader = VectorReader(layout, lambda _, length: bytes(length - 4))

        with pytest.raises(ValueError, match="buffer is smaller"):
            reader.read(0, 10)


class TestManifestFigures:
    MANIFEST = Manifest(
        (
            TensorSpec("step", DType.INT64, ()),
            TensorSpec("w", DType.FLOAT32, (2, 3)),
            TensorSpec("mask", DType.BOOL, (5,)),
            TensorSpec("h", DType.BFLOAT16, (4,)),
        )
    )

    def test_float_count(self) -> None:
        assert float_count(self.MANIFEST) == 10

    def test_vector_dtype(self) -> None:
        wide = Manifest((*self.MANIFEST.tensors, TensorSpec("d", DType.FLOAT64, (0,))))

        assert vector_dtype(self.MANIFEST) == np.float32
        assert vector_dtype(wide) == np.float64

    @pytest.mark.parametrize(
        ("encoding", "offsets"),
        [
            (Encoding.FULL_PRECISION, {"step": 0, "mask": 8 + 24}),
            (Encoding.INT8, {"step": 0, "mask": 8 + 6 + 4}),
        ],
    )
    def test_integer_ranges(self, encoding: Encoding, offsets: dict[str, int]) -> None:
        ranges = integer_ranges(self.MANIFEST, wire_manifest(self.MANIFEST, encoding))

        assert {spec.name: offset for spec, offset in ranges} == offsets


def slices(vector: Array, step: int) -> Iterator[Array]:
    return (vector[start : start + step] for start in range(0, len(vector), step))


def bytes_of(arrays: dict[str, Array]) -> Callable[[TensorSpec], Iterable[BytesLike]]:
    def give(spec: TensorSpec) -> Iterable[BytesLike]:
        data = arrays[spec.name].tobytes()
        return [data[:3], data[3:]]

    return give


def vector_of(arrays: dict[str, Array], base: Manifest) -> Array:
    floats = [arrays[s.name].reshape(-1).astype("f8") for s in base.tensors if s.dtype.is_float]
    return np.concatenate([np.empty(0), *floats])


class TestWritePayload:
    @given(models(), st.integers(1, 70))
    def test_it_undoes_reading(self, arrays: dict[str, Array], step: int) -> None:
        base = Manifest.from_arrays(arrays)

        written = write_payload(base, slices(vector_of(arrays, base), step), bytes_of(arrays))

        assert b"".join(written) == b"".join(chunks(arrays, base))

    def test_it_gives_chunks_of_a_payload(self) -> None:
        arrays = {"b": np.array([True]), "w": np.arange(700_000, dtype=np.float32)}
        base = Manifest.from_arrays(arrays)

        written = list(
            write_payload(base, slices(arrays["w"].astype("f8"), 2**18), bytes_of(arrays))
        )

        assert [len(chunk) for chunk in written] == [
            CHUNK_BYTES,
            CHUNK_BYTES,
            base.size_bytes % CHUNK_BYTES,
        ]
        assert written == list(chunks(arrays, base))

    def test_slices_may_be_strided(self) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT64, (3,)),))

        (chunk,) = write_payload(base, [np.arange(6.0)[::2]], bytes_of({}))

        assert assemble(base, [chunk])["w"].tolist() == [0, 2, 4]

    def test_values_are_rounded_to_even(self) -> None:
        base = Manifest(
            (TensorSpec("h", DType.FLOAT16, (2,)), TensorSpec("b", DType.BFLOAT16, (2,)))
        )
        tie, above = 1 + 2.0**-11, 1 + 2.0**-8 + 2.0**-40

        written = write_payload(base, [np.array([tie, 3 * tie - 2, tie, above])], bytes_of({}))

        arrays = assemble(base, written)
        assert arrays["h"].astype(float).tolist() == [1, 1 + 2 * 2.0**-10]
        assert arrays["b"].astype(float).tolist() == [1, 1 + 2.0**-7]

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            (DType.FLOAT16, 65520.0),
            (DType.BFLOAT16, 3.4e38),
            (DType.FLOAT32, -1e39),
            (DType.FLOAT64, np.nan),
        ],
    )
    def test_values_out_of_range_are_refused(self, dtype: DType, value: float) -> None:
        base = Manifest((TensorSpec("a", DType.FLOAT32, (2,)), TensorSpec("w", dtype, (2,))))

        with pytest.raises(NonFiniteError, match="tensor 'w', element 1"):
            list(write_payload(base, [np.array([1, 1, 1, value])], bytes_of({})))

    @pytest.mark.parametrize("count", [0, 9, 11])
    def test_another_number_of_elements_is_refused(self, count: int) -> None:
        base = Manifest((TensorSpec("w", DType.FLOAT32, (10,)),))

        with pytest.raises(PayloadSizeError, match="vector"):
            list(write_payload(base, [np.zeros(count)], bytes_of({})))

    @pytest.mark.parametrize("sizes", [(7, 9), (9, 7), (8, 9), (0, 0)])
    def test_another_number_of_integer_bytes_is_refused(self, sizes: tuple[int, int]) -> None:
        specs = tuple(TensorSpec(name, DType.INT64, ()) for name in "ab")
        given_bytes = dict(zip("ab", map(bytes, sizes), strict=True))

        with pytest.raises(PayloadSizeError):
            list(write_payload(Manifest(specs), [], lambda spec: [given_bytes[spec.name]]))

    def test_other_booleans_are_refused(self) -> None:
        base = Manifest((TensorSpec("b", DType.BOOL, (1,)),))

        with pytest.raises(InvalidPayloadError, match="'b', element 0: got 2"):
            list(write_payload(base, [], lambda _: [b"\x02"]))


@settings(deadline=None, max_examples=20)
@given(models(), ENCODINGS)
def test_a_payload_through_the_vector_and_back(
    arrays: dict[str, Array], encoding: Encoding
) -> None:
    base = Manifest.from_arrays(arrays)
    wire = wire_manifest(base, encoding, 1.0)
    payload = Payload(encode(arrays, base, encoding, 1.0), wire)
    reader = VectorReader(VectorLayout(base, encoding, wire), payload.read)
    places = {spec.name: offset for spec, offset in integer_ranges(base, wire)}

    def integers(spec: TensorSpec) -> list[Any]:
        return [payload.read(places[spec.name], spec.size_bytes)]

    written = write_payload(base, [reader.read(0, float_count(base)).astype(np.float64)], integers)

    decoded = decode(encode(arrays, base, encoding, 1.0), base, encoding, 1.0)
    assert b"".join(written) == b"".join(chunks(decoded, base))
