"""Device login: access tokens, refresh tokens, and proofs of possession.

Constructor: ``Login(context, keys)``.

Invariants: a handshake is granted tokens once: its session id is a nonce, consumed in the transaction that stores the
tokens. A refresh token is used once; a second use revokes every token of its login (RFC 9700 section 4.14.2). The
device's state is read in the granting transaction, so a suspension wins. Tokens are stored as hashes, and the session's
binding key is encrypted under a key that only replicas hold: a copy of the database grants no access.

A login interrupted after its last message starts over; the answer is not stored. States of a token: issued, used (a
refresh token), expired, or revoked with a reason (reuse, keys rotated, device revoked).

Proofs of possession: their sequence numbers are consumed in the database, one row per call until the token expires.
That costs one commit per call. Unlike a window in memory, it prevents replay across replicas and restarts.

The cryptography of the messages is in `qflare.protocol.login` and `qflare.protocol.possession`.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto.signing import InvalidKeyError, PublicKey, algorithm_of
from qflare.crypto.symmetric import UnsealError, decrypt, encrypt, hkdf_expand
from qflare.protocol.handshake import HandshakeError
from qflare.protocol.login import LoginServer, PendingLogin
from qflare.protocol.possession import METADATA_KEY, Refresh, check_call
from qflare.times import timestamp_of
from qflare.v1 import security_pb2
from qflare_server.context import Context, UnprovenKeyError
from qflare_server.errors import (
    DeviceRevokedError,
    DeviceSuspendedError,
    UnauthenticatedError,
)
from qflare_server.keys import ServerKeys
from qflare_server.storage.records import UserToken
from qflare_server.storage.repository import audit, devices, tokens
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.devices import LoginKey
from qflare_server.storage.tables import DeviceState, RiskLevel, TokenKind
from qflare_server.use_cases.access.authentication import (
    MAX_TOKEN_CHARACTERS,
    MAY_CALL,
    Principal,
    hash_secret,
    mint_secret,
    sole_value,
)
from qflare_server.use_cases.access.failed_attempts import FailedAttempts, RefusedError
from qflare_server.use_cases.access.rate_limits import hourly_budget

ACCESS_PREFIX: Final = "qfx1"
REFRESH_PREFIX: Final = "qfr1"
AUTHORIZATION: Final = "authorization"
_BEARER: Final = "bearer"
NONCE_MEMORY: Final = timedelta(minutes=5)
MAX_TOKENS_OF_DEVICE: Final = 128
"""Maximum access and refresh tokens stored per device, used ones included."""
_REUSED: Final = "refresh token used twice"


@dataclass(frozen=True)
class _NewTokens:
    """A grant before it is stored: the message for the device, and ids and hashes of its tokens."""

    message: security_pb2.TokenGrant = field(repr=False)
    access: tuple[str, str]
    refresh: tuple[str, str]
    access_expires_at: datetime
    refresh_expires_at: datetime


class Login:
    """Login use cases; thread-safe."""

    def __init__(self, context: Context, keys: ServerKeys) -> None:
        self._context = context
        self._keys = keys
        self._refusals = FailedAttempts(context)
        per_hour = context.config.max_device_records_per_hour
        self._logins = hourly_budget(per_hour, "logins")
        self._refreshes = hourly_budget(per_hour, "token refreshes")
        self._binding_kek = hkdf_expand(keys.state_key, b"qflare/v1/stored binding key")
        self._protocol = LoginServer(
            realm=keys.realm, state_key=keys.state_key, decapsulate=keys.decapsulate
        )

    def begin(
        self, caller: Caller, hello: security_pb2.SessionHello, tls_group: str
    ) -> security_pb2.SessionChallenge:
        """Answer the first half of a login; reads and writes nothing.

        Args:
            caller: The caller.
            hello: The hello as received.
            tls_group: TLS key exchange group of the connection, empty without TLS.

        Raises:
            UnauthenticatedError: The hello is not addressed to this coordinator.
        """
        try:
            return self._protocol.challenge(hello, tls_group, self._context.clock())
        except HandshakeError as error:
            raise self._refused(caller, hello.device_id, error) from error

    def authenticate(
        self, caller: Caller, proof: security_pb2.SessionProof
    ) -> security_pb2.SealedTokenGrant:
        """Finish a login: check the device's proof and grant tokens.

        Raises:
            UnauthenticatedError: The proof is wrong, late or replayed, or the device is not enrolled with this key.
            DeviceRevokedError: The device is revoked.
            DeviceSuspendedError: The device is suspended.
            TooManyRequestsError: The device has used up its logins of the hour.
        """
        at = self._context.clock()
        device_id = ""
        try:
            pending = self._protocol.open_proof(proof, at)
            device_id = pending.device_id
            session_keys = pending.verify(self._enrolled_key(pending))
            self._logins.take(device_id)
            minted = self._mint(at)
            sealed_key = self._seal_binding(pending.session_id, session_keys.binding_key)
            self._start(caller, pending, minted, sealed_key, at)
        except (HandshakeError, RefusedError) as error:
            raise self._refused(caller, device_id, error) from error
        except (DeviceRevokedError, DeviceSuspendedError) as error:
            self._record(caller, device_id, error)
            raise
        return session_keys.seal_grant(minted.message)

    def refresh(
        self, caller: Caller, request: security_pb2.SessionRefresh
    ) -> security_pb2.SealedTokenGrant:
        """Exchange a refresh token for the next tokens of its login.

        Raises:
            UnauthenticatedError: The token is unknown, expired, revoked or used, or the proof is wrong.
            DeviceRevokedError: The device is revoked.
            DeviceSuspendedError: The device is suspended.
            TooManyRequestsError: The device has used up its refreshes of the hour; the token stays valid.
        """
        at = self._context.clock()
        device_id = ""
        try:
            token = self._refresh_token(request)
            device_id = token.device_id or ""
            refresh = Refresh.check(self._open_binding(token), request)
            self._refreshes.take(device_id)
            minted = self._mint(at)
            if token.used_at is None and self._continue(token, minted, at):
                return refresh.seal_grant(minted.message)
            self._revoke_reused(caller, token, at)
            raise UnauthenticatedError
        except (HandshakeError, RefusedError) as error:
            raise self._refused(caller, device_id, error) from error
        except (DeviceRevokedError, DeviceSuspendedError) as error:
            self._record(caller, device_id, error)
            raise

    def check_pop(
        self,
        principal: Principal,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]] | None,
        first_message: bytes,
    ) -> None:
        """Check a device's proof of possession of its session's binding key, if the configuration requires proofs.

        Args:
            principal: The caller, from `Authentication.admit`.
            method: Full name of the method.
            metadata: Metadata of the call.
            first_message: First or only request message, as received.

        Raises:
            UnauthenticatedError: The proof is missing, wrong or replayed.
        """
        if not self._context.config.require_pop or principal.device_id is None:
            return
        try:
            access_token, proof = _credentials(metadata)
            key = self._open_binding_of(principal)
            sequence = check_call(key, access_token, method, first_message, proof)
        except HandshakeError as error:
            raise UnauthenticatedError from error
        self._use_up(f"pop:{principal.token_id}:{sequence}")

    def _enrolled_key(self, pending: PendingLogin) -> PublicKey:
        """Return the device's current key, if signed evidence binds it to the device."""
        with self._context.database.read() as session:
            key = _public_key(devices.find_login_key(session, pending.device_id))
        try:
            self._context.identities.require(pending.device_id, key.key_id)
        except UnprovenKeyError as error:
            raise RefusedError(f"unproven key: {error}") from error
        return key

    def _start(
        self,
        caller: Caller,
        pending: PendingLogin,
        minted: _NewTokens,
        sealed_key: bytes,
        at: datetime,
    ) -> None:
        nonce = f"login:{pending.session_id}"
        event = Event(
            "device.logged_in",
            f"device:{pending.device_id}",
            details={"session_id": pending.session_id, "key_id": pending.signature_key_id},
        )

        def work(session: Session) -> None:
            if not tokens.use_nonce(session, nonce, at + NONCE_MEMORY):
                raise RefusedError("the login has been finished already")
            device = _require_may_call(devices.find_login_key(session, pending.device_id))
            if device.key_id != pending.signature_key_id:
                raise RefusedError("the device has other keys")
            key = devices.get_key(session, pending.signature_key_id)
            if key is None or key.retired_at is not None:
                raise RefusedError("the device's key is retired")
            _store(session, device.device_id, pending.session_id, minted, sealed_key, at)
            audit.record(session, caller, event, at)

        self._context.database.write(work)

    def _refresh_token(self, request: security_pb2.SessionRefresh) -> UserToken:
        if len(request.refresh_token) > MAX_TOKEN_CHARACTERS:
            raise RefusedError("unknown refresh token")
        with self._context.database.read() as session:
            token = tokens.find_by_hash(session, hash_secret(request.refresh_token))
            if token is None or token.kind != TokenKind.REFRESH.value:
                raise RefusedError("unknown refresh token")
        if token.family_id != request.session_id:
            raise RefusedError("refresh token of another session")
        if token.revoked_at is not None:
            raise RefusedError(f"refresh token is revoked: {token.revoked_reason}")
        if token.expires_at is None or token.expires_at <= self._context.clock():
            raise RefusedError("refresh token has expired")
        return token

    def _continue(self, token: UserToken, minted: _NewTokens, at: datetime) -> bool:
        """Consume a refresh token and store the next tokens; return False if it was used or revoked concurrently."""

        def work(session: Session) -> bool:
            device = _require_may_call(devices.find_login_key(session, token.device_id or ""))
            if not tokens.consume(session, token.id, at):
                return False
            assert token.binding_key is not None
            _store(session, device.device_id, token.family_id or "", minted, token.binding_key, at)
            return True

        return self._context.database.write(work)

    def _revoke_reused(self, caller: Caller, token: UserToken, at: datetime) -> None:
        """Revoke every token of a login whose refresh token was reused, a sign of theft."""
        event = Event(
            "token.reused",
            f"device:{token.device_id}",
            RiskLevel.HIGH,
            {"token_id": token.id, "session_id": token.family_id},
        )

        def work(session: Session) -> None:
            if tokens.revoke_family(session, token.family_id or "", _REUSED, at):
                audit.record(session, caller, event, at)

        self._context.database.write(work)

    def _mint(self, at: datetime) -> _NewTokens:
        config = self._context.config
        access_expires = at + timedelta(seconds=config.access_token_s)
        refresh_expires = at + timedelta(seconds=config.refresh_token_s)
        access_id, access, access_hash = mint_secret(ACCESS_PREFIX)
        refresh_id, refresh, refresh_hash = mint_secret(REFRESH_PREFIX)
        message = security_pb2.TokenGrant(
            access_token=access,
            refresh_token=refresh,
            access_expire_time=timestamp_of(access_expires),
            refresh_expire_time=timestamp_of(refresh_expires),
            keyset_version=self._keys.keyset_version,
        )
        return _NewTokens(
            message,
            (access_id, access_hash),
            (refresh_id, refresh_hash),
            access_expires,
            refresh_expires,
        )

    def _seal_binding(self, session_id: str, key: bytes) -> bytes:
        return encrypt(self._binding_kek, key, session_id.encode())

    def _open_binding(self, token: UserToken) -> bytes:
        return self._unseal(token.binding_key, token.family_id)

    def _open_binding_of(self, principal: Principal) -> bytes:
        with self._context.database.read() as session:
            token = tokens.get_token(session, principal.token_id or "")
            family_id = None if token is None else token.family_id
        return self._unseal(principal.binding_key, family_id)

    def _unseal(self, sealed: bytes | None, session_id: str | None) -> bytes:
        if sealed is None or session_id is None:
            raise HandshakeError("the token is bound to no key")
        try:
            return decrypt(self._binding_kek, sealed, session_id.encode())
        except UnsealError as error:
            raise HandshakeError("the stored binding key does not open") from error

    def _use_up(self, nonce: str) -> None:
        at = self._context.clock()
        expires = at + timedelta(seconds=self._context.config.access_token_s)

        def work(session: Session) -> bool:
            return tokens.use_nonce(session, nonce, expires)

        if not self._context.database.write(work):
            raise UnauthenticatedError

    def _refused(self, caller: Caller, device_id: str, error: Exception) -> UnauthenticatedError:
        self._record(caller, device_id, error)
        return UnauthenticatedError()

    def _record(self, caller: Caller, device_id: str, error: Exception) -> None:
        subject = f"device:{device_id}" if _is_device_id(device_id) else "login"
        self._refusals.record(caller, "login.refused", subject, str(error))


def _is_device_id(text: str) -> bool:
    """Return whether a text is a well-formed device id; malformed ids are not recorded."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _store(
    session: Session, device_id: str, family_id: str, minted: _NewTokens, key: bytes, at: datetime
) -> None:
    tokens.insert_session(
        session,
        [
            (TokenKind.ACCESS, *minted.access, minted.access_expires_at),
            (TokenKind.REFRESH, *minted.refresh, minted.refresh_expires_at),
        ],
        device_id=device_id,
        family_id=family_id,
        binding_key=key,
        at=at,
    )
    tokens.delete_oldest_of_device(session, device_id, MAX_TOKENS_OF_DEVICE)


def _require_may_call(device: LoginKey | None) -> LoginKey:
    if device is None:
        raise RefusedError("unknown device")
    if device.state == DeviceState.REVOKED.value:
        raise DeviceRevokedError
    if device.state not in MAY_CALL:
        raise DeviceSuspendedError
    return device


def _public_key(device: LoginKey | None) -> PublicKey:
    if device is None or device.algorithm is None or device.public_key is None:
        raise RefusedError("unknown device, or one without keys")
    try:
        return PublicKey(algorithm_of(device.algorithm), device.public_key)
    except InvalidKeyError as error:
        raise RefusedError("the stored key of the device is not valid") from error


def bearer_of(value: object) -> str | None:
    """Return the token of an authorization value; None if it has another scheme, in any case (RFC 9110, 11.1)."""
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    return token.strip(" ") if scheme.lower() == _BEARER else None


def _credentials(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[str, bytes]:
    """Return the access token and the proof of possession from a call's metadata."""
    value, proof = (sole_value(metadata, key) for key in (AUTHORIZATION, METADATA_KEY))
    token = bearer_of(value)
    if token is None or not isinstance(proof, bytes):
        raise HandshakeError("the call carries no proof of possession")
    return token, proof
