"""Dashboard sessions: an admin token is exchanged for a short-lived secret in a browser cookie.

Constructor: ``DashboardLogin(context, authentication)``.

Sessions are kept in the memory of this process, with the token's hash only. Each page request is authorized by the
token's roles (`access.roles`), so revoking the token ends access immediately. Attempts are rate-limited per address,
and failed ones are recorded in the audit log.
"""

import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.errors import (
    PermissionDeniedError,
    QflareError,
    UnauthenticatedError,
)
from qflare_server.storage.repository import audit
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.use_cases.access.authentication import Authentication, Principal, hash_secret
from qflare_server.use_cases.access.failed_attempts import FailedAttempts
from qflare_server.use_cases.access.rate_limits import RateLimiter, network_of
from qflare_server.use_cases.access.roles import ACCESS

ADMIN_SERVICE: Final = "/qflare.v1.AdminService/"
LOGIN_METHOD: Final = ADMIN_SERVICE + "GetCoordinatorStatus"
"""Method that a role must allow for a dashboard login."""
ATTEMPTS_PER_SECOND: Final = 0.5
MAX_LOGINS: Final = 1000
SECRET_BYTES: Final = 32
SUBJECT: Final = "dashboard"


@dataclass(frozen=True)
class _DashboardSession:
    token_hash: str = field(repr=False)
    expires_at: datetime
    user: Principal | None = None
    """Of an identity provider; then there is no token of this coordinator."""


class DashboardLogin:
    """Dashboard login, authorization and logout; thread-safe."""

    def __init__(self, context: Context, authentication: Authentication) -> None:
        self._context = context
        self._authentication = authentication
        self._refusals = FailedAttempts(context)
        self._attempts = RateLimiter(ATTEMPTS_PER_SECOND, time.monotonic)
        self._lock = threading.Lock()
        self._logins: dict[str, _DashboardSession] = {}

    def log_in(self, token: str, peer_address: str) -> str:
        """Log in: return a session secret, valid for `dashboard_login_s`; only its hash is kept.

        Args:
            token: Admin token.
            peer_address: Address of the browser without its port; attempts are counted per address.

        Raises:
            TooManyRequestsError: Too many failed attempts from this address; a valid token is still admitted.
            UnauthenticatedError: The token is unknown, expired or revoked.
            PermissionDeniedError: The token is not an admin token.
        """
        caller = Caller("anonymous", peer_address, "token")
        try:
            principal = self._authentication.admit(LOGIN_METHOD, token)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            self._refusals.record(caller, "dashboard.login_refused", SUBJECT, str(error))
            self._attempts.take(network_of(peer_address) or peer_address)
            raise
        self._record(principal, peer_address, "dashboard.logged_in")
        return self._remember(hash_secret(token))

    def log_in_user(self, user: Principal, peer_address: str) -> str:
        """Log in a user whom the identity provider has authenticated; return a session secret.

        The session ends with the provider's token, and after `dashboard_login_s`.

        Args:
            user: From the provider's token.
            peer_address: Of the browser, without its port.

        Raises:
            UnauthenticatedError: The token has expired.
            PermissionDeniedError: No role of the user may see the dashboard.
        """
        try:
            self._authentication.admit_user(LOGIN_METHOD, user)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            caller = user.caller(peer_address)
            self._refusals.record(caller, "dashboard.login_refused", SUBJECT, str(error))
            raise
        self._record(user, peer_address, "dashboard.logged_in")
        return self._remember("", user)

    def admit(self, secret: str, method: str) -> Principal:
        """Authorize a session for a method of the administrators' service; return its principal.

        Args:
            secret: Session secret from `log_in`.
            method: Short name of the method, such as `ListDevices`.

        Raises:
            UnauthenticatedError: The session has ended, or its token is no longer valid.
            PermissionDeniedError: The token's roles do not allow the method.
        """
        with self._lock:
            found = self._logins.get(hash_secret(secret))
        if found is None or found.expires_at <= self._context.clock():
            raise UnauthenticatedError
        if found.user is not None:
            return self._authentication.admit_user(ADMIN_SERVICE + method, found.user)
        return self._authentication.admit_hash(ADMIN_SERVICE + method, found.token_hash)

    def log_out(self, secret: str, peer_address: str) -> None:
        """End a session. Idempotent."""
        try:
            principal = self.admit(secret, "GetCoordinatorStatus")
        except QflareError:
            principal = None
        with self._lock:
            self._logins.pop(hash_secret(secret), None)
        if principal is not None:
            self._record(principal, peer_address, "dashboard.logged_out")

    def _remember(self, token_hash: str, user: Principal | None = None) -> str:
        secret = secrets.token_urlsafe(SECRET_BYTES)
        now = self._context.clock()
        expires_at = now + timedelta(seconds=self._context.config.dashboard_login_s)
        with self._lock:
            self._logins = {
                key: login for key, login in self._logins.items() if login.expires_at > now
            }
            while len(self._logins) >= MAX_LOGINS:
                del self._logins[next(iter(self._logins))]
            self._logins[hash_secret(secret)] = _DashboardSession(token_hash, expires_at, user)
        return secret

    def _record(self, principal: Principal, peer_address: str, event_type: str) -> None:
        caller, event = principal.caller(peer_address), Event(event_type, SUBJECT)
        at = self._context.clock()

        def work(session: Session) -> None:
            audit.record(session, caller, event, at)

        self._context.database.write(work)


def may_call(principal: Principal, method: str) -> bool:
    """Return whether the roles of an administrator allow a method of the administrators' service."""
    return bool(principal.roles & ACCESS[ADMIN_SERVICE + method])
