"""Bearer tokens of an OpenID Connect provider: a signed JWT becomes a principal with roles, here and nowhere else.

Constructor: ``OidcTokens(context, provider)``. A verified token is cached until it expires or the provider's keys are
fetched again. Sources: RFC 7519, RFC 8725 (JWT best current practices), RFC 9068, OpenID Connect Core 1.0, 3.1.3.7.
"""

import hmac
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

from joserfc import jws, jwt
from joserfc.errors import JoseError

from qflare_server.config import ServerConfig
from qflare_server.context import Context
from qflare_server.errors import UnauthenticatedError
from qflare_server.use_cases.access.authentication import (
    JWT_PREFIX,
    MAX_JWT_CHARACTERS,
    Principal,
    hash_secret,
)
from qflare_server.use_cases.access.oidc_provider import OidcProvider
from qflare_server.use_cases.access.roles import ADMINISTRATIVE, Role

logger = logging.getLogger(__name__)

MAX_LIFETIME_S: Final = 86_400
LEEWAY_S: Final = 30
MAX_SUBJECT_CHARACTERS: Final = 180
MAX_REMEMBERED: Final = 10_000
TYPES: Final = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})


class OidcTokens:
    """Verifies the tokens of one provider; thread-safe."""

    def __init__(self, context: Context, provider: OidcProvider) -> None:
        self._context = context
        self._provider = provider
        config = context.config
        self._issuer, self._roles_claim = config.oidc_issuer, config.oidc_roles_claim
        self._clients = config.oidc_clients
        self._algorithms = list(config.oidc_accepted_algorithms)
        self._mapping = role_mapping(config)
        self._audiences = list(config.oidc_audiences)
        self._known: dict[str, tuple[float, Principal]] = {}

    def identify(self, token: str, *, nonce: str | None = None) -> Principal:
        """Return the principal of a token; without a mapped role, it has none.

        Args:
            token: A signed JWT.
            nonce: Of the dashboard's log-in that the token must belong to; None for a bearer token.

        Raises:
            UnauthenticatedError: The token is malformed, expired, unsigned, of another issuer, audience or log-in,
                or its key or algorithm is not accepted: one text for all.
            IdentityProviderUnavailableError: The provider's keys cannot be fetched.
        """
        if len(token) > MAX_JWT_CHARACTERS or not token.startswith(JWT_PREFIX):
            raise UnauthenticatedError
        token_hash = hash_secret(token)
        self._provider.keys()
        if nonce is None and (known := self.recognize(token_hash)) is not None:
            return known
        try:
            claims, fetched_at = self._verified(token)
            principal = self._principal(claims, nonce)
        except (JoseError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            logger.info("token of the identity provider refused: %s", type(error).__name__)
            raise UnauthenticatedError from error
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        self._known[token_hash] = fetched_at, principal
        return principal

    def recognize(self, token_hash: str) -> Principal | None:
        """Return the principal of a token that was verified before; None if it is over, or the keys are newer.

        This asks nothing of the provider.
        """
        found = self._known.get(token_hash)
        if found is None or found[0] != self._provider.fetched_at:
            return None
        expires_at = found[1].expires_at
        if expires_at is None or expires_at <= self._context.clock():
            self._known.pop(token_hash, None)
            return None
        return found[1]

    def _verified(self, token: str) -> tuple[dict[str, Any], float]:
        """Return the claims of a token whose signature verifies, and when its key was fetched."""
        header = jws.extract_compact(token.encode()).headers()
        key_id, algorithm = header.get("kid", ""), header.get("alg")
        if algorithm not in self._algorithms or not isinstance(key_id, str):
            raise ValueError("algorithm or key id")
        if str(header.get("typ", "")).lower() not in TYPES:
            raise ValueError("type")
        keys = self._provider.keys(key_id)
        key = keys.by_id[key_id]
        if key.alg is not None and key.alg != algorithm:
            raise ValueError("algorithm of the key")
        return jwt.decode(token, key, algorithms=self._algorithms).claims, keys.fetched_at

    def _principal(self, claims: dict[str, Any], nonce: str | None) -> Principal:
        now = self._context.clock().timestamp()
        registry = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self._issuer},
            aud={"essential": True, "values": self._audiences},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        registry.validate(claims)
        if not 0 < claims["exp"] - claims["iat"] <= MAX_LIFETIME_S:
            raise ValueError("lifetime")
        for name in ("azp", "client_id"):
            if name in claims and claims[name] not in self._clients:
                raise ValueError(name)
        if nonce is not None and not hmac.compare_digest(str(claims.get("nonce")), nonce):
            raise ValueError("nonce")
        roles = frozenset(
            role
            for value in values_at(claims, self._roles_claim)
            for role in self._mapping.get(value, ())
        )
        expires_at = datetime.fromtimestamp(claims["exp"] + LEEWAY_S, UTC)
        return Principal(
            principal_name(self._issuer, claims["sub"]),
            roles & ADMINISTRATIVE,
            authentication_method="oidc",
            expires_at=expires_at,
        )


def principal_name(issuer: str, subject: Any) -> str:
    """Return the name of a user in the audit log: the host of the provider and its stable subject.

    Raises:
        ValueError: The subject is not 1 to 180 printable ASCII characters.
    """
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT_CHARACTERS:
        raise ValueError("subject")
    if not (subject.isascii() and subject.isprintable()):
        raise ValueError("subject")
    return f"oidc:{urlsplit(issuer).hostname}:{subject}"


def values_at(claims: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Return the texts at a dotted path of nested claims: of a list or a single text; else none.

    A claim whose own name is the whole path, such as a URL with dots, is looked for first.
    """
    found: Any = claims.get(path)
    if found is None:
        found = claims
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return (found,)
    if not isinstance(found, list):
        return ()
    return tuple(value for value in found if isinstance(value, str))


def role_mapping(config: ServerConfig) -> Mapping[str, frozenset[Role]]:
    """Return the roles by value of the roles claim.

    Raises:
        ValueError: A role is unknown, or not an administrative one.
    """
    found: dict[str, frozenset[Role]] = {}
    for value, name in config.oidc_role_pairs:
        role = Role(name)
        if role not in ADMINISTRATIVE:
            raise ValueError(f"{name} is no role of administrators")
        found[value] = found.get(value, frozenset()) | {role}
    return found
