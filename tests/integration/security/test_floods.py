"""A coordinator under attack goes on answering: probes, devices and administrators, within its memory.

Every attack is a process of its own (`tests.support.attacks`) against a coordinator that is another. The first five are
those that stopped a coordinator before there were threads for each class of callers.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psutil  # type: ignore[import-untyped]
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.v1 import admin_service_pb2, admin_service_pb2_grpc, coordinator_service_pb2
from qflare_client import Client, UnavailableError, enroll
from qflare_server.config import ServerConfig
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from tests.support.processes import CoordinatorProcess

pytestmark = pytest.mark.alone

HEALTH_MS: Final = 100.0
CALL_MS: Final = 500.0
SHARE: Final = 0.9
"""Of the calls that have to be this fast: the tests run on machines that do something else as well."""
MORE_MEMORY_BYTES: Final = 150 * 2**20
OWN_CONNECTION: Final = (("grpc.use_local_subchannel_pool", 1),)
ANSWER_S: Final = 5.0
PAUSE: Final = threading.Event()
PAUSE_S: Final = 0.05
RETRIES: Final = 20
"""The time of all of them counts as that of the call."""
SLOWER: Final = 10.0
"""How much slower than without an attack a call may be, on a machine that is busy enough to miss the bounds above."""
COORDINATOR: Final = "/qflare.v1.CoordinatorService/"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@dataclass
class Latencies:
    """Milliseconds of calls by kind."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, kind: str, call: Callable[[], object]) -> None:
        """Make a call and note how long it took; one that was sent away is made again, as callers do, on the same time.

        gRPC itself sends calls away where more wait of one method than it holds, be they honest or not.
        """
        began = time.perf_counter()
        for last in (*[False] * RETRIES, True):
            try:
                call()
                break
            except (grpc.RpcError, UnavailableError):
                if last:
                    raise
                PAUSE.wait(PAUSE_S)
        self.of.setdefault(kind, []).append((time.perf_counter() - began) * 1000)

    def quantile(self, kind: str) -> float:
        """Return the time that `SHARE` of the calls have stayed within."""
        return sorted(self.of[kind])[int(SHARE * len(self.of[kind]))]


def was_cancelled(error: Any) -> bool:
    """Return whether the server cancelled the call before it was processed."""
    return bool(error.code() is grpc.StatusCode.CANCELLED)


class Target:
    """A coordinator process, with a device and an administrator that go on calling it."""

    def __init__(self, process: CoordinatorProcess, parts: Application, folder: Path) -> None:
        assert process.process is not None
        self.address = process.address
        self.process = psutil.Process(process.process.pid)
        self._parts = parts
        self._folder = folder
        token = parts.use_cases.tokens.issue_admin(Caller(), "tester", [Role.ADMIN]).secret
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel = grpc.insecure_channel(process.address, options=OWN_CONNECTION)
        self._admin: Any = admin_service_pb2_grpc.AdminServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self.clients: list[Client] = []
        self._device = self.device("honest")

    def device(self, name: str) -> Client:
        """Enroll a device and log it in."""
        secret = self._parts.use_cases.tokens.issue_enrollment(Caller())[0].secret
        bundle = bootstrap_bundle(self._parts.keys.trust, self.address, enrollment_token=secret)
        enroll(bundle, home=self._folder / name)
        client = Client(home=self._folder / name)
        self.clients.append(client)
        client.get_task()
        return client

    def token(self, name: str) -> str:
        """Return the access token of a new device."""
        request = coordinator_service_pb2.GetTaskRequest()
        metadata: Any = self.device(name)._login.metadata("/x", request)
        return str(dict(metadata)["authorization"]).removeprefix("Bearer ")

    def call_for(self, seconds: float) -> Latencies:
        """Make calls of every kind, one after the other."""
        latencies = Latencies()
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            latencies.measure("health", self._check)
            latencies.measure("health of a new connection", self._check_anew)
            latencies.measure("device", self._device.get_task)
            latencies.measure("administrator", self._list)
        return latencies

    def await_answer(self) -> None:
        """Wait until the health service answers; half a minute at most.

        While more calls wait than gRPC lets, it cancels some of them, and their callers ask again, as the SDK does.
        """
        ends_at = time.monotonic() + 6 * ANSWER_S
        while True:
            left_s = ends_at - time.monotonic()
            try:
                request = health_pb2.HealthCheckRequest()
                self._health.Check(request, timeout=max(left_s, 0.0), wait_for_ready=True)
            except grpc.RpcError as error:
                if not was_cancelled(error) or left_s <= 0:
                    raise
            else:
                return

    def memory_bytes(self) -> int:
        """Return the memory that the process holds."""
        return int(self.process.memory_info().rss)

    def close(self) -> None:
        """Let its callers go."""
        for client in self.clients:
            client.close()
        self._channel.close()

    def _check(self) -> None:
        self._health.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)

    def _check_anew(self) -> None:
        with grpc.insecure_channel(self.address, options=OWN_CONNECTION) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)

    def _list(self) -> None:
        request = admin_service_pb2.ListDevicesRequest(page_size=1)
        self._admin.ListDevices(request, metadata=self._metadata, timeout=ANSWER_S)


@contextmanager
def few_files() -> Iterator[None]:
    """Give processes that are started in the block the limits of a shell: 1024 open files, unless they ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, key_folder: Path) -> Iterator[Target]:
    """Yield a coordinator on SQLite that may open as few files as a shell allows by default."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "keys").symlink_to(key_folder)
    url = f"sqlite:///{folder}/qflare.db"
    parts = Application.open(ServerConfig(data_dir=folder, database_url=url).checked())
    process = CoordinatorProcess(folder, url)
    with few_files():
        process.start()
    target = Target(process, parts, folder)
    target.call_for(0.5)
    yield target
    target.close()
    process.stop()
    parts.close()


@contextmanager
def attack(target: Target, kind: str, **options: object) -> Iterator[None]:
    """Attack for as long as the block lasts."""
    command = [sys.executable, "-m", "tests.support.attacks", kind, target.address]
    command += [f"{name}={value}" for name, value in options.items()]
    attacker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert attacker.stdin is not None
    assert attacker.stdout is not None
    try:
        assert attacker.stdout.readline() == b"attacking\n"
        yield
    finally:
        attacker.stdin.close()
        attacker.wait(30)
        attacker.stdout.close()


class Expectations:
    """What a target is like with nobody attacking, and may be like under attack."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._quiet = target.call_for(0.5)
        self._memory_bytes = target.memory_bytes()

    def require(self, seconds: float, more_memory_bytes: int = MORE_MEMORY_BYTES) -> None:
        """Call for a while and require that answers come in time, and the memory stays."""
        latencies = self._target.call_for(seconds)
        for kind in latencies.of:
            bound = HEALTH_MS if kind.startswith("health") else CALL_MS
            bound = max(bound, SLOWER * self._quiet.quantile(kind))
            assert latencies.quantile(kind) < bound, (kind, latencies.of[kind])
        assert self._target.memory_bytes() - self._memory_bytes < more_memory_bytes


@pytest.mark.parametrize(
    "method",
    ["/grpc.health.v1.Health/Check", REFLECTION, COORDINATOR + "GetKeyset"],
)
def test_callers_that_send_nothing_hold_nobody_up(target: Target, method: str) -> None:
    expectations = Expectations(target)
    with attack(target, "half_open", count=10_000, method=method):
        expectations.require(3.0)


def test_uploads_of_a_byte_a_second_hold_nobody_up(target: Target) -> None:
    expectations = Expectations(target)
    tokens = ",".join(target.token(f"crawling-{number}") for number in range(50))
    with attack(target, "trickle", tokens=tokens):
        expectations.require(3.0)


@pytest.mark.parametrize("greet", ["no", "yes"])
def test_more_idle_connections_than_files_by_default_hold_nobody_up(
    target: Target, greet: str
) -> None:
    expectations = Expectations(target)
    with attack(target, "idle", count=1100, greet=greet):
        expectations.require(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("half_open", {"count": 20_000, "method": COORDINATOR + "GetKeyset"}),
        ("half_open", {"method": "/grpc.health.v1.Health/Watch"}),
        ("half_open", {"method": COORDINATOR + "GetTask"}),
        ("half_open", {"method": COORDINATOR + "GetTask", "token": "qfx1.a.b"}),
        ("half_open", {"method": "/made.up.Service/Method"}),
        ("rapid_reset", {}),
        ("rapid_reset", {"method": COORDINATOR + "GetKeyset"}),
        ("whole_calls", {}),
        ("whole_calls", {"method": COORDINATOR + "GetKeyset"}),
        ("whole_calls", {"method": COORDINATOR + "BeginAuthentication"}),
        ("whole_calls", {"method": COORDINATOR + "GetTask", "token": "qfx1.a.b"}),
        ("whole_calls", {"method": "/made.up.Service/Method"}),
        ("huge_headers", {}),
        ("reconnect", {"per_second": 200, "greet": "no"}),
        ("reconnect", {"per_second": 200, "begins": "yes"}),
        ("frames", {"frame": "ping"}),
        ("frames", {"frame": "settings"}),
        ("frames", {"frame": "window"}),
        ("frames", {"frame": "priority"}),
        ("frames", {"frame": "data"}),
        ("frames", {"frame": "headers"}),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(map(str, value.values())) or "default"
    ),
)
def test_floods_hold_nobody_up(target: Target, kind: str, options: dict[str, object]) -> None:
    expectations = Expectations(target)
    with attack(target, kind, **options):
        expectations.require(4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("frames", {"frame": "continuation"}), ("reconnect", {"begins": "yes"})],
    ids=["continuation", "reconnect"],
)
def test_a_flood_that_fills_the_line_leaves_nothing_behind(
    target: Target, kind: str, options: dict[str, object]
) -> None:
    """Endless header blocks, and new connections, keep the library's threads busy as fast as they come.

    No answer is promised meanwhile.
    """
    expectations, flooded = Expectations(target), threading.Event()
    with attack(target, kind, **options):
        flooded.wait(3.0)
    target.await_answer()

    expectations.require(2.0, 4 * MORE_MEMORY_BYTES)
