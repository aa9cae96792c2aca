"""Root documents and keysets: drafting, signing and verification. Pure: no files, no database, no clock.

The rules are those of The Update Framework: version 1 of the root is signed by a threshold of the pinned keys,
version n + 1 by a threshold of version n and of itself, the keyset by a threshold of the newest root. Versions
increase by one. `Trust` verifies documents from any storage under these rules, so an edited database cannot introduce
a key.

Source: The Update Framework specification 1.0.33, section 5.3.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Final, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.envelope import add_signature, open_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import (
    InvalidKeyError,
    InvalidSignatureError,
    PublicKey,
    Signer,
    SigningContext,
)
from qflare.evidence.forms import check_form
from qflare.times import timestamp_of
from qflare.v1 import security_pb2
from qflare_server.keys.ring import ROLES, Role
from qflare_server.keys.secret_files import KeyStoreError

ROOT_LIFETIME: Final = timedelta(days=3650)
"""Default lifetime of a root document."""

KEYSET_LIFETIME: Final = timedelta(days=400)
"""Default lifetime of a keyset."""

MAX_ROOTS_BYTES: Final = 2 * 2**20
"""Maximum bytes of root documents in one response; one document has at most 300 KiB."""

_FEW_KEPT: Final = 2
_KEPT: Final = {security_pb2.KEY_ROLE_MODEL: 9, security_pb2.KEY_ROLE_LOG: 9}
"""Maximum keys per role in a keyset: together at most what a device accepts (`keysets.MAX_KEY_COUNT`), within 64 KiB.
Model keys get the most, because model statements are kept longest."""


T = TypeVar("T")


class UntrustedDocumentError(KeyStoreError):
    """A root document or keyset has the wrong signers, version or realm."""


@dataclass(frozen=True)
class Trust:
    """Documents verified from the pinned root keys on.

    Attributes:
        roots: Signed root documents by version, from 1.
        root: The newest of them, parsed.
        keyset_envelope: The signed keyset.
        keyset: The keyset, parsed.
    """

    roots: tuple[security_pb2.SignedEnvelope, ...]
    root: security_pb2.RootDocument
    keyset_envelope: security_pb2.SignedEnvelope
    keyset: security_pb2.Keyset

    @classmethod
    def follow(
        cls,
        realm: str,
        roots: Sequence[security_pb2.SignedEnvelope],
        keyset: security_pb2.SignedEnvelope,
    ) -> "Trust":
        """Verify documents; the first root by its own keys, which the caller has to pin.

        Raises:
            UntrustedDocumentError: A signature, version or realm is wrong.
        """
        root = None
        for envelope in roots:
            root = _next_root(realm, envelope, root)
        if root is None:
            raise UntrustedDocumentError("there is no root document")
        return cls(tuple(roots), root, keyset, _open_keyset(realm, keyset, root))

    def bundle(self, known_root_version: int = 0) -> security_pb2.KeysetBundle:
        """Return the keyset with the roots after a version."""
        return security_pb2.KeysetBundle(
            roots=self.roots[max(known_root_version, 0) :], keyset=self.keyset_envelope
        )

    def part(self, known_root_version: int) -> security_pb2.KeysetBundle:
        """Return the keyset with the next roots after a version: at least one, up to the message limit."""
        whole = self.bundle(known_root_version)
        sizes = accumulate(root.ByteSize() for root in whole.roots)
        count = max(1, sum(size <= MAX_ROOTS_BYTES for size in sizes))
        del whole.roots[count:]
        return whole

    def root_key_ids(self) -> list[str]:
        """Return the key ids of the first root, which devices pin."""
        return [key.key_id for key in self._first_root().keys]

    def first_threshold(self) -> int:
        """Return the signature threshold of the pinned keys."""
        return self._first_root().threshold

    def signature_keys(self, role: Role) -> list[PublicKey]:
        """Return the keys that may sign in a role, the current one first."""
        return [PublicKey.from_proto(key.signature_key) for key in self._keys(role)]

    def kem_keys(self) -> list[KemPublicKey]:
        """Return the session KEM keys, the current one first."""
        keys = self._keys(security_pb2.KEY_ROLE_SESSION_KEM)
        return [KemPublicKey.from_proto(key.kem_key) for key in keys]

    def key_ids(self, role: Role) -> list[str]:
        """Return the ids of a role's keys, the current one first."""
        return [key_id_of(key) for key in self._keys(role)]

    def expires_at(self) -> datetime:
        """Return the expiry of keyset or root, whichever is earlier."""
        return min(_moment(self.keyset.expire_time), _moment(self.root.expire_time))

    def _keys(self, role: Role) -> list[security_pb2.RoleKey]:
        return [key for key in self.keyset.keys if key.role == role]

    def _first_root(self) -> security_pb2.RootDocument:
        return security_pb2.RootDocument.FromString(self.roots[0].payload)


def key_id_of(key: security_pb2.RoleKey) -> str:
    """Return the id of a key in a keyset."""
    return key.kem_key.key_id if key.HasField("kem_key") else key.signature_key.key_id


def most_keys(role: Role) -> int:
    """Return how many keys of a role a keyset names at most; the oldest leaves for the next."""
    return _KEPT.get(role, _FEW_KEPT)


def draft_root(
    realm: str,
    version: int,
    keys: Iterable[PublicKey],
    threshold: int,
    at: datetime,
    lifetime: timedelta = ROOT_LIFETIME,
) -> security_pb2.RootDocument:
    """Return an unsigned root document."""
    return security_pb2.RootDocument(
        realm=realm,
        version=version,
        issue_time=timestamp_of(at),
        expire_time=timestamp_of(at + lifetime),
        keys=[key.to_proto() for key in keys],
        threshold=threshold,
    )


def draft_keyset(
    realm: str,
    version: int,
    root_version: int,
    keys: Sequence[security_pb2.RoleKey],
    at: datetime,
    lifetime: timedelta = KEYSET_LIFETIME,
) -> security_pb2.Keyset:
    """Return an unsigned keyset.

    Args:
        realm: Name of the deployment.
        version: Its version, from 1.
        root_version: Version of the root that will sign it.
        keys: All eligible keys, oldest first. The newest of each role becomes the current one; earlier ones stay
            accepted up to the role's maximum.
        at: The time.
        lifetime: Lifetime of the keyset.
    """
    chosen: list[security_pb2.RoleKey] = []
    for role in ROLES:
        of_role = [key for key in reversed(keys) if key.role == role]
        chosen.extend(of_role[: most_keys(role)])
    return security_pb2.Keyset(
        realm=realm,
        version=version,
        root_version=root_version,
        issue_time=timestamp_of(at),
        expire_time=timestamp_of(at + lifetime),
        keys=chosen,
    )


def sign_document(
    document: security_pb2.RootDocument | security_pb2.Keyset, signers: Iterable[Signer]
) -> security_pb2.SignedEnvelope:
    """Sign a root document or a keyset with every signer.

    Raises:
        StatementError: No device would accept it.
    """
    is_root = isinstance(document, security_pb2.RootDocument)
    context = SigningContext.ROOT if is_root else SigningContext.KEYSET
    payload = document.SerializeToString(deterministic=True)
    check_form(context, payload)
    envelope = security_pb2.SignedEnvelope(payload=payload)
    for signer in signers:
        envelope = add_signature(envelope, signer, context)
    return envelope


def _next_root(
    realm: str, envelope: security_pb2.SignedEnvelope, before: security_pb2.RootDocument | None
) -> security_pb2.RootDocument:
    document = _read(security_pb2.RootDocument.FromString, envelope.payload)
    version = before.version + 1 if before is not None else 1
    if (document.realm, document.version) != (realm, version):
        raise UntrustedDocumentError(f"root document: want version {version} of {realm}")
    for root in (document,) if before is None else (before, document):
        _open(envelope, SigningContext.ROOT, root)
    return document


def _open_keyset(
    realm: str, envelope: security_pb2.SignedEnvelope, root: security_pb2.RootDocument
) -> security_pb2.Keyset:
    keyset = _read(security_pb2.Keyset.FromString, _open(envelope, SigningContext.KEYSET, root))
    if (keyset.realm, keyset.root_version) != (realm, root.version):
        raise UntrustedDocumentError(f"keyset: want one of root {root.version} of {realm}")
    named = Counter(key.role for key in keyset.keys)
    if not all(named[role] for role in ROLES):
        raise UntrustedDocumentError("keyset: a role has no key")
    return keyset


def _open(
    envelope: security_pb2.SignedEnvelope, context: SigningContext, root: security_pb2.RootDocument
) -> bytes:
    try:
        keys = [PublicKey.from_proto(key) for key in root.keys]
        return open_envelope(envelope, context, keys, root.threshold)
    except (InvalidSignatureError, InvalidKeyError) as error:
        raise UntrustedDocumentError(f"{context.value}: {error}") from error


def _read(parse: Callable[[bytes], T], payload: bytes) -> T:
    try:
        return parse(payload)
    except DecodeError as error:
        raise UntrustedDocumentError("document is malformed") from error


def _moment(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
