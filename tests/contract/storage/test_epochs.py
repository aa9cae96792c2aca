"""The counts that every call reads: never older than what was committed before the call, whoever committed it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qflare_server.config import ServerConfig
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.epochs import bump_rounds, bump_security
from tests.contract.storage.test_database import adding

READERS = 8
CHANGES = 50


@pytest.fixture
def other(server_config: ServerConfig) -> Iterator[Database]:
    """Return the same database as another process has it open."""
    opened = Database(make_engine(server_config))
    yield opened
    opened.close()


def test_a_change_by_another_process_is_seen_at_once(database: Database, other: Database) -> None:
    for count in range(1, CHANGES):
        other.write(bump_security)
        assert database.epochs().security == count
        assert database.epochs().security == count


def test_other_writes_change_no_count(database: Database, other: Database) -> None:
    database.write(bump_rounds)
    before = database.epochs()

    other.write(adding("a"))

    assert database.epochs() == before


def test_many_readers_never_see_less_than_was_committed(
    database: Database, other: Database
) -> None:
    committed = [0]
    done = threading.Event()

    def read_on() -> int:
        count = 0
        while not done.is_set():
            least = committed[0]
            assert database.epochs().security >= least
            count += 1
        return count

    with ThreadPoolExecutor(READERS) as pool:
        reading = [pool.submit(read_on) for _ in range(READERS)]
        for _ in range(CHANGES):
            other.write(bump_security)
            committed[0] += 1
        done.set()
        assert all(one.result() for one in reading)
