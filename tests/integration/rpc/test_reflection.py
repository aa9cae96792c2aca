"""Server reflection with the real grpcurl: methods, messages and the constraints of their fields."""

import subprocess
from collections.abc import Callable

import pytest

from tests.integration.conftest import Deployment
from tests.support.hostile_requests import methods


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: nothing is read from it."""
    return sqlite_url


@pytest.fixture
def describe(deploy: Callable[..., Deployment], grpcurl: str) -> Callable[[str], str]:
    address = deploy().coordinator.address

    def run(symbol: str) -> str:
        command = [grpcurl, "-plaintext", address, "describe", symbol]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_method_is_described(describe: Callable[[str], str]) -> None:
    text = describe("qflare.v1.AdminService.ListDevices")

    assert "rpc ListDevices ( .qflare.v1.ListDevicesRequest )" in text


def test_every_method_of_a_service_is_described(describe: Callable[[str], str]) -> None:
    text = describe("qflare.v1.CoordinatorService")

    names = [path.rpartition("/")[2] for path, _ in methods() if "qflare.v1.Coordinator" in path]
    assert len(names) > 10
    assert all(f"rpc {name} (" in text for name in names)


def test_constraints_of_a_message_are_shown(describe: Callable[[str], str]) -> None:
    text = describe("qflare.v1.CreateTrainingSessionRequest")

    assert "(.qflare.v1.constraint) = { required: true, max_length: 200 }" in text
