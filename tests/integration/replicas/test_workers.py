"""`serve --workers 2`: two processes on one port and one PostgreSQL."""

import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from qflare_server.serving.application import Application
from tests.support.held_uploads import WAIT_S, held_upload
from tests.support.jobs import check_every_version, enroll_devices, prepare, wait_for_end
from tests.support.processes import CoordinatorProcess, DeviceThread, Replicas

CONNECTIONS = 32
WORKERS = 2


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Return a PostgreSQL database: several processes need one."""
    return postgres_url


@pytest.fixture
def metrics_port() -> int:
    """Return a free port, behind which as many are free as there are workers."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def worker_ids(coordinator: CoordinatorProcess) -> list[int]:
    """Return the process ids of the workers."""
    assert coordinator.process is not None
    pid = coordinator.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_ended(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended that need not be a child of ours."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def answered_count(port: int) -> int:
    """Return how many calls of GetKeyset a worker has answered, by its metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("grpc_server_handled_total")]
    return sum(int(float(line.split()[-1])) for line in lines if "GetKeyset" in line)


def test_calls_reach_every_worker(replicas: Replicas, metrics_port: int) -> None:
    coordinator = replicas.start(worker_count=WORKERS, metrics_listen=f"127.0.0.1:{metrics_port}")
    for _ in range(CONNECTIONS):
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(coordinator.address, options=options) as channel:
            CoordinatorServiceStub(channel).GetKeyset(pb.GetKeysetRequest(), timeout=WAIT_S)
    answered = [answered_count(metrics_port + worker) for worker in range(WORKERS)]
    assert sum(answered) == CONNECTIONS
    assert min(answered) > 0


@pytest.mark.parametrize("worker_count", [1, WORKERS])
def test_the_settings_are_logged_once(
    replicas: Replicas, database_url: str, tmp_path: Path, worker_count: int
) -> None:
    log_file = tmp_path / "log"

    coordinator = replicas.start(worker_count=worker_count, log_file=log_file)
    coordinator.stop()

    (line,) = [line for line in log_file.read_text().splitlines() if "settings: " in line]
    assert f" workers={worker_count} " in line
    assert database_url not in line


@pytest.mark.slow
def test_rounds_close_whichever_worker_folds(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    coordinator = replicas.start(worker_count=WORKERS)
    session_id = prepare(parts)
    homes = enroll_devices(parts, tmp_path, coordinator.address)
    threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
    for thread in threads:
        thread.start()
    wait_for_end(threads, 120)
    check_every_version(parts, session_id)


def test_a_worker_that_is_killed_ends_them_all_with_a_failure(replicas: Replicas) -> None:
    coordinator = replicas.start(worker_count=WORKERS)
    first, second = worker_ids(coordinator)
    os.kill(first, signal.SIGKILL)
    assert coordinator.wait() == 1
    assert has_ended(second, 0)


def test_workers_end_with_a_supervisor_that_is_killed(replicas: Replicas) -> None:
    coordinator = replicas.start(worker_count=WORKERS)
    workers = worker_ids(coordinator)
    coordinator.kill()
    assert all(has_ended(worker, WAIT_S) for worker in workers)


def test_sigterm_drains_every_worker(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    coordinator = replicas.start(worker_count=WORKERS)
    with held_upload(parts, tmp_path / "device", coordinator) as upload:
        coordinator.send(signal.SIGTERM)
        assert upload.finish().acceptance_sequence == 1
        assert coordinator.wait() == 0


def test_a_second_coordinator_does_not_share_the_port_in_silence(
    parts: Application, replicas: Replicas, tmp_path: Path, database_url: str
) -> None:
    coordinator = replicas.start(worker_count=WORKERS)
    command = [sys.executable, "-m", "qflare_server", "--data-dir", str(tmp_path / "other")]
    done = subprocess.run(
        [*command, "serve", "--listen", coordinator.address, "--workers", str(WORKERS)],
        env={
            **os.environ,
            "QFLARE_DATABASE_URL": database_url,
            "QFLARE_KEY_DIR": str(parts.config.key_dir or parts.config.data_dir / "keys"),
        },
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )

    assert done.returncode != 0
    assert "in use" in done.stderr
