"""Export of models to safetensors files, and import from them.

Files are written and read as streams; memory does not depend on their size. A manifest may order
its tensors in any way; the data of a file is ordered by descending element size, as other programs
expect it, so that every tensor is aligned. The manifest's order is the order of the header's
entries, which is how a file that is exported and imported again keeps its layout digest.

Files are untrusted: the header is bounded, has one exact form, and must cover the file's data without
gaps or overlaps.

Source: https://github.com/huggingface/safetensors, README "Format" and safetensors/src/tensor.rs.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qflare.files import new_file, parse_json
from qflare.tensors.elements import BytesLike, PayloadSizeError
from qflare.tensors.manifest import (
    CHUNK_BYTES,
    DType,
    InvalidManifestError,
    Manifest,
    ManifestLimits,
    TensorSpec,
)
from qflare.tensors.payload import rechunk, split

MAX_HEADER_BYTES = 16 * 2**20
"""Longest header that is read or written, in bytes. The library allows 100 MB."""

FACT_PREFIX = "qflare_"
"""Begins the names of metadata that QFLARE adds to the files that it exports."""

_METADATA = "__metadata__"
_LENGTH_BYTES = 8


def own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without what QFLARE has added to it."""
    return {name: value for name, value in metadata.items() if not name.startswith(FACT_PREFIX)}


def with_facts(metadata: Mapping[str, str], **facts: object) -> dict[str, str]:
    """Return metadata with facts about a version, under names of their own: none of a file's own is replaced."""
    own = own_metadata(metadata)
    return own | {FACT_PREFIX + name: str(value) for name, value in facts.items()}


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a safetensors file, and access to its payload.

    Attributes:
        path: Where the file is.
        manifest: Its tensors, in the order of the header's entries.
        metadata: Metadata from the header.
    """

    path: Path
    manifest: Manifest
    metadata: Mapping[str, str]
    _header: bytes
    _offsets: Mapping[str, int]

    def chunks(self) -> Iterator[bytes]:
        """Return the canonical payload, chunk by chunk; each call reads the file anew.

        Raises:
            InvalidManifestError: While iterating: the file has another header than when it was
                opened.
            PayloadSizeError: While iterating: the file has become shorter.
            OSError: While iterating: it cannot be read.
        """
        return rechunk(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            if _read_header(file) != self._header:
                raise InvalidManifestError(f"{self.path}: the header changed since it was opened")
            for spec in self.manifest.tensors:
                file.seek(_LENGTH_BYTES + len(self._header) + self._offsets[spec.name])
                yield from _read_exactly(file, spec.size_bytes)


def export_safetensors(
    path: Path,
    manifest: Manifest,
    chunks: Iterable[BytesLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a payload to a safetensors file, or leave the path as it was.

    The file appears at once, whole and durable (temporary file in the same directory, fsync,
    rename), readable by its owner alone. Elements are not checked.

    Args:
        path: Replaced when it exists.
        manifest: Describes the payload.
        chunks: The payload in pieces of any size.
        metadata: Kept in the header; not interpreted.

    Raises:
        InvalidManifestError: A tensor is called `__metadata__`, or the header would be too long.
        PayloadSizeError: The payload size does not match the manifest.
        OSError: The file cannot be written.
    """
    offsets = _aligned_offsets(manifest)
    header = _encode_header(manifest, offsets, metadata or {})
    with new_file(path) as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        start = file.tell()
        for spec, offset, piece in split(manifest, chunks):
            if offset == 0:
                file.seek(start + offsets[spec.name])
            file.write(piece)


def import_safetensors(path: Path, limits: ManifestLimits | None = None) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Args:
        path: The file; it stays where it is and must not change while its payload is read.
        limits: Bounds on the manifest; the defaults of `ManifestLimits` when not given.

    Raises:
        InvalidManifestError: The file is not a safetensors file, is inconsistent or out of bounds,
            or has an element type or a name that a manifest cannot hold.
        OSError: The file cannot be read.
    """
    limits = limits or ManifestLimits()
    with path.open("rb") as file:
        header = _read_header(file)
        data_bytes = os.fstat(file.fileno()).st_size - _LENGTH_BYTES - len(header)
    entries = _decode_json(header)
    metadata = _decode_metadata(entries.pop(_METADATA, {}))
    if len(entries) > limits.max_tensors:
        raise InvalidManifestError(f"tensors: got {len(entries)}, wanted <= {limits.max_tensors}")
    if data_bytes > limits.max_payload_bytes:
        raise InvalidManifestError(
            f"payload bytes: got {data_bytes}, wanted <= {limits.max_payload_bytes}"
        )
    located = [_decode_entry(name, entry) for name, entry in entries.items()]
    _check_coverage(located, data_bytes)
    manifest = Manifest(tuple(spec for spec, _ in located))
    offsets = {spec.name: offset for spec, offset in located}
    return SafetensorsFile(path, manifest, metadata, header, offsets)


def _aligned_offsets(manifest: Manifest) -> dict[str, int]:
    """Place tensors of larger elements first, so that each starts at a multiple of its element size."""
    offsets: dict[str, int] = {}
    end = 0
    for spec in sorted(manifest.tensors, key=lambda spec: -spec.dtype.itemsize):
        offsets[spec.name] = end
        end += spec.size_bytes
    return offsets


def _encode_header(
    manifest: Manifest, offsets: Mapping[str, int], metadata: Mapping[str, str]
) -> bytes:
    if _METADATA in offsets:
        raise InvalidManifestError(f"tensor name: got {_METADATA!r}, which safetensors reserves")
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for spec in manifest.tensors:
        begin = offsets[spec.name]
        entries[spec.name] = {
            "dtype": spec.dtype.safetensors_name,
            "shape": spec.shape,
            "data_offsets": (begin, begin + spec.size_bytes),
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidManifestError(f"header: got {len(header)} bytes, wanted <= {MAX_HEADER_BYTES}")
    return header


def _read_header(file: BinaryIO) -> bytes:
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidManifestError(f"header: got {length} bytes, wanted <= {MAX_HEADER_BYTES}")
    header = file.read(length)
    if len(header) < length or not header.startswith(b"{"):
        raise InvalidManifestError(f"header: got {len(header)} bytes, wanted {length} of JSON")
    return header


def _decode_json(header: bytes) -> dict[str, Any]:
    """Parse a header, which begins with a brace: JSON that does is an object."""
    try:
        entries: dict[str, Any] = parse_json(header.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidManifestError(f"header: got {error}, wanted JSON") from None
    return entries


def _decode_metadata(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InvalidManifestError(f"{_METADATA}: wanted an object of strings")
    for name, value in entry.items():
        try:
            (name + value).encode()
        except UnicodeEncodeError:
            raise InvalidManifestError(f"{_METADATA}: wanted valid Unicode") from None
    return entry


def _decode_entry(name: str, entry: Any) -> tuple[TensorSpec, int]:
    """Return the tensor of a header entry, and where its data begins."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidManifestError(f"tensor {name!r}: wanted dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise InvalidManifestError(f"dtype of {name!r}: got {dtype!r}, wanted a string")
    shape = _decode_integers(f"shape of {name!r}", entry["shape"])
    spec = TensorSpec(name, DType.from_safetensors(dtype), shape)
    offsets = _decode_integers(f"data_offsets of {name!r}", entry["data_offsets"])
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.size_bytes:  # noqa: PLR2004
        raise InvalidManifestError(
            f"data_offsets of {name!r}: got {offsets}, wanted {spec.size_bytes} bytes"
        )
    return spec, offsets[0]


def _decode_integers(what: str, value: Any) -> tuple[int, ...]:
    # JSON's true is an int for isinstance.
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InvalidManifestError(f"{what}: wanted an array of integers")
    return tuple(value)


def _check_coverage(located: Iterable[tuple[TensorSpec, int]], data_bytes: int) -> None:
    end = 0
    for spec, begin in sorted(located, key=lambda item: (item[1], item[0].size_bytes)):
        if begin != end:
            raise InvalidManifestError(f"data of {spec.name!r}: begins at {begin}, wanted {end}")
        end += spec.size_bytes
    if end != data_bytes:
        raise InvalidManifestError(f"data: got {data_bytes} bytes in the file, wanted {end}")


def _read_exactly(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    missing_bytes = size_bytes
    while missing_bytes:
        piece = file.read(min(missing_bytes, CHUNK_BYTES))
        if not piece:
            raise PayloadSizeError(f"file: ended {missing_bytes} bytes early")
        missing_bytes -= len(piece)
        yield piece
