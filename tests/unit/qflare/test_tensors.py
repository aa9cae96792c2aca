"""Manifests and payloads."""

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.tensors import (
    CHUNK_BYTES,
    Array,
    DType,
    FiniteCheck,
    InvalidManifestError,
    InvalidPayloadError,
    Manifest,
    ManifestLimits,
    NonFiniteError,
    PayloadHasher,
    PayloadSizeError,
    PieceHasher,
    TensorSpec,
    assemble,
    chunks,
    payload_digest,
    rechunk,
    split,
)
from qflare.v1 import tensor_pb2

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS = st.builds(TensorSpec, NAMES, st.sampled_from(DType), SHAPES)
MANIFESTS = st.lists(SPECS, max_size=6, unique_by=lambda spec: spec.name).map(
    lambda specs: Manifest(tuple(specs))
)


@st.composite
def filled(draw: st.DrawFn) -> tuple[Manifest, bytes]:
    """A manifest, and a payload whose elements are finite and whose booleans are 0 or 1."""
    manifest = draw(MANIFESTS)
    seed = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for spec in manifest.tensors:
        if spec.dtype.is_float:
            values = seed.standard_normal(spec.element_count).astype(spec.dtype.numpy)
        elif spec.dtype is DType.BOOL:
            values = seed.integers(0, 2, spec.element_count).astype(bool)
        else:
            values = np.frombuffer(seed.bytes(spec.size_bytes), spec.dtype.numpy)
        parts.append(values.tobytes())
    return manifest, b"".join(parts)


def pieces(payload: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The payload, cut anywhere."""
    edges = [0, *sorted(position % (len(payload) + 1) for position in cuts), len(payload)]
    return (payload[begin:end] for begin, end in itertools.pairwise(edges))


CUTS = st.lists(st.integers(0, 10_000), max_size=8)


class TestDType:
    def test_numbers_and_names_are_those_of_the_schema(self) -> None:
        wanted = {name.removeprefix("DTYPE_"): number for name, number in tensor_pb2.Dtype.items()}
        del wanted["UNSPECIFIED"]

        assert {member.name: member.value for member in DType} == wanted

    def test_numpy_dtypes_are_found_in_either_byte_order(self) -> None:
        assert DType.from_numpy(np.dtype(">i8")) is DType.INT64
        assert DType.from_numpy(np.dtype(ml_dtypes.bfloat16)) is DType.BFLOAT16

    @pytest.mark.parametrize("name", ["c8", "O", "U3", "M8[s]", "V2", "f4,f4"])
    def test_other_numpy_dtypes_are_refused(self, name: str) -> None:
        with pytest.raises(InvalidManifestError, match="wanted one of FLOAT32"):
            DType.from_numpy(np.dtype(name))

    @pytest.mark.parametrize("number", [0, -1, 14])
    def test_unknown_numbers_are_refused(self, number: int) -> None:
        with pytest.raises(InvalidManifestError, match=f"got number {number}"):
            DType.from_number(number)

    def test_four_types_are_floats(self) -> None:
        floats = {member.name for member in DType if member.is_float}

        assert floats == {"FLOAT16", "BFLOAT16", "FLOAT32", "FLOAT64"}


class TestTensorSpec:
    @pytest.mark.parametrize(
        "name", ["", "a" * 257, "é" * 129, "a\nb", "\x00", "\x7f", "\x85", "\ud800"]
    )
    def test_bad_names_are_refused(self, name: str) -> None:
        with pytest.raises(InvalidManifestError, match="tensor name"):
            TensorSpec(name, DType.INT8, ())

    @pytest.mark.parametrize(
        "name", ["a" * 256, "é" * 128, "layer.0/w eight", "权重", "__metadata__"]
    )
    def test_other_names_are_allowed(self, name: str) -> None:
        assert TensorSpec(name, DType.INT8, ()).name == name

    @pytest.mark.parametrize(
        "shape", [(-1,), (2, -3), (1,) * 33, (2**61,), (2**31, 2**31), (2**62, 2**62, 0)]
    )
    def test_impossible_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidManifestError, match=r"(shape|rank) of 'x': got"):
            TensorSpec("x", DType.FLOAT32, shape)

    def test_largest_shape_is_allowed(self) -> None:
        assert TensorSpec("x", DType.INT8, (2**63 - 1,)).size_bytes == 2**63 - 1

    def test_a_scalar_has_one_element(self) -> None:
        assert TensorSpec("x", DType.FLOAT64, ()).size_bytes == 8


class TestManifest:
    def test_repeated_names_are_refused(self) -> None:
        with pytest.raises(InvalidManifestError, match="'x' twice"):
            Manifest((TensorSpec("x", DType.INT8, ()), TensorSpec("x", DType.INT16, ())))

    def test_a_payload_over_an_int64_is_refused(self) -> None:
        halves = [TensorSpec(name, DType.INT8, (2**62,)) for name in "ab"]

        with pytest.raises(InvalidManifestError, match="wanted an int64"):
            Manifest(tuple(halves))

    def test_arrays_keep_their_order(self) -> None:
        arrays = {name: np.zeros(2, np.float16) for name in "zaq"}

        assert [spec.name for spec in Manifest.from_arrays(arrays).tensors] == ["z", "a", "q"]

    @pytest.mark.parametrize(
        ("size", "count"), [(0, 0), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2)]
    )
    def test_chunk_count(self, size: int, count: int) -> None:
        assert Manifest((TensorSpec("x", DType.INT8, (size,)),)).chunk_count == count

    def test_layout_digest_is_what_the_docstring_says(self) -> None:
        manifest = Manifest(
            (TensorSpec("é", DType.BOOL, (3, 0)), TensorSpec("s", DType.FLOAT32, ()))
        )

        encoding = (
            b"qflare/v1/layout"
            + struct.pack(">I", 2) + "é".encode() + bytes([13]) + struct.pack(">IQQ", 2, 3, 0)
            + struct.pack(">I", 1) + b"s" + bytes([1]) + struct.pack(">I", 0)
        )  # fmt: skip
        assert manifest.layout_digest == hashlib.sha256(encoding).hexdigest()

    @given(MANIFESTS, MANIFESTS)
    def test_different_layouts_have_different_digests(self, one: Manifest, two: Manifest) -> None:
        assert (one.layout_digest == two.layout_digest) == (one == two)

    @given(MANIFESTS)
    def test_proto_round_trip(self, manifest: Manifest) -> None:
        message = tensor_pb2.Manifest.FromString(manifest.to_proto().SerializeToString())

        assert Manifest.from_proto(message) == manifest


def valid_message() -> tensor_pb2.Manifest:
    return Manifest(
        (TensorSpec("w", DType.FLOAT32, (2, 3)), TensorSpec("b", DType.INT64, (3,)))
    ).to_proto()


def _set(path: str, value: object) -> Callable[[tensor_pb2.Manifest], None]:
    def change(message: tensor_pb2.Manifest) -> None:
        target: Any = message.tensors[0] if path.startswith("tensors.") else message
        field = path.removeprefix("tensors.")
        if field == "shape":
            target.shape[:] = value
        else:
            setattr(target, field, value)

    return change


class TestManifestParsing:
    @pytest.mark.parametrize(
        ("path", "value", "match"),
        [
            ("size_bytes", 47, "size_bytes: got 47, wanted 48"),
            ("layout_digest", "0" * 64, "layout_digest: got '0+', wanted"),
            ("layout_digest", "", "layout_digest: got '', wanted"),
            ("tensors.size_bytes", 25, "size_bytes of 'w': got 25, wanted 24"),
            ("tensors.size_bytes", -1, "size_bytes of 'w': got -1"),
            ("tensors.name", "b", "'b' twice"),
            ("tensors.name", "a\tb", "no control characters"),
            ("tensors.name", "", "got 0 bytes"),
            ("tensors.dtype", 0, "dtype: got number 0"),
            ("tensors.dtype", 99, "dtype: got number 99"),
            ("tensors.shape", [-2, -3], "wanted all >= 0"),
            ("tensors.shape", [2**62, 2**62], "within an int64"),
            ("tensors.shape", [2**62, 4, 0], "within an int64"),
            ("tensors.shape", [1] * 33, "got 33, wanted <= 32"),
            ("tensors.shape", [3, 2], "layout_digest"),
            ("tensors.shape", [7], "size_bytes of 'w': got 24, wanted 28"),
        ],
    )
    def test_any_fault_is_refused(self, path: str, value: object, match: str) -> None:
        message = valid_message()
        _set(path, value)(message)

        with pytest.raises(InvalidManifestError, match=match):
            Manifest.from_proto(message)

    def test_too_many_tensors_are_refused(self) -> None:
        with pytest.raises(InvalidManifestError, match="tensors: got 2, wanted <= 1"):
            Manifest.from_proto(valid_message(), ManifestLimits(max_tensors=1))

    def test_too_large_a_payload_is_refused(self) -> None:
        with pytest.raises(InvalidManifestError, match="payload bytes: got 48, wanted <= 47"):
            Manifest.from_proto(valid_message(), ManifestLimits(max_payload_bytes=47))

    @given(st.binary(max_size=80))
    def test_any_message_parses_or_is_refused(self, suffix: bytes) -> None:
        message = valid_message()
        try:
            message.MergeFromString(suffix)
        except Exception:  # noqa: BLE001 - not a message at all: protobuf's business
            return
        try:
            manifest = Manifest.from_proto(message)
        except InvalidManifestError:
            return
        assert manifest.to_proto().tensors == message.tensors


class TestChunks:
    @given(filled(), CUTS)
    def test_assemble_undoes_any_cutting(
        self, case: tuple[Manifest, bytes], cuts: list[int]
    ) -> None:
        manifest, payload = case

        arrays = assemble(manifest, pieces(payload, cuts))

        assert b"".join(chunks(arrays, manifest)) == payload
        assert Manifest.from_arrays(arrays) == manifest

    @given(filled())
    def test_assembled_arrays_can_be_used_in_place(self, case: tuple[Manifest, bytes]) -> None:
        manifest, payload = case

        for array in assemble(manifest, [payload]).values():
            assert array.flags.writeable
            assert array.flags.aligned
            assert array.flags.c_contiguous
            assert array.dtype.isnative

    @pytest.mark.parametrize(
        "change",
        [
            np.asfortranarray,
            lambda array: array.astype(array.dtype.newbyteorder(">")),
            lambda array: np.repeat(array, 2, axis=1)[:, ::2],
            lambda array: array[::-1][::-1],
            lambda array: np.lib.stride_tricks.as_strided(array, array.shape, array.strides),
        ],
    )
    @pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u8", "?"])
    def test_memory_layout_does_not_matter(
        self, dtype: str, change: Callable[[Array], Array]
    ) -> None:
        array = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
        manifest = Manifest.from_arrays({"x": array})

        assert b"".join(chunks({"x": change(array)}, manifest)) == array.tobytes()

    def test_a_transposed_bfloat16_is_written_in_c_order(self) -> None:
        array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T
        manifest = Manifest.from_arrays({"x": array})

        payload = b"".join(chunks({"x": array}, manifest))

        assert np.frombuffer(payload, ml_dtypes.bfloat16).tolist() == [0, 3, 1, 4, 2, 5]

    @given(st.lists(st.integers(0, 2 * CHUNK_BYTES + 1), max_size=4))
    def test_every_chunk_but_the_last_has_the_chunk_size(self, sizes: list[int]) -> None:
        arrays = {str(i): np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
        manifest = Manifest.from_arrays(arrays)

        cut_up = list(chunks(arrays, manifest))

        assert [len(chunk) for chunk in cut_up[:-1]] == [CHUNK_BYTES] * (manifest.chunk_count - 1)
        assert len(cut_up) == manifest.chunk_count
        assert sum(map(len, cut_up)) == manifest.size_bytes

    def test_arrays_may_come_in_any_order(self) -> None:
        arrays = {"a": np.zeros(1, np.uint8), "b": np.ones(1, np.uint8)}
        manifest = Manifest.from_arrays(arrays)

        assert next(chunks({"b": arrays["b"], "a": arrays["a"]}, manifest)) == b"\x00\x01"

    @pytest.mark.parametrize(
        "arrays",
        [
            {},
            {"x": np.zeros((2, 3), np.float32), "y": np.zeros(1)},
            {"y": np.zeros((2, 3), np.float32)},
            {"x": np.zeros((3, 2), np.float32)},
            {"x": np.zeros(6, np.float32)},
            {"x": np.zeros((2, 3), np.float64)},
            {"x": np.zeros((2, 3), np.int32)},
            {"x": np.zeros((2, 3), object)},
        ],
    )
    def test_other_arrays_are_refused_at_once(self, arrays: Mapping[str, Array]) -> None:
        manifest = Manifest((TensorSpec("x", DType.FLOAT32, (2, 3)),))

        with pytest.raises(InvalidManifestError):
            chunks(arrays, manifest)

    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=9),
                st.sampled_from([4095, 4096, 300_000, CHUNK_BYTES - 3, CHUNK_BYTES]).map(bytes),
                st.just(bytes(2 * CHUNK_BYTES + 5)),
            ),
            max_size=9,
        )
    )
    def test_cut_keeps_the_bytes(self, parts: list[bytes]) -> None:
        cut = list(rechunk(parts))

        assert b"".join(cut) == b"".join(parts)
        assert all(len(chunk) == CHUNK_BYTES for chunk in cut[:-1])
        assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in cut[-1:])


class TestAssemble:
    @given(filled(), st.integers(1, 3), CUTS)
    def test_truncated_payloads_are_refused(
        self, case: tuple[Manifest, bytes], missing: int, cuts: list[int]
    ) -> None:
        manifest, payload = case
        if len(payload) < missing:
            return

        with pytest.raises(PayloadSizeError, match=f"wanted {len(payload)}"):
            assemble(manifest, pieces(payload[:-missing], cuts))

    @given(filled(), st.binary(min_size=1, max_size=3), CUTS)
    def test_extended_payloads_are_refused(
        self, case: tuple[Manifest, bytes], extra: bytes, cuts: list[int]
    ) -> None:
        manifest, payload = case

        with pytest.raises(PayloadSizeError, match=f"got over {len(payload)}"):
            assemble(manifest, pieces(payload + extra, cuts))

    def test_an_endless_stream_is_left_early(self) -> None:
        manifest = Manifest((TensorSpec("x", DType.INT8, (10,)),))
        stream = itertools.count()

        with pytest.raises(PayloadSizeError):
            assemble(manifest, (b"1234" for _ in stream))

        assert next(stream) == 3

    def test_other_booleans_are_refused(self) -> None:
        manifest = Manifest((TensorSpec("f", DType.FLOAT32, ()), TensorSpec("x", DType.BOOL, (3,))))

        with pytest.raises(InvalidPayloadError, match="'x', element 2: got 2, wanted 0 or 1"):
            assemble(manifest, [bytes(4) + b"\x00\x01\x02"])

    @given(filled(), CUTS)
    def test_split_gives_each_tensor_its_bytes(
        self, case: tuple[Manifest, bytes], cuts: list[int]
    ) -> None:
        manifest, payload = case

        got = {spec.name: bytearray() for spec in manifest.tensors}
        for spec, offset, piece in split(manifest, pieces(payload, cuts)):
            assert offset == len(got[spec.name])
            got[spec.name] += piece

        assert b"".join(got.values()) == payload
        assert all(len(got[spec.name]) == spec.size_bytes for spec in manifest.tensors)


def reference_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, as it is written there."""
    if len(leaves) <= 1:
        return hashlib.sha256(b"\x00" + leaves[0] if leaves else b"").digest()
    middle = 2 ** (math.ceil(math.log2(len(leaves))) - 1)
    left, right = reference_root(leaves[:middle]), reference_root(leaves[middle:])
    return hashlib.sha256(b"\x01" + left + right).digest()


class TestDigest:
    def test_the_empty_payload(self) -> None:
        assert payload_digest([]) == hashlib.sha256(b"").hexdigest()

    @pytest.mark.parametrize("count", range(1, 6))
    def test_it_is_the_merkle_root_over_the_chunks(self, count: int) -> None:
        cut_up = [bytes([i]) * CHUNK_BYTES for i in range(count - 1)] + [b"last"]

        assert payload_digest(cut_up) == reference_root(cut_up).hex()

    def test_leaf_hashes_are_kept(self) -> None:
        hasher = PayloadHasher()

        leaf_hash = hasher.add(b"one")

        assert leaf_hash == hashlib.sha256(b"\x00one").digest()
        assert hasher.leaf_hashes == [leaf_hash]

    @pytest.mark.parametrize(
        "sizes", [[0], [CHUNK_BYTES, 0], [CHUNK_BYTES + 1], [5, 5], [CHUNK_BYTES - 1, CHUNK_BYTES]]
    )
    def test_other_chunk_sizes_are_refused(self, sizes: list[int]) -> None:
        with pytest.raises(PayloadSizeError, match="chunk"):
            payload_digest(bytes(size) for size in sizes)


def feed_all(check: FiniteCheck, parts: Iterator[bytes]) -> None:
    for part in parts:
        check.feed(part)


FLOATS = [DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64]


class TestFiniteCheck:
    @given(filled(), CUTS)
    def test_finite_payloads_pass(self, case: tuple[Manifest, bytes], cuts: list[int]) -> None:
        manifest, payload = case
        check = FiniteCheck(manifest)

        feed_all(check, pieces(payload, cuts))

        check.finish()

    @given(filled(), CUTS, st.data())
    def test_any_bad_element_is_found_and_named(
        self, case: tuple[Manifest, bytes], cuts: list[int], data: st.DataObject
    ) -> None:
        manifest, payload = case
        places = [
            (spec, index)
            for spec in manifest.tensors
            for index in range(spec.element_count)
            if spec.dtype.is_float
        ]
        if not places:
            return
        spec, index = data.draw(st.sampled_from(places))
        bad = data.draw(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]))
        arrays = assemble(manifest, [payload])
        arrays[spec.name].reshape(-1)[index] = bad
        check = FiniteCheck(manifest)

        with pytest.raises(NonFiniteError) as caught:
            feed_all(check, pieces(b"".join(chunks(arrays, manifest)), cuts))

        assert f"tensor {spec.name!r}, element {index}:" in str(caught.value)

    @pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
    def test_every_16_bit_pattern_is_judged_as_numpy_does(self, dtype: DType) -> None:
        patterns = np.arange(2**16, dtype="<u2")
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(patterns.view(dtype.numpy))
        count = int(finite.sum())

        FiniteCheck(Manifest((TensorSpec("x", dtype, (count,)),))).feed(patterns[finite].tobytes())

        for pattern in patterns[~finite]:
            with pytest.raises(NonFiniteError):
                FiniteCheck(Manifest((TensorSpec("x", dtype, ()),))).feed(pattern.tobytes())

    @pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT64])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_largest_finite_numbers_pass(self, dtype: DType, sign: int) -> None:
        value = np.array(sign * np.finfo(dtype.numpy).max, dtype.numpy)

        FiniteCheck(Manifest((TensorSpec("x", dtype, ()),))).feed(value.tobytes())

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_an_element_cut_at_every_byte(self, dtype: DType) -> None:
        manifest = Manifest((TensorSpec("b", DType.INT8, (1,)), TensorSpec("x", dtype, (2,))))
        values = np.array([1, np.nan]).astype(dtype.numpy)
        check = FiniteCheck(manifest)

        for byte in b"\xff" + values.tobytes()[:-1]:
            check.feed(bytes([byte]))
        with pytest.raises(NonFiniteError, match="'x', element 1"):
            check.feed(values.tobytes()[-1:])

    def test_the_right_one_of_several_tensors_is_named(self) -> None:
        manifest = Manifest(tuple(TensorSpec(name, DType.FLOAT16, (2,)) for name in "abc"))
        values = np.array([0, 1, 2, 3, 4, np.inf], np.float16)

        with pytest.raises(NonFiniteError, match="'c', element 1: got inf"):
            FiniteCheck(manifest).feed(values.tobytes())

    def test_integers_are_free(self) -> None:
        manifest = Manifest((TensorSpec("x", DType.INT32, (1,)),))

        FiniteCheck(manifest).feed(b"\xff\xff\xff\x7f")

    def test_other_booleans_are_refused(self) -> None:
        check = FiniteCheck(Manifest((TensorSpec("x", DType.BOOL, (4,)),)))
        check.feed(b"\x01")

        with pytest.raises(InvalidPayloadError, match="'x', element 2: got 255, wanted 0 or 1"):
            check.feed(b"\x00\xff")

    def test_too_many_bytes_are_refused(self) -> None:
        check = FiniteCheck(Manifest((TensorSpec("x", DType.INT8, (4,)),)))

        with pytest.raises(PayloadSizeError, match="got at least 5 bytes, wanted 4"):
            check.feed(b"12345")

    def test_too_few_bytes_are_refused(self) -> None:
        check = FiniteCheck(Manifest((TensorSpec("x", DType.INT16, (2,)),)))
        check.feed(b"123")

        with pytest.raises(PayloadSizeError, match="got 3 bytes, wanted 4"):
            check.finish()


@given(st.integers(0, 3 * CHUNK_BYTES), st.lists(st.integers(0, 2 * CHUNK_BYTES), max_size=5))
def test_pieces_of_any_size_hash_like_chunks(size: int, cuts: list[int]) -> None:
    payload = bytes(size)
    hasher, start = PieceHasher(), 0
    for length in cuts:
        hasher.feed(memoryview(payload)[start : start + length])
        start = min(size, start + length)
    hasher.feed(payload[start:])
    whole = PayloadHasher()
    for start in range(0, size, CHUNK_BYTES):
        whole.add(payload[start : start + CHUNK_BYTES])

    assert hasher.finish() == whole.leaf_hashes
