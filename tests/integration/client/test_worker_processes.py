"""Worker processes in a training function, as data loaders start them: forked, spawned, or by a fork server."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import training_pb2
from qflare_client import Client, KeyStoreLockedError

Deploy = Callable[..., Any]

WITH_WORKERS = """\
import multiprocessing
import sys

import numpy as np

from qflare_client import Client, run


def shifted(value):
    return value + 1


def train(arrays, config):
    with multiprocessing.get_context(sys.argv[3]).Pool(2) as pool:
        return {"w": np.array(pool.map(shifted, list(arrays["w"])))}, 1, {"loss": 0.5}


if __name__ == "__main__":
    with Client(home=sys.argv[1]) as client:
        print(run(client, train, training_session_id=sys.argv[2], patience_s=20.0).update_count)
"""

LEAVES_A_WORKER = """\
import os
import sys

from qflare_client import Client

client = Client(home=sys.argv[1])
client.heartbeat()
worker = os.fork()
if not worker:  # what it has inherited is released by now
    print(os.getpid(), flush=True)
sys.stdin.read()
"""

USES_IT_IN_A_WORKER = """\
import os
import sys

from qflare_client import Client, ForkedError, run

client = Client(home=sys.argv[1])
session_id = sys.argv[2]
task = client.get_task(session_id)
base = client.download(session_id)
worker = os.fork()
if worker == 0:
    calls = [
        lambda: client.get_task(session_id),
        lambda: client.heartbeat(),
        lambda: client.download(session_id),
        lambda: client.submit(task, base, dict(base.arrays), 1),
        lambda: client.rotate_keys(),
        lambda: run(client, lambda arrays, config: (arrays, 1, {}), patience_s=20.0),
    ]
    for call in calls:
        try:
            call()
        except ForkedError:
            continue
        os._exit(1)
    client.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
print(client.heartbeat().device_state)
"""


def device(deploy: Deploy, tmp_path: Path) -> tuple[Path, str]:
    """Return the key store of an enrolled device that nobody uses, and a training session of one round."""
    deployment = deploy()
    deployment.device("a").close()
    rounds = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
    return tmp_path / "a", deployment.session(rounds=rounds, total_rounds=1)


def program(folder: Path, text: str, *arguments: object) -> list[str]:
    """Write a program of its own, and return the command that runs it."""
    path = folder / "device.py"
    path.write_text(text)
    return [sys.executable, os.fspath(path), *map(str, arguments)]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_training_function_may_use_worker_processes(
    deploy: Deploy, tmp_path: Path, method: str
) -> None:
    home, session_id = device(deploy, tmp_path)

    done = subprocess.run(
        program(tmp_path, WITH_WORKERS, home, session_id, method),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )

    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_worker_that_outlives_its_device_leaves_the_key_store_free(
    deploy: Deploy, tmp_path: Path
) -> None:
    home, _ = device(deploy, tmp_path)
    command = program(tmp_path, LEAVES_A_WORKER, home)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        worker = int(running.stdout.readline())
        with pytest.raises(KeyStoreLockedError):
            Client(home=home)
        running.kill()
        running.wait(10)

        os.kill(worker, 0)  # it lives
        with Client(home=home) as client:
            assert client.heartbeat().device_state == "active"
        os.kill(worker, signal.SIGKILL)


def test_a_client_that_came_with_a_fork_is_refused_at_once(deploy: Deploy, tmp_path: Path) -> None:
    home, session_id = device(deploy, tmp_path)

    done = subprocess.run(
        program(tmp_path, USES_IT_IN_A_WORKER, home, session_id),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )

    assert done.stdout.splitlines() == ["0", "active"], done.stderr


def test_the_template_makes_the_same_data_in_every_process() -> None:
    template = Path(__file__).parents[3] / "qflare_client/project/template/device.py"
    show = f"import runpy; print(runpy.run_path({os.fspath(template)!r})['INPUTS'][0, :2])"

    def shown(bundle: str) -> str:
        command = [sys.executable, "-c", show, bundle]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert shown("bundles/1.json") == shown("bundles/1.json") != shown("bundles/2.json")
