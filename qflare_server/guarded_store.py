"""A payload store whose database errors are the domain's, as those of `Database` are."""

from collections.abc import Sequence

from qflare_server.database import domain_errors
from qflare_server.repository.payload_stores import PayloadStore


class GuardedStore:
    """Hands every call on to a store.

    All methods raise StoreUnavailableError while its database cannot be reached, and StorageFullError where the disk
    is full.

    Args:
        store: What does the work.
    """

    def __init__(self, store: PayloadStore) -> None:
        self._store = store

    def append(self, payload_id: str, first_index: int, chunks: Sequence[bytes]) -> None:
        """Write consecutive chunks."""
        with domain_errors():
            self._store.append(payload_id, first_index, chunks)

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order."""
        with domain_errors():
            return self._store.read(payload_id, first_index, count)

    def stored_count(self, payload_id: str) -> int:
        """Return how many chunks are there without a gap."""
        with domain_errors():
            return self._store.stored_count(payload_id)

    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete all chunks of payloads."""
        with domain_errors():
            self._store.delete(payload_ids)

    def size_bytes(self) -> int:
        """Return the bytes that the store takes up on disk."""
        with domain_errors():
            return self._store.size_bytes()

    def close(self) -> None:
        """Close the store's connections."""
        self._store.close()
