"""The smaller form of a version's payload: the same bytes as the encodings of arrays, whatever the cuts."""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.tensors import FiniteCheck, Manifest, assemble, chunks
from qflare.tensors.download_encodings import download_manifest, narrowed, widened
from qflare.tensors.elements import NonFiniteError, PayloadSizeError
from qflare.tensors.encodings import Encoding, decode, encode
from qflare.tensors.manifest import InvalidManifestError

SMALLER = [Encoding.FLOAT16, Encoding.BFLOAT16]


def mixed(seed: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    """Return tensors of every sort of type, with sizes that put elements across any cut."""
    generator = np.random.default_rng(seed)
    return {
        "flags": np.array([True, False, True]),
        "wide": generator.normal(size=(7, 5)),
        "w": generator.normal(size=31).astype(np.float32),
        "count": np.array(7, np.int64),
        "half": generator.normal(size=5).astype(np.float16),
        "brain": generator.normal(size=3).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.array(0.1, np.float32),
    }


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    for start, stop in itertools.pairwise(bounds):
        yield data[start:stop]


def payload_of(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    return b"".join(chunks(arrays, Manifest.from_arrays(arrays)))


@pytest.mark.parametrize("encoding", SMALLER)
@given(places=st.lists(st.integers(0, 10_000), max_size=40), seed=st.integers(0, 99))
def test_any_cut_gives_what_encoding_the_arrays_gives(
    encoding: Encoding, places: list[int], seed: int
) -> None:
    arrays = mixed(seed)
    base = Manifest.from_arrays(arrays)

    got = b"".join(narrowed(base, encoding, cut(payload_of(arrays), places)))

    assert got == payload_of(encode(arrays, base, encoding))


@pytest.mark.parametrize("encoding", SMALLER)
@given(places=st.lists(st.integers(0, 10_000), max_size=40), seed=st.integers(0, 99))
def test_any_cut_reads_back_what_decoding_gives(
    encoding: Encoding, places: list[int], seed: int
) -> None:
    arrays = mixed(seed)
    base = Manifest.from_arrays(arrays)
    encoded = encode(arrays, base, encoding)

    got = assemble(base, widened(base, encoding, cut(payload_of(encoded), places)))

    wanted = decode(encoded, base, encoding)
    assert [array.dtype for array in got.values()] == [array.dtype for array in arrays.values()]
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("encoding", SMALLER)
def test_rounding_what_was_rounded_changes_nothing(encoding: Encoding) -> None:
    arrays = mixed()
    base = Manifest.from_arrays(arrays)
    once = b"".join(narrowed(base, encoding, [payload_of(arrays)]))

    twice = b"".join(narrowed(base, encoding, widened(base, encoding, [once])))

    assert twice == once


def test_a_value_beyond_the_range_is_found_by_its_place() -> None:
    arrays = {"w": np.array([1.0, 65_504.0, 65_520.0], np.float32)}
    base = Manifest.from_arrays(arrays)
    check = FiniteCheck(download_manifest(base, Encoding.FLOAT16))

    with pytest.raises(NonFiniteError, match="'w', element 2"):
        check.feed(b"".join(narrowed(base, Encoding.FLOAT16, [payload_of(arrays)])))


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.TOP_K])
def test_other_encodings_are_refused_at_once(encoding: Encoding) -> None:
    base = Manifest.from_arrays(mixed())

    for convert in (narrowed, widened):
        with pytest.raises(InvalidManifestError, match=f"got {encoding.name}, wanted"):
            convert(base, encoding, [])


@pytest.mark.parametrize("change", [b"", b"xx"])
def test_another_number_of_bytes_is_refused(change: bytes) -> None:
    arrays = mixed()
    base = Manifest.from_arrays(arrays)
    data = payload_of(arrays)[:-1] + change

    with pytest.raises(PayloadSizeError):
        list(narrowed(base, Encoding.FLOAT16, [data]))
