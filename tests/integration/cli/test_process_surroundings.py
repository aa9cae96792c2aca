"""Commands as processes in the surroundings of other people's machines: streams, locales, limits, folders, users.

Each works, or ends with one line of cause and one of remedy.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qflare_server.cli.main import main as server_main

PYTHON = shlex.quote(sys.executable)
STATUS = f"{PYTHON} -m qflare_server --data-dir data status"
PROGRAMS = (
    "qflare_server",
    "qflare_client",
    "qflare_client.admin",
    "qflare_helper",
    "qflare_simulation",
)
PROFILE = f"{PYTHON} -m qflare_client.admin profile set --address localhost:1 --token-file token"
WORKS = {
    "closed input": f"{STATUS} <&-",
    "closed output": f"{STATUS} >&-",
    "closed errors": f"{STATUS} 2>&-",
    "all closed": f"{STATUS} <&- >&- 2>&-",
    "help to a closed output": f"{PYTHON} -m qflare_server --help >&-",
    "a reader that has gone": f"set -o pipefail; {STATUS} | true",
    "plain C": f"LC_ALL=C {STATUS}",
    "no locale": f"env -u LANG -u LC_ALL {STATUS}",
    "Turkish": f"LC_ALL=tr_TR.UTF-8 {STATUS}",
    "ASCII": f"PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C PYTHONIOENCODING=ascii {STATUS}",
    "no such zone": f"TZ=No/Such {STATUS}",
    "odd zone": f"TZ='<+0545>-5:45' {STATUS}",
    "empty zone": f"TZ= {STATUS}",
    "a terminal of one column": f"COLUMNS=1 {STATUS}",
    "columns that are no number": f"COLUMNS=x {STATUS}",
    "help in twenty columns": f"COLUMNS=20 {PYTHON} -m qflare_server session create --help",
    "warnings as errors": f"PYTHONWARNINGS=error {STATUS}",
    "no environment": f"env -i {STATUS}",
    "no home": f"env -u HOME {STATUS}",
    "few files": f"ulimit -n 24; {STATUS}",
    "open umask": f"umask 000; {PYTHON} -m qflare_server --data-dir open init",
    "closed umask": f"umask 777; {PYTHON} -m qflare_server --data-dir closed init",
    "a working directory that is gone": 'DATA="$PWD/data"; mkdir gone; cd gone; rmdir ../gone;'
    f' {PYTHON} -m qflare_server --data-dir "$DATA" status',
    "a working directory that cannot be written": 'DATA="$PWD/data"; OTHER="$PWD/other"; cd /proc;'
    f' {PYTHON} -m qflare_server --data-dir "$DATA" status;'
    f' {PYTHON} -m qflare_server --data-dir "$OTHER" init',
}
FAILS = {
    "a full disk": (f"{STATUS} >/dev/full", "No space left"),
    "relative to a folder that is gone": (
        f"mkdir gone; cd gone; rmdir ../gone; {STATUS}",
        "the working directory no longer exists",
    ),
    "a home that cannot be written": (f"umask 077; touch token; HOME=/proc {PROFILE}", "/proc"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory with a data folder."""
    path = tmp_path_factory.mktemp("surroundings")
    assert server_main([f"--data-dir={path / 'data'}", "init"]) == 0
    return path


def shell(folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of bash, without the settings of whoever runs the tests."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("QFLARE_", "PYTHON"))
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=plain,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", WORKS.values(), ids=WORKS.keys())
def test_commands_work(folder: Path, command: str) -> None:
    done = shell(folder, command)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("command", "cause"), FAILS.values(), ids=FAILS.keys())
def test_commands_name_cause_and_remedy(folder: Path, command: str, cause: str) -> None:
    done = shell(folder, command)
    lines = done.stderr.splitlines()

    assert done.returncode in {1, 2}
    assert len(lines) == 2
    assert cause in lines[0]
    assert lines[1].startswith("try: ")


@pytest.mark.parametrize(
    ("words", "buffering"),
    [("--help", ""), ("--version", ""), ("--version", "PYTHONUNBUFFERED=1")],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_output_is_written_or_its_failure_told(
    folder: Path, program: str, words: str, buffering: str
) -> None:
    """Buffered output meets its reader or the disk only at the end."""
    command = f"{buffering} {PYTHON} -m {program} {words}"

    unread = shell(folder, f"set -o pipefail; {command} | true")
    full = shell(folder, f"{command} >/dev/full")

    assert (unread.returncode, unread.stderr) == (0, "")
    assert full.returncode in {1, 2}
    assert "No space left" in full.stderr.splitlines()[0]
    assert len(full.stderr.splitlines()) == 2


def test_files_are_private_whatever_the_umask(folder: Path) -> None:
    assert shell(folder, f"umask 000; {PYTHON} -m qflare_server --data-dir u init").returncode == 0

    made = [folder / "u", *(folder / "u").rglob("*")]
    assert [path for path in made if path.stat().st_mode & 0o077] == []
