"""Trusted keys of a device: the offline root, and the online keys that it signs.

`TrustedKeyset` holds a device's complete trust state as an immutable value: `TrustedKeyset.bootstrap` makes one from
the ids in a bootstrap bundle, `updated` gives the next one or raises and changes nothing. It uses
no files and no network, and takes the time only from `reference_time`.

Rules, after The Update Framework 1.0 (section 5.3):

1. Root document 1 is signed by the pinned threshold of the pinned keys, and by its own threshold.
2. Root document n + 1 is signed by the threshold of document n and by its own.
3. A keyset is signed by the threshold of the latest root document, and names it.
4. A version never decreases, and the document of a version never changes.
5. The latest root document and the keyset are not expired; expired earlier roots still verify later ones.
6. Every key has one role, every role has a key of the right sort.
7. Every online signature key has an algorithm that the device accepts; otherwise the keyset is rejected.

Usage::

    trusted = TrustedKeyset.bootstrap(bundle)
    trusted = trusted.updated(keyset_bundle, reference_time)
    model_keys = trusted.signature_keys(KeyRole.MODEL, reference_time)

Store `TrustedKeyset.bundle`; loading it through `updated` checks it again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final, Self

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.envelope import MAX_SIGNATURE_COUNT, open_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import (
    ONLINE_ALGORITHMS,
    Algorithm,
    PublicKey,
    SigningContext,
    algorithm_names,
)
from qflare.v1 import security_pb2

MAX_ROOT_COUNT: Final = 256
"""Most root documents that a bundle holds."""

MAX_KEY_COUNT: Final = 24
"""Most keys that a keyset holds."""


class KeysetError(ValueError):
    """A root document or keyset is not to be trusted."""


class ExpiredKeysetError(KeysetError):
    """The latest root document or the keyset is out of date."""


class KeysetRollbackError(KeysetError):
    """A version lower than one seen before, or another document under a version seen before."""


class RefusedAlgorithmError(KeysetError):
    """An online key has an algorithm that this device does not accept."""


class KeyRole(IntEnum):
    """Role of a key, numbered as in ``qflare.v1.KeyRole``."""

    SESSION_KEM = security_pb2.KEY_ROLE_SESSION_KEM
    MODEL = security_pb2.KEY_ROLE_MODEL
    REGISTRAR = security_pb2.KEY_ROLE_REGISTRAR
    LOG = security_pb2.KEY_ROLE_LOG
    TASK = security_pb2.KEY_ROLE_TASK


@dataclass(frozen=True)
class _Root:
    envelope: security_pb2.SignedEnvelope
    document: security_pb2.RootDocument
    keys: tuple[PublicKey, ...]


@dataclass(frozen=True)
class _Online:
    envelope: security_pb2.SignedEnvelope
    document: security_pb2.Keyset
    signature_keys: dict[KeyRole, tuple[PublicKey, ...]]
    kem_keys: tuple[KemPublicKey, ...]


@dataclass(frozen=True)
class TrustedKeyset:
    """Trust state of a device.

    Attributes:
        realm: Name of the deployment.
        root_key_ids: Pinned ids of the keys of root document 1.
        root_threshold: Minimum number of these keys that must sign it.
        algorithms: Accepted algorithms of online signature keys; root keys are accepted by their ids alone.
    """

    realm: str
    root_key_ids: frozenset[str]
    root_threshold: int
    algorithms: frozenset[Algorithm] = ONLINE_ALGORITHMS
    _roots: tuple[_Root, ...] = ()
    _online: _Online | None = None

    @classmethod
    def bootstrap(
        cls,
        bundle: security_pb2.BootstrapBundle,
        algorithms: frozenset[Algorithm] = ONLINE_ALGORITHMS,
    ) -> Self:
        """Create the initial trust state from a bootstrap bundle.

        Args:
            bundle: Bootstrap bundle from an administrator.
            algorithms: Accepted algorithms of online signature keys, one or more.

        Raises:
            KeysetError: It pins no keys, or a threshold that they cannot reach.
        """
        key_ids = frozenset(bundle.root_key_ids)
        _require(bundle.realm, "bootstrap bundle names no realm")
        _require(1 <= bundle.threshold <= len(key_ids), "threshold does not fit the root keys")
        _require(algorithms, "no algorithm is accepted")
        return cls(bundle.realm, key_ids, bundle.threshold, algorithms)

    @property
    def pins(self) -> Self:
        """Trust state that trusts no documents yet, from which they can be verified again."""
        return replace(self, _roots=(), _online=None)

    @property
    def bundle(self) -> security_pb2.KeysetBundle:
        """Everything trusted so far, to be stored."""
        keyset = None if self._online is None else self._online.envelope
        roots = [root.envelope for root in self._roots]
        return security_pb2.KeysetBundle(roots=roots, keyset=keyset)

    @property
    def root_version(self) -> int:
        """Version of the latest root document; 0 before the first."""
        return len(self._roots)

    @property
    def keyset_version(self) -> int:
        """Version of the keyset; 0 before the first."""
        return 0 if self._online is None else self._online.document.version

    @property
    def expires_at(self) -> datetime:
        """When the keyset or the latest root document expires, whichever is earlier, in UTC.

        Raises:
            KeysetError: No keyset is trusted yet.
        """
        if self._online is None:
            raise KeysetError("no keyset is trusted yet")
        times = (self._roots[-1].document.expire_time, self._online.document.expire_time)
        return min(time.ToDatetime(tzinfo=UTC) for time in times)

    def updated(self, bundle: security_pb2.KeysetBundle, reference_time: datetime) -> Self:
        """Verify a bundle and return the updated trust state.

        Args:
            bundle: Root documents by rising version, of which known ones may be left out, and a
                keyset.
            reference_time: The time, aware.

        Raises:
            KeysetRollbackError: A version went down, or changed.
            ExpiredKeysetError: The latest root document or the keyset is out of date.
            RefusedAlgorithmError: An online key has an algorithm that is not accepted.
            KeysetError: A signature, version or field is wrong.
        """
        _require(len(bundle.roots) <= MAX_ROOT_COUNT, "too many root documents")
        roots = self._roots
        for envelope in bundle.roots:
            roots = self._extended(roots, envelope)
        _require(roots, "no root document is trusted yet")
        online = self._opened(roots[-1], bundle.keyset)
        _check_current(roots, online, reference_time)
        return replace(self, _roots=roots, _online=online)

    def signature_keys(self, role: KeyRole, reference_time: datetime) -> tuple[PublicKey, ...]:
        """Keys whose signatures count for a role; the first is the one in use.

        Raises:
            ExpiredKeysetError: They are out of date.
            KeysetError: No keyset is trusted yet, or the role has keys of another sort.
        """
        keys = self._current(reference_time).signature_keys.get(role, ())
        _require(keys, f"no signature key has the role {role.name}")
        return keys

    def kem_key(self, reference_time: datetime) -> KemPublicKey:
        """The key to encapsulate and seal to.

        Raises:
            ExpiredKeysetError: It is out of date.
            KeysetError: No keyset is trusted yet.
        """
        return self._current(reference_time).kem_keys[0]

    def _current(self, reference_time: datetime) -> _Online:
        if self._online is None:
            raise KeysetError("no keyset is trusted yet")
        _check_current(self._roots, self._online, reference_time)
        return self._online

    def _extended(
        self, roots: tuple[_Root, ...], envelope: security_pb2.SignedEnvelope
    ) -> tuple[_Root, ...]:
        """The trusted root documents with one more, unless it is one of them."""
        root = _parse_root(envelope)
        _require(root.document.realm == self.realm, "root document is of another realm")
        version = root.document.version
        if version <= len(roots):
            if roots[version - 1].envelope.payload != envelope.payload:
                raise KeysetRollbackError(f"root document {version} has changed")
            return roots
        _require(version == len(roots) + 1, f"root document {version} is out of order")
        if roots:
            _open(envelope, SigningContext.ROOT, roots[-1].keys, roots[-1].document.threshold)
        else:
            pinned = [key for key in root.keys if key.key_id in self.root_key_ids]
            _open(envelope, SigningContext.ROOT, pinned, self.root_threshold)
        _open(envelope, SigningContext.ROOT, root.keys, root.document.threshold)
        return (*roots, root)

    def _opened(self, root: _Root, envelope: security_pb2.SignedEnvelope) -> _Online:
        """The keyset under a root document, not below the one that is trusted."""
        _open(envelope, SigningContext.KEYSET, root.keys, root.document.threshold)
        online = _parse_keyset(envelope)
        _require(online.document.realm == self.realm, "keyset is of another realm")
        same_root = online.document.root_version == root.document.version
        _require(same_root, "keyset is under another root document")
        self._check_version(online)
        self._check_algorithms(online)
        return online

    def _check_algorithms(self, online: _Online) -> None:
        found = {key.algorithm for keys in online.signature_keys.values() for key in keys}
        refused = found - self.algorithms
        if refused:
            raise RefusedAlgorithmError(
                f"keyset has keys of {', '.join(algorithm_names(refused))},"
                f" want {', '.join(algorithm_names(self.algorithms))}"
            )

    def _check_version(self, online: _Online) -> None:
        version = online.document.version
        if version < self.keyset_version:
            raise KeysetRollbackError(f"keyset {version} is below {self.keyset_version}")
        if self._online is not None and version == self.keyset_version:
            same = online.envelope.payload == self._online.envelope.payload
            if not same:
                raise KeysetRollbackError(f"keyset {version} has changed")


def check_document_form(envelope: security_pb2.SignedEnvelope, context: SigningContext) -> None:
    """Check the form of a root document or a keyset, independent of its signers.

    Args:
        envelope: The document; its signatures are not looked at.
        context: Whether it is a root document or a keyset.

    Raises:
        KeysetError: It is malformed.
    """
    if context is SigningContext.ROOT:
        _require(_parse_root(envelope).document.realm, "root document names no realm")
    else:
        _require(_parse_keyset(envelope).document.realm, "keyset names no realm")


def _parse_root(envelope: security_pb2.SignedEnvelope) -> _Root:
    """Read a root document; its signatures are not yet checked."""
    try:
        document = security_pb2.RootDocument.FromString(envelope.payload)
        keys = tuple(PublicKey.from_proto(key) for key in document.keys[: MAX_SIGNATURE_COUNT + 1])
    except (ValueError, DecodeError) as error:
        raise KeysetError(f"root document is malformed: {error}") from error
    _require(document.version >= 1, "root document has no version")
    _require(len(keys) <= MAX_SIGNATURE_COUNT, "root document has too many keys")
    _check_distinct(key.key_id for key in keys)
    _require(1 <= document.threshold <= len(keys), "threshold does not fit the root keys")
    return _Root(envelope, document, keys)


def _parse_keyset(envelope: security_pb2.SignedEnvelope) -> _Online:
    try:
        document = security_pb2.Keyset.FromString(envelope.payload)
        _require(len(document.keys) <= MAX_KEY_COUNT, "keyset has too many keys")
        signature_keys, kem_keys = _sorted_keys(document.keys)
    except (ValueError, DecodeError) as error:
        raise KeysetError(f"keyset is malformed: {error}") from error
    _require(document.version >= 1, "keyset has no version")
    _require(kem_keys, f"keyset has no key for {KeyRole.SESSION_KEM.name}")
    for role in set(KeyRole) - {KeyRole.SESSION_KEM}:
        _require(signature_keys.get(role), f"keyset has no key for {role.name}")
    return _Online(envelope, document, signature_keys, kem_keys)


def _role(number: int) -> KeyRole:
    try:
        return KeyRole(number)
    except ValueError:
        raise KeysetError(
            f"unknown role {number} of a key; if a later release made it, upgrade qflare"
        ) from None


def _sorted_keys(
    entries: Sequence[security_pb2.RoleKey],
) -> tuple[dict[KeyRole, tuple[PublicKey, ...]], tuple[KemPublicKey, ...]]:
    """Keys by role, in their order; raises ValueError for a key of the wrong sort or twice."""
    signature_keys: dict[KeyRole, tuple[PublicKey, ...]] = {}
    kem_keys: tuple[KemPublicKey, ...] = ()
    for entry in entries:
        role = _role(entry.role)
        wanted = "kem_key" if role is KeyRole.SESSION_KEM else "signature_key"
        _require(entry.WhichOneof("key") == wanted, f"key for {role.name} is of another sort")
        if role is KeyRole.SESSION_KEM:
            kem_keys += (KemPublicKey.from_proto(entry.kem_key),)
        else:
            key = PublicKey.from_proto(entry.signature_key)
            signature_keys[role] = (*signature_keys.get(role, ()), key)
    all_keys = [key for keys in signature_keys.values() for key in keys]
    _check_distinct([key.key_id for key in all_keys] + [key.key_id for key in kem_keys])
    return signature_keys, kem_keys


def _open(
    envelope: security_pb2.SignedEnvelope,
    context: SigningContext,
    keys: Sequence[PublicKey],
    threshold: int,
) -> None:
    try:
        open_envelope(envelope, context, keys, threshold)
    except ValueError as error:
        raise KeysetError(f"{context} is not signed as it has to be: {error}") from error


def _check_current(roots: tuple[_Root, ...], online: _Online, reference_time: datetime) -> None:
    _check_expiry(roots[-1].document.expire_time, reference_time, "root document")
    _check_expiry(online.document.expire_time, reference_time, "keyset")


def _check_expiry(expire_time: Timestamp, reference_time: datetime, what: str) -> None:
    try:
        expires_at = expire_time.ToDatetime(tzinfo=UTC)
    except ValueError as error:
        raise KeysetError(f"{what} has no valid expiry") from error
    if expires_at <= reference_time:
        raise ExpiredKeysetError(f"{what} expired at {expires_at:%Y-%m-%d %H:%M} UTC")


def _check_distinct(key_ids: Iterable[str]) -> None:
    listed = list(key_ids)
    _require(len(set(listed)) == len(listed), "a key is listed twice")


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise KeysetError(problem)
