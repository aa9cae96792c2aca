"""Dashboard log-ins with an OpenID Connect provider: authorization code with PKCE, state and nonce.

Constructor: ``OidcLogin(provider, tokens, dashboard_login)``. Between the two requests of a log-in, its secrets are in
a cookie of the browser and nowhere in the coordinator. Requests to the provider are bounded for each address and in
total. Sources: OpenID Connect Core 1.0, 3.1; RFC 7636; RFC 9207.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final
from urllib.parse import urlencode

from qflare.openid import code_challenge
from qflare_server.errors import IdentityProviderUnavailableError, UnauthenticatedError
from qflare_server.use_cases.access.dashboard_login import DashboardLogin
from qflare_server.use_cases.access.oidc_provider import OidcProvider
from qflare_server.use_cases.access.oidc_tokens import OidcTokens
from qflare_server.use_cases.access.rate_limits import RateLimiter

logger = logging.getLogger(__name__)

SECRET_BYTES: Final = 32
PER_ADDRESS_S: Final = 0.5
IN_TOTAL_S: Final = 5.0
EVERYBODY: Final = "everybody"


@dataclass(frozen=True)
class PendingLogin:
    """What a browser keeps between the two requests of a log-in."""

    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)

    @classmethod
    def new(cls) -> "PendingLogin":
        """Return fresh secrets."""
        return cls(*(secrets.token_urlsafe(SECRET_BYTES) for _ in range(3)))

    @classmethod
    def from_cookie(cls, cookie: str) -> "PendingLogin":
        """Return the secrets of a cookie.

        Raises:
            UnauthenticatedError: It is none.
        """
        parts = cookie.split(".")
        if len(parts) != 3 or not all(parts):  # noqa: PLR2004 - state, nonce, verifier
            raise UnauthenticatedError("the log-in took too long, or was begun in another browser")
        return cls(*parts)

    def as_cookie(self) -> str:
        """Return the value of the cookie."""
        return f"{self.state}.{self.nonce}.{self.verifier}"


class OidcLogin:
    """Begins and finishes log-ins; thread-safe."""

    def __init__(
        self, provider: OidcProvider, tokens: OidcTokens, dashboard_login: DashboardLogin
    ) -> None:
        self._provider = provider
        self._tokens = tokens
        self._dashboard_login = dashboard_login
        self._attempts = RateLimiter(PER_ADDRESS_S, time.monotonic, what="log-ins", burst=10)
        self._in_total = RateLimiter(IN_TOTAL_S, time.monotonic, what="log-ins", burst=50)

    def begin(self, client_id: str, redirect_uri: str) -> tuple[str, PendingLogin]:
        """Return where to send the browser, and what it must bring back.

        Args:
            client_id: Client of the dashboard.
            redirect_uri: Where the provider sends the browser afterwards.

        Raises:
            IdentityProviderUnavailableError: The provider does not answer, or offers no log-in.
        """
        metadata = self._provider.keys().metadata
        if not metadata.authorization_endpoint:
            raise IdentityProviderUnavailableError("the provider has no authorization endpoint")
        pending = PendingLogin.new()
        fields = {
            "response_type": "code",
            "scope": "openid",
            "client_id": client_id,
            "redirect_uri": redirect_uri,
            "state": pending.state,
            "nonce": pending.nonce,
            "code_challenge": code_challenge(pending.verifier),
            "code_challenge_method": "S256",
        }
        separator = "&" if "?" in metadata.authorization_endpoint else "?"
        return metadata.authorization_endpoint + separator + urlencode(fields), pending

    def finish(
        self, cookie: str, answer: Mapping[str, str], redirect_uri: str, peer_address: str
    ) -> str:
        """Log in with the answer of the provider; return a session secret, as `DashboardLogin.log_in`.

        Args:
            cookie: `PendingLogin.as_cookie` of the same browser.
            answer: Query of the redirect.
            redirect_uri: As for `begin`.
            peer_address: Of the browser, without its port.

        Raises:
            UnauthenticatedError: The answer is not one to this browser's log-in, or its token is not accepted.
            PermissionDeniedError: The user has no role here.
            TooManyRequestsError: Too many attempts.
            IdentityProviderUnavailableError: The provider does not answer.
        """
        pending = PendingLogin.from_cookie(cookie)
        if not hmac.compare_digest(answer.get("state", "").encode(), pending.state.encode()):
            raise UnauthenticatedError("the answer belongs to another log-in")
        issuer = self._provider.keys().metadata.issuer
        if answer.get("iss", issuer) != issuer or not answer.get("code"):
            raise UnauthenticatedError("the provider did not log you in")
        self._attempts.take(peer_address)
        self._in_total.take(EVERYBODY)
        form = {
            "grant_type": "authorization_code",
            "code": answer["code"],
            "redirect_uri": redirect_uri,
            "code_verifier": pending.verifier,
        }
        redeemed = self._provider.redeem(form)
        token = redeemed.values.get("id_token")
        if redeemed.status != HTTPStatus.OK or not isinstance(token, str):
            logger.warning(
                "identity provider: the token endpoint refused a code: status=%d", redeemed.status
            )
            raise UnauthenticatedError("the provider did not confirm the log-in")
        principal = self._tokens.identify(token, nonce=pending.nonce)
        return self._dashboard_login.log_in_user(principal, peer_address)
