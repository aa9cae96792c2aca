"""Root key files: one key per file, each encrypted under a separate passphrase, so that they can be stored apart.

If a threshold of root keys is required, no single file can sign alone. Files with several keys under one passphrase are
readable too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qflare.files import make_private_folder
from qflare_server.keys.ring import KeyRing, key_ids
from qflare_server.keys.secret_files import (
    DEFAULT_COST,
    Cost,
    KeyStoreError,
    decrypt_secret,
    encrypt_secret,
    random_passphrase,
    read_passphrase,
    read_secret,
    write_secret,
)

ROOT: Final = "root"


@dataclass(frozen=True)
class RootFile:
    """Location of a root key.

    Attributes:
        path: Its file.
        passphrase_file: File with its passphrase; None means the key file's path with the suffix ``.passphrase``.
    """

    path: Path
    passphrase_file: Path | None = None

    @property
    def passphrase(self) -> Path:
        """File with its passphrase."""
        return self.passphrase_file or self.path.with_suffix(".passphrase")

    def read(self) -> KeyRing:
        """Read the keys of the file and self-test them.

        Raises:
            KeyStoreError: It is missing, unreadable, accessible to other users, or altered.
        """
        secret = decrypt_secret(read_secret(self.path), read_passphrase(self.passphrase))
        return KeyRing.from_bytes(secret)

    def write(self, ring: KeyRing, cost: Cost = DEFAULT_COST, *, replace: bool = False) -> None:
        """Write keys, encrypted under the existing passphrase or a new random one.

        Raises:
            KeyStoreError: The file exists, or cannot be written.
        """
        if not self.passphrase.exists():
            write_secret(self.passphrase, random_passphrase() + b"\n")
        secret = encrypt_secret(ring.to_bytes(), read_passphrase(self.passphrase), cost)
        write_secret(self.path, secret, replace=replace)


def numbered(directory: Path, count: int) -> list[RootFile]:
    """Return the paths of a folder's root keys: ``root.key``, or ``root-1.key`` and so on for several."""
    if count == 1:
        return [RootFile(directory / f"{ROOT}.key")]
    return [RootFile(directory / f"{ROOT}-{number}.key") for number in range(1, count + 1)]


def found_in(directory: Path) -> list[RootFile]:
    """Return the root key files in a folder."""
    paths = [directory / f"{ROOT}.key", *sorted(directory.glob(f"{ROOT}-*.key"))]
    return [RootFile(path) for path in paths if path.exists()]


def given(paths: Sequence[Path], passphrase_files: Sequence[Path] = ()) -> tuple[RootFile, ...]:
    """Return the named root key files, each with its passphrase file if given.

    Raises:
        KeyStoreError: There are more or fewer passphrases than files, or two files share one.
    """
    if not passphrase_files:
        return tuple(RootFile(path) for path in paths)
    if len(passphrase_files) != len(paths):
        raise KeyStoreError(
            f"got {len(passphrase_files)} files of passphrases, want {len(paths)}: one for each root key"
        )
    if len({path.resolve() for path in passphrase_files}) != len(paths):
        raise KeyStoreError("root keys share a file of a passphrase: want one for each")
    return tuple(map(RootFile, paths, passphrase_files))


def read_all(files: Sequence[RootFile]) -> KeyRing:
    """Read the root keys of several files into one ring.

    Raises:
        KeyStoreError: A file cannot be read, the realms differ, or a key occurs twice.
    """
    rings = [file.read() for file in files]
    if len({ring.realm for ring in rings}) != 1:
        raise KeyStoreError("root keys: want files of one realm")
    keys = tuple(entry for ring in rings for entry in ring.keys)
    if len(set(key_ids(keys))) != len(keys):
        raise KeyStoreError("root keys: a key is in two of the files")
    return KeyRing(rings[0].realm, keys, b"")


def write_each(
    ring: KeyRing, files: Sequence[RootFile], cost: Cost = DEFAULT_COST, *, replace: bool = False
) -> None:
    """Write each key of a ring to a separate file.

    Raises:
        KeyStoreError: The number of files is not that of keys, or a file cannot be written; earlier ones are kept.
    """
    if len(files) != len(ring.keys):
        raise KeyStoreError(f"got {len(files)} places for root keys, want {len(ring.keys)}")
    for file, entry in zip(files, ring.keys, strict=True):
        make_private_folder(file.path.parent)
        file.write(KeyRing(ring.realm, (entry,), b""), cost, replace=replace)
