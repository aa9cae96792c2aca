"""A training job through a real PgBouncer in transaction mode, configured as docs/operations.md says."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest
from sqlalchemy import create_engine, make_url, text

from qflare_server.serving.application import Application
from tests.support.jobs import (
    DEVICES,
    ROUNDS,
    check_every_version,
    enroll_devices,
    prepare,
    wait_for_end,
)
from tests.support.postgresql import UNPRIVILEGED_USER, driver_url
from tests.support.processes import CoordinatorProcess, DeviceThread

pytestmark = pytest.mark.slow

FOLDER: Final = Path(__file__).parents[3] / ".tools" / "pgbouncer"
START_TIMEOUT_S: Final = 30
SETTINGS: Final = """
[databases]
{database} = host={host} dbname={database} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 16
ignore_startup_parameters = options
"""


@pytest.fixture
def database_url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture(scope="session")
def program() -> str:
    """Return the path of PgBouncer."""
    for found in (FOLDER / "usr" / "sbin" / "pgbouncer", Path("/usr/sbin/pgbouncer")):
        if found.exists():
            return str(found)
    given = shutil.which("pgbouncer")
    if given is None:
        pytest.skip("PgBouncer is not installed: `make tools`")
    return given


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_listens(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            threading.Event().wait(0.05)
        else:
            return


@pytest.fixture
def pooled_url(database_url: str, program: str) -> Iterator[str]:
    """Yield the URL of the database through PgBouncer."""
    url, port = make_url(database_url), free_port()
    role = "ALTER DATABASE {} SET {}".format(url.database, "{} = '{}'")
    engine = create_engine(driver_url(database_url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(role.format("lock_timeout", "10s")))
        connection.execute(text(role.format("idle_in_transaction_session_timeout", "60s")))
    engine.dispose()
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(
            SETTINGS.format(host=url.query["host"], database=url.database, port=port)
        )
        settings.chmod(0o644)
        libraries = FOLDER / "usr" / "lib" / "x86_64-linux-gnu"
        process = subprocess.Popen(
            [program, str(settings)],
            env={**os.environ, "LD_LIBRARY_PATH": str(libraries)} if libraries.exists() else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=UNPRIVILEGED_USER if os.geteuid() == 0 else None,
        )
        try:
            wait_until_it_listens(port, process)
            yield f"postgresql://postgres@127.0.0.1:{port}/{url.database}"
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)


def test_a_job_runs_through_a_pooler_of_transactions(
    parts: Application, pooled_url: str, tmp_path: Path
) -> None:
    session_id = prepare(parts)
    coordinator = CoordinatorProcess(tmp_path / "coordinator", pooled_url)
    coordinator.start()
    try:
        homes = enroll_devices(parts, tmp_path, coordinator.address)
        threads = [DeviceThread(home, index, session_id) for index, home in enumerate(homes)]
        for thread in threads:
            thread.start()
        wait_for_end(threads, 120)
    finally:
        coordinator.stop()

    assert [thread.update_count for thread in threads] == [ROUNDS] * DEVICES
    check_every_version(parts, session_id)
