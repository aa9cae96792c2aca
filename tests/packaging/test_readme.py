"""The README as a newcomer types it: a clone, an environment of its own, an empty home, and no other line."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.packaging.test_wheel import ROOT, TIMEOUT_S, tracked_files
from tests.support.manual_pages import PORTS, PREAMBLE, blocks, free_port

pytestmark = pytest.mark.slow
LEFT_OUT = "make demo"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the tracked files alone."""
    folder = tmp_path / "clone"
    for path in tracked_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def script() -> str:
    """Return every shell block of the README in order, with ports that are free."""
    code = "".join(
        block.code
        for block in blocks((ROOT / "README.md").read_text())
        if block.language == "sh" and not block.code.startswith(LEFT_OUT)
    )
    for port in PORTS:
        code = code.replace(port, free_port())
    return PREAMBLE + code


def test_the_readme_runs_as_it_is_typed(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PIP_CONSTRAINT": str(ROOT / ".ci/constraints.txt"),
    }
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    project = clone / "first-project"
    logs = [path.read_text() for path in project.glob("bundles/*.log")]
    assert [log.count("5 updates") for log in logs] == [1, 1], logs
    assert "verified" in done.stdout
    assert (project / "final.safetensors").stat().st_size > 0
