"""Processes that hold keys dump no core: all programs, and programs that embed the coordinator."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import pytest

PROGRAMS: Final = sorted(
    {
        entry.name
        for entry in entry_points(
            group="console_scripts",
        )
        if entry.name.startswith("qflare")
    }
)
REPORT: Final = """
import ctypes, resource
flag = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) if sys.platform == "linux" else 0  # PR_GET_DUMPABLE
print(*resource.getrlimit(resource.RLIMIT_CORE), flag)
"""
PROGRAM: Final = """
import sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name={name!r})
sys.argv = [{name!r}, "--version"]
try:
    entry.load()()
except SystemExit:
    pass
"""
EMBEDDING: Final = """
import sys
from qflare_server import registry
registry.register_device("bed-7")
"""


def report(program: str, folder: Path) -> str:
    """Run a program and return the limits of core dumps, and the flag, that it ends with."""
    environment = {**os.environ, "QFLARE_DATA_DIR": str(folder)}
    finished = subprocess.run(
        [sys.executable, "-c", program + REPORT],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return finished.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_dumps_core(name: str, tmp_path: Path) -> None:
    assert report(PROGRAM.format(name=name), tmp_path) == "0 0 0"


def test_a_program_that_embeds_the_coordinator_dumps_no_core(tmp_path: Path) -> None:
    assert report(EMBEDDING, tmp_path) == "0 0 0"


def test_all_programs_are_looked_at() -> None:
    names = ["admin", "client", "helper", "server", "simulate"]
    assert sorted(PROGRAMS) == [f"qflare-{name}" for name in names]
