"""Payloads as vectors: the floating elements of a model as one flat array, read and written in slices.

The *vector* of a manifest holds the elements of its floating tensors in manifest order; integers and
booleans are not in it. A `VectorReader` gives any slice of it from an encoded payload without expanding
more than the slice, and `write_payload` makes a payload of the base manifest from consecutive slices.

Invariants: a slice has the same values whatever slices were read before; reading consecutive slices
touches every byte once, in ascending order in each tensor. Payloads are trusted to keep the element rules
(`FiniteCheck` with `encoding_rules`): these are checked when a payload arrives, not on each reading.

This module is independent of where bytes are stored and what the numbers mean. It is not thread-safe.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from qflare.tensors.elements import BytesLike, FiniteCheck, PayloadSizeError
from qflare.tensors.encodings import Encoding, narrow, narrow_dtype
from qflare.tensors.manifest import Array, DType, Manifest, TensorSpec
from qflare.tensors.payload import rechunk
from qflare.tensors.vector_runs import (
    SPARSE_BLOCK_COUNT,
    Decode,
    PlainRun,
    ReadBytes,
    Run,
    locate_runs,
    tensor_offsets,
)

__all__ = [
    "ReadBytes",
    "VectorLayout",
    "VectorRange",
    "VectorReader",
    "float_count",
    "integer_ranges",
    "vector_dtype",
    "write_payload",
]


def float_count(manifest: Manifest) -> int:
    """Return the number of elements of a manifest's vector."""
    return sum(spec.element_count for spec in manifest.tensors if spec.dtype.is_float)


def vector_dtype(manifest: Manifest) -> np.dtype[Any]:
    """Return the numpy dtype of slices: float64 if any tensor is float64, otherwise float32."""
    wide = any(spec.dtype is DType.FLOAT64 for spec in manifest.tensors)
    return np.dtype(np.float64 if wide else np.float32)


def integer_ranges(base: Manifest, wire: Manifest | None = None) -> list[tuple[TensorSpec, int]]:
    """Return the integer and boolean tensors of a payload, each with its offset in bytes.

    Args:
        base: The manifest of the model.
        wire: The manifest of the payload where that is encoded.
    """
    offsets = tensor_offsets(wire or base)
    return [(spec, offsets[spec.name]) for spec in base.tensors if not spec.dtype.is_float]


class VectorLayout:
    """Where the elements of a vector are in the payloads of a manifest and an encoding.

    It costs time and memory in the number of tensors; make it once and share it between readers.

    Attributes:
        count: Elements of the vector.
        dtype: Numpy dtype of its slices.

    Args:
        base: The manifest of the model.
        encoding: How its floating tensors travel.
        wire: What `wire_manifest` makes of them; the base manifest when not given, for FULL_PRECISION.
        sparse_block_count: Entries of a TOP_K tensor that a reader reads and holds at once.
    """

    def __init__(
        self,
        base: Manifest,
        encoding: Encoding = Encoding.FULL_PRECISION,
        wire: Manifest | None = None,
        *,
        sparse_block_count: int = SPARSE_BLOCK_COUNT,
    ) -> None:
        self.count = float_count(base)
        self.dtype = vector_dtype(base)
        self._runs = locate_runs(base, encoding, wire or base, sparse_block_count)
        self._starts = [run.start for run in self._runs]

    def runs(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """Yield the runs that slice `start` to `stop` touches, with its bounds within each."""
        position = bisect_right(self._starts, start) - 1
        while start < stop:
            run = self._runs[position]
            end = min(stop, run.start + run.count)
            yield run, start - run.start, end - run.start
            start = end
            position += 1


class VectorReader:
    """Slices of the vector of one payload.

    Args:
        layout: Of the payload's manifest and encoding.
        read_bytes: Gives ranges of the payload.
    """

    def __init__(self, layout: VectorLayout, read_bytes: ReadBytes) -> None:
        self._layout = layout
        self._read_bytes = read_bytes
        self._open: tuple[Run, Decode] | None = None

    def read(self, start: int, stop: int) -> Array:
        """Return elements `start` to `stop` of the vector.

        Args:
            start: 0 to `stop`.
            stop: At most the vector's count.

        Returns:
            One dimension, of the layout's dtype, aligned. A view of the payload's bytes where they are
            stored in that dtype: not to be written into.

        Raises:
            IndexError: The bounds are not within the vector.
        """
        if not 0 <= start <= stop <= self._layout.count:
            raise IndexError(f"slice: got {start} to {stop}, wanted within {self._layout.count}")
        runs = list(self._layout.runs(start, stop))
        if len(runs) == 1:
            run, first, last = runs[0]
            if isinstance(run, PlainRun) and run.dtype.numpy == self._layout.dtype:
                return np.require(run.view(self._read_bytes, first, last), requirements="A")
        out = np.empty(stop - start, self._layout.dtype)
        for run, first, last in runs:
            begin = run.start + first - start
            self._decoder(run)(first, last, out[begin : begin + last - first])
        return out

    def _decoder(self, run: Run) -> Decode:
        if self._open is None or self._open[0] is not run:
            self._open = run, run.open(self._read_bytes)
        return self._open[1]


class VectorRange:
    """Range of values that a vector's tensors can hold, both as stored and as downloaded.

    Args:
        base: The manifest of the model.
        download: The encoding in which devices get it: FULL_PRECISION, FLOAT16 or BFLOAT16.
    """

    def __init__(self, base: Manifest, download: Encoding = Encoding.FULL_PRECISION) -> None:
        self._tensors = [
            spec for spec in base.tensors if spec.dtype.is_float and spec.element_count
        ]
        self._starts: list[int] = []
        self._download = download
        start = 0
        for spec in self._tensors:
            self._starts.append(start)
            start += spec.element_count

    def fits(self, start: int, values: Array) -> Array:
        """Return for each value of the vector from element `start` on whether it stays finite when it is rounded.

        Args:
            start: 0 or above; the values end within the vector.
            values: Float64, one dimension.

        Returns:
            Booleans of the same shape.
        """
        fitting = np.empty(len(values), np.bool_)
        position, stop = start, start + len(values)
        while position < stop:
            place = bisect_right(self._starts, position) - 1
            spec = self._tensors[place]
            end = min(stop, self._starts[place] + spec.element_count)
            part = narrow(values[position - start : end - start], spec.dtype)
            part = narrow(part, narrow_dtype(spec.dtype, self._download))
            fitting[position - start : end - start] = np.isfinite(part)
            position = end
        return fitting

    def tensor_at(self, element: int) -> str:
        """Return the name of the tensor that an element of the vector belongs to."""
        return self._tensors[bisect_right(self._starts, element) - 1].name


def write_payload(
    base: Manifest,
    float_slices: Iterable[Array],
    integer_bytes: Callable[[TensorSpec], Iterable[BytesLike]],
) -> Iterator[bytes]:
    """Make the payload of a base manifest, chunk by chunk.

    Memory beyond the caller's is a few chunks and the current slice.

    Args:
        base: Describes the payload.
        float_slices: The vector in consecutive float64 slices of any size. Each element is rounded to the
            element type of its tensor, to nearest, ties to even.
        integer_bytes: Called once for each integer or boolean tensor, in order; gives its bytes in pieces
            of any size.

    Yields:
        The chunks of the payload.

    Raises:
        NonFiniteError: An element is NaN or infinite, or beyond the range of its element type: a model that
            has left its range has diverged, and clipping would hide it.
        InvalidPayloadError: A boolean is neither 0 nor 1.
        PayloadSizeError: Too few or too many elements or integer bytes.
    """
    return rechunk(_checked(base, _tensor_pieces(base, float_slices, integer_bytes)))


def _checked(manifest: Manifest, pieces: Iterable[BytesLike]) -> Iterator[BytesLike]:
    check = FiniteCheck(manifest)
    for piece in pieces:
        check.feed(piece)
        yield piece


def _tensor_pieces(
    base: Manifest,
    float_slices: Iterable[Array],
    integer_bytes: Callable[[TensorSpec], Iterable[BytesLike]],
) -> Iterator[BytesLike]:
    rest = iter(float_slices)
    values: Array = np.empty(0)
    for spec in base.tensors:
        if not spec.dtype.is_float:
            yield from _exactly(spec, integer_bytes(spec))
            continue
        missing = spec.element_count
        while missing:
            if not len(values):
                values = _next_slice(rest, spec)
            part, values = values[:missing], values[missing:]
            missing -= len(part)
            yield np.ascontiguousarray(narrow(part, spec.dtype)).view(np.uint8).data
    if len(values) or any(len(extra) for extra in rest):
        raise PayloadSizeError(f"vector: got over {float_count(base)} elements, wanted as many")


def _next_slice(rest: Iterator[Array], spec: TensorSpec) -> Array:
    for values in rest:
        if len(values):
            return values
    raise PayloadSizeError(f"vector: got its end within tensor {spec.name!r}, wanted all elements")


def _exactly(spec: TensorSpec, pieces: Iterable[BytesLike]) -> Iterator[BytesLike]:
    size_bytes = 0
    for piece in pieces:
        size_bytes += len(piece)
        yield piece
    if size_bytes != spec.size_bytes:
        raise PayloadSizeError(
            f"tensor {spec.name!r}: got {size_bytes} bytes, wanted {spec.size_bytes}"
        )
