"""Ports of a coordinator: the plaintext health port, and addresses that cannot be bound."""

import socket
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.v1 import admin_service_pb2, admin_service_pb2_grpc
from qflare_server.cli.main import main
from qflare_server.config import ConfigError
from tests.integration.conftest import Deployment

Deploy = Callable[..., Deployment]
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: ports know nothing of databases."""
    return sqlite_url


def probe(port: int, service: str = "") -> health_pb2.HealthCheckResponse:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)


def test_a_coordinator_with_mutual_tls_answers_a_plaintext_probe(
    deploy: Deploy, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(folder)]) == 0
    deployment = deploy(
        health_listen="127.0.0.1:0",
        tls_certificate_file=folder / "server.pem",
        tls_key_file=folder / "server.key",
        tls_client_ca_file=folder / "ca.pem",
    )
    listener = deployment.coordinator.health_listener
    assert listener is not None

    assert probe(listener.port).status == SERVING
    assert probe(listener.port, "qflare.v1.CoordinatorService").status == SERVING


def test_the_health_port_serves_nothing_else(deploy: Deploy) -> None:
    deployment = deploy(health_listen="127.0.0.1:0")
    listener = deployment.coordinator.health_listener
    assert listener is not None

    with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListTrainingSessions(
                admin_service_pb2.ListTrainingSessionsRequest(),
                metadata=deployment.metadata,
                timeout=5,
            )

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_health_port_closes_with_the_coordinator(deploy: Deploy) -> None:
    deployment = deploy(health_listen="127.0.0.1:0")
    listener = deployment.coordinator.health_listener
    assert listener is not None
    deployment.coordinator.stop(0.0)

    with pytest.raises(grpc.RpcError) as caught:
        probe(listener.port)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("setting", ["listen", "health_listen"])
def test_an_address_in_use_names_the_setting_and_the_reason(deploy: Deploy, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            deploy(**{setting: address})

    wanted = f"QFLARE_{setting.upper()}: cannot bind {address}: Address already in use"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("address", ["192.0.2.1:50051", "no-such-host.invalid:1"])
def test_an_address_that_is_not_ours_names_the_setting_and_the_reason(
    deploy: Deploy, address: str
) -> None:
    with pytest.raises(ConfigError, match=f"QFLARE_HEALTH_LISTEN: cannot bind {address}: ."):
        deploy(health_listen=address)
