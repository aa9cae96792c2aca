"""Key rotation of the coordinator.

Online keys are rotated in three steps; `rotate_online` combines them if the root keys are available:

1. `prepare_online` adds the next keys to the key file; copy it to every replica,
2. `draft_keyset` returns the keyset for the root to sign, `sign_document` signs it (on the machine with the root keys),
3. `publish_keyset` stores it in the database; replicas adopt it within seconds.

`replace_stolen` replaces them so that no key in a stolen key file stays valid.

`rotate_root` rotates the root keys: the next root document, signed by previous and next keys, and the keyset are
published together. Devices keep pinning the keys of the first document and follow the chain.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qflare.crypto.signing import Algorithm, algorithm_of
from qflare.crypto.symmetric import SECRET_BYTES
from qflare.v1 import security_pb2
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.renewal import find_renewals
from qflare_server.keys.ring import (
    ROLES,
    SIGNING_ROLES,
    KeyProvider,
    KeyRing,
    Role,
    generate,
    key_ids,
)
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.keys.setup import SetupOptions
from qflare_server.keys.trust_documents import (
    KEYSET_LIFETIME,
    Trust,
    draft_root,
    key_id_of,
    sign_document,
)
from qflare_server.keys.trust_documents import draft_keyset as draft
from qflare_server.keys.trust_store import publish, read_published, trust_from_bundle
from qflare_server.storage.database import Database

_EARLIER_STATE_KEYS: Final = 4  # kept to open stored payloads until these are rewrapped


def prepare_online(
    folder: KeyFolder,
    *,
    roles: Collection[Role] = ROLES,
    algorithm: Algorithm | None = None,
) -> list[str]:
    """Add keys for roles to the online key file and return their ids; they are not in use yet.

    Args:
        folder: The key folder.
        roles: Roles of the new keys.
        algorithm: Algorithm of the signature keys; None means that of the newest key of each role.

    Raises:
        KeyStoreError: The key file cannot be read or written.
    """
    ring = folder.read_online()
    module = folder.signing_hardware
    for_module = [role for role in SIGNING_ROLES if role in roles and module is not None]
    for_file = [role for role in ROLES if role in roles and role not in for_module]
    present = _algorithms(folder.provider(ring))
    chosen = {role: algorithm or present.get(role, Algorithm.ML_DSA_65) for role in ROLES}
    made = [module.generate(role, chosen[role]).key_id for role in for_module] if module else []
    added = tuple(generate(role, chosen[role]) for role in for_file)
    folder.write_online(replace(ring, keys=ring.keys + added))
    return key_ids(added) + made


def _algorithms(provider: KeyProvider) -> dict[Role, Algorithm]:
    """Return the algorithm of the newest signature key of each role."""
    return {
        key.role: algorithm_of(key.signature_key.algorithm)
        for key in provider.public()
        if key.HasField("signature_key")
    }


def draft_keyset(
    folder: KeyFolder,
    database: Database,
    at: datetime,
    *,
    without: Collection[str] = (),
    lifetime: timedelta = KEYSET_LIFETIME,
) -> security_pb2.Keyset:
    """Return the unsigned keyset that activates the prepared keys.

    Args:
        folder: Key folder with the prepared keys.
        database: Database with the keyset in force.
        at: The time.
        without: Ids of keys to stop accepting, such as stolen ones.
        lifetime: Lifetime of the keyset.

    Raises:
        KeyStoreError: The key file cannot be read, or the published documents are invalid.
    """
    ring = folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    return follow_keyset(folder.provider(ring), trust, trust.root.version, at, without, lifetime)


def publish_keyset(
    folder: KeyFolder,
    database: Database,
    keyset: security_pb2.SignedEnvelope,
    at: datetime,
    *,
    withdrawn: Collection[str] | None = None,
) -> Trust:
    """Publish a signed keyset and delete keys that it no longer names.

    Args:
        folder: The key folder.
        database: Database with the keyset in force.
        keyset: Signed by the root keys.
        at: The time.
        withdrawn: Ids of keys that count no longer; None if it is not known why keys are missing.

    Raises:
        KeyStoreError: It is not properly signed, or not newer than the one in force.
        ConflictError: Another process published at the same moment.
    """
    ring = folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    wanted = Trust.follow(ring.realm, trust.roots, keyset)
    return publish_trust(folder, database, trust, wanted, at, withdrawn=withdrawn)


def rotate_online(
    folder: KeyFolder,
    database: Database,
    at: datetime,
    *,
    without: Collection[str] = (),
    lifetime: timedelta = KEYSET_LIFETIME,
    algorithm: Algorithm | None = None,
) -> Trust:
    """Rotate the online keys; requires a threshold of root keys.

    Args:
        folder: The key folder.
        database: Database with the keyset in force.
        at: The time.
        without: Ids of keys to stop accepting.
        lifetime: Lifetime of the keyset.
        algorithm: Algorithm of the next signature keys; None means the current one.

    Raises:
        KeyStoreError: The keys cannot be read or written.
        ConflictError: Another process published at the same moment.
    """
    root, ring = folder.read_root(), folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    _require_threshold(root, trust)
    prepare_online(folder, algorithm=algorithm)
    keyset = draft_keyset(folder, database, at, without=without, lifetime=lifetime)
    signed = sign_document(keyset, root.signing_keys())
    return publish_keyset(folder, database, signed, at, withdrawn=without)


def replace_stolen(
    folder: KeyFolder, database: Database, at: datetime, *, algorithm: Algorithm | None = None
) -> Trust:
    """Replace every key in the online key file; none of the previous keys stays accepted.

    Coordinators adopt the keys within seconds, and the state key when they are restarted; until then, the
    holder of a stolen state key can complete other devices' handshakes. Every device has to log in again. Versions
    and tasks that the stolen keys signed no longer verify under the next keyset. The earlier state key stays in
    the file for the stored keys of sealed payloads, which coordinators rewrap after their restart.

    Raises:
        KeyStoreError: The keys cannot be read or written.
        ConflictError: Another process published at the same moment.
    """
    root, ring = folder.read_root(), folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    _require_threshold(root, trust)  # before anything is written
    held = folder.provider(ring).public()
    stolen = {key_id_of(key) for key in [*trust.keyset.keys, *held]}
    earlier = (ring.state_key, *ring.earlier_state_keys)[:_EARLIER_STATE_KEYS]
    replaced = replace(ring, state_key=os.urandom(SECRET_BYTES), earlier_state_keys=earlier)
    folder.write_online(replaced)
    return rotate_online(folder, database, at, without=stolen, algorithm=algorithm)


def _require_threshold(root: KeyRing, trust: Trust) -> None:
    """Refuse a rotation that the available root keys cannot complete."""
    if len(root.keys) < trust.root.threshold:
        raise KeyStoreError(
            f"got {len(root.keys)} root keys, want {trust.root.threshold}: bring them together, or let each"
            " holder sign (qflare-server keys prepare, draft, sign, publish)"
        )


def rotate_root(
    folder: KeyFolder,
    database: Database,
    at: datetime,
    options: SetupOptions | None = None,
) -> Trust:
    """Rotate the root keys: the next root document is signed by the previous and by the next keys.

    The files of the previous root keys are kept with the suffix ``.previous``, to be destroyed when the next ones are
    in a safe place. Where root keys are kept apart, see `qflare_server.keys.root_replacement`.

    Args:
        folder: The key folder.
        database: Database with the documents in force.
        at: The time.
        options: Parameters of the next keys; None means the current count, algorithm and threshold.

    Raises:
        KeyStoreError: The keys cannot be read or written.
        ConflictError: Another process published at the same moment.
    """
    previous, ring = folder.read_root(), folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    _require_threshold(previous, trust)
    chosen = options or as_before(trust)
    following = KeyRing.generate_root(ring.realm, chosen.root_count, chosen.root_algorithm)
    version = trust.root.version + 1
    document = draft_root(
        ring.realm,
        version,
        [key.public for key in following.signing_keys()],
        chosen.threshold,
        at,
        chosen.root_lifetime,
    )
    envelope = sign_document(document, previous.signing_keys() + following.signing_keys())
    keyset = follow_keyset(folder.provider(ring), trust, version, at, (), chosen.keyset_lifetime)
    signed = sign_document(keyset, following.signing_keys())
    wanted = Trust.follow(ring.realm, [*trust.roots, envelope], signed)
    _keep_previous(folder)
    folder.write_root(following)
    _remove_others(folder, len(following.keys))
    return publish_trust(folder, database, trust, wanted, at)


def as_before(trust: Trust) -> SetupOptions:
    """Return options with the current count, algorithm and threshold of root keys."""
    algorithm = algorithm_of(trust.root.keys[0].algorithm)
    return SetupOptions(
        root_algorithm=algorithm,
        root_count=len(trust.root.keys),
        threshold=trust.root.threshold,
    )


def follow_keyset(
    provider: KeyProvider,
    trust: Trust,
    root_version: int,
    at: datetime,
    without: Collection[str],
    lifetime: timedelta,
) -> security_pb2.Keyset:
    """Return the next keyset: the accepted keys, oldest first, followed by the other held keys."""
    accepted = list(reversed(trust.keyset.keys))
    known = {key_id_of(key) for key in accepted}
    added = [key for key in provider.public() if key_id_of(key) not in known]
    absent = set(without) - known - {key_id_of(key) for key in added}
    if absent:
        raise KeyStoreError(
            f"the keyset has no key {min(absent)}",
            remedy=f"one of {', '.join(sorted(known))}",
        )
    keys: Sequence[security_pb2.RoleKey] = [
        key for key in accepted + added if key_id_of(key) not in without
    ]
    return draft(trust.keyset.realm, trust.keyset.version + 1, root_version, keys, at, lifetime)


def publish_trust(
    folder: KeyFolder,
    database: Database,
    trust: Trust,
    wanted: Trust,
    at: datetime,
    *,
    withdrawn: Collection[str] | None = None,
) -> Trust:
    """Publish the documents that succeed those in force, and delete online keys that the keyset no longer names.

    What a key has signed that leaves with the keyset after this one is signed anew (`qflare_server.keys.renewal`).

    Raises:
        KeyStoreError: The keyset is not the next one, or another is published under its version.
        ConflictError: Another process published at the same moment.
    """
    if wanted.keyset.version != trust.keyset.version + 1:
        raise KeyStoreError(
            f"keyset: got version {wanted.keyset.version}, want {trust.keyset.version + 1}"
        )
    ring = folder.read_online()
    renewals = find_renewals(database, folder.provider(ring), trust, wanted, withdrawn)
    published = publish(database, trust, wanted, at, renewals.write)
    named = {key_id_of(key) for key in published.keyset.keys}
    kept = tuple(entry for entry in ring.keys if entry.key_id in named)
    data = published.bundle().SerializeToString(deterministic=True)
    folder.write_online(replace(ring, keys=kept, bundle=data))
    if folder.signing_hardware is not None:
        folder.signing_hardware.keep_only(named)
    return published


def _keep_previous(folder: KeyFolder) -> None:
    for file in folder.held_root_files():
        kept = file.path.with_suffix(".key.previous")
        kept.unlink(missing_ok=True)
        os.link(file.path, kept)


def _remove_others(folder: KeyFolder, count: int) -> None:
    """Remove files of previous root keys that no new key replaced."""
    written = {file.path for file in folder.root_places(count)}
    for file in folder.held_root_files():
        if file.path not in written:
            file.path.unlink()
