"""The schema that the migrations make is the one that the models say, on both databases, from any start."""

import ast
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, inspect, text

from qflare_server.config import ServerConfig
from qflare_server.storage import schema
from qflare_server.storage.engine import make_engine
from qflare_server.storage.schema import SchemaError
from qflare_server.storage.tables import Base
from tests.conftest import migrate

REVISIONS = Path(__file__).parents[3] / "migrations" / "versions"
PROCESS_COUNT = 4


def opened(url: str) -> Iterator[Engine]:
    engine = make_engine(ServerConfig(database_url=url))
    yield engine
    engine.dispose()


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[Engine]:
    yield from opened(empty_database_url)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from opened(database_url)


def set_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :to"), {"to": revision})


def differences(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def test_head_is_what_the_models_say(engine: Engine) -> None:
    assert differences(engine) == []


def test_head_has_the_check_constraints_of_the_models(engine: Engine) -> None:
    wanted = {
        (table.name, str(constraint.name))
        for table in Base.metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint)
    }

    found = {
        (table, str(constraint["name"]))
        for (_schema, table), constraints in inspect(engine).get_multi_check_constraints().items()
        for constraint in constraints
    }

    assert found == wanted


def test_an_empty_database_has_no_revision(empty_engine: Engine) -> None:
    assert schema.is_empty(empty_engine)
    assert schema.current_revision(empty_engine) is None


def test_upgrade_brings_an_empty_database_to_the_head(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)

    assert schema.current_revision(empty_engine) == schema.head_revision()
    assert not schema.is_empty(empty_engine)
    schema.require_current(empty_engine)


def test_upgrade_of_a_current_database_changes_nothing(engine: Engine) -> None:
    schema.upgrade(engine)

    assert differences(engine) == []


def test_down_to_nothing_and_up_again_gives_the_same_schema(engine: Engine) -> None:
    schema.downgrade(engine, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]

    schema.upgrade(engine)

    assert differences(engine) == []


def test_a_failed_migration_leaves_nothing_behind(
    empty_engine: Engine,
) -> None:
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE used_nonces (other INTEGER)"))

    with pytest.raises(Exception, match="used_nonces"):
        schema.upgrade(empty_engine)

    assert inspect(empty_engine).get_table_names() == ["used_nonces"]


def test_foreign_keys_are_on_after_a_migration(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        schema.upgrade(engine)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


def test_an_empty_database_is_refused_with_the_command(empty_engine: Engine) -> None:
    with pytest.raises(SchemaError, match="no schema; run: qflare-server migrate"):
        schema.require_current(empty_engine)


def test_an_older_schema_is_refused_with_the_command(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "head_revision", lambda: "9999")

    with pytest.raises(SchemaError, match="needs 9999; run: qflare-server migrate"):
        schema.require_current(engine)


@pytest.mark.parametrize("step", [schema.require_current, schema.upgrade])
def test_a_newer_schema_is_refused_and_left_alone(engine: Engine, step: Any) -> None:
    set_revision(engine, "9999")

    with pytest.raises(SchemaError, match="newer than this program; upgrade the program"):
        step(engine)

    assert schema.current_revision(engine) == "9999"


def test_several_processes_migrate_at_once(empty_database_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=migrate, args=(empty_database_url,)) for _ in range(PROCESS_COUNT)
    ]

    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * PROCESS_COUNT


def test_revisions_are_one_line_of_numbered_files() -> None:
    revisions = list(schema._script().walk_revisions())

    numbers = [script.revision for script in reversed(revisions)]
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    assert all(Path(script.path).name.startswith(f"rev_{script.revision}_") for script in revisions)


@pytest.mark.parametrize("path", sorted(REVISIONS.glob("rev_*.py")), ids=lambda path: path.stem)
def test_revisions_import_nothing_of_ours(path: Path) -> None:
    tree = ast.parse(path.read_text())

    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"sqlalchemy", "alembic"}
