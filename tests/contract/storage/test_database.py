"""Transactions keep their promises, whoever else writes and whatever becomes of the database."""

import dataclasses
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, event, exc, func, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from qflare_server.config import ServerConfig
from qflare_server.errors import ConflictError, StorageFullError, StoreUnavailableError
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine, normalize_url
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.tables import Lease, TrainingSessionState
from tests.conftest import START

WAIT_S = 30.0
THREAD_COUNT = 8


def add_lease(session: Session, name: str, holder: str = "me") -> str:
    session.execute(insert(Lease).values(name=name, holder=holder, expires_at=START))
    return name


def adding(name: str) -> Callable[[Session], str]:
    return lambda session: add_lease(session, name)


def names(database: Database) -> list[str]:
    with database.read() as session:
        return sorted(session.scalars(select(Lease.name)))


@pytest.fixture
def sqlite_config(sqlite_url: str, server_config: ServerConfig) -> ServerConfig:
    return dataclasses.replace(server_config, database_url=sqlite_url, database_timeout_s=0.2)


@pytest.fixture
def sqlite_database(sqlite_config: ServerConfig) -> Iterator[Database]:
    opened = Database(make_engine(sqlite_config))
    yield opened
    opened.close()


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[Database]:
    config = ServerConfig(database_url=postgres_url, database_timeout_s=10.0)
    opened = Database(make_engine(config))
    yield opened
    opened.close()


def test_write_returns_the_result_of_its_work(database: Database) -> None:
    assert database.write(adding("a")) == "a"
    assert names(database) == ["a"]


def test_nothing_written_in_a_read_stays(database: Database) -> None:
    with database.read() as session:
        add_lease(session, "a")

    assert names(database) == []


def test_failing_work_undoes_all_that_it_wrote(database: Database) -> None:
    def work(session: Session) -> None:
        add_lease(session, "a")
        add_lease(session, "b")
        raise LookupError("no")

    with pytest.raises(LookupError):
        database.write(work)

    assert names(database) == []


def test_write_goes_on_after_a_failure(database: Database) -> None:
    with pytest.raises(ConflictError):
        database.write(lambda session: (add_lease(session, "a"), add_lease(session, "a")))

    database.write(adding("a"))

    assert names(database) == ["a"]


def test_unique_key_that_is_taken_is_a_conflict(database: Database) -> None:
    database.write(adding("a"))

    with pytest.raises(ConflictError):
        database.write(adding("a"))


def test_missing_row_of_a_foreign_key_is_a_conflict(database: Database) -> None:
    values: dict[str, Any] = {
        "training_session_id": "none",
        "number": 1,
        "state": "open",
        "base_version": 0,
        "quorum": 1,
        "target": 1,
        "nonce": "",
        "opened_at": START,
        "deadline_at": START,
    }

    with pytest.raises(ConflictError):
        database.write(lambda session: training_sessions.insert_round(session, values))


def test_fault_of_ours_is_not_translated(database: Database) -> None:
    with pytest.raises(exc.SQLAlchemyError):
        database.write(lambda session: session.execute(text("SELECT nonsense FROM nowhere")))


def test_time_reads_back_in_utc(database: Database) -> None:
    at = datetime(2030, 6, 1, 12, 30, 15, 123456, timezone(timedelta(hours=5)))

    def work(session: Session) -> None:
        session.execute(insert(Lease).values(name="a", holder="me", expires_at=at))

    database.write(work)

    with database.read() as session:
        read = session.scalars(select(Lease.expires_at)).one()
    assert read == at
    assert read.utcoffset() == timedelta(0)


def test_time_without_a_zone_is_refused(database: Database) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 - the point

    def work(session: Session) -> None:
        session.execute(insert(Lease).values(name="a", holder="me", expires_at=naive))

    with pytest.raises(exc.StatementError, match="time without a time zone"):
        database.write(work)


def queue_up(database: Database, works: list[Callable[[Session], Any]]) -> list[Future[Any]]:
    """Occupy the writer of an SQLite database, hand it works in this order, and let it take them as a group."""
    writer = database._writer
    assert writer is not None
    started, release = threading.Event(), threading.Event()

    def occupying(_session: Session) -> None:
        started.set()
        assert release.wait(WAIT_S)

    writer.submit(occupying)
    assert started.wait(WAIT_S)
    futures = [writer.submit(work) for work in works]
    release.set()
    return futures


def outcomes(futures: list[Future[Any]]) -> list[str]:
    return [type(future.exception(WAIT_S)).__name__ for future in futures]


def test_failing_work_of_a_group_undoes_nothing_of_the_others(sqlite_database: Database) -> None:
    commits: list[object] = []
    event.listen(sqlite_database.engine, "commit", commits.append)

    def failing(session: Session) -> None:
        add_lease(session, "half")
        raise LookupError("no")

    futures = queue_up(sqlite_database, [adding("a"), failing, adding("b"), adding("a")])

    assert outcomes(futures) == ["NoneType", "LookupError", "NoneType", "IntegrityError"]
    assert names(sqlite_database) == ["a", "b"]
    assert len(commits) == 2  # the one that occupied the writer, and the group


def test_no_work_is_answered_before_its_commit(sqlite_database: Database) -> None:
    answered_early: list[bool] = []
    futures: list[Future[Any]] = []
    event.listen(
        sqlite_database.engine,
        "commit",
        lambda _: answered_early.extend(future.done() for future in futures),
    )

    futures += queue_up(sqlite_database, [adding("a"), adding("b")])

    assert outcomes(futures) == ["NoneType", "NoneType"]
    assert not any(answered_early)


def test_threads_take_gapless_numbers(database: Database) -> None:
    database.write(_insert_session)
    barrier = threading.Barrier(THREAD_COUNT)

    def work(session: Session) -> int:
        owner = training_sessions.lock_session(session, "s")
        assert owner is not None
        number = owner.current_round + 1
        training_sessions.update_session(session, "s", {"current_round": number})
        return number

    def take(_thread: int) -> list[int]:
        barrier.wait(WAIT_S)
        return [database.write(work) for _ in range(5)]

    with ThreadPoolExecutor(THREAD_COUNT) as pool:
        taken = [number for part in pool.map(take, range(THREAD_COUNT)) for number in part]

    assert sorted(taken) == list(range(1, 5 * THREAD_COUNT + 1))


def _insert_session(session: Session) -> None:
    training_sessions.insert_session(
        session,
        {
            "id": "s",
            "name": "s",
            "model_type": "",
            "architecture": {},
            "state": TrainingSessionState.CREATED.value,
            "config": {},
            "created_at": START,
        },
    )


def test_reader_sees_nothing_that_is_not_committed(database: Database) -> None:
    inside, release = threading.Event(), threading.Event()

    def work(session: Session) -> None:
        add_lease(session, "a")
        inside.set()
        assert release.wait(WAIT_S)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(database.write, work)
        assert inside.wait(WAIT_S)
        before = names(database)
        release.set()
        future.result(WAIT_S)

    assert before == []
    assert names(database) == ["a"]


def test_write_to_a_closed_database_is_unavailable(sqlite_config: ServerConfig) -> None:
    database = Database(make_engine(sqlite_config))
    database.close()

    with pytest.raises(StoreUnavailableError):
        database.write(adding("a"))


def test_locked_database_is_unavailable_and_recovers(
    sqlite_database: Database, sqlite_config: ServerConfig
) -> None:
    path = make_url(sqlite_config.database_url).database
    assert path is not None
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(StoreUnavailableError):
        sqlite_database.write(adding("a"))
    other.execute("ROLLBACK")
    other.close()
    sqlite_database.write(adding("b"))

    assert names(sqlite_database) == ["b"]


def test_write_that_does_not_commit_in_time_is_unavailable(sqlite_config: ServerConfig) -> None:
    database = Database(make_engine(sqlite_config), timeout_s=0.05)
    release = threading.Event()

    with pytest.raises(StoreUnavailableError):
        database.write(lambda _session: release.wait(WAIT_S))

    release.set()
    database.close()


def test_full_disk_is_told_and_recovers(sqlite_database: Database) -> None:
    def limit(session: Session) -> None:
        pages = session.execute(text("PRAGMA page_count")).scalar_one()
        session.execute(text(f"PRAGMA max_page_count = {pages}"))

    def fill(session: Session) -> None:
        for number in range(500):
            add_lease(session, f"{number:050}", "x" * 60)

    sqlite_database.write(limit)
    with pytest.raises(StorageFullError):
        sqlite_database.write(fill)
    sqlite_database.write(
        lambda session: session.execute(text("PRAGMA max_page_count = 1073741823"))
    )
    sqlite_database.write(adding("a"))

    assert names(sqlite_database) == ["a"]


def test_lost_connection_is_unavailable_and_recovers(
    postgres_database: Database, postgres_server_url: str
) -> None:
    def work(session: Session) -> None:
        add_lease(session, "a")
        terminate(postgres_server_url, session.execute(select(func.pg_backend_pid())).scalar_one())
        session.execute(select(1))

    with pytest.raises(StoreUnavailableError):
        postgres_database.write(work)
    postgres_database.write(adding("b"))

    assert names(postgres_database) == ["b"]


def test_connection_lost_while_idle_is_replaced(
    postgres_database: Database, postgres_server_url: str
) -> None:
    with postgres_database.read() as session:
        pid = session.execute(select(func.pg_backend_pid())).scalar_one()
    terminate(postgres_server_url, pid)

    postgres_database.write(adding("a"))

    assert names(postgres_database) == ["a"]


def terminate(server_url: str, pid: int) -> None:
    """End one connection of a PostgreSQL, and wait until it is gone."""
    engine = create_engine(normalize_url(server_url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        gone = connection.execute(
            text("SELECT pg_terminate_backend(:pid, :wait_ms)"),
            {"pid": pid, "wait_ms": int(WAIT_S * 1000)},
        ).scalar_one()
    engine.dispose()
    assert gone


def test_database_that_cannot_be_reached_is_unavailable(postgres_url: str) -> None:
    url = make_url(postgres_url).set(database="qflare_no_such_database")
    config = ServerConfig(
        database_url=url.render_as_string(hide_password=False), database_timeout_s=2.0
    )
    database = Database(make_engine(config))

    with pytest.raises(StoreUnavailableError), database.read() as session:
        session.execute(select(1))

    database.close()


def test_lock_that_is_not_given_in_time_is_unavailable(postgres_url: str) -> None:
    config = ServerConfig(database_url=postgres_url, database_timeout_s=0.2)
    database = Database(make_engine(config))
    database.write(_insert_session)
    locked, release = threading.Event(), threading.Event()

    def holding(session: Session) -> None:
        training_sessions.lock_session(session, "s")
        locked.set()
        assert release.wait(WAIT_S)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(database.write, holding)
        assert locked.wait(WAIT_S)
        with pytest.raises(StoreUnavailableError):
            database.write(lambda session: training_sessions.lock_session(session, "s"))
        release.set()
        future.result(WAIT_S)

    database.close()


def test_work_is_repeated_after_a_deadlock(postgres_database: Database) -> None:
    postgres_database.write(lambda session: (add_lease(session, "a"), add_lease(session, "b")))
    barrier = threading.Barrier(2)
    runs: list[str] = []

    def crossing(first: str, second: str) -> Callable[[Session], None]:
        def work(session: Session) -> None:
            session.execute(select(Lease).where(Lease.name == first).with_for_update())
            runs.append(first)
            if len(runs) <= 2:
                barrier.wait(WAIT_S)
            session.execute(select(Lease).where(Lease.name == second).with_for_update())

        return work

    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(postgres_database.write, crossing("a", "b")),
            pool.submit(postgres_database.write, crossing("b", "a")),
        ]
        for future in futures:
            future.result(WAIT_S)

    # Three, or more: what is repeated may take its first lock again before the other transaction wakes up.
    assert len(runs) >= 3


def test_pool_that_is_exhausted_is_unavailable(database_url: str) -> None:
    config = ServerConfig(database_url=database_url, database_pool_size=1, database_timeout_s=0.2)
    database = Database(make_engine(config))

    with database.read() as session:
        session.execute(select(1))
        with pytest.raises(StoreUnavailableError), database.read() as other:
            other.execute(select(1))

    database.close()


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("postgresql://me@host/db", "postgresql+psycopg2"),
        ("postgres://me@host/db", "postgresql+psycopg2"),
        ("postgresql+psycopg2://me@host/db", "postgresql+psycopg2"),
        ("sqlite:///file.db", "sqlite"),
    ],
)
def test_url_gets_its_driver(given: str, driver: str) -> None:
    assert normalize_url(given).drivername == driver


@pytest.mark.parametrize(
    "given",
    ["mysql://host/db", "sqlite://", "sqlite:///:memory:", "postgresql://[::1/db", "no url", ""],
)
def test_url_of_no_use_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="database URL"):
        normalize_url(given)


@given(st.text(min_size=1), st.text(min_size=1))
def test_url_keeps_a_percent_encoded_password_and_host(password: str, database: str) -> None:
    given_url = f"postgresql://me:{quote(password, safe='')}@[::1]:5432/{quote(database, safe='')}"

    url = normalize_url(given_url)

    assert (url.password, url.host, url.port) == (password, "::1", 5432)


@pytest.mark.parametrize("name", ["a b.db", "ü.db", "a%20b.db", "sub/x.db", "a#b.db", "%C3%BC.db"])
def test_sqlite_files_have_the_percent_decoded_name_of_the_url(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = make_engine(ServerConfig(database_url=f"sqlite:///{name}"))
    with engine.connect():
        assert (tmp_path / unquote(name)).exists()
    engine.dispose()
