"""Bearer-token authentication. Tokens are checked on every call, so a revocation takes effect immediately.

Lookups are cached while the database's counter of security changes is unchanged. A call costs one small read, and a
revocation by one replica takes effect on the next call at every other. Polls (`POLLS`) cost no read: the
process that revoked a token refuses its polls at once, every other process within `storage.epochs.MAX_AGE_S`.
"""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from qflare_server.context import Context
from qflare_server.errors import (
    DeviceRevokedError,
    DeviceSuspendedError,
    PermissionDeniedError,
    QflareError,
    UnauthenticatedError,
)
from qflare_server.storage.epochs import Epochs
from qflare_server.storage.repository import devices, tokens
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.tokens import Credential
from qflare_server.storage.tables import DeviceState, TokenKind
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.access.roles import ACCESS, ADMINISTRATIVE, Role

SECRET_BYTES = 32
MAX_TOKEN_CHARACTERS = 200
MAX_JWT_CHARACTERS = 12_000
"""Longest token of an identity provider: the metadata of a call takes 16 KiB."""
JWT_PREFIX = "eyJ"
"""How a JWT begins: base64 of a JSON object; no token of a coordinator does."""
MAX_REMEMBERED = 50_000
MAY_CALL = frozenset(
    {DeviceState.ACTIVE.value, DeviceState.QUARANTINED.value, DeviceState.INACTIVE.value}
)
POLLS = frozenset({"/qflare.v1.CoordinatorService/GetTask"})
"""Methods whose callers are admitted by a snapshot of the counters: their response gives no access to anything."""
ANONYMOUS = frozenset({Role.ANYONE})


@dataclass(frozen=True)
class Principal:
    """The authenticated caller of an RPC.

    `device_id` is None for administrators and callers without a credential, `binding_key` verifies proofs of
    possession, `expires_at` is set for users of an identity provider.
    """

    name: str
    roles: frozenset[Role]
    device_id: str | None = None
    key_id: str | None = None
    key_algorithm: int | None = None
    public_key: bytes | None = None
    token_id: str | None = None
    binding_key: bytes | None = None
    authentication_method: str = ""
    expires_at: datetime | None = None

    def caller(self, peer_address: str) -> Caller:
        """Return the caller for the audit log."""
        method = self.authentication_method or ("token" if self.token_id else "none")
        return Caller(self.name, peer_address, method)


@dataclass(frozen=True)
class KnownCaller:
    """The last known owner of a token; used to classify a call, not to admit it."""

    name: str
    is_device: bool


class UserTokens(Protocol):
    """Verifies the tokens of an identity provider."""

    def identify(self, token: str) -> Principal:
        """Return the principal of a token.

        Raises:
            UnauthenticatedError: The token is not accepted.
            IdentityProviderUnavailableError: The provider's keys cannot be fetched.
        """

    def recognize(self, token_hash: str) -> Principal | None:
        """Return the principal of a token that was verified before, by the hash of the token."""


NOBODY = Principal("anonymous", ANONYMOUS)


def mint_secret(prefix: str) -> tuple[str, str, str]:
    """Return token id, secret and its hash. Only the hash is stored; the secret is shown once."""
    token_id = secrets.token_hex(16)
    secret = f"{prefix}.{token_id}.{secrets.token_urlsafe(SECRET_BYTES)}"
    return token_id, secret, hash_secret(secret)


def hash_secret(secret: str) -> str:
    """Return the SHA-256 of a secret: 32 random bytes need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def sole_value(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> str | bytes | None:
    """Return the value of a metadata key, None without it.

    Raises:
        UnauthenticatedError: The key occurs more than once. Two readers could each use a different value, so the
            admitted credential would not be the proven one.
    """
    values = [value for name, value in metadata or () if name == key]
    if len(values) > 1:
        raise UnauthenticatedError(f"the call carries {key} more than once")
    return values[0] if values else None


class Authentication:
    """Resolves the credential of a call to a principal and authorizes the method."""

    def __init__(
        self, context: Context, presence: Presence, users: UserTokens | None = None
    ) -> None:
        self._context = context
        self._presence = presence
        self._users = users
        self._known: dict[str, tuple[int, Credential]] = {}

    def admit(self, method: str, bearer: str | None) -> Principal:
        """Authorize a call and return the principal.

        Raises:
            UnauthenticatedError: The credential is missing, unknown, expired or revoked; the text is the same for all.
            DeviceRevokedError: The device is revoked.
            DeviceSuspendedError: The device is suspended.
            PermissionDeniedError: The caller's roles do not allow the method, or no role may call it.
            IdentityProviderUnavailableError: The token is of an identity provider whose keys cannot be fetched.
        """
        if Role.ANYONE in _allowed(method):
            return NOBODY
        if bearer and self._users is not None and bearer.startswith(JWT_PREFIX):
            return self.admit_user(method, self._users.identify(bearer))
        if not bearer or len(bearer) > MAX_TOKEN_CHARACTERS:
            raise UnauthenticatedError
        return self.admit_hash(method, hash_secret(bearer))

    def admit_hash(self, method: str, token_hash: str, epochs: Epochs | None = None) -> Principal:
        """Authorize a caller by the hash of a token that was seen before; return the principal.

        Args:
            method: Full name of a method of a device or an administrator.
            token_hash: Result of `hash_secret` for the token.
            epochs: Counters of changes, read after the call has come; None reads them.

        Raises:
            QflareError: As `admit`.
        """
        if epochs is None:
            database = self._context.database
            epochs = database.recent_epochs() if method in POLLS else database.epochs()
        return _authorized(self._identify(token_hash, epochs.security), method)

    def admit_remembered(self, method: str, bearer: str | None, epochs: Epochs) -> Principal | None:
        """Authorize a call from memory, as `admit` does; None if that takes a query, or refuses the call.

        Args:
            method: Full name of the method.
            bearer: The token of the call.
            epochs: Counters at which memory has to be current.
        """
        if not bearer or len(bearer) > MAX_TOKEN_CHARACTERS:
            return None
        known = self._known.get(hash_secret(bearer))
        if known is None or known[0] != epochs.security:
            return None
        if known[1].device_state == DeviceState.INACTIVE.value:  # to be reactivated by a write
            return None
        try:
            return _authorized(self._principal(known[1]), method)
        except QflareError:
            return None

    def admit_user(self, method: str, principal: Principal) -> Principal:
        """Authorize a user whom the identity provider has authenticated; return the principal.

        Raises:
            UnauthenticatedError: The user's token has expired.
            PermissionDeniedError: The user's roles do not allow the method.
        """
        if principal.expires_at is None or principal.expires_at <= self._context.clock():
            raise UnauthenticatedError
        return _authorized(principal, method)

    def recognize(self, bearer: str | None) -> KnownCaller | None:
        """Return the last known owner of a token from memory; None for an unknown or expired one.

        This does not admit the call: a token revoked since is still recognized, and `admit` refuses it.
        """
        if bearer and self._users is not None and bearer.startswith(JWT_PREFIX):
            if len(bearer) > MAX_JWT_CHARACTERS:
                return None
            user = self._users.recognize(hash_secret(bearer))
            return None if user is None else KnownCaller(user.name, is_device=False)
        if not bearer or len(bearer) > MAX_TOKEN_CHARACTERS:
            return None
        known = self._known.get(hash_secret(bearer))
        if known is None:
            return None
        found = known[1]
        is_over = found.expires_at is not None and found.expires_at <= self._context.clock()
        if is_over or found.revoked_at is not None:
            return None
        if found.kind == TokenKind.ADMIN.value:
            return KnownCaller(f"admin:{found.subject}", is_device=False)
        if found.kind != TokenKind.ACCESS.value:
            return None
        return KnownCaller(f"device:{found.device_id}", is_device=True)

    def introduce(self, bearer: str | None) -> KnownCaller | None:
        """Look up a token, so that `recognize` knows it from now on; None for an invalid one.

        Raises:
            StoreUnavailableError: The database does not answer.
            QflareError: The token is one of the identity provider's, and `admit` refuses it.
        """
        if bearer and self._users is not None and bearer.startswith(JWT_PREFIX):
            return KnownCaller(self._users.identify(bearer).name, is_device=False)
        if bearer and len(bearer) <= MAX_TOKEN_CHARACTERS:
            self._find(hash_secret(bearer), self._context.database.epochs().security)
        return self.recognize(bearer)

    def _identify(self, token_hash: str, epoch: int) -> Principal:
        return self._principal(self._find(token_hash, epoch))

    def _principal(self, found: Credential | None) -> Principal:
        now = self._context.clock()
        if found is None or found.revoked_at is not None:
            if found is not None and found.device_state == DeviceState.REVOKED.value:
                raise DeviceRevokedError
            raise UnauthenticatedError
        if found.expires_at is not None and found.expires_at <= now:
            raise UnauthenticatedError
        if found.kind == TokenKind.ADMIN.value:
            roles = frozenset(Role(role) for role in found.roles) & ADMINISTRATIVE
            return Principal(f"admin:{found.subject}", roles, token_id=found.token_id)
        if found.kind != TokenKind.ACCESS.value or found.device_id is None:
            raise UnauthenticatedError
        return self._device(found, now)

    def _find(self, token_hash: str, epoch: int) -> Credential | None:
        """Return a credential; a cached one is valid until the counter of security changes moves."""
        known = self._known.get(token_hash)
        if known is not None and known[0] == epoch:
            return known[1]
        with self._context.database.read() as session:
            found = tokens.find_credential(session, token_hash)
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        if found is not None:
            self._known[token_hash] = (epoch, found)
        return found

    def _device(self, found: Credential, now: datetime) -> Principal:
        assert found.device_id is not None
        if found.device_state == DeviceState.REVOKED.value:
            raise DeviceRevokedError
        if found.device_state not in MAY_CALL:
            raise DeviceSuspendedError
        if found.device_state == DeviceState.INACTIVE.value:
            self._reactivate(found.device_id)
        self._presence.note(found.device_id, now)
        return Principal(
            f"device:{found.device_id}",
            frozenset({Role.DEVICE}),
            found.device_id,
            found.key_id,
            found.key_algorithm,
            found.public_key,
            found.token_id,
            found.binding_key,
        )

    def _reactivate(self, device_id: str) -> None:
        """Reactivate an inactive device; a concurrent suspension wins."""
        self._context.database.write(lambda session: devices.reactivate(session, device_id))


def _authorized(principal: Principal, method: str) -> Principal:
    allowed = _allowed(method)
    if not principal.roles & allowed:
        raise PermissionDeniedError(f"needs one of: {', '.join(sorted(allowed))}")
    return principal


def _allowed(method: str) -> frozenset[Role]:
    allowed = ACCESS.get(method)
    if allowed is None:
        raise PermissionDeniedError("no role may call this method")
    return allowed
