"""Root key replacement with keys held apart: each holder signs where their key is.

1. Each next holder makes a key (`make_root_key`) and hands over the public half.
2. `draft_exchange` says what has to be signed: the next root document, and the keyset under it.
3. A threshold of the previous holders signs the root document; a threshold of the next ones signs both.
4. `publish_exchange` joins the signatures and brings both documents into force together.
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
    """Make a root key in a new file and return the public half.

    Raises:
        KeyStoreError: The file is there already, or cannot be written.
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
    """Return the next root document and the keyset under it, for the holders to sign.

    Args:
        folder: Key folder with the online keys.
        database: Where the documents in force are.
        keys: Public halves of the next root keys, 1 to 16.
        threshold: How many of them have to sign.
        at: The time.
        root_lifetime: How long the root document is trusted.
        keyset_lifetime: How long the keyset is.

    Raises:
        KeyStoreError: A key is there twice, the threshold does not fit, or the key file cannot be read.
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
    """Bring a signed root document and the keyset under it into force.

    Raises:
        KeyStoreError: One is not signed as it has to be, or does not follow those in force.
        ConflictError: Another process published at the same moment.
    """
    ring = folder.read_online()
    trust = read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    wanted = Trust.follow(ring.realm, [*trust.roots, root], keyset)
    return publish_trust(folder, database, trust, wanted, at)


def joined(envelopes: Sequence[security_pb2.SignedEnvelope]) -> security_pb2.SignedEnvelope:
    """Return one envelope with the signatures of several over the same bytes.

    Raises:
        KeyStoreError: There is none, or they are over different bytes.
    """
    if len({envelope.payload for envelope in envelopes}) != 1:
        raise KeyStoreError("signed files: want one or more, all over the same document")
    result = security_pb2.SignedEnvelope(payload=envelopes[0].payload)
    for signature in (each for envelope in envelopes for each in envelope.signatures):
        if signature.key_id not in {known.key_id for known in result.signatures}:
            result.signatures.append(signature)
    return result
