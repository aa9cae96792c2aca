"""Login: access tokens on demand, refreshed before they expire.

Invariants: one login or refresh at a time; tokens stay in memory; an interrupted login is started anew, since a session
is granted tokens only once; a failed refresh is followed by a login, since its token may be spent. The device's clock
is not trusted: if it makes a new token look expired, the token is used until the coordinator refuses it.

The cryptography of the messages is elsewhere (see `qflare.protocol.login` and `qflare.protocol.possession`).
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import Message

from qflare.protocol.handshake import HandshakeError
from qflare.protocol.login import DeviceLogin, SessionKeys
from qflare.protocol.possession import METADATA_KEY, CallProver, Refresh
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import (
    AuthenticationError,
    QflareClientError,
    RejectedError,
    VerificationError,
)
from qflare_client.keystore.identity import Identity
from qflare_client.rpc.caller import Calls
from qflare_client.rpc.transport import Metadata
from qflare_client.trust.keyset import Trust

_log = logging.getLogger(__name__)

_AUTHORIZATION = "authorization"
_USED_SHARE = 0.8
"""Fraction of an access token's lifetime after which it is refreshed."""


@dataclass(frozen=True)
class _Session:
    """A login and its current tokens."""

    keys: SessionKeys
    grant: security_pb2.TokenGrant = field(repr=False)
    prover: CallProver
    refresh_at: float | None
    """Monotonic time in seconds at which the tokens are due for refresh; None means never."""

    @property
    def authorization(self) -> str:
        return f"Bearer {self.grant.access_token}"


class Login:
    """Credentials of an enrolled device; thread-safe.

    Args:
        calls: Unauthenticated calls.
        trust: The coordinator's keyset.
        identity: The device.
        pending: The device with the keys of an interrupted rotation; used when the coordinator no longer accepts the
            current ones.
        settle: Called when the coordinator has accepted a login with the pending keys.
        prove_possession: Prove possession of the session's key with every call.
        required_tls_group: TLS group that the coordinator must report; None accepts any.
    """

    def __init__(
        self,
        calls: Calls,
        trust: Trust,
        identity: Identity,
        *,
        pending: Identity | None = None,
        settle: Callable[[Identity], None] | None = None,
        prove_possession: bool = False,
        required_tls_group: str | None = None,
    ) -> None:
        self._calls = calls
        self._trust = trust
        self._identity = identity
        self._pending = pending
        self._settle = settle or (lambda _: None)
        self._prove_possession = prove_possession
        self._required_tls_group = required_tls_group
        self._lock = threading.Lock()
        self._session: _Session | None = None

    @property
    def identity(self) -> Identity:
        """The device, with the keys that the coordinator accepts."""
        return self._identity

    def use(self, identity: Identity) -> None:
        """Log in as this device from now on."""
        with self._lock:
            self._identity = identity
            self._pending = None
            self._session = None

    def metadata(self, method: str, first_message: Message) -> Metadata:
        """See `qflare_client.rpc.caller.Credentials`.

        Raises:
            QflareClientError: No token could be obtained.
        """
        session = self._session
        if session is None or _is_due(session):
            session = self._renewed()
        metadata: Metadata = ((_AUTHORIZATION, session.authorization),)
        if self._prove_possession:
            proof = session.prover.prove(method, first_message.SerializeToString())
            metadata += ((METADATA_KEY, proof),)
        return metadata

    def refused(self, metadata: Metadata) -> None:
        """See `qflare_client.rpc.caller.Credentials`."""
        token = dict(metadata).get(_AUTHORIZATION)
        with self._lock:
            if self._session is not None and self._session.authorization == token:
                self._session = None

    def _renewed(self) -> _Session:
        with self._lock:
            session = self._session
            if session is not None and not _is_due(session):
                return session  # another thread was faster
            if session is not None:
                session = self._refreshed(session)
            self._session = session or self._logged_in()
            self._trust.at_least(self._session.grant.keyset_version)
            return self._session

    def _refreshed(self, session: _Session) -> _Session | None:
        """Return the session with refreshed tokens; None if the refresh failed."""
        keys = session.keys
        refresh = Refresh.start(keys.binding_key, keys.session_id, session.grant.refresh_token)
        transport = self._calls.transport
        request = messages.RefreshTokenRequest(refresh=refresh.request)
        try:
            # A single attempt: if its response is lost, the token is spent.
            answer = transport.unary(transport.stub.RefreshToken, request)
            return _session(keys, refresh.open_grant(answer.grant))
        except (QflareClientError, HandshakeError) as error:
            _log.info("refresh failed, logging in again: %s", error)
            return None

    def _logged_in(self) -> _Session:
        try:
            return self._login_as(self._identity)
        except AuthenticationError:
            if self._pending is None:
                raise
        session = self._login_as(self._pending)
        self._identity, self._pending = self._pending, None
        self._settle(self._identity)
        return session

    def _login_as(self, identity: Identity) -> _Session:
        key_id = self._trust.session_key().key_id
        try:
            return self._calls.repeat(lambda _: self._attempt(identity))
        except RejectedError:
            # The coordinator may have rotated the key that the hello was encapsulated to.
            self._trust.refresh()
            if self._trust.session_key().key_id == key_id:
                raise
        return self._calls.repeat(lambda _: self._attempt(identity))

    def _attempt(self, identity: Identity) -> _Session:
        """Log in, once."""
        transport = self._calls.transport
        login = DeviceLogin(
            realm=identity.realm,
            device_id=identity.device_id,
            signing_key=identity.keys.signing,
            server_key=self._trust.session_key(),
            required_tls_group=self._required_tls_group,
        )
        begin = messages.BeginAuthenticationRequest(hello=login.hello())
        challenge = transport.unary(transport.stub.BeginAuthentication, begin).challenge
        try:
            keys, proof = login.prove(challenge)
            answer = transport.unary(
                transport.stub.Authenticate, messages.AuthenticateRequest(proof=proof)
            )
            return _session(keys, keys.open_grant(answer.grant))
        except HandshakeError as error:
            raise VerificationError(f"login: {error}") from error


def _session(keys: SessionKeys, grant: security_pb2.TokenGrant) -> _Session:
    life_s = grant.access_expire_time.ToNanoseconds() / 1e9 - time.time()
    refresh_at = time.monotonic() + life_s * _USED_SHARE if life_s > 0 else None
    return _Session(keys, grant, CallProver(keys.binding_key, grant.access_token), refresh_at)


def _is_due(session: _Session) -> bool:
    return session.refresh_at is not None and time.monotonic() >= session.refresh_at
