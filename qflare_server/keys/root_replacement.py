"""Root key replacement with separate key holders, each of whom signs on their own machine.

1. Each next holder generates a key (`make_root_key`) and hands over the public half.
2. `draft_exchange` returns the documents to sign: the next root document, and the keyset under it.
3. A threshold of the previous holders signs the root document; a threshold of the next ones signs both.
4. `publish_exchange` combines the signatures and publishes both documents together.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from qflare.crypto.envelope import MAX_SIGNATURE_COUNT
from qflare.crypto.signing import Algorithm, PublicKey
from qflare.v1 import security_pb2
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.ring import KeyRing
from qflare_server.keys.root_files import RootFile, write_each
from qflare_server.keys.rotation import follow_keyset, publish_trust
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.keys.trust_documents import KEYSET_LIFETIME, ROOT_LIFETIME, Trust, draft_root
from qflare_server.keys.trust_store import read_published, trust_from_bundle
from qflare_server.storage.database import Database


def make_root_key(realm: str, algorithm: Algorithm, file: RootFile) -> PublicKey:
    """Generate a root key in a new file and return the public half.

    Raises:
        KeyStoreError: The file exists, or cannot be written.
    """
    ring = KeyRing.generate_root(realm, 1, algorithm)
    write_each(ring, [file])
    return ring.signing_keys()[0].public


def draft_exchange(
    folder: KeyFolder,
    database: Database,
    keys: Sequence[PublicKey],
    threshold: int,
    at: datetime,
    *,
    root_lifetime: timedelta = ROOT_LIFETIME,
    keyset_lifetime: timedelta = KEYSET_LIFETIME,
) -> tuple[security_pb2.RootDocument, security_pb2.Keyset]:
    """Return the next root document and the keyset under it, both unsigned.

    Args:
        folder: Key folder with the online keys.
        database: Database with the documents in force.
        keys: Public halves of the next root keys, 1 to 16.
        threshold: Number of required root signatures.
        at: The time.
        root_lifetime: Lifetime of the root document.
        keyset_lifetime: Lifetime of the keyset.

    Raises:
        KeyStoreError: A key occurs twice, the threshold is out of range, or the key file cannot be read.
    """
    if not 1 <= threshold <= len(keys) <= MAX_SIGNATURE_COUNT // 2:
        raise KeyStoreError(
            f"got threshold {threshold} of {len(keys)} root keys, want 1 to all of at most"
            f" {MAX_SIGNATURE_COUNT // 2}"
        )
    if len({key.key_id for key in keys}) != len(keys):
        raise KeyStoreError("a root key is given twice")
    ring = folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    version = trust.root.version + 1
    document = draft_root(ring.realm, version, keys, threshold, at, root_lifetime)
    keyset = follow_keyset(folder.provider(ring), trust, version, at, (), keyset_lifetime)
    return document, keyset


def publish_exchange(
    folder: KeyFolder,
    database: Database,
    root: security_pb2.SignedEnvelope,
    keyset: security_pb2.SignedEnvelope,
    at: datetime,
) -> Trust:
    """Publish a signed root document and the keyset under it.

    Raises:
        KeyStoreError: A document is not properly signed, or does not succeed the one in force.
        ConflictError: Another process published at the same moment.
    """
    ring = folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    wanted = Trust.follow(ring.realm, [*trust.roots, root], keyset)
    return publish_trust(folder, database, trust, wanted, at)


def joined(envelopes: Sequence[security_pb2.SignedEnvelope]) -> security_pb2.SignedEnvelope:
    """Combine the signatures of several envelopes over the same bytes.

    Raises:
        KeyStoreError: There are no envelopes, or their bytes differ.
    """
    if len({envelope.payload for envelope in envelopes}) != 1:
        raise KeyStoreError("signed files: want one or more, all over the same document")
    result = security_pb2.SignedEnvelope(payload=envelopes[0].payload)
    for signature in (each for envelope in envelopes for each in envelope.signatures):
        if signature.key_id not in {known.key_id for known in result.signatures}:
            result.signatures.append(signature)
    return result
