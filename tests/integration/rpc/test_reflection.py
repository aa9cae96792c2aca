"""Server reflection with the real grpcurl: methods, messages and the constraints of their fields."""

import subprocess
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from qflare_server.serving.rpc.dispatcher import REFLECTION_THREADS
from tests.integration.conftest import Deployment
from tests.support.hostile_requests import methods
from tests.support.silent_reader import silent_reader


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: nothing is read from it."""
    return sqlite_url


@pytest.fixture
def address(deploy: Callable[..., Deployment]) -> str:
    return deploy().coordinator.address


@pytest.fixture
def describe(address: str, grpcurl: str) -> Callable[[str], str]:
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


def test_callers_that_read_nothing_make_room(address: str, describe: Callable[[str], str]) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    with ExitStack() as stack:
        for _ in range(REFLECTION_THREADS):
            stack.enter_context(silent_reader(address, path, request))

        assert "rpc ListDevices (" in describe("qflare.v1.AdminService.ListDevices")
