"""What the demo prints at its end can be typed as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import pytest

from tests.conftest import ROOT
from tests.support.manual_pages import free_port

TIMEOUT_S: Final = 120


def typed(line: str, folder: Path, environ: dict[str, str]) -> str:
    """Type a line as printed; return what it writes."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def run_demo(
    name: str, folder: Path, *words: str, environ: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a demo in a folder to its end."""
    pytest.importorskip("sklearn")
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits" / name), *words],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )


@pytest.mark.slow
def test_the_commands_that_the_demo_prints_open_dashboard_and_command_line(tmp_path: Path) -> None:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    words = ["--output", "out", "--devices", "2", "--rounds", "1"]
    done = run_demo("demo.py", tmp_path, *words, environ=environ)
    printed = done.stdout.split("Restart the coordinator on this database:")[1]
    for port in ("50051", "8080"):
        printed = printed.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    url = re.findall(r"open (http://\S+)", printed)[0]
    serve = next(line for line in printed.splitlines() if " serve " in line).strip().rstrip("&")
    calls = [line.strip() for line in printed.splitlines() if line.startswith("  qflare-admin ")]
    token = re.findall(r"token in (\S+)", printed)[0]

    with subprocess.Popen(
        ["bash", "-c", f"exec {serve}"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as coordinator:
        try:
            assert coordinator.stdout is not None
            for line in coordinator.stdout:
                if line.startswith("dashboard on "):
                    break
            assert "Admin token" in urlopen(url, timeout=TIMEOUT_S).read().decode()
            assert (tmp_path / token).read_text().startswith("qfa1.")
            assert len(calls) == 5
            for call in calls:
                assert typed(call, tmp_path, environ)
            grpcurl = [line for line in printed.splitlines() if "grpcurl -plaintext" in line]
            assert bool(grpcurl) == ("grpcurl:" in printed)
            for line in grpcurl:
                call = f"export QFLARE_TOKEN=$(cat {token}); {line.strip()}"
                assert "training_sessions" in typed(call, tmp_path, environ)
        finally:
            coordinator.terminate()


@pytest.mark.slow
def test_the_demo_of_secure_aggregation_trains_and_verifies(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["--output", "out", "--devices", "4", "--rounds", "2"]
    done = run_demo("demo_secure.py", tmp_path, *words, environ=environ)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "2 of 4 sent an update" in done.stdout
    assert "device 2 died before-sealing, device 3 after-sealing" in done.stdout
    assert "2 sets of together 4 seeds" in done.stdout
    assert "offline: verified: " in done.stdout
    assert "2 answers with 4 updates verified" in done.stdout
    shown = done.stdout.split("of a single device:")[1].splitlines()[1:3]
    assert len({*shown}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo.py", "demo_secure.py"])
def test_a_demo_deletes_no_folder_but_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    done = run_demo(name, tmp_path, "--output", ".")

    assert done.returncode == 1
    assert "choose a new --output" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "thesis.txt").exists()
