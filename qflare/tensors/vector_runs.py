"""Runs of a payload vector: ranges of elements that are decoded alike.

A run stores the location and encoding of its elements in a payload. Opening it on a payload returns a function that
decodes any range of it. The function keeps state between calls, which makes consecutive ranges cheap.

Reads across runs are in `qflare.tensors.vectors`, which other modules use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qflare.tensors.elements import BytesLike
from qflare.tensors.encodings import INDEX_SUFFIX, SCALE_SUFFIX, VALUE_SUFFIX, Encoding, dequantize
from qflare.tensors.manifest import Array, DType, Manifest

ReadBytes: TypeAlias = Callable[[int, int], BytesLike]
"""`read(offset, length)` gives exactly that many bytes of a payload; they must not change afterwards."""

SPARSE_BLOCK_COUNT = 8192
"""Entries of a TOP_K tensor that a reader holds unless told otherwise: 64 KiB with int32 indices."""

Decode: TypeAlias = Callable[[int, int, Array], None]
"""`decode(start, stop, out)` fills `out` with elements of one run, counted from the run's beginning."""


@dataclass(frozen=True)
class Run(ABC):
    """Consecutive elements of the vector that are decoded alike.

    Attributes:
        start: Index of the first in the vector.
        count: Number of elements, at least one.
        offset: Where their bytes begin in the payload.
    """

    start: int
    count: int
    offset: int

    @abstractmethod
    def open(self, read_bytes: ReadBytes) -> Decode:
        """Return a function that decodes elements of this run from a payload."""


@dataclass(frozen=True)
class PlainRun(Run):
    """Elements of one floating type, of one tensor or of several side by side."""

    dtype: DType

    def view(self, read_bytes: ReadBytes, start: int, stop: int) -> Array:
        """Return elements of the run as they are stored, without a copy."""
        itemsize = self.dtype.itemsize
        data = read_bytes(self.offset + start * itemsize, (stop - start) * itemsize)
        return np.frombuffer(data, self.dtype.numpy, stop - start)

    def open(self, read_bytes: ReadBytes) -> Decode:
        """See `Run`."""

        def decode(start: int, stop: int, out: Array) -> None:
            out[:] = self.view(read_bytes, start, stop)

        return decode


@dataclass(frozen=True)
class QuantizedRun(Run):
    """One INT8 tensor.

    Attributes:
        scale_offset: Where its scale is in the payload.
    """

    scale_offset: int

    def open(self, read_bytes: ReadBytes) -> Decode:
        """See `Run`."""
        scale = np.frombuffer(read_bytes(self.scale_offset, 4), "<f4", 1)

        def decode(start: int, stop: int, out: Array) -> None:
            levels = np.frombuffer(
                read_bytes(self.offset + start, stop - start), np.int8, stop - start
            )
            dequantize(levels, scale, out)

        return decode


@dataclass(frozen=True)
class SparseRun(Run):
    """One TOP_K tensor; `offset` is that of its indices.

    Attributes:
        value_offset: Where its values begin.
        index_dtype: Element type of its indices.
        entry_count: Number of its indices, and of its values.
        block_count: Entries that are read and held at once.
    """

    value_offset: int
    index_dtype: DType
    entry_count: int
    block_count: int

    def open(self, read_bytes: ReadBytes) -> Decode:
        """See `Run`."""
        return _SparseCursor(self, read_bytes).decode


class _SparseCursor:
    """Position in the entries of a TOP_K tensor, and the block of entries that begins there.

    Invariant: every entry before the block has an index below `_floor`. After `decode(start, stop, out)` the block
    holds the first entry at or after `stop`, if there is one, so that the next range needs no search.
    """

    def __init__(self, run: SparseRun, read_bytes: ReadBytes) -> None:
        self._run = run
        self._read_bytes = read_bytes
        self._load(0, floor=0)

    def decode(self, start: int, stop: int, out: Array) -> None:
        """Fill `out` with elements of the tensor, zero where it has no entry."""
        out[:] = 0
        self._seek(start)
        while True:
            first, last = np.searchsorted(self._indices, (start, stop))
            out[self._indices[first:last] - start] = self._values[first:last]
            if last < len(self._indices) or self._end == self._run.entry_count:
                return
            self._load(self._end, floor=int(self._indices[-1]) + 1)

    def _load(self, begin: int, floor: int) -> None:
        count = min(self._run.block_count, self._run.entry_count - begin)
        self._floor, self._begin, self._end = floor, begin, begin + count
        self._indices = self._read_indices(begin, count)
        data = self._read_bytes(self._run.value_offset + begin * 4, count * 4)
        self._values = np.frombuffer(data, "<f4", count)

    def _read_indices(self, begin: int, count: int) -> Array:
        dtype = self._run.index_dtype
        data = self._read_bytes(self._run.offset + begin * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(data, dtype.numpy, count)

    def _seek(self, start: int) -> None:
        """Make the block hold the first entry at or after `start`, or be one that only that entry follows."""
        if start < self._floor:
            low, high = 0, self._begin
        elif self._end < self._run.entry_count and start > int(self._indices[-1]) + 1:
            low, high = self._end, self._run.entry_count
        else:
            return
        while low < high:
            middle = (low + high) // 2
            if int(self._read_indices(middle, 1)[0]) < start:
                low = middle + 1
            else:
                high = middle
        self._load(low, floor=start)


def locate_runs(
    base: Manifest, encoding: Encoding, wire: Manifest, sparse_block_count: int
) -> list[Run]:
    """Return the runs of a vector in order.

    Args:
        base: The manifest of the model.
        encoding: How its floating tensors travel.
        wire: What `wire_manifest` makes of them.
        sparse_block_count: Entries of a TOP_K tensor that are read and held at once.
    """
    return _merged(_located(base, encoding, wire, sparse_block_count))


def _located(
    base: Manifest, encoding: Encoding, wire: Manifest, sparse_block_count: int
) -> Iterator[Run]:
    offsets = tensor_offsets(wire)
    wire_specs = {spec.name: spec for spec in wire.tensors}
    start = 0
    for spec in base.tensors:
        name, count = spec.name, spec.element_count
        if not spec.dtype.is_float or not count:
            continue
        if encoding is Encoding.TOP_K:
            index = wire_specs[name + INDEX_SUFFIX]
            yield SparseRun(
                start,
                count,
                offset=offsets[index.name],
                value_offset=offsets[name + VALUE_SUFFIX],
                index_dtype=index.dtype,
                entry_count=index.element_count,
                block_count=sparse_block_count,
            )
        elif encoding is Encoding.INT8:
            yield QuantizedRun(start, count, offsets[name], offsets[name + SCALE_SUFFIX])
        else:
            yield PlainRun(start, count, offsets[name], wire_specs[name].dtype)
        start += count


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Join plain runs that lie side by side, so that many small tensors are read like a large one."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if (
            isinstance(run, PlainRun)
            and isinstance(last, PlainRun)
            and run.dtype is last.dtype
            and run.offset == last.offset + last.count * last.dtype.itemsize
        ):
            merged[-1] = PlainRun(last.start, last.count + run.count, last.offset, run.dtype)
        else:
            merged.append(run)
    return merged


def tensor_offsets(manifest: Manifest) -> dict[str, int]:
    """Return where each tensor begins in the payload, by name."""
    offsets: dict[str, int] = {}
    end = 0
    for spec in manifest.tensors:
        offsets[spec.name] = end
        end += spec.size_bytes
    return offsets
