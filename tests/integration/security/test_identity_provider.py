"""Administrators of an OpenID Connect provider: a real one, real tokens, and every token that must not be accepted."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from qflare.v1 import admin_service_pb2 as pb
from qflare_server.cli.main import main
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.errors import UnauthenticatedError
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.use_cases.access.oidc_provider import INTERVAL_S, OidcProvider
from qflare_server.use_cases.access.oidc_tokens import OidcTokens, values_at
from tests.integration.conftest import Deployment
from tests.support.identity_provider import RESOURCE, IdentityProvider, device_tokens

Deploy = Callable[..., Deployment]
JWKS = "/jwks"


@pytest.fixture(scope="module")
def provider() -> Iterator[IdentityProvider]:
    running = IdentityProvider()
    yield running
    running.stop()


def call(deployment: Deployment, method: str, token: str, **fields: Any) -> Any:
    request = getattr(pb, f"{method}Request")(**fields)
    metadata = (("authorization", f"Bearer {token}"),)
    return getattr(deployment.admin, method)(request, metadata=metadata)


def code(deployment: Deployment, method: str, token: str, **fields: Any) -> grpc.StatusCode:
    """Return the status of a call."""
    try:
        call(deployment, method, token, **fields)
    except grpc.RpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.OK


def encoded(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def hmac_signed(provider: IdentityProvider, claims: dict[str, Any]) -> str:
    """Return a token of HS256 whose key is the provider's public key."""
    text = f"{encoded({'alg': 'HS256', 'kid': 'test'})}.{encoded(claims)}"
    digest = hmac.digest(provider.key.as_pem(private=False), text.encode(), hashlib.sha256)
    return f"{text}.{encoded(digest)}"


def test_a_user_of_the_provider_administers_with_the_roles_of_the_claim(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-admins", "of-something-else")
    provider.set_roles("victor", "fl-viewers")
    alice = device_tokens(provider, "alice")["id_token"]
    victor = device_tokens(provider, "victor")["id_token"]

    call(deployment, "IssueAdminToken", alice, name="robot", roles=["viewer"])

    audit = deployment.coordinator.use_cases.audit
    (row,) = audit.list(PageRequest(), AuditFilter(actor="oidc:127.0.0.1:alice")).rows
    assert (row.event_type, row.authentication_method) == ("token.issued", "oidc")
    assert code(deployment, "ListDevices", victor) is grpc.StatusCode.OK
    denied = code(deployment, "IssueAdminToken", victor, name="robot", roles=["admin"])
    assert denied is grpc.StatusCode.PERMISSION_DENIED


def test_without_a_mapped_role_nothing_is_allowed_and_a_role_ends_with_the_next_token(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("bob", "fl-admins")
    assert code(deployment, "ListDevices", device_tokens(provider, "bob")["id_token"]) is (
        grpc.StatusCode.OK
    )

    provider.set_roles("bob", "admin", "viewer")
    without = device_tokens(provider, "bob")["id_token"]

    assert code(deployment, "ListDevices", without) is grpc.StatusCode.PERMISSION_DENIED


def test_an_access_token_for_the_audience_is_accepted_and_an_id_token_is_not(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path, oidc_audience=RESOURCE))
    provider.set_roles("carol", "fl-viewers")
    tokens = device_tokens(provider, "carol", resource=RESOURCE)

    assert code(deployment, "ListDevices", tokens["access_token"]) is grpc.StatusCode.OK
    assert code(deployment, "ListDevices", tokens["id_token"]) is grpc.StatusCode.UNAUTHENTICATED
    foreign = device_tokens(provider, "carol", "other", RESOURCE)["access_token"]
    assert code(deployment, "ListDevices", foreign) is grpc.StatusCode.UNAUTHENTICATED


def test_every_token_that_is_not_the_providers_for_us_is_refused(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    good = provider.claims()
    now = good["iat"]
    stranger = RSAKey.generate_key(2048, {"kid": "test"})
    changes: dict[str, dict[str, Any]] = {
        "another issuer": {"iss": "https://id.example.org"},
        "an issuer with a slash": {"iss": provider.issuer + "/"},
        "another audience": {"aud": "other"},
        "no audience": {"aud": None},
        "another party": {"aud": ["command-line", "other"], "azp": "other"},
        "expired": {"iat": now - 700, "exp": now - 60},
        "no expiry": {"exp": None},
        "valid for years": {"exp": now + 100_000_000},
        "not yet valid": {"nbf": now + 300},
        "issued in the future": {"iat": now + 300},
        "no subject": {"sub": None},
        "a subject of another type": {"sub": ["mallory"]},
        "a subject with a line break": {"sub": "mal\nlory"},
        "an expiry of another type": {"exp": str(now + 600)},
    }
    refused = {what: provider.sign(provider.claims(**changed)) for what, changed in changes.items()}
    whole = provider.sign(good)
    header, claims, signature = whole.split(".")
    elevated = encoded(provider.claims(sub="root"))
    refused |= {
        "algorithm none": f"{encoded({'alg': 'none', 'kid': 'test'})}.{claims}.",
        "HMAC with the public key": hmac_signed(provider, good),
        "another algorithm of the key": jwt.encode(
            {"alg": "PS256", "kid": "test"},
            good,
            RSAKey.import_key(provider.key.as_pem(private=True)),
            algorithms=["PS256"],
        ),
        "another key of the same id": jwt.encode({"alg": "RS256", "kid": "test"}, good, stranger),
        "an unknown key": provider.sign(good, kid="unknown"),
        "a log-out token": provider.sign(good, typ="logout+jwt"),
        "changed claims": f"{header}.{elevated}.{signature}",
        "no signature": f"{header}.{claims}.",
        "two parts": f"{header}.{claims}",
        "too long": provider.sign(provider.claims(padding="x" * 9_000)),
        "no JSON": f"eyJ.{claims}.{signature}",
    }

    assert code(deployment, "ListDevices", whole) is grpc.StatusCode.OK
    for what, token in refused.items():
        found = code(deployment, "ListDevices", token)
        assert found is grpc.StatusCode.UNAUTHENTICATED, what


def test_a_flood_of_unknown_keys_asks_the_provider_once_at_most(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    good = provider.sign(provider.claims())
    assert code(deployment, "ListDevices", good) is grpc.StatusCode.OK
    before = provider.requests(JWKS)

    for number in range(50):
        token = provider.sign(provider.claims(), kid=f"unknown-{number}")
        assert code(deployment, "ListDevices", token) is grpc.StatusCode.UNAUTHENTICATED

    assert provider.requests(JWKS) - before <= 1
    assert code(deployment, "ListDevices", good) is grpc.StatusCode.OK


def test_a_new_key_of_the_provider_is_fetched_and_the_old_one_is_no_longer_accepted(
    deploy: Deploy, tmp_path: Path
) -> None:
    provider = IdentityProvider()
    try:
        clock = [1000.0]
        deployment = deploy(**provider.settings(tmp_path))
        held = OidcProvider(deployment.config, monotonic=lambda: clock[0])
        tokens = OidcTokens(deployment.coordinator.parts.context, held)
        before = provider.sign(provider.claims(sub="before"))
        late = provider.sign(provider.claims(sub="late"))
        assert tokens.identify(before).name == "oidc:127.0.0.1:before"

        provider.rotate_key("second")
        after = provider.sign(provider.claims(sub="after"))

        with pytest.raises(UnauthenticatedError):
            tokens.identify(after)
        clock[0] += INTERVAL_S
        assert tokens.identify(after).name == "oidc:127.0.0.1:after"
        for token in (before, late):
            with pytest.raises(UnauthenticatedError):
                tokens.identify(token)
    finally:
        provider.stop()


def test_a_provider_with_a_private_authority_is_trusted_by_its_certificate_only(
    deploy: Deploy, tmp_path: Path
) -> None:
    certificates = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(certificates)]) == 0
    provider = IdentityProvider(certificates=certificates)
    try:
        assert provider.issuer.startswith("https://")
        provider.set_roles("alice", "fl-viewers")
        token = device_tokens(provider, "alice")["id_token"]

        deployment = deploy(**provider.settings(tmp_path, oidc_ca_file=certificates / "ca.pem"))
        assert code(deployment, "ListDevices", token) is grpc.StatusCode.OK
    finally:
        provider.stop()


def test_a_provider_of_an_unknown_authority_is_not_believed(deploy: Deploy, tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(certificates)]) == 0
    provider = IdentityProvider(certificates=certificates)
    try:
        deployment = deploy(**provider.settings(tmp_path))
        token = provider.sign(provider.claims())

        assert code(deployment, "ListDevices", token) is grpc.StatusCode.UNAVAILABLE
        assert provider.requests(JWKS) == 0
    finally:
        provider.stop()


def test_an_outage_of_the_provider_concerns_its_users_only(deploy: Deploy, tmp_path: Path) -> None:
    provider = IdentityProvider()
    token = provider.sign(provider.claims())
    provider.stop()
    deployment = deploy(**provider.settings(tmp_path))

    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, "ListDevices", token)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "identity provider" in (refused.value.details() or "")
    assert code(deployment, "ListDevices", deployment.admin_token) is grpc.StatusCode.OK


def test_an_outage_does_not_end_the_log_ins_before_it(deploy: Deploy, tmp_path: Path) -> None:
    provider = IdentityProvider()
    deployment = deploy(**provider.settings(tmp_path))
    token, later = (provider.sign(provider.claims(sub=name)) for name in ("early", "late"))
    assert code(deployment, "ListDevices", token) is grpc.StatusCode.OK

    provider.stop()

    assert code(deployment, "ListDevices", token) is grpc.StatusCode.OK
    assert code(deployment, "ListDevices", later) is grpc.StatusCode.OK


def test_the_document_of_another_issuer_is_not_believed(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    other = provider.issuer.replace("127.0.0.1", "localhost")
    deployment = deploy(**provider.settings(tmp_path, oidc_issuer=other))

    token = provider.sign(provider.claims(iss=other))

    assert code(deployment, "ListDevices", token) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"oidc_algorithms": ""}, "QFLARE_OIDC_ALGORITHMS"),
        ({"oidc_algorithms": "RS256,none"}, "QFLARE_OIDC_ALGORITHMS"),
        ({"oidc_algorithms": "HS256"}, "QFLARE_OIDC_ALGORITHMS"),
        ({"oidc_issuer": "http://id.example.org"}, "QFLARE_OIDC_ISSUER"),
        ({"oidc_issuer": "https://user@id.example.org"}, "QFLARE_OIDC_ISSUER"),
        ({"oidc_client_id": ""}, "QFLARE_OIDC_CLIENT_ID"),
        ({"oidc_roles": ""}, "QFLARE_OIDC_ROLES"),
        ({"oidc_roles": "staff=device"}, "QFLARE_OIDC_ROLES"),
        ({"oidc_roles": "staff"}, "QFLARE_OIDC_ROLES"),
        ({"oidc_issuer": ""}, "QFLARE_OIDC_ISSUER"),
    ],
)
def test_settings_that_are_not_safe_are_refused(changed: dict[str, str], named: str) -> None:
    settings: dict[str, Any] = {
        "oidc_issuer": "https://id.example.org",
        "oidc_algorithms": "RS256",
        "oidc_client_id": "dashboard",
        "oidc_roles": "staff=viewer",
    }
    ServerConfig(**settings).checked()

    with pytest.raises(ConfigError, match=named):
        ServerConfig(**{**settings, **changed}).checked()


def test_roles_are_found_at_a_dotted_path_in_a_list_or_a_text() -> None:
    claims = {"a": {"b": ["x", 1, "y"], "c": "z"}, "https://e.org/roles": ["u"], "n": 5}

    assert values_at(claims, "a.b") == ("x", "y")
    assert values_at(claims, "a.c") == ("z",)
    assert values_at(claims, "https://e.org/roles") == ("u",)
    assert [values_at(claims, path) for path in ("a", "a.d", "n", "n.m", "missing")] == [()] * 5
