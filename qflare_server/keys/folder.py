"""The folder of a coordinator's keys.

::

    online.key          online keys; every replica has a copy
    online.passphrase   its passphrase, unless stored elsewhere
    root.key            offline root key; `serve` never reads it, so it can be moved away
    root.passphrase     its passphrase, likewise
    root-1.key ...      several root keys: one file and one passphrase each

A hardware module (`qflare_server.keys.hardware`) encrypts the passphrase of the online keys and may hold the signature
keys.

Key selection is in `qflare_server.keys.setup`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qflare_server.config import ServerConfig
from qflare_server.keys.hardware import Hardware, open_module, provider_of
from qflare_server.keys.ring import KeyProvider, KeyRing
from qflare_server.keys.root_files import (
    ROOT,
    RootFile,
    found_in,
    given,
    numbered,
    read_all,
    write_each,
)
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

ONLINE: Final = "online"


def key_directory(config: ServerConfig) -> Path:
    """Return the key folder's path of a configuration."""
    return config.key_dir or config.data_dir / "keys"


@dataclass(frozen=True)
class KeyFolder:
    """Locations of keys and passphrases.

    Attributes:
        directory: The folder.
        passphrase_file: Passphrase of the online keys; None means beside them.
        root_directory: Folder of the root keys; None means the same folder.
        root_passphrase_files: Passphrases of the root keys in the root folder, in their order; empty means beside them.
        root_files: Root key files in separate places; empty means those in the root folder.
        cost: Cost of written files.
        hardware: Encrypts the online passphrase, and may hold the signature keys; None means no module.
    """

    directory: Path
    passphrase_file: Path | None = None
    root_directory: Path | None = None
    root_passphrase_files: tuple[Path, ...] = ()
    root_files: tuple[RootFile, ...] = ()
    cost: Cost = DEFAULT_COST
    hardware: Hardware | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> "KeyFolder":
        """Return the key folder of a configuration, with its hardware module.

        Raises:
            KeyStoreError: The module cannot be opened.
        """
        hardware = None
        if config.pkcs11_module is not None and config.pkcs11_pin_file is not None:
            hardware = open_module(
                config.pkcs11_module,
                config.pkcs11_token,
                config.pkcs11_pin_file,
                signs=config.pkcs11_signing,
            )
        return cls(key_directory(config), config.key_passphrase_file, hardware=hardware)

    @property
    def signing_hardware(self) -> Hardware | None:
        """The module, if it holds the signature keys."""
        return self.hardware if self.hardware is not None and self.hardware.signs else None

    def provider(self, ring: KeyRing) -> KeyProvider:
        """Return the provider that signs and decapsulates: the file's online keys and the module's."""
        return provider_of(ring, self.signing_hardware)

    @property
    def online_file(self) -> Path:
        """File of the online keys."""
        return self.directory / f"{ONLINE}.key"

    @property
    def root_file(self) -> Path:
        """File of the root keys."""
        return self._root_folder / f"{ROOT}.key"

    @property
    def _root_folder(self) -> Path:
        return self.root_directory or self.directory

    @property
    def online_passphrase_file(self) -> Path:
        """File of the passphrase of the online keys."""
        return self.passphrase_file or self.online_file.with_suffix(".passphrase")

    def is_empty(self) -> bool:
        """Whether there are no online keys."""
        return not self.online_file.exists()

    def read_online(self) -> KeyRing:
        """Read and test the online keys.

        Raises:
            KeyStoreError: They are missing, unreadable, accessible to other users, or altered.
        """
        if self.is_empty():
            raise KeyStoreError(
                f"no keys in {self.directory}: run qflare-server init",
                remedy="qflare-server init, or QFLARE_KEY_DIR or --data-dir if the keys are elsewhere",
            )
        return _read(self.online_file, self._online_passphrase())

    def root_places(self, count: int) -> list[RootFile]:
        """Return the paths for a number of root keys, one per file."""
        return list(self.root_files) or self._with_passphrases(numbered(self._root_folder, count))

    def held_root_files(self) -> list[RootFile]:
        """Return the root key files present."""
        return list(self.root_files) or self._with_passphrases(found_in(self._root_folder))

    def _with_passphrases(self, files: Sequence[RootFile]) -> list[RootFile]:
        return list(given([file.path for file in files], self.root_passphrase_files))

    def read_root(self) -> KeyRing:
        """Read and self-test the root keys of all files present.

        Raises:
            KeyStoreError: As `read_online`.
        """
        held = self.held_root_files()
        if not held:
            raise KeyStoreError(
                f"{self.root_file} is not here: bring it back, or let the machine that has it sign"
                " (qflare-server keys prepare, draft, sign, publish)"
            )
        return read_all(held)

    def write_online(self, ring: KeyRing, *, replace: bool = True) -> None:
        """Write the online keys.

        Raises:
            KeyStoreError: They cannot be written.
        """
        passphrase = self._online_passphrase()
        write_secret(
            self.online_file,
            encrypt_secret(ring.to_bytes(), passphrase, self.cost),
            replace=replace,
        )

    def write_root(self, ring: KeyRing, *, replace: bool = True) -> None:
        """Write each root key to a separate file, under its existing passphrase or a new random one.

        Raises:
            KeyStoreError: They cannot be written.
        """
        write_each(ring, self.root_places(len(ring.keys)), self.cost, replace=replace)

    def make_passphrase(self) -> None:
        """Write a random passphrase for the online keys if none exists.

        Raises:
            KeyStoreError: They cannot be written.
        """
        if not self.online_passphrase_file.exists():
            passphrase = random_passphrase()
            if self.hardware is not None:
                passphrase = self.hardware.wrap(passphrase).hex().encode()
            write_secret(self.online_passphrase_file, passphrase + b"\n")

    def _online_passphrase(self) -> bytes:
        stored = read_passphrase(self.online_passphrase_file)
        if self.hardware is None:
            return stored
        try:
            return self.hardware.unwrap(bytes.fromhex(stored.decode()))
        except ValueError as error:
            raise KeyStoreError(
                f"{self.online_passphrase_file} was not encrypted by a PKCS#11 token"
            ) from error


def _read(path: Path, passphrase: bytes) -> KeyRing:
    return KeyRing.from_bytes(decrypt_secret(read_secret(path), passphrase))
