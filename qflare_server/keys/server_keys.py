"""The coordinator's keys while it serves: signing, decapsulation, keyset.

`ServerKeys.load(config, database, clock)` reads the key folder created by ``qflare-server init``, publishes its trust
documents and follows those in the database. `ServerKeys` implements `StatementSigner` of `qflare_server.context`: the
signed keyset selects the key of each role, the key file only stores the keys.

A newly published keyset is noticed within `LOOK_INTERVAL`, and before anything is signed: a signature by a key that has
just left would be shown for as long as what is signed. If the keyset names a key that is not loaded, the key file is
read again. So keys rotate without a restart: copy the file with the next keys to every replica, then publish.

Invariants: private keys are never in the database; documents in the database are valid only if they chain to the
root in the key file; versions never decrease.
"""

import logging
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.message import DecodeError

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import PublicKey, SigningContext
from qflare.evidence.forms import check_form
from qflare.protocol.keysets import KeyRole
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import Clock, KeysetStatus
from qflare_server.errors import QflareError
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.held_keys import CONTEXTS, HeldKeys
from qflare_server.keys.renewal import renew_tasks
from qflare_server.keys.ring import KeyProvider, KeyRing, Role
from qflare_server.keys.secret_files import KeyStoreError, OutOfMemoryError
from qflare_server.keys.trust_documents import Trust, UntrustedDocumentError
from qflare_server.keys.trust_store import (
    newest_versions,
    publish,
    published_signers,
    read_published,
    trust_from_bundle,
)
from qflare_server.storage.database import Database

logger = logging.getLogger(__name__)

LOOK_INTERVAL: Final = timedelta(seconds=5)
"""Maximum delay before a keyset published by another process is noticed."""

WARNING_INTERVAL: Final = timedelta(days=1)
"""Interval between expiry warnings."""


class ServerKeys:
    """Signs, decapsulates and provides the keyset in force; thread-safe.

    Args:
        ring: Keys of the key file.
        database: Database of the trust documents.
        clock: Clock.
        provide: Returns the key provider; called again after a change. None means the key file's keys.
        reread: Rereads the key file; None means that it never changes.
    """

    def __init__(
        self,
        ring: KeyRing,
        database: Database,
        clock: Clock,
        *,
        provide: Callable[[KeyRing], KeyProvider] | None = None,
        reread: Callable[[], KeyRing] | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._provide = provide or (lambda ring: ring)
        self._reread = reread
        self._lock = threading.Lock()
        self._looked_at = clock()
        self.realm: Final = ring.realm
        self._pinned = trust_from_bundle(ring.realm, ring.bundle)
        self._trust = publish(database, self._pinned, self._pinned, clock())
        self._registrars = self._read_registrars()
        self._held_keys = HeldKeys(self._provide(ring))
        self.state_key: Final = ring.state_key
        self.earlier_state_keys: Final = ring.earlier_state_keys
        self._warned_at = datetime.min.replace(tzinfo=UTC)
        self._hold(self._trust)
        self._warn()

    @classmethod
    def load(cls, config: ServerConfig, database: Database, clock: Clock) -> "ServerKeys":
        """Load the keys of a configuration.

        Raises:
            KeyStoreError: The keys are missing, unusable or of another realm, or the trust documents in the database do
                not chain to them.
            StoreUnavailableError: The database cannot be reached.
        """
        folder = KeyFolder.from_config(config)
        ring = folder.read_online()
        if ring.realm != config.realm:
            raise KeyStoreError(f"keys are of realm {ring.realm!r}, want {config.realm!r}")
        return cls(ring, database, clock, provide=folder.provider, reread=folder.read_online)

    def sign(self, role: Role, payload: bytes) -> security_pb2.SignedEnvelope:
        """Sign a payload with the current key of a role, in the role's context.

        Raises:
            KeyStoreError: No accepted key of the role is held.
            StatementError: No verifier would accept the payload.
        """
        if role not in CONTEXTS:
            raise KeyStoreError("keys of this role sign nothing")
        return self._sign(role, CONTEXTS[role], payload)

    def sign_request(self, payload: bytes) -> security_pb2.SignedEnvelope:
        """Sign a request to a helper for secure aggregation with the current task key.

        Raises:
            KeyStoreError: No accepted task key is held.
            StatementError: The helper would not accept the payload.
        """
        return self._sign(security_pb2.KEY_ROLE_TASK, SigningContext.UNMASKING_REQUEST, payload)

    def _sign(
        self, role: Role, context: SigningContext, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        for key_id in self._newest().key_ids(role):
            signer = self._held_keys.signers.get(key_id)
            if signer is not None:
                check_form(context, payload)
                return sign_envelope(signer, context, payload)
        raise KeyStoreError("no key of this role is held: copy the key file to this replica")

    def accepts(self, role: Role, envelope: security_pb2.SignedEnvelope) -> bool:
        """Return whether a signature names a key that the newest keyset has for a role; it is not verified."""
        named = {signature.key_id for signature in envelope.signatures}
        return not named.isdisjoint(self._newest().key_ids(role))

    def renew_tasks(self) -> int:
        """Sign anew the tasks of rounds in progress whose key leaves with the next keyset; return how many.

        The publication of a keyset renews those that it finds. A replica that lacked the newest key, or whose
        transaction committed later, has written others since.
        """
        trust = self._newest()
        if not self._held_keys.covers(trust):
            return 0
        return renew_tasks(self._database, self._held_keys, trust)

    def decapsulate(self, key_id: str, encapsulation: bytes) -> bytes:
        """Recover a secret that was encapsulated to an accepted session KEM key, 32 bytes.

        Raises:
            UnknownKeyError: The key is not held or no longer accepted.
            UnsealError: The encapsulation is malformed.
        """
        accepted = self._current().key_ids(security_pb2.KEY_ROLE_SESSION_KEM)
        wanted = key_id if key_id in accepted else ""
        return self._held_keys.provider.decapsulate(wanted, encapsulation)

    def bundle(self, known_root_version: int = 0) -> security_pb2.KeysetBundle:
        """Return the keyset in force and the next root documents after a version, up to the message limit."""
        return self._current().part(known_root_version)

    @property
    def trust(self) -> Trust:
        """The documents in force."""
        return self._current()

    def status(self) -> KeysetStatus:
        """Return version and expiry of the keyset in force."""
        trust = self._current()
        return KeysetStatus(trust.keyset.version, trust.expires_at())

    @property
    def keyset_version(self) -> int:
        """Version of the keyset in force."""
        return self._current().keyset.version

    @property
    def root_key_ids(self) -> list[str]:
        """Ids of the root keys that devices pin."""
        return self._pinned.root_key_ids()

    def registrar_keys(self, *, fresh: bool = False) -> Collection[PublicKey]:
        """Return the registrar keys of every published keyset, including retired ones.

        Args:
            fresh: Check the database for a newer keyset even if it was checked recently.
        """
        if fresh:
            self._newest()
        else:
            self._current()
        return self._registrars

    def _read_registrars(self) -> Collection[PublicKey]:
        """Return the registrar keys of all published keysets, each verified from the pinned root keys on.

        Raises:
            UntrustedDocumentError: A published document does not chain to them: the database was edited.
        """
        pinned = self._pinned
        try:
            signers = published_signers(
                self._database, self.realm, pinned.root_key_ids(), pinned.first_threshold()
            )
        except (ValueError, DecodeError) as error:
            raise UntrustedDocumentError(f"published keysets: {error}") from error
        return signers[KeyRole.REGISTRAR]

    def _current(self) -> Trust:
        now = self._clock()
        if abs(now - self._looked_at) < LOOK_INTERVAL:  # the clock may have been set back
            return self._trust
        with self._lock:
            if abs(now - self._looked_at) >= LOOK_INTERVAL:
                self._looked_at = now
                self._look()
                self._warn()
            return self._trust

    def _newest(self) -> Trust:
        """Return the documents in force, also if they were published just now."""
        with self._lock:
            self._look()
            return self._trust

    def _look(self) -> None:
        """Adopt a newly published keyset; keep the known one if that fails."""
        try:
            known = (self._trust.root.version, self._trust.keyset.version)
            if newest_versions(self._database) == known:
                return
            found = read_published(self._database, self._trust)
            registrars = self._read_registrars()
            if found.keyset.version > self._trust.keyset.version:
                self._hold(found)
        except (KeyStoreError, QflareError, DecodeError) as error:
            logger.error("cannot follow the published keyset: %s", error)  # noqa: TRY400 - no fault of ours
            return
        if found.keyset.version > self._trust.keyset.version:
            self._registrars = registrars
            self._trust = found
            logger.info("keyset in force: version=%d", found.keyset.version)

    def _hold(self, trust: Trust) -> None:
        if self._held_keys.covers(trust) or self._reread is None:
            return
        try:
            self._held_keys = HeldKeys(self._provide(self._reread()))
        except OutOfMemoryError:
            raise  # a later look may succeed
        except KeyStoreError as error:
            logger.error("cannot read the key file again: %s", error)  # noqa: TRY400 - no fault of ours
        if not self._held_keys.covers(trust):
            logger.error("keyset %d names keys that are not held here", trust.keyset.version)

    def _warn(self) -> None:
        """Log once a day that the keyset expires soon."""
        now = self._clock()
        expires = self._trust.expires_at()
        status = KeysetStatus(self._trust.keyset.version, expires)
        if not status.expires_soon(now) or now - self._warned_at < WARNING_INTERVAL:
            return
        self._warned_at = now
        logger.warning(
            "keyset or root expire at %s: run qflare-server keys rotate", f"{expires:%F %T} UTC"
        )
