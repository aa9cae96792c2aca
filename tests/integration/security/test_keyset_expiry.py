"""A keyset that expires soon is reported wherever operators and devices look, and everything goes on until then."""

import json
import logging
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.v1 import admin_service_pb2 as pb
from qflare_server.cli.main import main
from qflare_server.config import ServerConfig
from qflare_server.context import EXPIRY_WARNING, utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import SetupOptions, initialize
from qflare_server.serving.dashboard.alerts import find_alerts
from tests.integration.conftest import Deployment

CHEAP = Cost(iterations=1, memory_kib=1024, lanes=1)
LIFETIMES = {
    "soon": EXPIRY_WARNING - timedelta(minutes=1),
    "later": EXPIRY_WARNING + timedelta(days=1),
}


@pytest.fixture(params=LIFETIMES)
def lifetime(request: pytest.FixtureRequest) -> timedelta:
    """Return the lifetime of the keyset: one that is reported, and one that is not."""
    return LIFETIMES[request.param]


@pytest.fixture
def deployment(
    lifetime: timedelta, database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Deployment]:
    """Yield a coordinator whose keyset has that lifetime."""
    directory = tmp_path / "coordinator"
    directory.mkdir()
    initialize(
        KeyFolder(directory / "keys", cost=CHEAP),
        "qflare",
        utc_now(),
        SetupOptions(keyset_lifetime=lifetime),
    )
    config = ServerConfig(
        data_dir=directory,
        database_url=database_url,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
    ).checked()
    with caplog.at_level(logging.WARNING):
        running = Deployment(config, tmp_path)
        yield running
        running.close()


def health(deployment: Deployment, service: str) -> int:
    """Return what the health service says of a service."""
    with grpc.insecure_channel(deployment.coordinator.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_the_expiry_of_the_keyset_is_reported_everywhere(
    deployment: Deployment,
    lifetime: timedelta,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soon = lifetime < EXPIRY_WARNING
    expires_at = deployment.coordinator.parts.keys.trust.expires_at()
    device = deployment.device("device")
    device.get_task()

    status = deployment.admin.GetCoordinatorStatus(
        pb.GetCoordinatorStatusRequest(), metadata=deployment.metadata
    )
    assert status.keyset_expire_time.ToDatetime(tzinfo=UTC) == expires_at
    assert status.keyset_version == 1

    port = deployment.coordinator.observability.metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [item for item in lines if item.startswith("qflare_keyset_expiry_timestamp_seconds")]
    assert float(line.split()[1]) == pytest.approx(expires_at.timestamp())

    report = deployment.coordinator.use_cases.overview.report()
    alerts = [item.text for item in find_alerts(report, draining=False)]
    assert any("keyset expires" in text for text in alerts) is soon

    serving = health_pb2.HealthCheckResponse.SERVING
    assert health(deployment, "") == serving
    assert (health(deployment, "keyset") == serving) is not soon

    records = [*caplog.get_records("setup"), *caplog.records]
    logs = {record.name for record in records if "expire" in record.getMessage()}
    assert ("qflare_server.keys.server_keys" in logs) is soon
    assert ("qflare_client.trust.keyset" in logs) is soon

    monkeypatch.setenv("QFLARE_DATA_DIR", str(deployment.config.data_dir))
    monkeypatch.setenv("QFLARE_DATABASE_URL", deployment.config.database_url)
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert f"keyset: version 1, expires {expires_at:%Y-%m-%d}" in text
    assert ("keys rotate" in text) is soon
    assert main(["status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["keyset"]
    assert (datetime.fromisoformat(shown["expires_at"]), shown["expires_soon"]) == (
        expires_at,
        soon,
    )
