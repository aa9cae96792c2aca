"""Environments with flwr of two versions, and apps as `flwr new` writes them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from string import Template

import pytest

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
TEMPLATES = ROOT / ".venv-flower/templates/flwr/cli/new/templates/app"
NAMES = {
    "project_name": "sample",
    "package_name": "sample",
    "import_name": "sample",
    "framework_str": "",
    "username": "sample",
}

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what is tested is the device."""
    return sqlite_url


@pytest.fixture(params=[".venv-flower-oldest", ".venv-flower"], ids=["oldest", "newest"])
def interpreter(request: pytest.FixtureRequest) -> Path:
    """A Python with flwr, of the oldest supported version and of the newest."""
    found: Path = ROOT / request.param / "bin/python"
    require(found)
    return found


def require(path: Path) -> None:
    """Skip a test, or let it fail where everything is required, without a file of the Flower environments."""
    if not path.exists():
        reason = f"{path} does not exist (make install-flower); Flower apps were NOT run"
        if os.environ.get("QFLARE_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def start(tmp_path: Path) -> Run:
    """Start a program with flwr; its data sets are those of this folder."""

    def started(interpreter: Path, *arguments: object) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE / "data"),
        }
        return subprocess.Popen(
            [interpreter, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return started


def finished(process: subprocess.Popen[str], timeout_s: float = 120) -> str:
    """Wait for a program that has to succeed, and return what it said."""
    said, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, said
    return said


@pytest.fixture
def new_app(tmp_path: Path) -> Callable[[str], Path]:
    """Write the app of a framework, as `flwr new` does."""

    def written(framework: str) -> Path:
        require(TEMPLATES)
        folder = tmp_path / framework
        package = folder / "sample"
        package.mkdir(parents=True)
        files = {
            folder / "pyproject.toml": f"pyproject.{framework}.toml.tpl",
            package / "__init__.py": "code/__init__.py.tpl",
            package / "task.py": f"code/task.{framework}.py.tpl",
            package / "client_app.py": f"code/client.{framework}.py.tpl",
            package / "server_app.py": f"code/server.{framework}.py.tpl",
        }
        for path, template in files.items():
            text = (TEMPLATES / template).read_text(encoding="utf-8")
            path.write_text(Template(text).substitute(NAMES), encoding="utf-8")
        return folder

    return written
