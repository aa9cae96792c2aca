"""Trusted keyset of the device, and verification of the coordinator's signatures with it.

Invariants: an accepted keyset is stored before it is used, and no lower version is accepted afterwards; an expired
keyset verifies nothing. If the keyset does not contain a signer, the device asks once for a later keyset and then
refuses the signature.

The rules of keysets and statements are elsewhere (see `protocol.keysets`, `evidence.statements` and
`evidence.lineage`).
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final, Self, TypeVar

from google.protobuf.message import DecodeError

from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import (
    ONLINE_ALGORITHMS,
    Algorithm,
    PublicKey,
    algorithm_named,
    algorithm_names,
)
from qflare.evidence.lineage import ModelVersion, open_model, verify_chain
from qflare.evidence.statements import (
    StatementError,
    StatementMismatchError,
    open_task,
    require_equal,
)
from qflare.evidence.unmasking import Masking, masking_of
from qflare.evidence.verification import follow_keysets
from qflare.protocol.keysets import (
    MAX_ROOT_COUNT,
    ExpiredKeysetError,
    KeyRole,
    KeysetError,
    TrustedKeyset,
)
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import (
    InvalidStatementError,
    KeyStoreError,
    RolledBackModelError,
    UntrustedKeysetError,
)
from qflare_client.keystore.store import KeyStore
from qflare_client.rpc.caller import Calls

R = TypeVar("R")

_log = logging.getLogger(__name__)

EXPIRY_WARNING: Final = timedelta(days=60)
"""How long before the coordinator's keyset expires the device logs warnings."""

_WARNING_INTERVAL: Final = timedelta(days=1)
_DOCUMENT = "trust.json"
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_TASK_FIELDS = (
    "training_session_id",
    "round_number",
    "base_version",
    "base_digest",
    "device_training",
    "transfer",
)
_LINK_FIELDS = frozenset({"version", "parent_digest", "digest", "payload_digest"})


def utc_now() -> datetime:
    """Return the current UTC time, timezone-aware."""
    return datetime.now(UTC)


class Trust:
    """The trusted keyset of a device, kept in its key store. Thread-safe.

    Args:
        store: Key store of the device.
        calls: Unauthenticated calls, to fetch later keysets.
        trusted: The keyset verified before, or the pins of a bootstrap bundle.
        clock: Returns the UTC time, timezone-aware.
    """

    def __init__(
        self,
        store: KeyStore,
        calls: Calls,
        trusted: TrustedKeyset,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._calls = calls
        self._trusted = trusted
        self._clock = clock
        self._lock = threading.Lock()
        self._warned_at = _BEGINNING

    @classmethod
    def begin(
        cls,
        store: KeyStore,
        bundle: security_pb2.BootstrapBundle,
        calls: Calls,
        algorithms: frozenset[Algorithm] = ONLINE_ALGORITHMS,
    ) -> Self:
        """Fetch the first keyset and verify it against the root keys of a bootstrap bundle.

        Args:
            store: Key store of the device.
            bundle: Bootstrap bundle from the administrator.
            calls: Unauthenticated calls.
            algorithms: Accepted algorithms of the coordinator's online signature keys, from now on.

        Raises:
            UntrustedKeysetError: It does not chain to the root keys.
            QflareClientError: The call failed.
        """
        with _untrusted():
            trust = cls(store, calls, TrustedKeyset.bootstrap(bundle, algorithms))
        trust.refresh()
        return trust

    @classmethod
    def load(cls, store: KeyStore, calls: Calls) -> Self:
        """Load the trusted keyset from the key store.

        Raises:
            KeyStoreError: There is none, or it is damaged.
        """
        facts = store.read_document(_DOCUMENT)
        try:
            pins = TrustedKeyset(
                str(facts["realm"]),
                frozenset(facts["root_key_ids"]),
                int(facts["threshold"]),
                frozenset(algorithm_named(name) for name in facts["algorithms"]),
            )
            bundle = security_pb2.KeysetBundle.FromString(bytes.fromhex(facts["bundle"]))
            # An expired keyset is still the lower bound for accepted versions.
            return cls(store, calls, pins.updated(bundle, _BEGINNING))
        except (KeyError, TypeError, ValueError, DecodeError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error

    @property
    def realm(self) -> str:
        """Name of the deployment."""
        return self._trusted.realm

    @property
    def bundle(self) -> security_pb2.KeysetBundle:
        """Root documents and keyset as received, as evidence."""
        return self._trusted.bundle

    def refresh(self) -> None:
        """Fetch the coordinator's keyset, verify and store it.

        Raises:
            UntrustedKeysetError: It does not verify.
            QflareClientError: The call failed.
        """
        bundle = self._fetch(self._trusted.root_version)
        with self._lock, _untrusted():
            trusted = self._trusted.updated(bundle, self._clock())
            self._store.write_document(
                _DOCUMENT,
                {
                    "realm": trusted.realm,
                    "root_key_ids": sorted(trusted.root_key_ids),
                    "threshold": trusted.root_threshold,
                    "algorithms": algorithm_names(trusted.algorithms),
                    "bundle": trusted.bundle.SerializeToString().hex(),
                },
            )
            self._trusted = trusted
        self._warn_of_expiry()

    def _fetch(self, known_root_version: int) -> security_pb2.KeysetBundle:
        """Return the root documents after a version and the keyset; one answer may not hold them all."""
        bundle = security_pb2.KeysetBundle()
        while True:
            request = messages.GetKeysetRequest(
                known_root_version=known_root_version + len(bundle.roots)
            )
            answer = self._calls.unary(self._calls.transport.stub.GetKeyset, request)
            bundle.roots.extend(answer.bundle.roots)
            bundle.keyset.CopyFrom(answer.bundle.keyset)
            missing = answer.root_version - known_root_version - len(bundle.roots)
            if missing <= 0 or not answer.bundle.roots or len(bundle.roots) > MAX_ROOT_COUNT:
                return bundle

    def at_least(self, keyset_version: int) -> None:
        """Fetch the keyset if the coordinator has a later one.

        Raises:
            QflareClientError: As `refresh`.
        """
        if self._trusted.keyset_version < keyset_version:
            self.refresh()

    def session_key(self) -> KemPublicKey:
        """Return the coordinator's KEM key for enrollment and login.

        Raises:
            UntrustedKeysetError: The keyset has expired, and there is no later one.
            QflareClientError: The call for a later one failed.
        """
        return self._current(lambda trusted, now: trusted.kem_key(now))

    def signature_keys(self, role: KeyRole) -> tuple[PublicKey, ...]:
        """Return the coordinator's signature keys of a role.

        Raises:
            QflareClientError: As `session_key`.
        """
        return self._current(lambda trusted, now: trusted.signature_keys(role, now))

    def keys_for(
        self, role: KeyRole, envelope: security_pb2.SignedEnvelope
    ) -> tuple[PublicKey, ...]:
        """Return the keys of a role, from a later keyset if the current one does not contain an envelope's signer.

        Raises:
            QflareClientError: As `session_key`.
        """
        keys = self.signature_keys(role)
        signers = {signature.key_id for signature in envelope.signatures}
        if signers.isdisjoint(key.key_id for key in keys):
            self.refresh()
            keys = self.signature_keys(role)
        return keys

    def registrar_keys(
        self, signers: Collection[str], earlier_keysets: Sequence[security_pb2.SignedEnvelope]
    ) -> tuple[PublicKey, ...]:
        """Return the keys that have ever signed receipts, as far as earlier keysets are needed to know them.

        Args:
            signers: Ids of the keys that have signed the receipts in question.
            earlier_keysets: By rising version, as the coordinator shows them.

        Raises:
            InvalidStatementError: An earlier keyset is not signed by the root keys of its time.
            QflareClientError: As `session_key`.
        """
        keys = self.signature_keys(KeyRole.REGISTRAR)
        if {key.key_id for key in keys}.issuperset(signers):
            return keys
        self.refresh()

        def follow(trusted: TrustedKeyset, now: datetime) -> tuple[PublicKey, ...]:
            _, ever = follow_keysets(trusted.pins, earlier_keysets, trusted.bundle, now)
            return ever[KeyRole.REGISTRAR]

        with _checked():
            return self._current(follow)

    def open_task(self, answer: messages.GetTaskResponse) -> security_pb2.TaskStatement:
        """Verify a task statement, and that the response agrees with it.

        Raises:
            InvalidStatementError: It is not signed by the coordinator, or about something else.
        """
        keys = self.keys_for(KeyRole.TASK, answer.task)
        with _checked():
            statement = open_task(answer.task, keys, self._trusted.realm)
            for field in _TASK_FIELDS:
                require_equal(field, getattr(answer, field), getattr(statement, field))
        return statement

    def masking_of(self, answer: messages.GetTaskResponse) -> Masking | None:
        """Return the masking that a verified task requires; None for none.

        Raises:
            InvalidStatementError: It is malformed, or names documents of other helpers.
        """
        with _checked():
            return masking_of(answer.task)

    def open_model(
        self, envelope: security_pb2.SignedEnvelope, training_session_id: str
    ) -> ModelVersion:
        """Verify the statement of a version.

        Raises:
            InvalidStatementError: It is not signed by the coordinator, or about something else.
        """
        keys = self.keys_for(KeyRole.MODEL, envelope)
        with _checked():
            return open_model(
                envelope, keys, realm=self._trusted.realm, training_session_id=training_session_id
            )

    def follow(
        self,
        envelopes: Sequence[security_pb2.SignedEnvelope],
        training_session_id: str,
        known: ModelVersion | None,
    ) -> list[ModelVersion]:
        """Verify consecutive versions, and that they follow a known one.

        Raises:
            RolledBackModelError: One is missing, goes back, or has another history.
            InvalidStatementError: One is not signed by the coordinator, or about something else.
        """
        if not envelopes:
            return []
        keys = self.keys_for(KeyRole.MODEL, envelopes[-1])
        with _checked():
            return verify_chain(
                envelopes,
                keys,
                realm=self._trusted.realm,
                training_session_id=training_session_id,
                known=known,
            )

    def _warn_of_expiry(self) -> None:
        """Log, once a day, that the coordinator's keyset is about to expire."""
        now, expires_at = self._clock(), self._trusted.expires_at
        if expires_at - now >= EXPIRY_WARNING or now - self._warned_at < _WARNING_INTERVAL:
            return
        self._warned_at = now
        _log.warning(
            "the coordinator's keyset expires at %s: its operator has to publish the next one",
            f"{expires_at:%Y-%m-%d %H:%M} UTC",
        )

    def _current(self, read: Callable[[TrustedKeyset, datetime], R]) -> R:
        """Read from an unexpired keyset."""
        try:
            found = read(self._trusted, self._clock())
        except ExpiredKeysetError:
            self.refresh()
        else:
            self._warn_of_expiry()
            return found
        with _untrusted():
            return read(self._trusted, self._clock())


@contextmanager
def _untrusted() -> Iterator[None]:
    try:
        yield
    except KeysetError as error:
        raise UntrustedKeysetError(str(error)) from error


@contextmanager
def _checked() -> Iterator[None]:
    try:
        yield
    except StatementMismatchError as error:
        kind = RolledBackModelError if error.field in _LINK_FIELDS else InvalidStatementError
        raise kind(str(error)) from error
    except StatementError as error:
        raise InvalidStatementError(str(error)) from error
