"""What goes wrong under a running coordinator: servers that stop answering, files that go, pages that rot."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg2
import pytest
from sqlalchemy import delete, exc, make_url, text

from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import ConflictError, StorageDamagedError, StoreUnavailableError
from qflare_server.serving.application import open_database
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.payload_store import PayloadFile, PayloadTable
from qflare_server.storage.repository import leases
from qflare_server.storage.schema import SchemaError
from qflare_server.storage.tables import ModelUpdate, PayloadChunk
from tests.contract.conftest import MakeCore
from tests.support.line import Line
from tests.support.postgresql import address_of, execute, over, with_database
from tests.support.use_cases import CoordinatorHarness, vector

BIG = 700_000  # elements: three chunks of float32
TIMEOUT_S = 0.5
PAUSE = threading.Event()

T = TypeVar("T")


@pytest.fixture
def impatient(postgres_url: str, tmp_path: Path) -> Iterator[Database]:
    """Yield a database on PostgreSQL that waits half a second for an answer."""
    config = ServerConfig(
        data_dir=tmp_path, database_url=postgres_url, database_timeout_s=TIMEOUT_S
    )
    opened = Database(make_engine(config), timeout_s=5.0)
    yield opened
    opened.close()


@contextmanager
def stopped_backend(database: Database) -> Iterator[None]:
    """Stop the server process behind the one idle connection of a pool."""
    with database.engine.connect() as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def select_one(database: Database) -> None:
    with database.read() as session:
        session.execute(text("SELECT 1"))


def write_one(database: Database) -> None:
    database.write(lambda session: session.execute(text("SELECT 1")))


def copy_in(database: Database) -> None:
    PayloadTable(database.engine).append("p", 0, [bytes(2**20)])


def copy_out(database: Database) -> None:
    PayloadTable(database.engine).read("p", 0, 1)


def execute_many(database: Database) -> None:
    with database.read() as session:
        session.execute(text("SELECT CAST(:n AS int)"), [{"n": 1}, {"n": 2}])


def fetch_from_the_server(database: Database) -> None:
    with database.read() as session:
        session.connection().execution_options(stream_results=True, max_row_buffer=1)
        list(session.execute(text("SELECT generate_series(1, 3)")))


def read_epochs(database: Database) -> None:
    database.epochs()


def check(database: Database) -> None:
    database.check()


CALLS = [
    select_one,
    write_one,
    copy_in,
    copy_out,
    execute_many,
    fetch_from_the_server,
    read_epochs,
    check,
]


@pytest.mark.parametrize("call", [call for call in CALLS if call is not read_epochs])
def test_no_call_waits_longer_than_the_timeout_for_a_server_that_is_stopped(
    impatient: Database, call: Callable[[Database], None]
) -> None:
    with stopped_backend(impatient):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            call(impatient)
        took_s = time.monotonic() - started

    assert took_s < TIMEOUT_S + 5.0
    call(impatient)  # on a connection of its own


@pytest.fixture
def distant(postgres_url: str, tmp_path: Path) -> Iterator[tuple[Database, Line]]:
    """Yield a database behind a line that can swallow every byte, and the line."""
    with Line(address_of(postgres_url)) as line:
        config = ServerConfig(
            data_dir=tmp_path,
            database_url=over(line.address, postgres_url),
            database_timeout_s=TIMEOUT_S,
        )
        opened = Database(make_engine(config), timeout_s=5.0)
        yield opened, line
        line.cut()
        opened.close()


@pytest.mark.parametrize(
    ("call", "connected"),
    [(call, True) for call in CALLS] + [(call, False) for call in (write_one, read_epochs)],
)
def test_no_call_waits_longer_than_the_timeout_for_a_line_that_swallows_every_byte(
    distant: tuple[Database, Line], call: Callable[[Database], None], *, connected: bool
) -> None:
    database, line = distant
    if connected:
        call(database)

    line.hush()
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        call(database)
    took_s = time.monotonic() - started
    line.cut()
    line.speak()
    until_answered(partial(call, database))

    assert took_s < TIMEOUT_S + 8.0


def test_no_statement_waits_longer_than_the_timeout_for_the_next_of_many(
    distant: tuple[Database, Line],
) -> None:
    database, line = distant
    drivers = database.engine.raw_connection()
    waits: dict[str, Callable[[Any], object]] = {
        "executemany": lambda cursor: cursor.executemany("SELECT %s", [(1,), (2,)]),
        "fetchone": lambda cursor: cursor.fetchone(),
        "fetchmany": lambda cursor: cursor.fetchmany(2),
        "fetchall": lambda cursor: cursor.fetchall(),
    }

    for name, wait in waits.items():
        cursor: Any = drivers.cursor() if name == "executemany" else begun(drivers)
        line.hush()
        with pytest.raises(psycopg2.Error):
            wait(cursor)
        line.cut()
        line.speak()
        drivers.invalidate()
        drivers = until_answered(database.engine.raw_connection)
    drivers.close()


def begun(drivers: Any) -> Any:
    """Return a cursor of the server that has run its statement and fetched no row."""
    cursor = drivers.cursor("many")
    cursor.execute("SELECT generate_series(1, 3)")
    return cursor


def until_answered(call: Callable[[], T]) -> T:
    """Return what a call returns once the database answers again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return call()
        except (StoreUnavailableError, exc.OperationalError):
            assert time.monotonic() < deadline


def test_connections_are_kept_alive_and_bounded_by_the_timeout(
    distant: tuple[Database, Line],
) -> None:
    database, _ = distant
    with database.engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        with socket.socket(fileno=os.dup(raw.fileno())) as line:
            kept = {
                "keepalive": line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                "idle": line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                "interval": line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                "count": line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                "user timeout": line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            }
        limits = {
            name: connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("statement_timeout", "lock_timeout")
        }

    assert kept == {
        "keepalive": 1,
        "idle": 10,
        "interval": 5,
        "count": 3,
        "user timeout": int(TIMEOUT_S * 1000),
    }
    assert limits == {"statement_timeout": "500ms", "lock_timeout": "500ms"}


def test_a_statement_that_takes_too_long_is_ended_by_the_server(impatient: Database) -> None:
    with pytest.raises(StoreUnavailableError), impatient.read() as session:
        session.execute(text("SELECT pg_sleep(30)"))

    select_one(impatient)


def test_a_server_that_has_become_read_only_is_unavailable_until_it_is_one_no_longer(
    impatient: Database, postgres_url: str
) -> None:
    name = make_url(postgres_url).database

    def set_read_only(value: str) -> None:
        with impatient.engine.execution_options(
            isolation_level="AUTOCOMMIT"
        ).connect() as connection:
            connection.execute(text("SET SESSION default_transaction_read_only TO off"))
            connection.execute(
                text(f'ALTER DATABASE "{name}" SET default_transaction_read_only TO {value}')
            )
        impatient.engine.dispose()

    impatient.check()
    set_read_only("on")
    with pytest.raises(StoreUnavailableError, match="read-only"):
        impatient.check()
    with pytest.raises(StoreUnavailableError, match="read-only"):
        impatient.write(lambda session: leases.acquire(session, "n", "h", NOW, NOW))
    set_read_only("off")

    impatient.check()


NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_what_a_url_says_of_the_connection_holds(postgres_url: str, tmp_path: Path) -> None:
    url = make_url(postgres_url).update_query_dict(
        {"options": "-c search_path=elsewhere", "application_name": "ward"}
    )
    config = ServerConfig(data_dir=tmp_path, database_url=url.render_as_string(hide_password=False))
    engine = make_engine(config)
    with engine.connect() as connection:
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("search_path", "application_name", "lock_timeout", "synchronous_commit")
        ]
    engine.dispose()

    assert shown == ["elsewhere", "ward", "10s", "on"]


def test_the_clock_of_coordinators_on_one_server_is_the_server_s(impatient: Database) -> None:
    ours = impatient.clock()
    with impatient.read() as session:
        theirs = session.execute(text("SELECT clock_timestamp()")).scalar_one()

    assert abs(ours - theirs) < timedelta(seconds=1)
    assert impatient.clock() > ours


def test_a_database_that_cannot_hold_all_text_is_refused(
    postgres_server_url: str, tmp_path: Path
) -> None:
    name = "qflare_test_latin1"
    execute(postgres_server_url, f"DROP DATABASE IF EXISTS {name}")
    execute(
        postgres_server_url,
        f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
    )
    url = with_database(postgres_server_url, name)
    config = ServerConfig(data_dir=tmp_path, database_url=url, auto_migrate=True)
    try:
        with pytest.raises(SchemaError, match="LATIN1"):
            open_database(config)
    finally:
        execute(postgres_server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite(sqlite_url: str, tmp_path: Path) -> Iterator[Database]:
    """Yield a database on SQLite that has been written to."""
    opened = Database(make_engine(ServerConfig(data_dir=tmp_path, database_url=sqlite_url)))
    opened.write(lambda session: leases.acquire(session, "first", "h", NOW, NOW))
    yield opened
    opened.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_acknowledged_once_the_database_file_is_gone(
    sqlite: Database, sqlite_url: str, replaced: bool
) -> None:
    path = Path(make_url(sqlite_url).database or "")
    content = path.read_bytes()
    path.unlink()
    if replaced:
        path.write_bytes(content)

    with pytest.raises(StoreUnavailableError, match="deleted or replaced"):
        sqlite.write(lambda session: leases.acquire(session, "second", "h", NOW, NOW))
    with pytest.raises(StoreUnavailableError, match="deleted or replaced"):
        sqlite.check()


def test_no_chunk_is_acknowledged_once_the_payload_file_is_gone(tmp_path: Path) -> None:
    store = PayloadFile(tmp_path / "p.payloads", timeout_s=1.0)
    store.append("p", 0, [b"a"])
    store.check()
    (tmp_path / "p.payloads").unlink()

    with pytest.raises(StoreUnavailableError):
        store.append("p", 1, [b"b"])
    with pytest.raises(StoreUnavailableError, match="deleted or replaced"):
        store.check()
    store.close()


def spoil(path: Path, first_byte: int) -> None:
    """Overwrite a file from a byte on with what is no page."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(first_byte)
        file.write(b"\xa5" * (size - first_byte))


def test_a_damaged_database_is_a_typed_error_and_stays_unhealthy(
    sqlite_url: str, tmp_path: Path
) -> None:
    path = Path(make_url(sqlite_url).database or "")
    spoil(path, 8192)
    database = Database(make_engine(ServerConfig(data_dir=tmp_path, database_url=sqlite_url)))

    with pytest.raises(StorageDamagedError), database.read() as session:
        session.execute(text("SELECT count(*) FROM devices")).all()
    with pytest.raises(StorageDamagedError):
        database.check()
    database.close()


def test_a_damaged_payload_file_is_a_typed_error_and_stays_unhealthy(tmp_path: Path) -> None:
    path = tmp_path / "p.payloads"
    store = PayloadFile(path, timeout_s=1.0)
    store.append("p", 0, [os.urandom(2**20)])
    store.close()
    spoil(path, 65536)
    store = PayloadFile(path, timeout_s=1.0)

    with pytest.raises(StorageDamagedError):
        store.read("p", 0, 1)
    with pytest.raises(StorageDamagedError):
        store.check()
    store.close()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_chunks_count_as_stored_up_to_the_first_that_is_missing(
    core: CoordinatorHarness, missing: int
) -> None:
    store = core.context.store_of("database")
    store.append("p", 0, [b"a", b"b", b"c", b"d"])
    drop_chunk(core, "p", missing)

    assert store.stored_count("p") == missing


def drop_chunk(core: CoordinatorHarness, payload_id: str, index: int) -> None:
    """Delete one chunk behind the coordinator's back."""
    store = core.context.store_of("database")
    engine = store._engine  # type: ignore[attr-defined]
    chunk = delete(PayloadChunk).where(
        PayloadChunk.payload_id == payload_id, PayloadChunk.chunk_index == index
    )
    lock = getattr(store, "_lock", nullcontext())  # a file has one connection for all threads
    with lock, engine.begin() as connection:
        connection.execute(chunk)


def test_an_update_whose_chunk_was_lost_on_the_way_is_not_acknowledged_and_goes_on(
    make_core: MakeCore,
) -> None:
    large = make_core(payload_store="database", inline_payload_bytes=0, upload_batch_bytes=2**20)
    large.add_devices(1)
    session_id = large.start(vector(0.0, BIG), rounds=training_pb2.RoundPolicy(quorum=1))
    draft = large.draft("device-0", session_id, vector(1.0, BIG))

    def losing() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks
        with large.database.read() as session:
            (payload_id,) = session.scalars(text("SELECT payload_id FROM uploads"))
        while large.store.stored_count(payload_id) < 2:
            PAUSE.wait(0.01)
        drop_chunk(large, payload_id, 1)

    with pytest.raises(ConflictError):
        large.send(draft, losing())
    acknowledged_before = large.count(ModelUpdate)
    following, _ = large.uploads.find(draft.device, draft.statement.update_id)
    large.send(draft, draft.chunks[following:])

    assert (acknowledged_before, following) == (0, 1)
    large.settle()
    assert large.weights(session_id, 1) == vector(1.0, BIG)["w"].tobytes()


def test_timeouts_are_those_of_the_settings(make_core: MakeCore) -> None:
    core = make_core(database_timeout_s=3.0)

    with core.database.read() as session:
        if core.database.is_sqlite:
            assert session.execute(text("PRAGMA busy_timeout")).scalar_one() == 3000
        else:
            assert session.execute(text("SHOW statement_timeout")).scalar_one() == "3s"
