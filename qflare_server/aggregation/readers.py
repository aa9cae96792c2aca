"""Readers of the payloads of a fold: opened by each thread for itself, keeping the slice that was read last."""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from qflare.tensors import Manifest
from qflare.tensors.manifest import DType, TensorSpec
from qflare_server.storage.payload_records import StoredPayload, chunks_of, seal_of
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.strategies import Reader

BASE_CHUNKS: Final = 48  # kept of a payload that several threads read, each at a slice of its own
HELD_CHUNKS: Final = 128  # payloads of up to so many are kept whole, and thus hashed once


def kept_chunks(chunk_count: int) -> int:
    """Return how many chunks to keep of a payload that is read for every update of a round."""
    return chunk_count if chunk_count <= HELD_CHUNKS else BASE_CHUNKS


def difference(read: Reader, base: Reader) -> Reader:
    """Return a reader of an update minus the version that it was trained from."""

    def read_difference(start: int, stop: int) -> np.ndarray[Any, Any]:
        return read(start, stop).astype(np.float64) - base(start, stop)

    return read_difference


def stored_payload(update: AcceptedUpdate) -> StoredPayload:
    """Return the stored payload of an update."""
    return StoredPayload(
        update.payload_id,
        update.size_bytes,
        update.payload_digest,
        update.chunk_digests,
        update.location == "row",
        seal_of(update.sealed_header, update.sealed_key, None),
        chunks_of(update.chunks_id, update.store),
    )


class OpenReaders(threading.local):
    """The reader that a thread has open: of all updates of a fold, one at a time."""

    opened_by: Callable[[], Reader] | None = None
    read: Reader

    def reader(self, open_reader: Callable[[], Reader]) -> Reader:
        """Return a reader that is opened when it is read, and closed when another one is."""

        def read(start: int, stop: int) -> np.ndarray[Any, Any]:
            if self.opened_by is not open_reader:
                self.read, self.opened_by = open_reader(), open_reader
            return self.read(start, stop)

        return read


def by_thread(open_reader: Callable[[], Reader]) -> Reader:
    """Return a reader that each thread opens for itself: decoders keep state."""
    return OpenReaders().reader(open_reader)


class _Last(threading.local):
    """The slice that a thread has read last."""

    bounds: tuple[int, int] | None = None
    values: np.ndarray[Any, Any]


def held_slice(read: Reader) -> Reader:
    """Return a reader that keeps the slice that was read last: a cohort asks for the same one in turn."""
    last = _Last()

    def held(start: int, stop: int) -> np.ndarray[Any, Any]:
        if last.bounds != (start, stop):
            last.values, last.bounds = read(start, stop), (start, stop)
        return last.values

    return held


def vector_manifest(name: str, element_count: int) -> Manifest:
    """Return the layout in which a strategy's vector is kept."""
    return Manifest((TensorSpec(name, DType.FLOAT64, (element_count,)),))
