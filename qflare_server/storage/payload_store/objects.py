"""Payload store `object`: the chunks of a payload as objects of a bucket.

Each append writes one object, a part, whose name says which chunks it holds: `payloads/ID/FIRST-COUNT`. The store
makes a part visible whole or not at all, and durable before it answers, so an interrupted upload goes on after the
last whole part. Parts of a payload may overlap after a crash; a chunk is read from the part that begins last.
"""

import re
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

from qflare.tensors import CHUNK_BYTES, BytesLike
from qflare_server.errors import ConflictError, ObjectStoreUnavailableError
from qflare_server.storage.payload_store.bucket import Bucket
from qflare_server.storage.payload_store.interface import OBJECT, require_chunks

MARKER_KEY: Final = "store-identity"
PART_BYTES: Final = 16 * 2**20
CHECK_S: Final = 10.0
"""Seconds between two looks at the bucket."""
SIZE_S: Final = 300.0
"""Seconds for which the bytes that the bucket takes up are remembered; listing it costs a request per 1,000 parts."""
_FOLDER: Final = "payloads"
_OWNERS: Final = "owners"
_OWNER: Final = re.compile(r"owners/[0-9]{12}")
_KNOWN_PAYLOADS: Final = 1024
_ID: Final = re.compile(r"[0-9A-Za-z_]{1,64}")
_PART: Final = re.compile(r"([0-9]{8})-([0-9]{8})")


class _Part(NamedTuple):
    """Chunks from number `first` up to number `end`."""

    first: int
    end: int
    size_bytes: int = 0

    def key(self, payload_id: str) -> str:
        return f"{_folder(payload_id)}/{self.first:08d}-{self.end - self.first:08d}"


class _Piece(NamedTuple):
    """Consecutive chunks of one part, as the range of its bytes."""

    part: _Part
    start: int
    end: int


def _folder(payload_id: str) -> str:
    if _ID.fullmatch(payload_id) is None:
        raise ValueError(f"payload id: got {payload_id!r}")
    return f"{_FOLDER}/{payload_id}"


def _owner_key(number: int) -> str:
    return f"{_OWNERS}/{number:012d}"


class PayloadBucket:
    """Payload store in a bucket; several coordinators on several machines may share it.

    Args:
        bucket: The bucket.
    """

    name: Final = OBJECT
    batch_bytes: Final = PART_BYTES
    read_chunks: Final = 4

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[_Part, ...]] = OrderedDict()
        self._size = 0
        self._sized_at: float | None = None
        self._identity = ""
        self._checked_at: float | None = None
        self._problem: ObjectStoreUnavailableError | None = None

    def identity(self) -> str:
        """Return the content of the bucket's marker object."""
        found = self._bucket.get(MARKER_KEY) or b""
        self._identity = found.decode("ascii", errors="replace")
        return self._identity

    def adopt(self, identity: str) -> None:
        """Write the bucket's marker object unless it has one."""
        self._bucket.create(MARKER_KEY, identity.encode())

    def owner(self) -> str:
        """Return the content of the owner object with the largest number."""
        return self._latest_owner()[1]

    def _latest_owner(self) -> tuple[int, str]:
        for _attempt in range(
            2
        ):  # the latest may be deleted, as an earlier one, after it was listed
            keys = [found.key for found in self._bucket.collect(_OWNERS)]
            numbers = [int(key.rpartition("/")[2]) for key in keys if _OWNER.fullmatch(key)]
            if not numbers:
                break
            data = self._bucket.get(_owner_key(max(numbers)))
            if data is not None:
                return max(numbers), data.decode("ascii", errors="replace")
        return 0, ""

    def replace_owner(self, before: str, after: str) -> None:
        """Create the owner object with the next number, then delete the earlier ones.

        The service refuses a second object of one name, so that of two writers only one succeeds, and a writer that was
        frozen meanwhile replaces nothing: the largest number counts.
        """
        number, found = self._latest_owner()
        if found != before or not self._bucket.create(_owner_key(number + 1), after.encode()):
            return
        earlier = [each.key for each in self._bucket.collect(_OWNERS)]
        self._bucket.delete([key for key in earlier if key < _owner_key(number + 1)])

    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        """Write consecutive chunks as one part."""
        if not chunks:
            return
        part = _Part(first_index, first_index + len(chunks))
        self._put(payload_id, part, b"".join(chunks))
        self._remove_replaced(payload_id, part)

    def _put(self, payload_id: str, part: _Part, data: bytes) -> None:
        self._bucket.put(part.key(payload_id), data)
        self._count(len(data))

    def _remove_replaced(self, payload_id: str, new: _Part) -> None:
        """Delete older parts that begin within a new one; keep the chunks that they have beyond it."""
        for part in self._list(payload_id):
            if not new.first <= part.first < new.end or part[:2] == new[:2]:
                continue
            if part.end > new.end:
                start = (new.end - part.first) * CHUNK_BYTES
                rest = self._bucket.get_range(part.key(payload_id), start, part.size_bytes)
                self._put(payload_id, _Part(new.end, part.end), rest)
            self._delete(payload_id, [part])

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Check that the parts come to the whole payload."""
        parts = self._list(payload_id)
        require_chunks(_count_of(parts), size_bytes)
        pieces = _pieces(parts, 0, _count_of(parts))
        if sum(piece.end - piece.start for piece in pieces) != size_bytes:
            raise ConflictError("chunks of the upload are missing; send it again")

    def truncate(self, payload_id: str, count: int) -> None:
        """Delete the parts from chunk `count` on, and shorten the one that it is in."""
        for part in self._list(payload_id):
            if part.end <= count:
                continue
            if part.first < count:
                stop = (count - part.first) * CHUNK_BYTES
                rest = self._bucket.get_range(part.key(payload_id), 0, stop)
                self._put(payload_id, _Part(part.first, count), rest)
            self._delete(payload_id, [part])

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order."""
        with self._lock:
            known = self._known.get(payload_id)
        if known is not None:
            chunks = self._read(payload_id, known, first_index, count)
            if len(chunks) == count:
                return chunks
        return self._read(payload_id, self._list(payload_id), first_index, count)

    def _read(self, payload_id: str, parts: Sequence[_Part], first: int, count: int) -> list[bytes]:
        chunks: list[bytes] = []
        for piece in _pieces(parts, first, first + count):
            data = self._bucket.get_range(piece.part.key(payload_id), piece.start, piece.end)
            if len(data) != piece.end - piece.start:
                break
            chunks += [
                data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)
            ]
        return chunks

    def forget(self, payload_id: str) -> None:
        """Do nothing: there is no cache."""

    def stored_count(self, payload_id: str) -> int:
        """Return the number of consecutive chunks that the parts come to."""
        return _count_of(self._list(payload_id))

    def payload_ids(self) -> Iterator[str]:
        """Yield the ids of all payloads that have parts."""
        latest = ""
        for found in self._bucket.list(_FOLDER):
            payload_id = found.key.split("/")[1]
            if payload_id != latest and _ID.fullmatch(payload_id):
                latest = payload_id
                yield payload_id

    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete the parts of payloads."""
        for payload_id in payload_ids:
            found = self._bucket.collect(_folder(payload_id))
            self._forget(payload_id)
            self._bucket.delete([each.key for each in found])
            self._count(-sum(each.size_bytes for each in found))

    def size_bytes(self) -> int:
        """Return the size of all parts: listed every five minutes, and counted by this process in between."""
        now = time.monotonic()
        with self._lock:
            if self._sized_at is not None and now < self._sized_at + SIZE_S:
                return self._size
        total = sum(found.size_bytes for found in self._bucket.list(_FOLDER))
        with self._lock:
            self._size, self._sized_at = total, now
        return total

    def check(self) -> None:
        """Check, every ten seconds, that the bucket answers and is still the same.

        Raises:
            ObjectStoreUnavailableError: It does not, or it was emptied or replaced.
        """
        now = time.monotonic()
        if self._checked_at is None or now >= self._checked_at + CHECK_S:
            self._problem = self._find_problem()
            self._checked_at = time.monotonic()
        if self._problem is not None:
            raise self._problem.with_traceback(None)

    def _find_problem(self) -> ObjectStoreUnavailableError | None:
        try:
            found = self._bucket.probe(MARKER_KEY)
        except ObjectStoreUnavailableError as error:
            return error
        if found is None or found.decode("ascii", errors="replace") != self._identity:
            return ObjectStoreUnavailableError(
                "the bucket of the object store was emptied or replaced"
            )
        return None

    def close(self) -> None:
        """Do nothing: the client closes its connections when it is freed."""

    def _list(self, payload_id: str) -> tuple[_Part, ...]:
        """Return the parts of a payload, and remember them for reading."""
        found = (
            _parse(each.key.rpartition("/")[2], each.size_bytes)
            for each in self._bucket.collect(_folder(payload_id))
        )
        parts = tuple(sorted(part for part in found if part is not None))
        with self._lock:
            self._known[payload_id] = parts
            self._known.move_to_end(payload_id)
            if len(self._known) > _KNOWN_PAYLOADS:
                self._known.popitem(last=False)
        return parts

    def _forget(self, payload_id: str) -> None:
        with self._lock:
            self._known.pop(payload_id, None)

    def _delete(self, payload_id: str, parts: Sequence[_Part]) -> None:
        self._forget(payload_id)
        self._bucket.delete([part.key(payload_id) for part in parts])
        self._count(-sum(part.size_bytes for part in parts))

    def _count(self, size_bytes: int) -> None:
        with self._lock:
            self._size += size_bytes


def _parse(name: str, size_bytes: int) -> _Part | None:
    """Return a part from its name and size; None if its size is not that of its chunks, or if it is no part."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    first, count = int(found[1]), int(found[2])
    if not (count - 1) * CHUNK_BYTES < size_bytes <= count * CHUNK_BYTES:
        return None
    return _Part(first, first + count, size_bytes)


def _holder(parts: Sequence[_Part], index: int) -> _Part | None:
    """Return the part that a chunk is read from: of those that hold it, the one that begins last."""
    begun = bisect_right(parts, index, key=attrgetter("first"))
    return next((part for part in reversed(parts[:begun]) if index < part.end), None)


def _count_of(parts: Sequence[_Part]) -> int:
    """Return the number of consecutive chunks from the first."""
    count = 0
    for part in parts:
        if part.first > count:
            break
        count = max(count, part.end)
    return count


def _pieces(parts: Sequence[_Part], first: int, end: int) -> list[_Piece]:
    """Return where to read chunks from number `first` up to number `end`, as far as there are any."""
    pieces: list[_Piece] = []
    for index in range(first, end):
        part = _holder(parts, index)
        if part is None:
            break
        start = (index - part.first) * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, part.size_bytes)
        if pieces and pieces[-1].part == part:
            start = pieces.pop().start
        pieces.append(_Piece(part, start, stop))
    return pieces
