"""The folder in which a device keeps its keys and what it has learnt to trust.

Three kinds of files: *secrets* (bytes), *documents* (JSON), and *bulk*, a secret followed by bytes of any length that
it opens. All are written atomically: to a temporary file that only the owner can read, synchronized, renamed, and
the folder synchronized, so that after a crash a file is the earlier or the later one, whole. A passphrase encrypts the
secrets.

Invariants: one process at a time (an advisory lock that ends with the process, whatever it has forked); a secret that
others may read is refused, as is a folder that others may write; a store that is closed writes nothing.

What it does not do: know what the files mean (see `qflare_client.keystore.identity`), or wipe anything from memory.
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
    """How secrets are stored."""

    encode: Callable[[bytes], bytes]
    """From a secret to the bytes of its file."""

    decode: Callable[[bytes], bytes]
    """The way back; raises `WrongPassphraseError`."""


PLAIN = SecretCoding(bytes, bytes)
"""Secrets are stored as they are, protected by the permissions of their files only."""


class KeyStore:
    """An open, locked key store.

    Args:
        home: Folder; made, for the owner only, when it does not exist.
        coding: How secrets are stored.

    Raises:
        KeyStoreLockedError: Another process uses it, or another part of this one.
        KeyStoreError: It cannot be used, or others may write into it.
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

    def close(self) -> None:
        """Give the lock back. May be called more than once."""
        if self._lock >= 0:
            # Closing alone would leave the lock to a process that was forked behind Python's back.
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._let_go()

    def _let_go(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def leave_to_parent(self) -> None:
        """Let go of the lock in a process that was forked: it belongs to the one that opened the store."""
        if self._lock >= 0:
            self._let_go()
            self._was_forked = True

    def _require_open(self) -> None:
        if self._was_forked:
            raise ForkedError
        if self._lock < 0:
            raise KeyStoreError(f"key store {self.home} is closed")

    def read_secret(self, name: str) -> bytes | None:
        """Return a secret; None when there is none of this name.

        Raises:
            WrongPassphraseError: It cannot be opened.
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
        """Store a secret and what it opens, durably; memory is that of one piece.

        Args:
            name: Of the file.
            secret: Stored as secrets are.
            bulk: Pieces of any size, stored as they are: encrypted under a key in the secret.

        Raises:
            KeyStoreError: They cannot be written.
        """
        self._require_open()
        coded = self._coding.encode(secret)
        _write(self.home / name, chain((_LENGTH.pack(len(coded)), coded), bulk))

    def open_bulk(self, name: str) -> tuple[bytes, BinaryIO] | None:
        """Return a secret, and an open file that stands at the first byte of what it opens; None when there is none.

        Raises:
            WrongPassphraseError: The secret cannot be opened.
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
        """Return the names of the files that begin with a prefix, in order.

        Raises:
            KeyStoreError: The folder cannot be read.
        """
        try:
            return sorted(path.name for path in self.home.glob(f"{prefix}*") if path.is_file())
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error

    def read_document(self, name: str) -> dict[str, Any]:
        """Return a document; empty when there is none of this name.

        Raises:
            KeyStoreError: It cannot be read or is no JSON object.
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
        """Give a secret or document another name, durably and at once; what has that name is replaced.

        Raises:
            KeyStoreError: There is none of this name, or it cannot be renamed.
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


# A worker of a data loader would otherwise hold the lock for as long as it lives, also when its parent has died.
os.register_at_fork(after_in_child=_leave_all_to_parent)


def read_document(home: Path, name: str) -> dict[str, Any]:
    """Return a document of a key store that may be in use; empty when there is none.

    Raises:
        KeyStoreError: It cannot be read or is no JSON object.
    """
    data = _read(home / name)
    if data is None:
        return {}
    try:
        document = json.loads(data)
    except ValueError as error:
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
    """Read the secret at the head of a bulk file, as it is stored."""
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
