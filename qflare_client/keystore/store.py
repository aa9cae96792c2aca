"""Key store: the folder with a device's keys and trust state.

There are three kinds of files: *secrets* (bytes), *documents* (JSON), and *bulk*, a secret followed by data of any
length that the secret decrypts. All are written atomically: to a temporary file readable by its owner only,
synchronized, renamed, and the folder synchronized. After a crash a file has either its old or its new content. A
passphrase encrypts the secrets.

Invariants: one process at a time (an advisory lock that ends with the process, even if it has forked); a secret
readable by others is refused, as is a folder writable by others; a closed store writes nothing.

It does not interpret the files (see `qflare_client.keystore.identity`) or wipe memory.
"""

import fcntl
import json
import os
import stat
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from qflare.files import make_private_folder, new_file, synchronize_folder
from qflare_client.errors import ForkedError, KeyStoreError, KeyStoreLockedError

_LOCK = "lock"
_LENGTH: Final = struct.Struct(">Q")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ANY = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class SecretCoding:
    """Encoding of secrets on disk."""

    encode: Callable[[bytes], bytes]
    """Encodes a secret for its file."""

    decode: Callable[[bytes], bytes]
    """Decodes the bytes of a file; raises `WrongPassphraseError`."""


PLAIN = SecretCoding(bytes, bytes)
"""Secrets are stored unencrypted, protected only by file permissions."""


class KeyStore:
    """An open, locked key store.

    Args:
        home: Folder; created with mode 0700 if it does not exist.
        coding: Encoding of secrets.

    Raises:
        KeyStoreLockedError: Another process, or another part of this one, uses the store.
        KeyStoreError: The store cannot be used, or others may write into it.
    """

    def __init__(self, home: Path, coding: SecretCoding = PLAIN) -> None:
        self.home = home
        self._coding = coding
        try:
            make_private_folder(home)
            _check_mode(home, _OTHERS_WRITE)
            self._lock = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KeyStoreError(f"key store {home}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise KeyStoreLockedError(f"key store {home} is in use by another process") from None
        self._was_forked = False
        _OPEN.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def place(self) -> int:
        """Number of the lock file in its file system: a copy, or a restored backup, of the folder has another one.

        Raises:
            KeyStoreError: The store is closed.
        """
        self._require_open()
        return os.fstat(self._lock).st_ino

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock >= 0:
            # Closing the file would not release the lock if the process was forked outside of Python.
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._close_lock()

    def _close_lock(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def leave_to_parent(self) -> None:
        """Close the lock in a forked process: it belongs to the process that opened the store."""
        if self._lock >= 0:
            self._close_lock()
            self._was_forked = True

    def _require_open(self) -> None:
        if self._was_forked:
            raise ForkedError
        if self._lock < 0:
            raise KeyStoreError(f"key store {self.home} is closed")

    def read_secret(self, name: str) -> bytes | None:
        """Return a secret; None if there is none of this name.

        Raises:
            WrongPassphraseError: It cannot be decrypted.
            KeyStoreError: It cannot be read, or others can read it.
        """
        path = self.home / name
        data = _read(path)
        if data is None:
            return None
        _check_mode(path, _OTHERS_ANY)
        return self._coding.decode(data)

    def write_secret(self, name: str, secret: bytes) -> None:
        """Store a secret durably.

        Raises:
            KeyStoreError: It cannot be written.
        """
        self._require_open()
        _write(self.home / name, [self._coding.encode(secret)])

    def write_bulk(self, name: str, secret: bytes, bulk: Iterable[bytes]) -> None:
        """Store a secret and the data that it decrypts, durably, with one piece in memory at a time.

        Args:
            name: File name.
            secret: Stored like any other secret.
            bulk: Pieces of any size, already encrypted under a key in the secret.

        Raises:
            KeyStoreError: They cannot be written.
        """
        self._require_open()
        coded = self._coding.encode(secret)
        _write(self.home / name, chain((_LENGTH.pack(len(coded)), coded), bulk))

    def open_bulk(self, name: str) -> tuple[bytes, BinaryIO] | None:
        """Return a secret, and an open file positioned at the first byte of its data; None if there is none.

        Raises:
            WrongPassphraseError: The secret cannot be decrypted.
            KeyStoreError: They cannot be read, or others can read them.
        """
        path = self.home / name
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KeyStoreError(f"cannot read {path}: {error}") from error
        try:
            _check_mode(path, _OTHERS_ANY)
            return self._coding.decode(_read_head(path, file)), file
        except BaseException:
            file.close()
            raise

    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of the files with a prefix.

        Raises:
            KeyStoreError: The folder cannot be read.
        """
        try:
            return sorted(path.name for path in self.home.glob(f"{prefix}*") if path.is_file())
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error

    def read_document(self, name: str) -> dict[str, Any]:
        """Return a document; empty if there is none of this name.

        Raises:
            KeyStoreError: It cannot be read or is not a JSON object.
        """
        return read_document(self.home, name)

    def write_document(self, name: str, document: Mapping[str, Any]) -> None:
        """Store a document durably.

        Raises:
            KeyStoreError: It cannot be written.
        """
        self._require_open()
        _write(self.home / name, [json.dumps(document, indent=1, sort_keys=True).encode()])

    def rename(self, name: str, following: str) -> None:
        """Rename a secret or document durably and atomically, replacing any file of that name.

        Raises:
            KeyStoreError: It does not exist or cannot be renamed.
        """
        self._require_open()
        try:
            (self.home / name).replace(self.home / following)
            synchronize_folder(self.home)
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a secret or document, if there is one of this name.

        Raises:
            KeyStoreError: It cannot be deleted.
        """
        self._require_open()
        try:
            (self.home / name).unlink(missing_ok=True)
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error


_OPEN: "weakref.WeakSet[KeyStore]" = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for store in list(_OPEN):
        store.leave_to_parent()


# A data-loader worker would otherwise hold the lock for its lifetime, even after its parent has exited.
os.register_at_fork(after_in_child=_leave_all_to_parent)


def read_document(home: Path, name: str) -> dict[str, Any]:
    """Return a document without locking the key store; empty if there is none.

    Raises:
        KeyStoreError: It cannot be read or is not a JSON object.
    """
    data = _read(home / name)
    if data is None:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KeyStoreError(f"{home / name} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise KeyStoreError(f"{home / name} is damaged: no JSON object")
    return document


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeyStoreError(f"cannot read {path}: {error}") from error


def _read_head(path: Path, file: BinaryIO) -> bytes:
    """Read the encoded secret at the start of a bulk file."""
    try:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
        if length > size - _LENGTH.size:
            raise KeyStoreError(f"{path} is damaged: it ends early")
        return file.read(length)
    except OSError as error:
        raise KeyStoreError(f"cannot read {path}: {error}") from error


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    try:
        with new_file(path) as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error}") from error


def _check_mode(path: Path, forbidden: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & forbidden:
        wanted = mode & ~forbidden
        raise KeyStoreError(
            f"{path} has mode {mode:04o} and is open to others; want {wanted:04o} or less"
        )
