"""The OpenID Connect provider of administrators: its metadata and keys, cached.

Constructor: ``OidcProvider(config)``. Both are fetched again after `REFRESH_S`, and when a token names an unknown key;
never more often than once per `INTERVAL_S`, and by one thread at a time while others continue with what is cached.
Nothing that a caller sends can cause more requests. Keys older than `MAX_AGE_S` are not used.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, TypeAlias

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey, import_key

from qflare.openid import (
    Answer,
    ProviderError,
    ProviderMetadata,
    basic_credentials,
    discover,
    request_json,
    trust,
)
from qflare_server.config import ServerConfig
from qflare_server.errors import IdentityProviderUnavailableError
from qflare_server.keys.secret_files import read_secret

logger = logging.getLogger(__name__)

REFRESH_S: Final = 600.0
MAX_AGE_S: Final = 3600.0
INTERVAL_S: Final = 60.0
FIRST_INTERVAL_S: Final = 5.0
"""The same as long as nothing has been fetched yet."""
MAX_KEYS: Final = 64
MIN_RSA_BITS: Final = 2048

Key: TypeAlias = RSAKey | ECKey | OKPKey


@dataclass(frozen=True)
class ProviderKeys:
    """Signature keys of a provider by id; `fetched_at` is monotonic, in seconds."""

    fetched_at: float
    metadata: ProviderMetadata
    by_id: Mapping[str, Key] = field(repr=False)


class OidcProvider:
    """Requests to the provider of a configuration; thread-safe.

    Args:
        config: The `oidc_*` settings.
        monotonic: Monotonic clock, in seconds.

    Raises:
        OSError: The file of the authorities cannot be read.
        KeyStoreError: The file of the client's secret cannot be read, or others can read it.
    """

    def __init__(
        self, config: ServerConfig, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._monotonic = monotonic
        self._tls = trust(config.oidc_ca_file)
        self._secret = ""
        if config.oidc_client_secret_file is not None:
            self._secret = read_secret(config.oidc_client_secret_file).decode().strip()
        self._fetching = threading.Lock()
        self._tried_at = float("-inf")
        self._keys: ProviderKeys | None = None

    @property
    def fetched_at(self) -> float | None:
        """When the keys were fetched, by the monotonic clock in seconds; None without keys."""
        held = self._keys
        return None if held is None else held.fetched_at

    def keys(self, key_id: str | None = None) -> ProviderKeys:
        """Return the metadata and the keys.

        Args:
            key_id: A key that is looked for: if it is unknown, the keys are fetched again, within the limits.

        Raises:
            IdentityProviderUnavailableError: None could be fetched within the last hour.
        """
        if self._is_due(key_id):
            self._refresh()
        held = self._keys
        if held is None or self._monotonic() - held.fetched_at > MAX_AGE_S:
            raise IdentityProviderUnavailableError
        return held

    def redeem(self, form: Mapping[str, str]) -> Answer:
        """Post a grant to the token endpoint, with the credentials of this client.

        Raises:
            IdentityProviderUnavailableError: The provider does not answer.
        """
        metadata, client_id = self.keys().metadata, self._config.oidc_client_id
        sent, authorization = {**form, "client_id": client_id}, ""
        if self._secret and "client_secret_basic" in metadata.token_auth_methods:
            authorization = basic_credentials(client_id, self._secret)
        elif self._secret:
            sent["client_secret"] = self._secret
        try:
            return request_json(metadata.token_endpoint, self._tls, sent, authorization)
        except ProviderError as error:
            logger.warning("identity provider: token endpoint: %s", error)
            raise IdentityProviderUnavailableError from error

    def _is_due(self, key_id: str | None) -> bool:
        held = self._keys
        if held is None:
            return True
        is_unknown = key_id is not None and key_id not in held.by_id
        return is_unknown or self._monotonic() - held.fetched_at > REFRESH_S

    def _refresh(self) -> None:
        if not self._fetching.acquire(blocking=False):
            return
        try:
            interval_s = FIRST_INTERVAL_S if self._keys is None else INTERVAL_S
            if self._monotonic() - self._tried_at < interval_s:
                return
            self._keys = self._fetch()
        except ProviderError as error:
            logger.warning("identity provider: %s", error)
        finally:
            self._fetching.release()

    def _fetch(self) -> ProviderKeys:
        self._tried_at = self._monotonic()
        metadata = discover(self._config.oidc_issuer, self._tls)
        answer = request_json(metadata.jwks_uri, self._tls)
        entries = answer.values.get("keys")
        if answer.status != HTTPStatus.OK or not isinstance(entries, list):
            raise ProviderError("jwks_uri does not answer with keys")
        found = [key for entry in entries[:MAX_KEYS] if (key := _usable(entry)) is not None]
        by_id = {key.kid or "": key for key in found}
        if not by_id:
            raise ProviderError("the provider has no signature key that can be used")
        return ProviderKeys(self._tried_at, metadata, by_id)


def _usable(entry: Any) -> Key | None:
    """Return a public signature key of a key set; None for any other entry."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    if entry.get("kty") not in {"RSA", "EC", "OKP"}:
        return None
    try:
        key = import_key(entry)
        if isinstance(key, RSAKey) and key.public_key.key_size < MIN_RSA_BITS:
            return None
    except (JoseError, ValueError, TypeError):
        return None
    return key if isinstance(key, RSAKey | ECKey | OKPKey) else None
