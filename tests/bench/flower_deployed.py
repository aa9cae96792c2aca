"""Flower as its manual deploys it, on this machine: a SuperLink, SuperNodes and an app of both, over loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.bench.simulation import FLOWER, HERE
from tests.support.manual_pages import free_port

TIMEOUT_S: Final = 270.0
STOP_S: Final = 20.0
LOOK_S: Final = 0.2
PROJECT: Final = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "secure"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "secure.flower_secure_server:app"
clientapp = "secure.flower_secure_client:app"

[tool.flwr.app.config]
"""
CONNECTION: Final = """
[superlink]
default = "local"

[superlink.local]
address = "{address}"
insecure = true
"""


def deployed_round(
    folder: Path, devices: int, elements: int, dropped: int, shares: int, threshold: int
) -> tuple[float, float]:
    """Run one round of `SecAggPlusWorkflow`, and return its seconds and the CPU seconds of the machine.

    Both are of the workflow alone, in a ServerApp whose nodes are there. Every SuperNode is a process of its own,
    without TLS, with all settings as Flower has them.

    Args:
        folder: Empty; for Flower's files.
        devices: Number of SuperNodes.
        elements: Of the model, float32.
        dropped: Nodes that drop out after they have shared keys; their error is sent at once.
        shares: Shares of each secret.
        threshold: Shares that restore it.

    Raises:
        RuntimeError: The round did not end in time, or the app failed.
    """
    result = folder / "result"
    numbers = {
        "devices": devices,
        "elements": elements,
        "dropped": dropped,
        "shares": shares,
        "threshold": threshold,
    }
    app = _write_app(folder / "app", numbers, result)
    port = free_port()
    address = f"127.0.0.1:{port}"
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(address=address))
    link = ("--port", port, "--disable-runtime-dependency-installation")
    with contextlib.ExitStack() as stack:

        def start(name: str, *words: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(_program([name, *words], home, folder / "log"))

        start("flower-superlink", "--insecure", *link)
        _await_listener(int(port))
        for number in range(devices):
            own = ("--port", free_port(), "--node-config", f"number={number}")
            start("flower-supernode", "--insecure", "--superlink", address, *own)
        run = start("flwr", "run", str(app), "local", "--stream")
        _await(result, run)
    wall_s, cpu_s = result.read_text().split()
    return float(wall_s), float(cpu_s)


def _write_app(folder: Path, numbers: Mapping[str, int], result: Path) -> Path:
    package = folder / "secure"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("flower_secure_client.py", "flower_secure_server.py"):
        shutil.copy(HERE / name, package)
    config = "".join(f"{name} = {number}\n" for name, number in numbers.items())
    (folder / "pyproject.toml").write_text(f'{PROJECT}{config}result = "{result}"\n')
    return folder


@contextlib.contextmanager
def _program(words: Sequence[str], home: Path, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Flower's programs, and end it with all that it has started."""
    programs = FLOWER.parent
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [str(programs / words[0]), *words[1:]],
            env=environment,
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_listener(port: int) -> None:
    """Wait until a program listens."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(LOOK_S)
    raise RuntimeError("Flower's SuperLink did not start")


def _await(result: Path, run: subprocess.Popen[bytes]) -> None:
    """Wait for the line that the ServerApp writes."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        is_over = run.poll() is not None or time.monotonic() > deadline
        if result.exists() and result.read_text().endswith("\n"):
            return
        if is_over:
            said = (result.parent / "log").read_text(errors="replace")[-4000:]
            raise RuntimeError(f"Flower's round did not end:\n{said}")
        time.sleep(LOOK_S)
