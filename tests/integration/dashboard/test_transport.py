"""How the dashboard is reached from other machines: over its own TLS, or through a proxy that ends it."""

import http.client
import shutil
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qflare_server.cli.main import main
from qflare_server.config import ConfigError
from qflare_server.serving.dashboard import open_dashboard
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.visitor import Visitor

Deploy = Callable[..., Deployment]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: transport knows nothing of databases."""
    return sqlite_url


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """Return a folder with certificates of this machine and of one browser."""
    return make(tmp_path / "certificates")


def make(folder: Path) -> Path:
    assert main(["certificates", "make", "--output", str(folder), "--client", "browser"]) == 0
    return folder


def settings(certificates: Path, **more: object) -> dict[str, object]:
    files = {
        "tls_certificate_file": certificates / "server.pem",
        "tls_key_file": certificates / "server.key",
    }
    return {"dashboard": "127.0.0.1:0", **files, **more}


def trusting(certificates: Path, *, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if client:
        context.load_cert_chain(certificates / "browser.pem", certificates / "browser.key")
    return context


def url(deployment: Deployment) -> str:
    assert deployment.coordinator.dashboard is not None
    return deployment.coordinator.dashboard.url.replace("127.0.0.1", "localhost")


def test_with_certificates_it_speaks_https_and_its_cookie_needs_it(
    deploy: Deploy, certificates: Path
) -> None:
    deployment = deploy(**settings(certificates))
    visitor = Visitor(url(deployment), trusting(certificates))

    answer = visitor.log_in(deployment.issue_admin(Role.VIEWER))

    assert url(deployment).startswith("https://")
    assert answer.headers["set-cookie"].startswith("__Host-qflare=")
    assert "; Secure" in answer.headers["set-cookie"]
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert visitor.get("/").code == 200


def test_it_speaks_nothing_older_than_tls_1_3(deploy: Deploy, certificates: Path) -> None:
    deployment = deploy(**settings(certificates))
    context = trusting(certificates)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(ssl.SSLError, match=r"(?i)version|eof"):
        Visitor(url(deployment), context).get("/login")
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    assert Visitor(url(deployment), context).get("/login").code == 200


def test_mutual_tls_is_asked_of_browsers_too(deploy: Deploy, certificates: Path) -> None:
    mutual = settings(certificates, tls_client_ca_file=certificates / "ca.pem")
    deployment = deploy(**mutual)

    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|EOF"):
        Visitor(url(deployment), trusting(certificates)).get("/login")
    assert Visitor(url(deployment), trusting(certificates, client=True)).get("/login").code == 200


@pytest.mark.slow
def test_a_certificate_that_changes_is_shown_to_the_next_visitor(
    deploy: Deploy, certificates: Path, tmp_path: Path
) -> None:
    deployment = deploy(**settings(certificates))
    fresh = make(tmp_path / "fresh")
    visitor = Visitor(url(deployment), trusting(fresh))
    with pytest.raises(ssl.SSLCertVerificationError):
        visitor.get("/login")

    for name in ("server.key", "server.pem"):
        shutil.copyfile(fresh / name, certificates / name)

    code, attempts = 0, 0
    while code != 200:
        attempts += 1
        assert attempts < 20_000
        try:
            code = visitor.get("/login").code
        except ssl.SSLError:
            continue


def test_tls_files_that_cannot_be_read_are_said(deploy: Deploy, certificates: Path) -> None:
    coordinator = deploy().coordinator
    (certificates / "server.key").write_text("no key")
    config = replace(coordinator.config, **settings(certificates))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"QFLARE_DASHBOARD: cannot read the TLS files"):
        open_dashboard(config, coordinator.use_cases, coordinator.draining)


def test_behind_a_proxy_the_browser_is_the_last_entry_that_it_wrote(deploy: Deploy) -> None:
    deployment = deploy(dashboard="127.0.0.1:0", dashboard_behind_proxy=True)

    answer = Visitor(url(deployment)).log_in(
        deployment.issue_admin(Role.VIEWER), X_Forwarded_For="203.0.113.9, 198.51.100.7"
    )

    assert "; Secure" in answer.headers["set-cookie"]
    audit = deployment.coordinator.use_cases.audit
    (event,) = audit.list(PageRequest(), AuditFilter(event_type="dashboard.logged_in")).rows
    assert event.peer_address == "198.51.100.7"


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["203.0.113.9", "198.51.100.7"], "198.51.100.7"),
        (["203.0.113.9, 198.51.100.7:4321"], "198.51.100.7"),
        (["198.51.100.7, [2001:db8::7]:443"], "2001:db8::7"),
        (["2001:DB8:0::7"], "2001:db8::7"),
        (["198.51.100.7, unknown"], "127.0.0.1"),
        (["\x9b31m"], "127.0.0.1"),
        (["198.51.100.7,"], "127.0.0.1"),
        (["127.1"], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
def test_a_browser_that_makes_up_addresses_is_known_by_the_proxy_s(
    deploy: Deploy, lines: list[str], wanted: str
) -> None:
    deployment = deploy(dashboard="127.0.0.1:0", dashboard_behind_proxy=True)
    connection = http.client.HTTPConnection(urlsplit(url(deployment)).netloc, timeout=10)
    connection.putrequest("POST", "/login")
    connection.putheader("Content-Type", "application/x-www-form-urlencoded")
    connection.putheader("Content-Length", "7")
    for line in lines:
        connection.putheader("X-Forwarded-For", line.encode("latin-1"))
    connection.endheaders(b"token=x")
    assert connection.getresponse().status == 401
    connection.close()

    audit = deployment.coordinator.use_cases.audit
    (event,) = audit.list(PageRequest(), AuditFilter(event_type="dashboard.login_refused")).rows
    assert event.peer_address == wanted


def test_without_a_proxy_nobody_says_another_address(deploy: Deploy) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")

    Visitor(url(deployment)).log_in("wrong", X_Forwarded_For="198.51.100.7")

    audit = deployment.coordinator.use_cases.audit
    (event,) = audit.list(PageRequest(), AuditFilter(event_type="dashboard.login_refused")).rows
    assert event.peer_address == "127.0.0.1"
