"""Parsed configurations: one cache for each database, whatever ids two of them share."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.training_configs import INFO_KEY, MAX_PARSED, ParsedConfigs, to_json
from tests.conftest import START

ID = "in-process-1"
KINDS = 3 * MAX_PARSED


def insert(database: Database, total_rounds: int) -> None:
    row = {
        "id": ID,
        "name": "test",
        "model_type": "",
        "architecture": {},
        "state": "created",
        "config": to_json(training_pb2.TrainingConfig(total_rounds=total_rounds)),
        "created_at": START,
    }
    database.write(lambda session: training_sessions.insert_session(session, row))


def config_of(session: Session) -> training_pb2.TrainingConfig:
    found = training_sessions.lock_session(session, ID)
    assert found is not None
    return found.config


def test_is_parsed_once_by_a_database(database: Database) -> None:
    insert(database, 3)

    with database.read() as session:
        first = config_of(session)

    assert first.total_rounds == 3
    assert database.write(config_of) is first
    assert database.write(lambda session: session.info[INFO_KEY].get(ID, to_json(first))) is first


def test_databases_with_the_same_ids_do_not_share_it(
    database: Database, sqlite_template: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.db"
    shutil.copyfile(sqlite_template, path)
    other = Database(make_engine(ServerConfig(database_url=f"sqlite:///{path}")))
    insert(database, 3)
    insert(other, 5)

    found = [item.write(config_of).total_rounds for item in (database, other)]

    assert found == [3, 5]
    other.close()


def test_what_has_changed_is_parsed_again() -> None:
    known = ParsedConfigs()
    known.get(ID, {"total_rounds": 3})

    assert known.get(ID, {"total_rounds": 4}).total_rounds == 4


def test_is_bounded_and_safe_to_share() -> None:
    known = ParsedConfigs()

    def look(number: int) -> bool:
        rounds = number % KINDS + 1
        return known.get(f"id-{rounds}", {"total_rounds": rounds}).total_rounds == rounds

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(2 * KINDS)))
    assert len(known) == MAX_PARSED
