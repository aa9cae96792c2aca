"""Names by which the dashboard and the metrics may be asked for, and how the metrics are reached from elsewhere."""

import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest

from qflare_server.cli.main import main
from qflare_server.config import ConfigError, ServerConfig
from tests.integration.conftest import Deployment

Deploy = Callable[..., Deployment]
OPEN: Final = {"metrics": "/metrics", "dashboard": "/login"}
KNOWN: Final = [
    "localhost",
    "LocalHost:8080",
    "127.0.0.1",
    "127.0.0.1:1",
    "[::1]",
    "[::1]:9464",
    "10.0.0.7",
    "inside.example.org",
    "INSIDE.example.org:80",
]
UNKNOWN: Final = [
    "",
    "rebound.example.test",
    "localhost.",
    "localhost:",
    "localhost:x",
    "localhost.rebound.example.test",
    "localhost:80@rebound.example.test",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "0127.0.0.1",
    "127.0.0.1.rebound.example.test",
    "127.0.0.1:80:80",
    "::1",
    "[::1",
    "[127.0.0.1]",
    "[localhost]",
    "*.example.org",
    "example.org",
    "inside.example.org.rebound.example.test",
]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: host names know nothing of databases."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    """Return a coordinator with both ports."""
    return deploy(
        dashboard="127.0.0.1:0",
        dashboard_hosts=" inside.example.org , ,",
        metrics_listen="127.0.0.1:0",
        metrics_hosts="inside.example.org",
    )


def port_of(deployment: Deployment, kind: str) -> int:
    if kind == "metrics":
        return deployment.coordinator.observability.metrics_port
    assert deployment.coordinator.dashboard is not None
    return urlsplit(deployment.coordinator.dashboard.url).port or 0


def code_of(port: int, *headers: str, target: str) -> int:
    """Return the status code of a request with exactly these headers."""
    lines = [f"GET {target} HTTP/1.1", *headers, "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("kind", OPEN)
def test_names_of_its_own_and_addresses_are_known(deployment: Deployment, kind: str) -> None:
    port, target = port_of(deployment, kind), OPEN[kind]

    assert {host: code_of(port, f"host: {host}", target=target) for host in KNOWN} == dict.fromkeys(
        KNOWN, 200
    )


@pytest.mark.parametrize("kind", OPEN)
def test_other_names_are_refused(deployment: Deployment, kind: str) -> None:
    port, target = port_of(deployment, kind), OPEN[kind]

    codes = {host: code_of(port, f"hOsT: {host}", target=target) for host in UNKNOWN}

    assert set(codes.values()) <= {400, 421}, codes


@pytest.mark.parametrize("kind", OPEN)
def test_one_host_is_asked_for(deployment: Deployment, kind: str) -> None:
    port, target = port_of(deployment, kind), OPEN[kind]

    assert code_of(port, target=target) == 400
    twice = ("Host: localhost", "Host: rebound.example.test")
    assert code_of(port, *twice, target=target) == 400
    elsewhere = f"http://rebound.example.test{target}"
    assert code_of(port, "Host: localhost", target=elsewhere) == 404
    forwarded = ("Host: rebound.example.test", "X-Forwarded-Host: localhost")
    assert code_of(port, *forwarded, target=target) == 421


@pytest.mark.parametrize("kind", OPEN)
def test_idle_connections_of_one_address_hold_nobody_up(deployment: Deployment, kind: str) -> None:
    port, target = port_of(deployment, kind), OPEN[kind]
    idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(120)]

    began = time.monotonic()
    assert code_of(port, "Host: localhost", target=target) == 200
    assert time.monotonic() - began < 2.0
    for connection in idle:
        connection.close()


def test_metrics_are_at_one_path_and_only_read(deployment: Deployment) -> None:
    port = port_of(deployment, "metrics")

    assert code_of(port, "Host: localhost", target="/metrics?name[]=x&debug=1") == 200
    assert code_of(port, "Host: localhost", target="/metrics/..") == 404
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(
            b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        )
        assert b" 405 " in connection.makefile("rb").readline()


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:9464",
        "[::]:9464",
        "192.0.2.1:1",
        "127.0.0.1.example.org:1",
        "127.1:1",
        "0x7f.0.0.1:1",
        "2130706433:1",
        "0:1",
        "localhost.:1",
        "Localhost.example.org:1",
        "[::ffff:192.0.2.1]:1",
        "[::2]:1",
    ],
)
def test_metrics_for_others_need_tls_or_a_flag(address: str, tmp_path: Path) -> None:
    files: dict[str, Any] = {"tls_certificate_file": tmp_path / "a", "tls_key_file": tmp_path / "b"}
    with pytest.raises(ConfigError, match=r"QFLARE_METRICS_LISTEN: .* or QFLARE_METRICS_INSECURE"):
        ServerConfig(metrics_listen=address, allow_insecure=True).checked()
    with pytest.raises(ConfigError, match="QFLARE_METRICS_LISTEN cannot require X25519MLKEM768"):
        ServerConfig(metrics_listen=address, require_pq_tls=True, **files).checked()

    assert ServerConfig(metrics_listen=address, **files).checked().metrics_has_tls
    assert not ServerConfig(metrics_listen=address, metrics_insecure=True).checked().metrics_has_tls


@pytest.mark.parametrize("address", ["127.0.0.1:9464", "[::1]:9464", "localhost:9464"])
def test_metrics_for_this_machine_need_no_tls(address: str) -> None:
    assert not ServerConfig(metrics_listen=address).checked().metrics_has_tls


def test_metrics_for_others_are_served_over_tls(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(folder), "--client", "prometheus"]) == 0
    files: dict[str, Any] = {
        "tls_certificate_file": folder / "server.pem",
        "tls_key_file": folder / "server.key",
        "tls_client_ca_file": folder / "ca.pem",
    }
    deployment = deploy(metrics_listen="127.1:0", **files)
    url = f"https://localhost:{port_of(deployment, 'metrics')}/metrics"
    trusted = ssl.create_default_context(cafile=str(folder / "ca.pem"))

    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|EOF"):
        urllib.request.urlopen(url, timeout=10, context=trusted).read()
    trusted.load_cert_chain(folder / "prometheus.pem", folder / "prometheus.key")
    with urllib.request.urlopen(url, timeout=10, context=trusted) as answer:
        assert b"qflare_database_up 1.0" in answer.read()


def test_names_of_the_certificate_are_known(deploy: Deploy, tmp_path: Path) -> None:
    folder, names = tmp_path / "certificates", ("pages.example.org", "*.wards.example.org")
    hosts = [word for name in names for word in ("--host", name)]
    assert main(["certificates", "make", "--output", str(folder), *hosts]) == 0
    files: dict[str, Any] = {
        "tls_certificate_file": folder / "server.pem",
        "tls_key_file": folder / "server.key",
    }
    port = port_of(deploy(dashboard="127.0.0.1:0", **files), "dashboard")
    unchecked = ssl._create_unverified_context()

    codes = {}
    for name in (*names, "a.wards.example.org", "a.b.wards.example.org", "wards.example.org"):
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=unchecked)
        connection.request("GET", "/login", headers={"Host": name})
        codes[name] = connection.getresponse().status
        connection.close()

    assert codes == {
        "pages.example.org": 200,
        "*.wards.example.org": 200,
        "a.wards.example.org": 200,
        "a.b.wards.example.org": 421,
        "wards.example.org": 421,
    }
