"""Devices that are killed at random points of SCAFFOLD end with the model of an undisturbed run."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import training_pb2
from qflare_client import Scaffold

pytestmark = pytest.mark.slow

Deploy = Callable[..., Any]
MODEL: Final = {"w": np.zeros(1)}
ROUNDS: Final = 40
DEVICES: Final = 2
KILLS: Final = 4
TIMEOUT_S: Final = 120
TRAINING: Final = """
from pathlib import Path

from qflare_client import Scaffold

A, B = (1.0, 10.0), (-3.0, 2.0)
DEVICE = int(Path.cwd().name[-1])

def train(arrays, task):
    with open("progress", "ab") as progress:
        progress.write(b".")
    scaffold = Scaffold(arrays, task)
    weights = scaffold.weights
    for _ in range(8):
        weights["w"] -= 0.05 * (A[DEVICE] * (weights["w"] - B[DEVICE]) + scaffold.correction["w"])
    return scaffold.trained(weights, 8), 1, {}
"""


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what is tested is the state of devices."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


class KilledDevice(threading.Thread):
    """A device in a process that is killed while it trains, sends or keeps its control variates, and started again."""

    def __init__(self, folder: Path, session_id: str, kills: int) -> None:
        super().__init__(daemon=True)
        (folder / "quadratic.py").write_text(TRAINING)
        self._folder = folder
        words = [sys.executable, "-m", "qflare_client", "run", "quadratic:train", "--home", "home"]
        self._command = [*words, "--training-session", session_id]
        self._chance = random.Random(folder.name)
        self._kills = kills
        self.returncode: int | None = None

    def run(self) -> None:
        """Take part to the end."""
        for _ in range(self._kills):
            with self._open() as process:
                self._await_progress(process)
                process.kill()
        with self._open() as process:
            self.returncode = process.wait(TIMEOUT_S)

    def _open(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)

    def _trained_count(self) -> int:
        progress = self._folder / "progress"
        return progress.stat().st_size if progress.exists() else 0

    def _await_progress(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for some rounds and a moment more."""
        wanted = self._trained_count() + self._chance.randint(1, 3)
        pause = threading.Event()
        while self._trained_count() < wanted and process.poll() is None:
            pause.wait(0.001)
        pause.wait(self._chance.uniform(0, 0.03))


def final_weight(deployment: Any, folder: Path, kills: int) -> Any:
    """Return the last version of a session whose devices are killed so often."""
    session_id = deployment.session(
        Scaffold.initial(MODEL),
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=TIMEOUT_S)),
        total_rounds=ROUNDS,
        strategy=training_pb2.StrategyConfig(name="scaffold"),
    )
    devices = []
    with ExitStack() as stack:
        for number in range(DEVICES):
            home = folder / f"device-{kills}-{number}"
            home.mkdir()
            client = deployment.device(f"{home.name}/home")
            client.close()
            devices.append(KilledDevice(home, session_id, kills))
            devices[-1].start()
            stack.callback(devices[-1].join)
    assert [device.returncode for device in devices] == [0, 0]
    reader = deployment.device(f"reader-{kills}")
    return reader.download(session_id)


def test_devices_that_are_killed_end_with_the_model_of_an_undisturbed_run(
    deployment: Any, tmp_path: Path
) -> None:
    undisturbed = final_weight(deployment, tmp_path, 0)
    killed = final_weight(deployment, tmp_path, KILLS)

    assert undisturbed.version == killed.version == ROUNDS
    assert {name: array.tobytes() for name, array in killed.arrays.items()} == {
        name: array.tobytes() for name, array in undisturbed.arrays.items()
    }
