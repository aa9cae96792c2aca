"""safetensors files, against the library that defines them."""

import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qflare.tensors import (
    Array,
    DType,
    InvalidManifestError,
    Manifest,
    ManifestLimits,
    PayloadSizeError,
    TensorSpec,
    assemble,
    chunks,
)
from qflare.tensors.safetensors_files import (
    MAX_HEADER_BYTES,
    export_safetensors,
    import_safetensors,
)

DTYPES = [member.numpy for member in DType if member is not DType.BFLOAT16]
ARRAYS: st.SearchStrategy[Array] = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    )
)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=9).filter(
    lambda name: name != "__metadata__"
)
MODELS = st.dictionaries(NAMES, ARRAYS, max_size=5)
METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
FEW = settings(max_examples=50, deadline=None)


def export(
    path: Path, arrays: dict[str, Array], metadata: dict[str, str] | None = None
) -> Manifest:
    manifest = Manifest.from_arrays(arrays)
    export_safetensors(path, manifest, chunks(arrays, manifest), metadata)
    return manifest


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


class TestAgainstTheLibrary:
    @FEW
    @given(MODELS, METADATA)
    def test_the_library_reads_what_we_write(
        self, model: dict[str, Array], metadata: dict[str, str]
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            export(path, model, metadata)

            with safetensors.safe_open(path, "np") as file:
                assert set(file.keys()) == set(model)
                assert (file.metadata() or {}) == metadata
                for name, array in model.items():
                    got = file.get_tensor(name)
                    assert got.dtype == array.dtype
                    np.testing.assert_array_equal(got, array)

    @FEW
    @given(MODELS, METADATA)
    def test_we_read_what_the_library_writes(
        self, model: dict[str, Array], metadata: dict[str, str]
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            contiguous = {name: np.ascontiguousarray(array) for name, array in model.items()}
            for name, array in model.items():
                contiguous[name] = contiguous[name].reshape(array.shape)
            # Given empty metadata and no tensor, safetensors 0.8.0 writes a header that is not JSON.
            safetensors.numpy.save_file(contiguous, path, metadata or None)

            file = import_safetensors(path)
            arrays = assemble(file.manifest, file.chunks())

        assert file.metadata == metadata
        assert arrays.keys() == model.keys()
        for name, array in model.items():
            np.testing.assert_array_equal(arrays[name], array)

    @FEW
    @given(MODELS, METADATA)
    def test_our_round_trip_keeps_the_layout(
        self, model: dict[str, Array], metadata: dict[str, str]
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            manifest = export(path, model, metadata)

            file = import_safetensors(path)

            assert file.manifest == manifest
            assert file.metadata == metadata
            assert b"".join(file.chunks()) == b"".join(chunks(model, manifest))

    def test_bfloat16_travels_both_ways(self, tmp_path: Path) -> None:
        values = np.arange(7).astype(ml_dtypes.bfloat16)
        path = tmp_path / "model.safetensors"
        manifest = export(path, {"odd": np.array([True]), "x": values})

        with safetensors.safe_open(path, "np") as file:
            assert file.get_tensor("x").view(np.uint16).tolist() == values.view(np.uint16).tolist()
        assert import_safetensors(path).manifest == manifest

    def test_every_tensor_is_aligned(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        export(path, {"a": np.array([True]), "b": np.ones(1, "i2"), "c": np.ones(3, "f8")})

        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + header_bytes])

        assert header_bytes % 8 == 0
        assert {name: entry["data_offsets"][0] for name, entry in header.items()} == {
            "a": 26,
            "b": 24,
            "c": 0,
        }


class TestExport:
    def test_a_failed_export_leaves_the_file_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        manifest = export(path, {"x": np.zeros(3)})
        before = path.read_bytes()

        with pytest.raises(PayloadSizeError):
            export_safetensors(path, manifest, [b"short"])

        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_the_reserved_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidManifestError, match="__metadata__"):
            export(tmp_path / "model.safetensors", {"__metadata__": np.zeros(3)})

    def test_a_header_that_could_not_be_read_is_not_written(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidManifestError, match="header"):
            export(tmp_path / "model.safetensors", {}, {"note": "x" * MAX_HEADER_BYTES})


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


class TestImport:
    @pytest.mark.parametrize(
        ("header", "data"),
        [
            (b"", b""),
            (b"[]", b""),
            (b" {}", b""),
            (b"{", b""),
            (b"{} trailing", b""),
            (b'{"a": \xff}', b""),
            (b'{"a":' * 100_000, b""),
            (b'{"a":1' + b"0" * 5000 + b"}", b""),
            (json.dumps({"a": ENTRY}).encode()[:-1] + b', "a": {}}', b"12"),
            ({"a": []}, b""),
            ({"a": {**ENTRY, "extra": 1}}, b"12"),
            ({"a": {**ENTRY, "dtype": "F8_E4M3"}}, b"12"),
            ({"a": {**ENTRY, "dtype": 3}}, b"12"),
            ({"a": {**ENTRY, "shape": [3]}}, b"12"),
            ({"a": {**ENTRY, "shape": [-2]}}, b"12"),
            ({"a": {**ENTRY, "shape": [2.0]}}, b"12"),
            ({"a": {**ENTRY, "shape": [True, 2]}}, b"12"),
            ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"12"),
            ({"a": {**ENTRY, "shape": 2}}, b"12"),
            ({"a": {**ENTRY, "data_offsets": [1, 3]}}, b"123"),
            ({"a": {**ENTRY, "data_offsets": [-2, 0]}}, b""),
            ({"a": {**ENTRY, "data_offsets": [0, 2, 2]}}, b"12"),
            ({"a": ENTRY, "b": ENTRY}, b"12"),
            ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [3, 5]}}, b"12345"),
            ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [1, 3]}}, b"123"),
            ({"a": ENTRY}, b"123"),
            ({"a": ENTRY}, b"1"),
            ({"": ENTRY}, b"12"),
            ({"a\n": ENTRY}, b"12"),
            ({"\ud800": ENTRY}, b"12"),
            ({"__metadata__": {"a": 1}}, b""),
            ({"__metadata__": []}, b""),
        ],
    )
    def test_malformed_files_are_refused(self, tmp_path: Path, header: Any, data: bytes) -> None:
        path = write_raw(tmp_path / "model.safetensors", header, data)

        with pytest.raises(InvalidManifestError):
            import_safetensors(path)

    @pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\x10" + bytes(7) + b"{}"])
    def test_impossible_header_lengths_are_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)

        with pytest.raises(InvalidManifestError, match="header"):
            import_safetensors(path)

    @pytest.mark.parametrize("limits", [ManifestLimits(max_tensors=0), ManifestLimits(10, 1)])
    def test_limits_are_kept(self, tmp_path: Path, limits: ManifestLimits) -> None:
        path = write_raw(tmp_path / "model.safetensors", {"a": ENTRY}, b"12")

        with pytest.raises(InvalidManifestError, match="wanted <="):
            import_safetensors(path, limits)

    def test_data_in_another_order_than_the_entries(self, tmp_path: Path) -> None:
        header = {"b": {**ENTRY, "data_offsets": [2, 4]}, "a": ENTRY}
        path = write_raw(tmp_path / "model.safetensors", header, b"aabb")

        file = import_safetensors(path)

        assert [spec.name for spec in file.manifest.tensors] == ["b", "a"]
        assert b"".join(file.chunks()) == b"bbaa"

    def test_the_payload_can_be_read_again(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "model.safetensors", {"a": ENTRY}, b"12")

        file = import_safetensors(path)

        assert list(file.chunks()) == list(file.chunks()) == [b"12"]

    def test_a_file_that_shrinks_meanwhile_is_noticed(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "model.safetensors", {"a": ENTRY}, b"12")
        file = import_safetensors(path)
        path.write_bytes(path.read_bytes()[:-1])

        with pytest.raises(PayloadSizeError, match="1 bytes early"):
            list(file.chunks())

    def test_a_file_that_is_replaced_meanwhile_is_noticed(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "model.safetensors", {"a": ENTRY}, b"12")
        file = import_safetensors(path)
        write_raw(path, {"b": ENTRY}, b"12")

        with pytest.raises(InvalidManifestError, match="changed"):
            list(file.chunks())

    @FEW
    @given(st.binary(max_size=60))
    def test_any_bytes_parse_or_are_refused(self, header: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_raw(Path(folder, "model.safetensors"), b"{" + header)
            try:
                import_safetensors(path)
            except InvalidManifestError:
                return


def test_a_large_model_passes_through_in_chunks(tmp_path: Path) -> None:
    model = {"flag": np.array([True]), "w": np.arange(700_000, dtype=np.float64)}
    path = tmp_path / "model.safetensors"

    manifest = export(path, model)
    file = import_safetensors(path)

    assert manifest.tensors[1] == TensorSpec("w", DType.FLOAT64, (700_000,))
    assert b"".join(file.chunks()) == b"".join(chunks(model, manifest))


def test_metadata_of_code_points_that_are_no_text_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", b'{"__metadata__":{"a":"\\ud800"}}')

    with pytest.raises(InvalidManifestError, match="valid Unicode"):
        import_safetensors(path)
