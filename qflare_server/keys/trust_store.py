"""Trust documents in the database: reading, verification and publication."""

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.orm import Session

from qflare.crypto.signing import PublicKey
from qflare.evidence.statements import digest_of
from qflare.evidence.verification import follow_keysets
from qflare.protocol.keysets import KeyRole, TrustedKeyset
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import ConflictError
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.keys.trust_documents import Trust, UntrustedDocumentError
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine, normalize_url
from qflare_server.storage.error_translation import domain_errors
from qflare_server.storage.repository import audit, evidence
from qflare_server.storage.repository import trust_documents as documents
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.schema import current_revision
from qflare_server.storage.tables import RiskLevel


def trust_from_bundle(realm: str, data: bytes) -> Trust:
    """Follow a serialized bundle that begins with version 1 of the root.

    Raises:
        UntrustedDocumentError: It does not satisfy the rules.
    """
    bundle = security_pb2.KeysetBundle.FromString(data)
    return Trust.follow(realm, list(bundle.roots), bundle.keyset)


def read_published(database: Database, pinned: Trust) -> Trust:
    """Return the documents in force.

    Args:
        database: Database that holds them.
        pinned: Documents that they must extend; older versions are refused.

    Raises:
        UntrustedDocumentError: They do not satisfy the rules: the database was edited.
    """
    with database.read() as session:
        stored = documents.load(session)
    return _checked(stored, pinned)


def publish(
    database: Database,
    pinned: Trust,
    wanted: Trust,
    at: datetime,
    also: Callable[[Session], None] = lambda _: None,
) -> Trust:
    """Publish the documents missing from the database, and return the documents in force.

    Args:
        database: Database that holds them.
        pinned: Documents that they must extend.
        wanted: The documents to publish.
        at: The time.
        also: Runs in the transaction that publishes a keyset.

    Raises:
        UntrustedDocumentError: Others are published under the same versions.
    """

    def work(session: Session) -> documents.StoredTrust:
        for version, envelope in enumerate(wanted.roots, 1):
            _insert(session, documents.ROOT, version, envelope, at)
        if documents.newest_version(session, documents.KEYSET) < wanted.keyset.version:
            _insert(session, documents.KEYSET, wanted.keyset.version, wanted.keyset_envelope, at)
            also(session)
        return documents.load(session)

    try:
        stored = database.write(work)
    except ConflictError:
        stored = database.write(
            work
        )  # another process published concurrently; its documents are visible now
    return _checked(stored, pinned)


SignerKeys = dict[KeyRole, tuple[PublicKey, ...]]


def published_signers(
    database: Database,
    realm: str,
    root_key_ids: Collection[str],
    root_threshold: int,
    at: datetime | None = None,
) -> SignerKeys:
    """Return every key that a published keyset has named, by role.

    Args:
        database: Database with the trust documents.
        realm: Name of the deployment.
        root_key_ids: Pinned ids of the keys of root document 1.
        root_threshold: Number of required signatures by them.
        at: Time at which the keyset in force must not have expired; None means its time of issue.

    Raises:
        ValueError: The trust documents in the database do not chain to the pinned keys.
    """
    with database.read() as session:
        roots = [_envelope(data) for data in evidence.trust_documents(session, documents.ROOT)]
        keysets = [_envelope(data) for data in evidence.trust_documents(session, documents.KEYSET)]
    if not roots or not keysets:
        raise ValueError("the database holds no root document or no keyset")
    pinned = security_pb2.BootstrapBundle(
        realm=realm, root_key_ids=sorted(set(root_key_ids)), threshold=root_threshold
    )
    newest = security_pb2.Keyset.FromString(keysets[-1].payload)
    issued_at = newest.issue_time.ToDatetime(tzinfo=UTC)
    bundle = security_pb2.KeysetBundle(roots=roots, keyset=keysets[-1])
    _, keys = follow_keysets(TrustedKeyset.bootstrap(pinned), keysets[:-1], bundle, at or issued_at)
    return keys


def _envelope(data: bytes) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope.FromString(data)


def newest_versions(database: Database) -> tuple[int, int]:
    """Return the versions of the newest root document and keyset; cheap."""
    with database.read() as session:
        return (
            documents.newest_version(session, documents.ROOT),
            documents.newest_version(session, documents.KEYSET),
        )


def require_no_published_root(config: ServerConfig, folder: Path) -> None:
    """Refuse to generate keys for a database that already has a root document, signed by other keys.

    Args:
        config: Configuration with the database; a database that does not exist yet is accepted.
        folder: Key folder without keys, for the message.

    Raises:
        KeyStoreError: The database has a root document.
        StoreUnavailableError: The database cannot be reached.
    """
    url = normalize_url(config.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return
    engine = make_engine(config)
    try:
        with domain_errors(), Session(engine) as session:
            if current_revision(engine) is None or not documents.newest_version(
                session, documents.ROOT
            ):
                return
    finally:
        engine.dispose()
    raise KeyStoreError(
        f"the keys of this database are not in {folder}, and others cannot take their place",
        remedy="restore the keys from a backup into that folder, or set QFLARE_KEY_DIR or --data-dir",
    )


def _insert(
    session: Session, kind: str, version: int, envelope: security_pb2.SignedEnvelope, at: datetime
) -> None:
    found = documents.find(session, kind, version)
    if found is None:
        data = envelope.SerializeToString(deterministic=True)
        documents.insert_document(session, kind, version, data, at)
        details = {"digest": digest_of(envelope.payload)}
        event = Event(f"{kind}.published", f"{kind}:{version}", RiskLevel.HIGH, details)
        audit.record(session, SYSTEM, event, at)
    elif security_pb2.SignedEnvelope.FromString(found).payload != envelope.payload:
        raise UntrustedDocumentError(f"another {kind} {version} is published in this database")


def _checked(stored: documents.StoredTrust, pinned: Trust) -> Trust:
    roots: Sequence[security_pb2.SignedEnvelope] = [
        security_pb2.SignedEnvelope.FromString(data) for data in stored.roots
    ]
    if not roots or stored.keyset is None:
        raise UntrustedDocumentError("the database holds no root document or no keyset")
    known = [envelope.payload for envelope in pinned.roots]
    if [envelope.payload for envelope in roots[: len(known)]] != known:
        raise UntrustedDocumentError("root documents in the database are not those of the keys")
    keyset = security_pb2.SignedEnvelope.FromString(stored.keyset)
    trust = Trust.follow(pinned.keyset.realm, roots, keyset)
    if trust.keyset.version < pinned.keyset.version:
        raise UntrustedDocumentError("the database went back to an earlier keyset")
    return trust
