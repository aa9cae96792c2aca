"""The optional log-in with an OpenID Connect provider; its library is in the extra ``qflare[oidc]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qflare_server.config import ConfigError
from qflare_server.context import Context

if TYPE_CHECKING:
    from qflare_server.use_cases.access.oidc_provider import OidcProvider
    from qflare_server.use_cases.access.oidc_tokens import OidcTokens


@dataclass(frozen=True)
class Oidc:
    """The provider, and the verification of its tokens."""

    provider: OidcProvider
    tokens: OidcTokens


def open_oidc(context: Context) -> Oidc | None:
    """Return the parts of the configured provider; None without one.

    Raises:
        ConfigError: The extra is not installed, or a file cannot be used.
    """
    if not context.config.oidc_issuer:
        return None
    try:
        from qflare_server.use_cases.access.oidc_provider import OidcProvider  # noqa: PLC0415
        from qflare_server.use_cases.access.oidc_tokens import OidcTokens  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"QFLARE_OIDC_ISSUER needs {error.name}", remedy="pip install 'qflare[oidc]'"
        ) from error
    try:
        provider = OidcProvider(context.config)
    except OSError as error:
        raise ConfigError(f"QFLARE_OIDC_CA_FILE: {error.strerror or error}") from error
    return Oidc(provider, OidcTokens(context, provider))
