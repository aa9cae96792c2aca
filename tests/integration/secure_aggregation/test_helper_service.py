"""A helper as a service: health, metrics, and what strangers may hold."""

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1.helper_service_pb2_grpc import HelperServiceStub
from qflare_helper.errors import BusyError
from qflare_helper.limits import (
    MAX_STRANGERS,
    MAX_STRANGERS_OF_HOST,
    StallGuard,
    Strangers,
    host_of,
)
from qflare_helper.monitoring import MAX_CONNECTIONS
from tests.integration.secure_aggregation.conftest import (
    TIMEOUT_S,
    SecureStart,
    contribute,
)
from tests.integration.secure_aggregation.test_attacks import LyingCoordinator

States = health_pb2.HealthCheckResponse
OPTIONS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")


def _health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status)


def _metrics(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_helper_tells_how_it_is_and_strangers_hold_little_of_it(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=3, policy={"min_cohort": 2})
    for index in range(2):
        contribute(made.deployment.device(f"device-{index}"), session_id, index)
    helper = made.helpers[0]
    helper.stop()
    helper.start(*OPTIONS)
    liar = LyingCoordinator(made, session_id)
    assert _health(helper.address) == _health(f"127.0.0.1:{helper.health_port}") == States.SERVING
    liar.ask(liar.members)
    liar.refusal(liar.members[:1])
    _with_strangers(helper.address, liar)
    _with_silent_connections(helper.metrics_port)

    text = _metrics(helper.metrics_port)
    assert 'qflare_helper_served_total{outcome="answered"} 2.0' in text
    assert 'qflare_helper_served_total{outcome="small_cohort"} 1.0' in text
    assert 'qflare_helper_served_total{outcome="busy"}' in text
    assert "qflare_helper_counter 1.0" in text
    assert "qflare_helper_in_progress 0.0" in text
    with pytest.raises(urllib.error.HTTPError):
        _metrics(helper.metrics_port, "/another")

    _spoil(helper.home / "ledger.db")
    assert _health(helper.address) == States.NOT_SERVING


def _with_strangers(address: str, liar: LyingCoordinator) -> None:
    """Hold as many silent calls as one host may; further ones are refused, short ones and later ones are not."""
    ends = threading.Event()

    def silent() -> Iterator[messages.UnmaskRequest]:
        ends.wait()
        yield from ()

    with grpc.insecure_channel(address) as channel:
        stub = HelperServiceStub(channel)
        held = [stub.Unmask(silent(), timeout=60) for _ in range(MAX_STRANGERS_OF_HOST)]

        def hold_again() -> (
            None
        ):  # a call that was refused because an earlier one had not quite ended
            held[:] = [
                call if call.is_active() else stub.Unmask(silent(), timeout=60) for call in held
            ]

        try:
            _wait_for_code(stub, grpc.StatusCode.RESOURCE_EXHAUSTED, hold_again)
            assert stub.GetHelper(messages.GetHelperRequest(), timeout=10).counter == 1
            assert _health(address) == States.SERVING
            assert liar.refusal(liar.members).startswith("RESOURCE_EXHAUSTED")
        finally:
            ends.set()
        for call in held:
            call.cancel()
        _wait_for_code(stub, grpc.StatusCode.INVALID_ARGUMENT)
    assert liar.ask(liar.members)


def _wait_for_code(
    stub: HelperServiceStub, code: grpc.StatusCode, prepare: Callable[[], None] = lambda: None
) -> None:
    """Send requests without a header until the helper refuses them with a status."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        prepare()
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Unmask(iter(()), timeout=20))
        error: Any = caught.value
        if error.code() is code:
            return
    raise AssertionError(code)


def _with_silent_connections(port: int) -> None:
    """Open more silent connections than are held; those beyond are closed, and the others end by themselves."""
    silent = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(MAX_CONNECTIONS + 4)]
    for connection in silent:
        connection.settimeout(30)
        assert connection.recv(1) == b""
        connection.close()


def _spoil(file: Path) -> None:
    for path in (file, file.with_name("ledger.db-wal"), file.with_name("ledger.db-shm")):
        path.unlink(missing_ok=True)
    file.write_bytes(b"no database" * 100)


def test_strangers_are_counted_by_host() -> None:
    strangers = Strangers()
    leave = [strangers.enter(f"ipv4:192.0.2.1:{port}") for port in range(MAX_STRANGERS_OF_HOST)]
    with pytest.raises(BusyError):
        strangers.enter("ipv4:192.0.2.1:999")
    others = range(MAX_STRANGERS - MAX_STRANGERS_OF_HOST)
    leave += [strangers.enter(f"ipv4:198.51.100.{number}:1") for number in others]
    with pytest.raises(BusyError):
        strangers.enter("ipv4:203.0.113.1:1")
    for end in leave:
        end()
        end()  # counts once
    strangers.enter("ipv4:192.0.2.1:1")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.1:5", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5", "2001:db8::/64"),
        ("ipv6:[2001:db8::ff]:5", "2001:db8::/64"),
        ("ipv6:[fe80::1%25eth0]:5", "fe80::/64"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_hosts_of_peers(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_a_call_whose_next_part_does_not_come_is_cancelled() -> None:
    guard, cancelled = StallGuard(), threading.Event()

    def parts() -> Iterator[int]:
        yield 1
        cancelled.wait(30)

    guard.start()
    try:
        with guard.watch(parts(), cancelled.set, stall_s=0.0) as paced:
            assert list(paced) == [1]
        assert cancelled.is_set()
        cancelled.clear()  # and so are later ones, after a time without calls
        with guard.watch(parts(), cancelled.set, stall_s=0.0) as paced:
            assert list(paced) == [1]
        assert cancelled.is_set()
    finally:
        guard.stop()
