"""Payload bytes: serialization, deserialization and hashing of arrays in chunks.

Payloads travel and are hashed in chunks of exactly `CHUNK_BYTES`, the last one shorter. The payload
digest is the root of the RFC 6962 Merkle tree over the chunks, so that a single chunk can be
proved.

Invariants: the same arrays give the same bytes on every machine, whatever their strides or byte
order; memory use is at most one tensor and one chunk beyond the caller's inputs and the
outputs.

This module does not check elements (see `elements`), sign, seal, encode or read files. Import these names from
`qflare.tensors`.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from qflare.crypto import merkle
from qflare.tensors.elements import BytesLike, PayloadSizeError, check_elements
from qflare.tensors.manifest import (
    CHUNK_BYTES,
    Array,
    DType,
    InvalidManifestError,
    Manifest,
    TensorSpec,
)

_JOINED_BYTES = 4096  # shorter pieces are copied at once: a chunk of many is not a long list


def chunks(arrays: Mapping[str, Array], manifest: Manifest) -> Iterator[bytes]:
    """Return the canonical payload of arrays, chunk by chunk.

    Memory beyond the arrays is one chunk, and a copy of one tensor where its strides or byte order
    are not canonical. The arrays must not change before the iterator is exhausted.

    Args:
        arrays: Exactly the tensors of the manifest, in any order, strides and byte order.
        manifest: Fixes the order of the bytes.

    Raises:
        InvalidManifestError: At once, when a name, dtype or shape differs from the manifest.
    """
    return rechunk(pieces(arrays, manifest))


def pieces(arrays: Mapping[str, Array], manifest: Manifest) -> Iterator[memoryview]:
    """Return the bytes of `chunks` tensor by tensor, without copies where strides and byte order are canonical.

    Raises:
        InvalidManifestError: At once, when a name, dtype or shape differs from the manifest.
    """
    check_arrays(arrays, manifest)
    return (_tensor_bytes(arrays[spec.name], spec) for spec in manifest.tensors)


def check_arrays(arrays: Mapping[str, Array], manifest: Manifest) -> None:
    """Check that arrays have the names, dtypes and shapes of a manifest, in any order.

    Raises:
        InvalidManifestError: A name, dtype or shape differs.
    """
    wanted = {spec.name for spec in manifest.tensors}
    if arrays.keys() != wanted:
        raise InvalidManifestError(
            f"tensor names: missing {sorted(wanted - arrays.keys())[:5]}, "
            f"not wanted {sorted(arrays.keys() - wanted)[:5]}"
        )
    for spec in manifest.tensors:
        array = arrays[spec.name]
        got = (DType.from_numpy(array.dtype), array.shape)
        if got != (spec.dtype, spec.shape):
            raise InvalidManifestError(
                f"tensor {spec.name!r}: got {got[0].name} {got[1]}, "
                f"wanted {spec.dtype.name} {spec.shape}"
            )


def _tensor_bytes(array: Array, spec: TensorSpec) -> memoryview:
    canonical = np.ascontiguousarray(array, dtype=spec.dtype.numpy)
    return canonical.reshape(-1).view(np.uint8).data


def rechunk(parts: Iterable[BytesLike]) -> Iterator[bytes]:
    """Cut consecutive bytes, given in pieces of any size, into the chunks of a payload.

    Pieces are copied when their chunk is whole; until then they must not change. Holds those of at most
    one chunk.
    """
    for view in chunk_views(parts):
        yield bytes(view)


def chunk_views(parts: Iterable[BytesLike]) -> Iterator[bytes | memoryview]:
    """Cut bytes as `rechunk` does, but do not copy a whole chunk within one piece: it must not change while in use."""
    pending: list[memoryview | bytearray] = []
    missing = CHUNK_BYTES
    for part in parts:
        view = memoryview(part)
        while len(view) >= missing:
            whole, view = view[:missing], view[missing:]
            yield b"".join((*pending, whole)) if pending else whole
            missing = CHUNK_BYTES
            pending.clear()
        missing -= len(view)
        if len(view) >= _JOINED_BYTES:
            pending.append(view)
        elif pending and isinstance(pending[-1], bytearray):
            pending[-1] += view
        else:
            pending.append(bytearray(view))
    if missing < CHUNK_BYTES:
        yield b"".join(pending)


def assemble(manifest: Manifest, chunks: Iterable[BytesLike]) -> dict[str, Array]:
    """Build arrays from the bytes of a payload.

    Args:
        manifest: Already bounded by its receiver: its size is allocated (and touched as bytes
            arrive).
        chunks: The payload in pieces of any size.

    Returns:
        One writable, aligned, C-order, native-endian array per tensor, in manifest order.

    Raises:
        PayloadSizeError: Too few or too many bytes.
        InvalidPayloadError: A boolean is neither 0 nor 1.
    """
    arrays: dict[str, Array] = {
        spec.name: np.empty(spec.shape, spec.dtype.numpy) for spec in manifest.tensors
    }
    buffers = {name: array.reshape(-1).view(np.uint8) for name, array in arrays.items()}
    for spec, offset, piece in split(manifest, chunks):
        buffers[spec.name].data[offset : offset + len(piece)] = piece
    for spec in manifest.tensors:
        if spec.dtype is DType.BOOL:
            check_elements(spec.name, arrays[spec.name])
    # Copies on big-endian hosts only.
    return {
        name: array.astype(array.dtype.newbyteorder("="), copy=False)
        for name, array in arrays.items()
    }


def split(
    manifest: Manifest, chunks: Iterable[BytesLike]
) -> Iterator[tuple[TensorSpec, int, memoryview]]:
    """Split the bytes of a payload at tensor boundaries.

    Args:
        manifest: Describes the payload.
        chunks: The payload in pieces of any size.

    Yields:
        A tensor, an offset in its bytes, and the bytes there, at least one: in the order of the
        payload, without copies. Tensors of no bytes do not appear.

    Raises:
        PayloadSizeError: Too few or too many bytes.
    """
    missing_bytes = manifest.size_bytes
    rest = (spec for spec in manifest.tensors if spec.size_bytes)
    spec, offset = None, 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        missing_bytes -= len(view)
        if missing_bytes < 0:
            raise PayloadSizeError(f"payload: got over {manifest.size_bytes} bytes, wanted as many")
        while view:
            if spec is None or offset == spec.size_bytes:
                spec, offset = next(rest), 0
            piece = view[: spec.size_bytes - offset]
            yield spec, offset, piece
            offset += len(piece)
            view = view[len(piece) :]
    if missing_bytes:
        raise PayloadSizeError(
            f"payload: got {manifest.size_bytes - missing_bytes} bytes, "
            f"wanted {manifest.size_bytes}"
        )


class PayloadHasher:
    """Digest of a payload that arrives chunk by chunk.

    Attributes:
        leaf_hashes: The Merkle leaf hash of each chunk so far, 32 bytes each.
        size_bytes: Bytes so far.
    """

    def __init__(self) -> None:
        self.leaf_hashes: list[bytes] = []
        self.size_bytes = 0

    def add(self, chunk: bytes) -> bytes:
        """Take the next chunk and return its leaf hash, `SHA-256(0x00 || chunk)`.

        Raises:
            PayloadSizeError: The chunk is empty or over `CHUNK_BYTES`, or follows a shorter one.
        """
        if not 1 <= len(chunk) <= CHUNK_BYTES:
            raise PayloadSizeError(f"chunk: got {len(chunk)} bytes, wanted 1 to {CHUNK_BYTES}")
        if self.size_bytes % CHUNK_BYTES:
            raise PayloadSizeError(
                f"chunk {len(self.leaf_hashes) - 1}: got {self.size_bytes % CHUNK_BYTES} bytes and "
                f"another chunk after it, wanted {CHUNK_BYTES}"
            )
        leaf_hash = merkle.leaf_hash(chunk)
        self.leaf_hashes.append(leaf_hash)
        self.size_bytes += len(chunk)
        return leaf_hash

    def root(self) -> str:
        """Return the payload digest of the chunks so far, 64 lower-case hex digits.

        It is the RFC 6962 Merkle root over the chunks; of no chunk, the SHA-256 of nothing.
        """
        return merkle.root(self.leaf_hashes).hex()


class PieceHasher:
    """Leaf hashes of a payload that arrives in pieces of any size, which are neither kept nor copied."""

    def __init__(self) -> None:
        self._leaf_hashes: list[bytes] = []
        self._hash = merkle.begin_leaf()
        self._filled_bytes = 0

    def feed(self, piece: BytesLike) -> None:
        """Take the next bytes."""
        view = memoryview(piece).cast("B")
        while view:
            part = view[: CHUNK_BYTES - self._filled_bytes]
            self._hash.update(part)
            self._filled_bytes += len(part)
            view = view[len(part) :]
            if self._filled_bytes == CHUNK_BYTES:
                self._end_chunk()

    def finish(self) -> list[bytes]:
        """Return the Merkle leaf hash of each chunk, 32 bytes each, once all bytes have been fed."""
        if self._filled_bytes:
            self._end_chunk()
        return self._leaf_hashes

    def _end_chunk(self) -> None:
        self._leaf_hashes.append(self._hash.digest())
        self._hash = merkle.begin_leaf()
        self._filled_bytes = 0


def payload_digest(chunks: Iterable[bytes]) -> str:
    """Return the digest of a payload given as its chunks, 64 lower-case hex digits.

    Raises:
        PayloadSizeError: A chunk but the last does not have `CHUNK_BYTES`.
    """
    hasher = PayloadHasher()
    for chunk in chunks:
        hasher.add(chunk)
    return hasher.root()
