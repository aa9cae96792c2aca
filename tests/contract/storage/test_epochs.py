"""The counts that every call reads: never older than what was committed before the call, whoever committed it.

Polls read a snapshot: as fresh as that for changes of their own process, and of bounded age for those of others.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session

from qflare_server.config import ServerConfig
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.epochs import MAX_AGE_S, EpochReader, bump_rounds, bump_security
from tests.contract.storage.test_database import adding
from tests.support.steady_time import SteadyTime

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


def test_a_snapshot_has_every_change_of_its_own_process(database: Database) -> None:
    for count in range(1, CHANGES):
        database.write(bump_security)
        assert database.recent_epochs().security == count


def test_a_snapshot_is_read_once_and_again_when_it_is_too_old(
    database: Database, other: Database
) -> None:
    steady_time = SteadyTime()
    reader = EpochReader(database.engine, steady_time)
    try:
        before = reader.recent()
        other.write(bump_rounds)
        assert [reader.recent() for _ in range(CHANGES)] == [before] * CHANGES
        assert reader.read_count == 1
        steady_time.advance(MAX_AGE_S)
        assert reader.recent().rounds == before.rounds + 1
        assert reader.read_count == 2
    finally:
        reader.close()


def test_a_read_that_began_before_a_change_is_no_snapshot_of_it(database: Database) -> None:
    reader = EpochReader(database.engine, lambda: 0.0)  # the read and the change at one instant
    try:
        reader.recent()
        database.write(bump_security)
        reader.invalidate()
        assert reader.recent().security == 1
    finally:
        reader.close()


def test_a_failed_change_leaves_the_count(database: Database) -> None:
    def fail_after_counting(session: Session) -> None:
        bump_security(session)
        raise LookupError

    before = database.recent_epochs()
    with pytest.raises(LookupError):
        database.write(fail_after_counting)
    assert database.recent_epochs() == before


def test_many_readers_of_snapshots_never_miss_a_change_of_their_own_process(
    database: Database,
) -> None:
    committed = [0]
    done = threading.Event()

    def read_on() -> int:
        count = 0
        while not done.is_set():
            least = committed[0]
            assert database.recent_epochs().security >= least
            count += 1
        return count

    with ThreadPoolExecutor(READERS) as pool:
        reading = [pool.submit(read_on) for _ in range(READERS)]
        for _ in range(CHANGES):
            database.write(bump_security)
            committed[0] += 1
        done.set()
        assert all(one.result() for one in reading)


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
