"""OpenID Connect on the wire: discovery, bounded requests to a provider, and PKCE.

The coordinator and `qflare-admin` use the same requests: over https except on loopback, without redirects, and with
limits on size and time. Sources: OpenID Connect Discovery 1.0, RFC 7636 (PKCE), RFC 8414.
"""

import base64
import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

MAX_ANSWER_BYTES: Final = 256 * 1024
TIMEOUT_S: Final = 5.0
CHUNK_BYTES: Final = 16 * 1024
DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class ProviderError(Exception):
    """The provider cannot be used: its answer or one of its addresses is not acceptable."""


class ProviderUnreachableError(ProviderError):
    """The provider does not answer, or answers that it is unavailable."""


@dataclass(frozen=True)
class ProviderMetadata:
    """Facts of a discovery document; an empty endpoint is not offered.

    `token_auth_methods` are the ways in which a client may authenticate at the token endpoint.
    """

    issuer: str
    jwks_uri: str
    authorization_endpoint: str
    token_endpoint: str
    device_authorization_endpoint: str
    revocation_endpoint: str
    token_auth_methods: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """An HTTP status, and the JSON object that came with it."""

    status: int
    values: Mapping[str, Any] = field(repr=False)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the answer then is an error."""


def is_acceptable(url: str) -> bool:
    """Return whether a URL may be one of a provider: https, or http on loopback; without user and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username is not None or parts.fragment:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Return the TLS settings of requests to a provider.

    Args:
        ca_file: PEM certificates of the authorities to trust; None means those of the system.

    Raises:
        OSError: The file cannot be read, or holds no certificate.
    """
    return ssl.create_default_context(cafile=ca_file)


def request_json(
    url: str,
    tls: ssl.SSLContext,
    form: Mapping[str, str] | None = None,
    authorization: str = "",
) -> Answer:
    """Send one request, and return its answer: at most 256 KiB within 5 s, without redirects.

    Args:
        url: Of the provider.
        tls: From `trust`.
        form: Fields to post; None means a GET.
        authorization: Value of the Authorization header; empty means none.

    Raises:
        ProviderError: The URL is not acceptable, or the answer is no JSON object or too large.
        ProviderUnreachableError: There is no answer in time, or the status is 5xx or 429.
    """
    if not is_acceptable(url):
        raise ProviderError("an address of the provider is neither https nor on loopback")
    headers = {"Accept": "application/json"}
    if authorization:
        headers["Authorization"] = authorization
    data = None if form is None else urlencode(form).encode()
    opener = build_opener(_NoRedirects, HTTPSHandler(context=tls))
    request = Request(url, data, headers)  # noqa: S310 - the scheme is checked above
    try:
        try:
            response = opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            response = error
        with response:
            status, body = response.status, _read(response)
    except (OSError, http.client.HTTPException) as error:
        raise ProviderUnreachableError(f"no answer: {type(error).__name__}") from error
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
        raise ProviderUnreachableError(f"HTTP status {status}")
    return Answer(status, _parsed(body))


def discover(issuer: str, tls: ssl.SSLContext) -> ProviderMetadata:
    """Return what a provider says of itself.

    Args:
        issuer: URL of the provider, exactly as in its tokens.
        tls: From `trust`.

    Raises:
        ProviderError: The document is another issuer's, or names an address that is not acceptable.
        ProviderUnreachableError: As `request_json`.
    """
    answer = request_json(issuer.rstrip("/") + DISCOVERY_PATH, tls)
    if answer.status != HTTPStatus.OK:
        raise ProviderError(f"discovery: HTTP status {answer.status}")
    document = answer.values
    if document.get("issuer") != issuer:
        raise ProviderError("the discovery document is of another issuer")
    methods = document.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
    return ProviderMetadata(
        issuer,
        _endpoint(document, "jwks_uri", required=True),
        _endpoint(document, "authorization_endpoint"),
        _endpoint(document, "token_endpoint", required=True),
        _endpoint(document, "device_authorization_endpoint"),
        _endpoint(document, "revocation_endpoint"),
        tuple(str(method) for method in methods) if isinstance(methods, list) else (),
    )


def basic_credentials(client_id: str, secret: str) -> str:
    """Return the Authorization header of a client with a secret (RFC 6749, 2.3.1)."""
    pair = f"{quote(client_id, safe='')}:{quote(secret, safe='')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def code_challenge(verifier: str) -> str:
    """Return the S256 challenge of a PKCE verifier (RFC 7636, 4.2)."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _endpoint(document: Mapping[str, Any], name: str, *, required: bool = False) -> str:
    url = document.get(name, "")
    if not url and not required:
        return ""
    if not isinstance(url, str) or not is_acceptable(url):
        raise ProviderError(f"{name} of the discovery document is neither https nor on loopback")
    return url


def _read(response: Any) -> bytes:
    give_up_at, data = time.monotonic() + TIMEOUT_S, bytearray()
    while part := response.read1(CHUNK_BYTES):
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise ProviderError(f"the answer exceeds {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > give_up_at:
            raise TimeoutError
    return bytes(data)


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProviderError("the answer is not JSON") from error
    if not isinstance(values, dict):
        raise ProviderError("the answer is no JSON object")
    return values
