"""Interface of payload stores, and the names under which rows of payloads refer to them."""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from qflare.tensors import CHUNK_BYTES, BytesLike
from qflare_server.errors import ConflictError

FILES: Final = "files"
OBJECT: Final = "object"
DATABASE: Final = "database"
STORE_NAMES: Final = (FILES, OBJECT, DATABASE)
READ_CHUNKS: Final = 8
"""Most chunks of one read; bounds its memory and the time that it holds a lock."""


class PayloadStore(Protocol):
    """Storage of the chunks of large payloads; thread-safe.

    Every chunk of a payload but the last has `CHUNK_BYTES` bytes. A payload has one writer at a time.

    All methods raise StoreUnavailableError while the store cannot be reached, StorageFullError when it is full, and
    StorageDamagedError when it cannot read what it has written.
    """

    @property
    def name(self) -> str:
        """One of `STORE_NAMES`, recorded in the rows of payloads."""

    @property
    def batch_bytes(self) -> int:
        """Least bytes of a batch that is written at a reasonable cost; 0 if any size will do."""

    @property
    def read_chunks(self) -> int:
        """Chunks that are read at once at a reasonable cost, where a reader needs several one after the other."""

    def identity(self) -> str:
        """Return the name that the deployment gave to this folder or bucket; empty if it has none yet."""

    def adopt(self, identity: str) -> None:
        """Give a folder or bucket a name; does nothing if it has one."""

    def owner(self) -> str:
        """Return the name of the database that may delete from this folder or bucket; empty if it has none."""

    def replace_owner(self, before: str, after: str) -> None:
        """Replace the owner's name; does nothing if it is not `before`, or if another is written at the same time."""

    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        """Write consecutive chunks; they are durable when `complete` has returned. Existing chunks are replaced.

        What a crash leaves of an unfinished payload may be less, or damaged.
        """

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Check that a payload is whole, and make it durable under its final name; can be repeated.

        Raises:
            ConflictError: Bytes are missing.
        """

    def truncate(self, payload_id: str, count: int) -> None:
        """Delete the chunks of an unfinished payload from number `count` on."""

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order, fewer at the end of the payload."""

    def forget(self, payload_id: str) -> None:
        """Free what a cache of this machine holds of a payload that will hardly be read again; only a hint."""

    def stored_count(self, payload_id: str) -> int:
        """Return the number of consecutive chunks from the first."""

    def payload_ids(self) -> Iterable[str]:
        """Return the ids of all payloads that have chunks."""

    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete all chunks of payloads; unknown ids are ignored."""

    def size_bytes(self) -> int:
        """Return the bytes that the store takes up."""

    def check(self) -> None:
        """Check that the store is intact; cheap, called once a second."""

    def close(self) -> None:
        """Close the store's connections."""


def require_chunks(stored_count: int, size_bytes: int) -> None:
    """Check the number of stored chunks of a payload of a size.

    Raises:
        ConflictError: Chunks are missing.
    """
    if stored_count != -(-size_bytes // CHUNK_BYTES):
        raise ConflictError("chunks of the upload are missing; send it again")
