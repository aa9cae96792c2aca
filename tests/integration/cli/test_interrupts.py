"""Ctrl-C ends every program that waits: soon, with the exit code of an interruption, and without a traceback."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from safetensors.numpy import save_file

from qflare.command_line import INTERRUPTED
from qflare_client.__main__ import main as client_main
from qflare_server.cli.main import main as server_main
from tests.conftest import ROOT
from tests.support.processes import CoordinatorProcess

PATIENCE_S = 30.0
TICK_S = 0.05
DEVICE = "def train(arrays, config):\n    return arrays, 1, {}\n"
Ready = Callable[[str], bool]
Served = tuple[Path, str]


@pytest.fixture(autouse=True)
def foreground() -> Iterator[None]:
    """Let programs start as a job in the foreground; one in the background ignores Ctrl-C, as do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def started(words: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, as a shell does, with its output in files."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"}
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            process_group=0,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_output(process: subprocess.Popen[bytes], folder: Path, is_there: Ready) -> None:
    """Wait until a program's output says that it is at work."""
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not is_there((folder / "out").read_text() + (folder / "err").read_text()):
        assert process.poll() is None, (folder / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(TICK_S)


def interrupted(process: subprocess.Popen[bytes], folder: Path) -> int:
    """Interrupt a program as the terminal does, and return its exit code."""
    os.killpg(process.pid, signal.SIGINT)
    code = process.wait(PATIENCE_S)
    shown = (folder / "err").read_text()
    assert "Traceback" not in shown, shown
    return code


def test_a_coordinator(tmp_path: Path) -> None:
    words = ["-m", "qflare_server", "--data-dir", "data", "serve", "--listen", "127.0.0.1:0"]
    with started(words, tmp_path) as process:
        await_output(process, tmp_path, lambda text: "serving on " in text)

        assert interrupted(process, tmp_path) == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve; give the folder of the data and of an enrolled device, and the address. Its session waits for two."""
    folder = tmp_path_factory.mktemp("served")
    save_file({"w": np.zeros(4, np.float32)}, folder / "initial.safetensors")
    data = ["--data-dir", str(folder / "data")]
    assert server_main([*data, "init"]) == 0
    coordinator = CoordinatorProcess(folder / "data", f"sqlite:///{folder / 'data' / 'qflare.db'}")
    coordinator.start()
    try:
        model = ["--model", str(folder / "initial.safetensors")]
        create = ["session", "create", "--name", "m", "--quorum", "2", "--start", *model]
        assert server_main([*data, *create]) == 0
        issue = ["token", "issue", "--bundles", str(folder / "bundles")]
        assert server_main([*data, *issue, "--address", coordinator.address]) == 0
        (bundle,) = (folder / "bundles").iterdir()
        assert client_main(["enroll", str(bundle), "--home", str(folder / "device")]) == 0
        yield folder, coordinator.address
    finally:
        coordinator.stop()


def test_an_administrator_who_watches(served: Served, tmp_path: Path) -> None:
    folder, address = served
    token = ["--address", address, "--token-file", str(folder / "data" / "admin.token")]
    words = ["-m", "qflare_client.admin", *token, "watch", "m"]
    with started(words, tmp_path) as process:
        await_output(process, tmp_path, bool)

        assert interrupted(process, tmp_path) == INTERRUPTED


def test_a_device_that_waits_for_others(served: Served, tmp_path: Path) -> None:
    folder, _ = served
    (tmp_path / "own_device.py").write_text(DEVICE)
    words = ["-m", "qflare_client", "run", "own_device:train", "--home", str(folder / "device")]
    with started(words, tmp_path) as process:
        await_output(process, tmp_path, lambda text: "update accepted" in text)

        assert interrupted(process, tmp_path) == INTERRUPTED


def test_a_helper(served: Served, tmp_path: Path) -> None:
    folder, _ = served
    (bundle,) = (folder / "bundles").iterdir()
    helper = ["-m", "qflare_helper", "--home", str(tmp_path / "helper")]
    named = ["--bootstrap", str(bundle), "--address", "127.0.0.1:1"]
    init = [sys.executable, *helper, "init", *named, "--output", str(tmp_path / "helper.json")]
    subprocess.run(init, check=True, capture_output=True)
    with started([*helper, "serve", "--listen", "127.0.0.1:0"], tmp_path) as process:
        await_output(process, tmp_path, lambda text: "serving on " in text)

        assert interrupted(process, tmp_path) == 0


def test_a_simulation_ends_with_the_processes_of_its_pool(tmp_path: Path) -> None:
    words = ["-m", "qflare_simulation"]
    subprocess.run([sys.executable, *words, "init", "digits"], cwd=tmp_path, check=True)
    config = tmp_path / "digits" / "config.toml"
    config.write_text(config.read_text().replace("total_rounds = 20", "total_rounds = 100000"))
    run = [*words, "run", str(config), "--workers", "2", "--folder", "kept"]
    with started(run, tmp_path) as process:
        await_output(process, tmp_path, lambda _: rounds_of(tmp_path / "kept") > 1)
        members = psutil.Process(process.pid).children(recursive=True)

        assert interrupted(process, tmp_path) == INTERRUPTED
        _, alive = psutil.wait_procs(members, PATIENCE_S)
    assert members
    assert alive == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment"), [("demo.py", "version"), ("demo_secure.py", "helper")])
def test_a_demo_ends_with_its_coordinator_helper_and_devices(
    name: str, moment: str, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    demo = [str(ROOT / "examples" / "digits" / name), "--output", "demo", "--rounds", "1000"]
    with started(demo, tmp_path) as process:
        await_output(process, tmp_path, lambda text: moment in text)
        members = psutil.Process(process.pid).children(recursive=True)

        assert interrupted(process, tmp_path) == INTERRUPTED
        _, alive = psutil.wait_procs(members, PATIENCE_S)
    assert members
    assert alive == []


def rounds_of(folder: Path) -> int:
    """Return how many rounds a simulation has opened so far."""
    file = folder / "qflare.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM rounds").fetchone()[0])
        except sqlite3.OperationalError:  # its tables are being made
            return 0
