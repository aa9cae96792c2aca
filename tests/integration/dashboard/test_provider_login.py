"""Dashboard log-ins with a real OpenID Connect provider."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, expect

from qflare_server.cli.main import main
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter
from tests.integration.conftest import Deployment
from tests.support.identity_provider import IdentityProvider, User
from tests.support.visitor import Answer, Visitor

Deploy = Callable[..., Deployment]
NAME = "oidc:127.0.0.1:alice"


@pytest.fixture(scope="module")
def provider() -> Iterator[IdentityProvider]:
    running = IdentityProvider()
    yield running
    running.stop()


@pytest.fixture
def deployment(deploy: Deploy, provider: IdentityProvider, tmp_path: Path) -> Deployment:
    return deploy(dashboard="127.0.0.1:0", **provider.settings(tmp_path))


def visitor(deployment: Deployment) -> Visitor:
    assert deployment.coordinator.dashboard is not None
    return Visitor(deployment.coordinator.dashboard.url)


def events(deployment: Deployment, event_type: str) -> list[Any]:
    audit = deployment.coordinator.use_cases.audit
    return list(audit.list(PageRequest(), AuditFilter(event_type=event_type)).rows)


def path_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def return_of(browser: Visitor, user: User) -> str:
    """Begin a log-in and let the user go through the provider; return the path of the way back."""
    begun = browser.get("/login/oidc")
    assert begun.code == 303
    return path_of(user.follow(begun.headers["location"]))


def test_a_user_logs_in_and_out(deployment: Deployment, provider: IdentityProvider) -> None:
    provider.set_roles("alice", "fl-viewers")
    browser = visitor(deployment)
    assert "/login/oidc" in browser.get("/login").text

    answer = browser.get(return_of(browser, User(provider, "alice")))

    assert answer.code == 200
    assert 'url=/"' in answer.text
    cookie = next(line for line in answer.cookies if line.startswith("qflare="))
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    browser.cookie = cookie.partition(";")[0]
    assert browser.get("/").code == 200
    assert browser.get("/audit").code == 403
    assert [row.actor for row in events(deployment, "dashboard.logged_in")] == [NAME]
    assert browser.ask("POST", "/logout").code == 303
    assert [row.actor for row in events(deployment, "dashboard.logged_out")] == [NAME]


def test_a_person_logs_in_with_a_browser(
    deployment: Deployment, provider: IdentityProvider, browser: Browser
) -> None:
    """The strict session cookie has to survive the way over the provider's own pages."""
    provider.set_roles("carol", "fl-viewers")
    assert deployment.coordinator.dashboard is not None
    url = deployment.coordinator.dashboard.url
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)

    page.get_by_role("link", name="log in with your organization's account").click()
    page.locator("input[name=login]").fill("carol")
    page.locator("input[name=password]").fill("any")
    page.locator("form button[type=submit]").click()
    page.locator("form button[type=submit]").click()

    expect(page.get_by_role("heading", name="Overview", level=1)).to_be_visible(timeout=20_000)
    expect(page.locator(".who")).to_contain_text("oidc:127.0.0.1:carol")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Admin token")).to_be_visible()
    page.goto(url)
    expect(page.get_by_label("Admin token")).to_be_visible()
    context.close()


def test_a_user_logs_in_with_a_provider_of_a_private_authority(
    deploy: Deploy, tmp_path: Path
) -> None:
    certificates = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(certificates)]) == 0
    provider = IdentityProvider(certificates=certificates)
    try:
        settings = provider.settings(tmp_path, oidc_ca_file=certificates / "ca.pem")
        deployment = deploy(dashboard="127.0.0.1:0", **settings)
        provider.set_roles("alice", "fl-viewers")
        browser = visitor(deployment)

        answer = browser.get(return_of(browser, User(provider, "alice")))

        assert answer.code == 200
        assert [row.actor for row in events(deployment, "dashboard.logged_in")] == [NAME]
    finally:
        provider.stop()


def test_a_request_carries_state_nonce_and_challenge(
    deployment: Deployment, provider: IdentityProvider
) -> None:
    begun = visitor(deployment).get("/login/oidc")

    asked = parse_qs(urlsplit(begun.headers["location"]).query)

    assert begun.headers["location"].startswith(provider.issuer)
    assert asked["code_challenge_method"] == ["S256"]
    assert {"state", "nonce", "code_challenge"} <= asked.keys()


def test_without_a_role_there_is_no_log_in(
    deployment: Deployment, provider: IdentityProvider
) -> None:
    browser = visitor(deployment)

    answer = browser.get(return_of(browser, User(provider, "nobody")))

    assert (answer.code, "no role" in answer.text) == (403, True)
    (row,) = events(deployment, "dashboard.login_refused")
    assert row.actor == "oidc:127.0.0.1:nobody"


@pytest.mark.parametrize("what", ["state", "cookie", "nonce", "verifier", "code", "issuer"])
def test_an_answer_to_another_log_in_is_refused(
    deployment: Deployment, provider: IdentityProvider, what: str
) -> None:
    provider.set_roles("alice", "fl-viewers")
    browser = visitor(deployment)
    way_back = return_of(browser, User(provider, "alice"))
    query = dict(parse_qsl(urlsplit(way_back).query))
    name, _, value = browser.cookie.partition("=")
    state, nonce, verifier = value.split(".")
    match what:
        case "state":
            query["state"] = "x" * len(state)
        case "code":
            query["code"] = "x" * len(query["code"])
        case "issuer":
            query["iss"] = "https://id.example.org"
        case "cookie":
            browser.cookie = ""
        case "nonce":
            browser.cookie = f"{name}={state}.{'x' * len(nonce)}.{verifier}"
        case _:
            browser.cookie = f"{name}={state}.{nonce}.{'x' * len(verifier)}"

    answer: Answer = browser.get("/login/oidc/callback?" + urlencode(query))

    assert answer.code == 401
    assert not any(
        line.startswith("qflare=") and "Max-Age=0" not in line for line in answer.cookies
    )
    assert events(deployment, "dashboard.logged_in") == []


def test_an_outage_of_the_provider_leaves_tokens_usable(deploy: Deploy, tmp_path: Path) -> None:
    provider = IdentityProvider()
    provider.stop()
    deployment = deploy(dashboard="127.0.0.1:0", **provider.settings(tmp_path))
    browser = visitor(deployment)

    answer = browser.get("/login/oidc")

    assert (answer.code, "cannot be reached" in answer.text) == (503, True)
    assert browser.log_in(deployment.admin_token).code == 303


def test_without_a_provider_there_is_no_such_log_in(deploy: Deploy) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")
    browser = visitor(deployment)

    assert browser.get("/login/oidc").code == 404
    assert "/login/oidc" not in browser.get("/login").text
