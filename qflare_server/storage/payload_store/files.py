"""Payload store `files`: one file per payload in one folder of a local disk.

A payload is written in order to `ID.partial`, which is synchronized and renamed to `ID` when it is whole. What a crash
leaves in a partial file is verified when its upload is resumed, and deleted otherwise. Ids come from the coordinator,
never from a caller, and are checked before they become a name.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from qflare.files import make_private_folder, new_file, synchronize_folder
from qflare.tensors import CHUNK_BYTES, BytesLike
from qflare_server.errors import (
    ConflictError,
    StorageDamagedError,
    StorageFullError,
    StoreUnavailableError,
)
from qflare_server.storage.file_identity import FileIdentity
from qflare_server.storage.payload_store.interface import FILES
from qflare_server.storage.payload_store.write_back import write_back

PARTIAL: Final = ".partial"
MARKER: Final = "store-identity"
OWNER: Final = "store-owner-"
_OWNER: Final = re.compile(r"store-owner-[0-9]{12}")
_ID: Final = re.compile(r"[0-9A-Za-z_]{1,64}")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MAX_VECTOR: Final = min(1024, os.sysconf("SC_IOV_MAX"))

Method = TypeVar("Method", bound=Callable[..., Any])


def _domain_errors(method: Method) -> Method:
    """Translate errors of the operating system; record damage, which `check` reports from then on."""

    @wraps(method)
    def guarded(self: "PayloadFolder", *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except OSError as error:
            translated = _translate(error)
            if isinstance(translated, StorageDamagedError):
                self.damage = translated
            raise translated from error

    return cast("Method", guarded)


def _translate(error: OSError) -> Exception:
    if error.errno in _FULL:
        return StorageFullError()
    if error.errno == errno.EIO:
        return StorageDamagedError("the disk of the payload folder is damaged: restore a backup")
    said = error.strerror or type(error).__name__
    return StoreUnavailableError(f"the payload folder cannot be used: {said}")


class PayloadFolder:
    """Payload store in a folder; several processes of one machine may share it.

    Args:
        folder: Created with mode 0700 if it is missing.

    Raises:
        StoreUnavailableError: The folder cannot be created or read.
    """

    name: Final = FILES
    batch_bytes: Final = 0
    read_chunks: Final = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damage: StorageDamagedError | None = None
        self._open()
        self._place = FileIdentity(folder)

    @_domain_errors
    def _open(self) -> None:
        make_private_folder(self._folder)

    @_domain_errors
    def identity(self) -> str:
        """Return the name in the folder's marker file."""
        try:
            return (self._folder / MARKER).read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return ""

    @_domain_errors
    def adopt(self, identity: str) -> None:
        """Write the folder's marker file."""
        with suppress(FileExistsError), new_file(self._folder / MARKER, replace=False) as file:
            file.write(identity.encode())

    @_domain_errors
    def owner(self) -> str:
        """Return the content of the owner file with the largest number."""
        return self._latest_owner()[1]

    def _latest_owner(self) -> tuple[int, str]:
        for _attempt in range(
            2
        ):  # the latest may be deleted, as an earlier one, after it was listed
            paths = sorted(self._owner_files())
            if not paths:
                break
            with suppress(FileNotFoundError):
                text = paths[-1].read_text(encoding="ascii", errors="replace")
                return int(paths[-1].name.removeprefix(OWNER)), text
        return 0, ""

    def _owner_files(self) -> list[Path]:
        return [path for path in self._folder.glob(f"{OWNER}*") if _OWNER.fullmatch(path.name)]

    @_domain_errors
    def replace_owner(self, before: str, after: str) -> None:
        """Create the owner file with the next number, then delete the earlier ones.

        A second file of one name is refused, so that of two writers only one succeeds, and a writer that was frozen
        meanwhile replaces nothing: the largest number counts.
        """
        number, found = self._latest_owner()
        if found != before:
            return
        path = self._folder / f"{OWNER}{number + 1:012d}"
        try:
            with new_file(path, replace=False) as file:
                file.write(after.encode())
        except FileExistsError:
            return
        for earlier in self._owner_files():
            if earlier.name < path.name:
                earlier.unlink(missing_ok=True)

    def _whole(self, payload_id: str) -> Path:
        if _ID.fullmatch(payload_id) is None:
            raise ValueError(f"payload id: got {payload_id!r}")
        return self._folder / payload_id

    def _partial(self, payload_id: str) -> Path:
        return self._whole(payload_id).with_suffix(PARTIAL)

    @_domain_errors
    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        """Write consecutive chunks; of a payload that is not whole yet, `complete` makes them durable.

        They are on their way to the disk when this returns, and those of earlier calls have arrived: a slow disk slows
        the upload, not its end, and a commit of the database does not wait for more than one batch.
        """
        path, is_whole = self._partial(payload_id), self._whole(payload_id).exists()
        if is_whole:
            path = self._whole(payload_id)
        with _opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
            before = os.fstat(descriptor).st_size
            start = first_index * CHUNK_BYTES
            try:
                end = _write(descriptor, chunks, start)
                if is_whole or not write_back(descriptor, start, end):
                    os.fdatasync(descriptor)
            except OSError:
                with suppress(OSError):  # half a chunk is of no use
                    os.ftruncate(descriptor, before)
                raise
        self._place.require()

    @_domain_errors
    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Synchronize the file, give it its final name, and synchronize the folder."""
        path = self._partial(payload_id)
        with suppress(FileNotFoundError), _opened(path, os.O_RDWR) as descriptor:
            _require_size(descriptor, size_bytes)
            os.fsync(descriptor)
            path.rename(self._whole(payload_id))
        try:
            with _opened(self._whole(payload_id), os.O_RDONLY) as descriptor:
                _require_size(descriptor, size_bytes)
        except FileNotFoundError:
            raise ConflictError("chunks of the upload are missing; send it again") from None
        synchronize_folder(self._folder)
        self._place.require()

    @_domain_errors
    def has_every_byte(self, payload_id: str, size_bytes: int) -> bool:
        """Return whether a completed payload is there in its full size; cheap enough for a transaction."""
        try:
            return self._whole(payload_id).stat().st_size == size_bytes
        except FileNotFoundError:
            return False

    @_domain_errors
    def truncate(self, payload_id: str, count: int) -> None:
        """Shorten the file."""
        with suppress(FileNotFoundError):
            self._whole(payload_id).rename(self._partial(payload_id))
        with suppress(FileNotFoundError), _opened(self._partial(payload_id), os.O_WRONLY) as file:
            size = min(os.fstat(file).st_size, count * CHUNK_BYTES)
            os.ftruncate(file, size)

    @_domain_errors
    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order."""
        chunks: list[bytes] = []
        with suppress(FileNotFoundError), self._reading(payload_id) as descriptor:
            for index in range(first_index, first_index + count):
                chunk = os.pread(descriptor, CHUNK_BYTES, index * CHUNK_BYTES)
                if not chunk:
                    break
                chunks.append(chunk)
        return chunks

    @contextmanager
    def _reading(self, payload_id: str) -> Iterator[int]:
        """Open a payload's file, under whichever name it has."""
        whole, partial = self._whole(payload_id), self._partial(payload_id)
        for path in (whole, partial):
            with suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as descriptor:
                yield descriptor
                return
        with _opened(whole, os.O_RDONLY) as descriptor:  # renamed in between
            yield descriptor

    def forget(self, payload_id: str) -> None:
        """Free the page cache of a payload, whose pages the next uploads then get.

        New pages cost several times as much as used ones in a virtual machine, whose host has to provide them. Pages
        that are not on the disk yet stay.
        """
        with suppress(OSError), self._reading(payload_id) as descriptor:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @_domain_errors
    def stored_count(self, payload_id: str) -> int:
        """Return the number of chunks that the length of the file comes to."""
        for path in (self._whole(payload_id), self._partial(payload_id), self._whole(payload_id)):
            with suppress(FileNotFoundError):
                return -(-path.stat().st_size // CHUNK_BYTES)
        return 0

    @_domain_errors
    def payload_ids(self) -> list[str]:
        """Return the ids of all payloads, unfinished ones included."""
        with os.scandir(self._folder) as entries:
            names = {entry.name.removesuffix(PARTIAL) for entry in entries}
        return sorted(name for name in names if name != MARKER and _ID.fullmatch(name))

    @_domain_errors
    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete the files of payloads."""
        for payload_id in payload_ids:
            self._partial(payload_id).unlink(missing_ok=True)
            self._whole(payload_id).unlink(missing_ok=True)

    @_domain_errors
    def size_bytes(self) -> int:
        """Return the size of all files."""
        total = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def check(self) -> None:
        """Check that the folder is still in its place and that its disk has reported no damage.

        Raises:
            StorageDamagedError: The disk has reported an error since the process started.
            StoreUnavailableError: The folder was deleted, replaced or unmounted.
        """
        if self.damage is not None:
            raise self.damage
        self._place.require()

    def close(self) -> None:
        """Do nothing: no file stays open between calls."""


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, chunks: Sequence[BytesLike], offset: int) -> int:
    """Write all chunks, however few bytes the system takes at a time; return the offset after the last."""
    left = [memoryview(chunk) for chunk in chunks]
    while left:
        written = os.pwritev(descriptor, left[:_MAX_VECTOR], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
    return offset


def _require_size(descriptor: int, size_bytes: int) -> None:
    if os.fstat(descriptor).st_size != size_bytes:
        raise ConflictError("chunks of the upload are missing; send it again")
