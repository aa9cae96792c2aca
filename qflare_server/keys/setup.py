"""First-time setup of keys, and bootstrap bundles for devices.

`initialize` generates root keys, online keys, their passphrases and the first trust documents; `ensure_initialized`
does so if a configuration has none. Key rotation is in `qflare_server.keys.rotation`.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from qflare.crypto.envelope import MAX_SIGNATURE_COUNT
from qflare.crypto.signing import ONLINE_ALGORITHMS, Algorithm, algorithm_named
from qflare.files import make_private_folder, synchronize_folder
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.ring import ROLES, SIGNING_ROLES, KeyRing
from qflare_server.keys.secret_files import KeyStoreError, write_secret
from qflare_server.keys.trust_documents import (
    KEYSET_LIFETIME,
    ROOT_LIFETIME,
    Trust,
    draft_root,
    sign_document,
)
from qflare_server.keys.trust_documents import draft_keyset as draft
from qflare_server.keys.trust_store import require_no_published_root

DEFAULT_ONLINE: Final = "ml-dsa-65"
DEFAULT_ROOT: Final = "ml-dsa-87"


@dataclass(frozen=True)
class SetupOptions:
    """Parameters of the first keys.

    Attributes:
        algorithm: Algorithm of the online signature keys, one of `ONLINE_ALGORITHMS`.
        root_algorithm: Algorithm of the root keys, any.
        root_count: Number of root keys, 1 to 8.
        threshold: Number of required root signatures.
        keyset_lifetime: Lifetime of the first keyset.
        root_lifetime: Lifetime of the root document.
    """

    algorithm: Algorithm = Algorithm.ML_DSA_65
    root_algorithm: Algorithm = Algorithm.ML_DSA_87
    root_count: int = 1
    threshold: int = 1
    keyset_lifetime: timedelta = KEYSET_LIFETIME
    root_lifetime: timedelta = ROOT_LIFETIME

    def __post_init__(self) -> None:
        most = MAX_SIGNATURE_COUNT // 2  # previous and next keys sign the same document
        if not 1 <= self.threshold <= self.root_count <= most:
            raise KeyStoreError(
                f"got threshold {self.threshold} of {self.root_count} root keys, want 1 to all of at most {most}"
            )
        if self.algorithm not in ONLINE_ALGORITHMS:
            raise KeyStoreError(f"{self.algorithm.name} signs too slowly for online keys")

    @classmethod
    def from_config(
        cls, config: ServerConfig, root_count: int = 1, threshold: int = 1
    ) -> "SetupOptions":
        """Return the options of a configuration.

        Raises:
            KeyStoreError: The threshold is out of range.
        """
        return cls(
            algorithm_named(config.online_algorithm or DEFAULT_ONLINE),
            algorithm_named(config.root_algorithm or DEFAULT_ROOT),
            root_count,
            threshold,
        )


def initialize(
    folder: KeyFolder, realm: str, at: datetime, options: SetupOptions | None = None
) -> Trust:
    """Generate root keys, online keys, missing passphrases and the first trust documents.

    The folder is created atomically; of two concurrent processes, one succeeds.

    Args:
        folder: Key folder; its directory does not exist or is empty.
        realm: Name of the deployment.
        at: The time.
        options: Algorithms and lifetimes; None means the defaults.

    Returns:
        The documents, not yet in any database: a coordinator publishes them when it loads the keys.

    Raises:
        KeyStoreError: Keys exist already, or the folder cannot be written.
    """
    chosen = options or SetupOptions()
    present = [file.path for file in folder.root_files if file.path.exists()]
    if present:
        raise KeyStoreError(f"{present[0]} is there already")
    root = KeyRing.generate_root(realm, chosen.root_count, chosen.root_algorithm)
    module = folder.signing_hardware
    roles = ROLES if module is None else (security_pb2.KEY_ROLE_SESSION_KEM,)
    online = KeyRing.generate_online(realm, chosen.algorithm, roles)
    if module is not None:
        for role in SIGNING_ROLES:
            module.generate(role, chosen.algorithm)
    trust = _first_trust(root, folder.provider(online).public(), at, chosen)
    data = trust.bundle().SerializeToString(deterministic=True)
    try:
        make_private_folder(folder.directory.parent)
        name = tempfile.mkdtemp(prefix=f".{folder.directory.name}.", dir=folder.directory.parent)
    except OSError as error:
        raise KeyStoreError(f"cannot write {folder.directory}: {error.strerror}") from error
    made = Path(name)
    with _held(made):
        try:
            _fill(replace(folder, directory=made), root, replace(online, bundle=data))
            _put_in_place(made, folder.directory)
        except KeyStoreError:
            shutil.rmtree(made)
            for file in folder.root_files:
                file.path.unlink(missing_ok=True)
            raise
    return trust


@contextmanager
def _held(folder: Path, *, waiting: bool = True) -> Iterator[None]:
    """Lock a folder while it is filled; the system releases the lock when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(directory: Path) -> None:
    """Delete temporary folders of killed starts beside a key folder; a running start locks its own."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        with suppress(OSError), _held(left, waiting=False):
            shutil.rmtree(left)


def ensure_initialized(
    config: ServerConfig,
    *,
    options: SetupOptions | None = None,
    folder: KeyFolder | None = None,
) -> bool:
    """Generate keys if a configuration has none yet.

    Args:
        config: Configuration with locations and algorithms.
        options: Algorithms and lifetimes; None means the configuration's.
        folder: Folder for the keys; None means the configuration's folder.

    Returns:
        Whether keys were generated; False if keys exist, also if another process just created them.

    Raises:
        KeyStoreError: They cannot be written, or the database belongs to other keys.
        StoreUnavailableError: The database cannot be reached.
    """
    folder = folder or KeyFolder.from_config(config)
    remove_abandoned(folder.directory)
    if not folder.is_empty():
        return False
    try:
        require_no_published_root(config, folder.directory)
        initialize(
            folder, config.realm, datetime.now(UTC), options or SetupOptions.from_config(config)
        )
    except KeyStoreError:
        if folder.is_empty():
            raise
        return False
    return True


def bootstrap_bundle(
    trust: Trust,
    address: str,
    *,
    enrollment_token: str = "",
    certificate_authorities: str = "",
    helper_key_ids: Collection[str] = (),
) -> security_pb2.BootstrapBundle:
    """Return the bootstrap bundle of a device; a secret if it contains a token."""
    return security_pb2.BootstrapBundle(
        realm=trust.keyset.realm,
        address=address,
        root_key_ids=trust.root_key_ids(),
        threshold=trust.first_threshold(),
        enrollment_token=enrollment_token,
        certificate_authorities=certificate_authorities,
        helper_key_ids=sorted(helper_key_ids),
    )


def write_bootstrap(path: Path, bundle: security_pb2.BootstrapBundle) -> None:
    """Write a bootstrap bundle as JSON to an owner-only file.

    Raises:
        KeyStoreError: The file exists, or cannot be written.
    """
    write_secret(path, json_format.MessageToJson(bundle).encode() + b"\n")


def _first_trust(
    root: KeyRing, online: Sequence[security_pb2.RoleKey], at: datetime, options: SetupOptions
) -> Trust:
    signers = root.signing_keys()
    document = draft_root(
        root.realm,
        1,
        [key.public for key in signers],
        options.threshold,
        at,
        options.root_lifetime,
    )
    keyset = draft(root.realm, 1, 1, online, at, options.keyset_lifetime)
    envelopes = [sign_document(document, signers)]
    return Trust.follow(root.realm, envelopes, sign_document(keyset, signers))


def _fill(folder: KeyFolder, root: KeyRing, online: KeyRing) -> None:
    folder.make_passphrase()
    folder.write_root(root, replace=False)
    folder.write_online(online, replace=False)


def _put_in_place(made: Path, directory: Path) -> None:
    """Rename a filled folder into place; the system refuses if the target is not empty."""
    try:
        made.rename(directory)
    except OSError as error:
        raise KeyStoreError(f"{directory} holds keys already, or other files") from error
    synchronize_folder(directory.parent)
