"""The folder in which a device keeps its keys and what it has learnt to trust.

Two kinds of files: *secrets* (bytes) and *documents* (JSON). Both are written atomically: to a
temporary file that only the owner can read, synchronised, renamed, and the folder synchronised, so that
after a crash a file is the earlier or the later one, whole. A passphrase encrypts the secrets.

Invariants: one process at a time (an advisory lock that ends with the process); a secret that others may
read is refused, as is a folder that others may write.

What it does not do: know what the files mean (see `qflare_client.keystore.identity`), or wipe anything from memory.
"""

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qflare_client.errors import KeyStoreError, KeyStoreLockedError

_LOCK = "lock"
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
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_mode(home, _OTHERS_WRITE)
            self._lock = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KeyStoreError(f"key store {home}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise KeyStoreLockedError(f"key store {home} is in use by another process") from None

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
            os.close(self._lock)
            self._lock = -1

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
        _write(self.home / name, self._coding.encode(secret))

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
        _write(self.home / name, json.dumps(document, indent=1, sort_keys=True).encode())

    def rename(self, name: str, following: str) -> None:
        """Give a secret or document another name, durably and at once; what has that name is replaced.

        Raises:
            KeyStoreError: There is none of this name, or it cannot be renamed.
        """
        try:
            (self.home / name).replace(self.home / following)
            _synchronise_folder(self.home)
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a secret or document, if there is one of this name.

        Raises:
            KeyStoreError: It cannot be deleted.
        """
        try:
            (self.home / name).unlink(missing_ok=True)
        except OSError as error:
            raise KeyStoreError(f"key store {self.home}: {error}") from error


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


def _write(path: Path, data: bytes) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:  # mkstemp makes it 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _synchronise_folder(path.parent)
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error}") from error


def _synchronise_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_mode(path: Path, forbidden: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & forbidden:
        wanted = mode & ~forbidden
        raise KeyStoreError(
            f"{path} has mode {mode:04o} and is open to others; want {wanted:04o} or less"
        )
