"""The watchdog of PostgreSQL connections: its thread ends with the work, and comes back with it."""

import threading

from sqlalchemy import text

from qflare_server.config import ServerConfig
from qflare_server.storage.engine import make_engine

PATIENCE_S = 20.0
ENGINES = 5


def watchdogs() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "database-watchdog"}


def ended(threads: set[threading.Thread]) -> int:
    """Wait for threads and return how many have ended; those of other engines may go on."""
    for thread in threads:
        thread.join(PATIENCE_S)
    return sum(not thread.is_alive() for thread in threads)


def test_no_thread_outlives_its_engine(postgres_url: str) -> None:
    before = watchdogs()
    for _ in range(ENGINES):
        engine = make_engine(ServerConfig(database_url=postgres_url))
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        engine.dispose()
    started = watchdogs() - before

    assert len(started) >= ENGINES
    assert ended(started) >= ENGINES


def test_a_thread_that_has_ended_comes_back_with_the_next_wait(postgres_url: str) -> None:
    before = watchdogs()
    engine = make_engine(ServerConfig(database_url=postgres_url))
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        started = watchdogs() - before
        assert ended(started) >= 1
        connection.execute(text("SELECT 1"))

        assert watchdogs() - before - started
    engine.dispose()
