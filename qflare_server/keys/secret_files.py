"""Secret files: passphrase-encrypted secrets, and passphrases.

A file is ``magic (5) || iterations (4) || memory in KiB (4) || lanes (4) || salt (16)``, the header, and then
``nonce (12) || ciphertext || tag (16)`` of AES-256-GCM under the key that Argon2id derives from passphrase and header,
with the header as associated data.

Invariants: a secret is written to an owner-only temporary file, synchronized and renamed into place, so that after a
crash the file is either the old or the new one, complete. A secret that group or others can read or write, or that
belongs to another user, is refused. A secret owned by root may be group-readable.

Secrets are not wiped from memory; Python has no reliable way to do so.

Source: RFC 9106 section 4, second recommended option, for the cost.
"""

import os
import secrets
import stat
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from qflare.crypto.symmetric import SECRET_BYTES, UnsealError, decrypt, encrypt
from qflare.files import new_file

_MAGIC: Final = b"QFSF\x01"
_COST: Final = struct.Struct(">III")
_SALT_BYTES: Final = 16
_HEADER_BYTES: Final = len(_MAGIC) + _COST.size + _SALT_BYTES
_MAX_FILE_BYTES: Final = 2**20
_ROOT_USER: Final = 0
_ONE_AT_A_TIME: Final = threading.Lock()


class KeyStoreError(Exception):
    """The coordinator's keys cannot be read, written or trusted. Never sent over the wire.

    Args:
        message: The fault.
        remedy: Specific advice; empty means that of the error class.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = (
            remedy or "docs/deploy/keys.md, which says where keys are and who may read them"
        )


class OutOfMemoryError(KeyStoreError):
    """A key cannot be derived from its passphrase for lack of memory; a later attempt may succeed."""


@dataclass(frozen=True)
class Cost:
    """Argon2id cost parameters.

    Attributes:
        iterations: Passes over the memory, 1 to 64.
        memory_kib: Memory in KiB, 32 to 1,048,576.
        lanes: Parallel lanes, 1 to 16.
    """

    iterations: int = 3
    memory_kib: int = 65_536
    lanes: int = 4

    def checked(self) -> "Cost":
        """Return this cost if it is in range.

        Raises:
            KeyStoreError: It is out of range; a file must not be able to ask for all memory.
        """
        ranges = ((self.iterations, 1, 64), (self.memory_kib, 32, 2**20), (self.lanes, 1, 16))
        if not all(least <= value <= most for value, least, most in ranges):
            raise KeyStoreError("key file: cost of its passphrase is out of range")
        return self

    def key(self, passphrase: bytes, salt: bytes) -> bytes:
        """Derive the key of a file, 32 bytes; takes a quarter of a second by default.

        Derivations of a process follow each other, so that their memory is that of one.

        Raises:
            OutOfMemoryError: There is no memory for it now.
        """
        function = Argon2id(
            salt=salt,
            length=SECRET_BYTES,
            iterations=self.iterations,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        )
        with _ONE_AT_A_TIME:
            try:
                return function.derive(passphrase)
            except MemoryError as error:
                raise OutOfMemoryError(
                    f"no memory for the passphrase of a key file: it takes {self.memory_kib} KiB",
                    remedy="more memory for this process",
                ) from error


DEFAULT_COST: Final = Cost()
"""Default cost of written files."""


def encrypt_secret(secret: bytes, passphrase: bytes, cost: Cost = DEFAULT_COST) -> bytes:
    """Return the bytes of an encrypted file.

    Raises:
        KeyStoreError: The passphrase is empty, or the cost out of range.
    """
    if not passphrase:
        raise KeyStoreError("the passphrase is empty")
    salt = os.urandom(_SALT_BYTES)
    numbers = _COST.pack(cost.checked().iterations, cost.memory_kib, cost.lanes)
    header = _MAGIC + numbers + salt
    return header + encrypt(cost.key(passphrase, salt), secret, header)


def decrypt_secret(data: bytes, passphrase: bytes) -> bytes:
    """Decrypt the output of `encrypt_secret`.

    Raises:
        KeyStoreError: The data is not a key file or was changed, or the passphrase is wrong.
    """
    header, rest = data[:_HEADER_BYTES], data[_HEADER_BYTES:]
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise KeyStoreError("not a key file")
    cost = Cost(*_COST.unpack_from(header, len(_MAGIC))).checked()
    key = cost.key(passphrase, header[-_SALT_BYTES:])
    try:
        return decrypt(key, rest, header)
    except UnsealError as error:
        raise KeyStoreError(
            "key file: wrong passphrase, or it was changed",
            remedy="the passphrase that belongs to this file, or the file from a backup",
        ) from error


def read_secret(path: Path) -> bytes:
    """Read an owner-only file.

    Raises:
        KeyStoreError: It cannot be read, is too long, or is accessible to other users.
    """
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyStoreError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise KeyStoreError(f"{path} is longer than {_MAX_FILE_BYTES} bytes")
    return data


def read_passphrase(path: Path) -> bytes:
    """Read a passphrase: the first line of an owner-only file.

    Raises:
        KeyStoreError: As `read_secret`, or it is empty.
    """
    passphrase = read_secret(path).split(b"\n", 1)[0].rstrip(b"\r")
    if not passphrase:
        raise KeyStoreError(f"{path} holds no passphrase")
    return passphrase


def random_passphrase() -> bytes:
    """Return a random passphrase, 43 characters."""
    return secrets.token_urlsafe(SECRET_BYTES).encode()


def write_secret(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write an owner-only file atomically.

    Args:
        path: Path of the file; its folder exists.
        data: Content.
        replace: Replace an existing file; otherwise an existing file is an error.

    Raises:
        KeyStoreError: The file exists, or cannot be written.
    """
    try:
        with new_file(path, replace=replace) as file:
            file.write(data)
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from error


def _check_owner(path: Path, found: os.stat_result) -> None:
    mode, user = stat.S_IMODE(found.st_mode), os.geteuid()
    if mode & forbidden_bits(found.st_uid, user):
        raise KeyStoreError(
            f"{path} has mode {mode:04o} and is open to others; want 0600",
            remedy=f"chmod 600 {path}",
        )
    if found.st_uid not in {user, _ROOT_USER}:
        raise KeyStoreError(f"{path} belongs to another user", remedy=f"chown it: {path}")


def forbidden_bits(owner: int, user: int) -> int:
    """Return the permission bits that a secret file must not have, given its owner and the reading user.

    Orchestrators mount secrets as root-owned files, readable by the group of an unprivileged process. No other file may
    be accessible to a group.
    """
    mounted = owner == _ROOT_USER and user != _ROOT_USER
    return stat.S_IRWXO | stat.S_IRWXG & ~(stat.S_IRGRP if mounted else 0)
