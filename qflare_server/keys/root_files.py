"""Files of root keys: one key in each, each under a passphrase of its own, so that they can be kept apart.

Where a threshold of root keys has to sign, no file signs alone. A file with several keys, all under one passphrase, is
read as well.
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
        passphrase_file: File with its passphrase; None means beside it, with the suffix ``.passphrase``.
    """

    path: Path
    passphrase_file: Path | None = None

    @property
    def passphrase(self) -> Path:
        """File with its passphrase."""
        return self.passphrase_file or self.path.with_suffix(".passphrase")

    def read(self) -> KeyRing:
        """Read and test what is in it.

        Raises:
            KeyStoreError: It is missing, unreadable, accessible to other users, or altered.
        """
        secret = decrypt_secret(read_secret(self.path), read_passphrase(self.passphrase))
        return KeyRing.from_bytes(secret)

    def write(self, ring: KeyRing, cost: Cost = DEFAULT_COST, *, replace: bool = False) -> None:
        """Write keys, under a random passphrase where there is none.

        Raises:
            KeyStoreError: It cannot be written, or is there already.
        """
        if not self.passphrase.exists():
            write_secret(self.passphrase, random_passphrase() + b"\n")
        secret = encrypt_secret(ring.to_bytes(), read_passphrase(self.passphrase), cost)
        write_secret(self.path, secret, replace=replace)


def numbered(directory: Path, count: int) -> list[RootFile]:
    """Return the files of a folder for root keys: ``root.key``, or ``root-1.key`` and so on for several."""
    if count == 1:
        return [RootFile(directory / f"{ROOT}.key")]
    return [RootFile(directory / f"{ROOT}-{number}.key") for number in range(1, count + 1)]


def found_in(directory: Path) -> list[RootFile]:
    """Return the files of root keys that a folder holds."""
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
    """Read the root keys of files together.

    Raises:
        KeyStoreError: One cannot be read, they are of several realms, or a key is there twice.
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
    """Write each key of a ring to a file of its own.

    Raises:
        KeyStoreError: There are not as many files as keys, or one cannot be written; those before it then stay.
    """
    if len(files) != len(ring.keys):
        raise KeyStoreError(f"got {len(files)} places for root keys, want {len(ring.keys)}")
    for file, entry in zip(files, ring.keys, strict=True):
        make_private_folder(file.path.parent)
        file.write(KeyRing(ring.realm, (entry,), b""), cost, replace=replace)
