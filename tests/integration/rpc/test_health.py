"""Watches of the health service, which anyone may open: none of them stops the coordinator or stays in its memory."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.conftest import Deployment
from tests.support.silent_reader import silent_reader

Deploy = Callable[..., Deployment]
States = health_pb2.HealthCheckResponse
WATCH: Final = "/grpc.health.v1.Health/Watch"
TIMEOUT_S: Final = 10.0
READERS_OF_NOTHING: Final = 4
WATCHES: Final = 400
CHANGES: Final = 100


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: states of health know nothing of databases."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy()


@pytest.fixture
def stub(deployment: Deployment) -> Iterator[Any]:
    with grpc.insecure_channel(deployment.coordinator.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.fixture
def coarse_switches() -> Iterator[None]:
    """Let threads keep the interpreter for long, so that the end of a call meets what runs for it."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.05)
    yield
    sys.setswitchinterval(interval_s)


def check(stub: Any, service: str = "") -> int:
    """Return the state of a service."""
    request = health_pb2.HealthCheckRequest(service=service)
    return int(stub.Check(request, timeout=TIMEOUT_S).status)


def flip(deployment: Deployment, times: int) -> None:
    """Change the state of the coordinator as a whole."""
    for number in range(times):
        state = States.SERVING if number % 2 else States.NOT_SERVING
        deployment.coordinator._health.set("", state)


def finished(target: Callable[[], None]) -> bool:
    """Run a function in a thread; return whether it returned in time."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return not thread.is_alive()


def test_a_watcher_gets_each_state_once(deployment: Deployment, stub: Any) -> None:
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

    assert next(watch).status == States.SERVING
    flip(deployment, 1)
    flip(deployment, 1)
    assert next(watch).status == States.NOT_SERVING
    deployment.coordinator._health.set("", States.SERVING)
    assert next(watch).status == States.SERVING


def test_an_unknown_service_is_watched_until_it_is_known(deployment: Deployment, stub: Any) -> None:
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="later"), timeout=TIMEOUT_S)

    assert next(watch).status == States.SERVICE_UNKNOWN
    deployment.coordinator._health.set("later", States.SERVING)
    assert next(watch).status == States.SERVING


def test_watchers_that_read_nothing_hold_nobody_up(deployment: Deployment, stub: Any) -> None:
    health = deployment.coordinator._health
    with ExitStack() as stack:
        for _ in range(READERS_OF_NOTHING):
            stack.enter_context(silent_reader(deployment.coordinator.address, WATCH, b""))
        assert finished(lambda: await_watches(deployment, READERS_OF_NOTHING))

        assert finished(lambda: flip(deployment, 2))
        assert check(stub) == States.SERVING
        assert finished(lambda: deployment.coordinator._set_healthy(healthy=True))
    assert finished(lambda: await_watches(deployment, 0))
    assert health.watch_count == 0


def await_watches(deployment: Deployment, count: int) -> None:
    """Wait until there are so many watches."""
    pause = threading.Event()
    while deployment.coordinator._health.watch_count != count:
        pause.wait(0.01)


@pytest.mark.usefixtures("coarse_switches")
def test_watches_that_end_while_states_change_hold_nobody_up(
    deployment: Deployment, stub: Any
) -> None:
    flips = threading.Thread(target=flip, args=(deployment, CHANGES * WATCHES), daemon=True)
    flips.start()
    for number in range(WATCHES):
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        if number % 2:
            next(watch)
        watch.cancel()
    flips.join(TIMEOUT_S * 3)

    assert not flips.is_alive()
    assert check(stub) == States.SERVING


def test_names_of_services_that_strangers_watch_are_forgotten(
    deployment: Deployment, stub: Any
) -> None:
    for number in range(200):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=f"{number}" * 50), timeout=5)
        if number % 3:
            next(watch)
        watch.cancel()

    assert finished(lambda: await_watches(deployment, 0))
    assert [*vars(deployment.coordinator._health)["_watches"]] == []
