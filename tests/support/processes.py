"""Coordinators as processes of their own, to be killed, and devices as threads that survive it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from qflare_client import Client, RetryPolicy, run
from qflare_client.tasks import TrainingTask


class CoordinatorProcess:
    """A `qflare-server serve` process on a fixed port.

    Args:
        data_dir: Folder of its keys.
        database_url: Database, shared or its own.
        port: 0 takes a free one at the first start and keeps it.
        settings: Further `QFLARE_*` variables.
        worker_count: Processes that share the port.
        log_file: Where their log goes; None throws it away.
    """

    def __init__(
        self,
        data_dir: Path,
        database_url: str,
        port: int = 0,
        settings: Mapping[str, str] | None = None,
        worker_count: int = 1,
        log_file: Path | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._database_url = database_url
        self._settings = dict(settings or {})
        self._worker_count = worker_count
        self._log_file = log_file
        self.port = port
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it serves."""
        environ = {
            **os.environ,
            "QFLARE_DATABASE_URL": self._database_url,
            "QFLARE_DATABASE_POOL_SIZE": "8",
            **self._settings,
        }
        command = [sys.executable, "-m", "qflare_server", "--data-dir", str(self._data_dir)]
        with (self._log_file or Path(os.devnull)).open("a") as log:
            self.process = subprocess.Popen(
                [
                    *command,
                    "serve",
                    *("--listen", f"127.0.0.1:{self.port}"),
                    *("--workers", str(self._worker_count)),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
            )
        self._await_address(self.process)

    def _await_address(self, process: subprocess.Popen[str]) -> None:
        """Wait until every worker has said where it serves."""
        assert process.stdout is not None
        serving = 0
        for line in process.stdout:
            if line.startswith("serving on "):
                self.port = int(line.rpartition(":")[2])
                serving += 1
                if serving == self._worker_count:
                    return
        raise AssertionError("the coordinator did not start")

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Kill it without warning."""
        self.send(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Let it end by itself; return its exit code, 0 where it has ended before."""
        self.send(signal.SIGTERM)
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended gets none."""
        if self.process is not None:
            self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for its end and return its exit code, 0 where it has ended before."""
        if self.process is None:
            return 0
        code = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code


class Replicas:
    """Coordinator processes on one database; those that still run are stopped at the end."""

    def __init__(self, data_dir: Path, database_url: str, stack: ExitStack) -> None:
        self._data_dir = data_dir
        self._database_url = database_url
        self._stack = stack

    def start(
        self, *, worker_count: int = 1, log_file: Path | None = None, **settings: object
    ) -> CoordinatorProcess:
        """Start one more, with settings that differ from the defaults."""
        variables = {f"QFLARE_{name.upper()}": str(value) for name, value in settings.items()}
        process = CoordinatorProcess(
            self._data_dir,
            self._database_url,
            settings=variables,
            worker_count=worker_count,
            log_file=log_file,
        )
        process.start()
        self._stack.callback(process.stop)
        return process


def addresses(*coordinators: CoordinatorProcess) -> str:
    """Return a gRPC target of several addresses, of which the first that answers is used."""
    return "ipv4:" + ",".join(coordinator.address for coordinator in coordinators)


def trained(arrays: dict[str, np.ndarray], index: int, round_number: int) -> dict[str, np.ndarray]:
    """Return what device `index` makes of a version: always the same."""
    random = np.random.default_rng([index, round_number])
    return {
        name: (values + random.standard_normal(values.shape)).astype(values.dtype)
        for name, values in arrays.items()
    }


class DeviceThread(threading.Thread):
    """A device that runs the SDK's loop until its training session is over."""

    def __init__(
        self, home: Path, index: int, session_id: str, *, address: str | None = None
    ) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._home = home
        self._index = index
        self._session_id = session_id
        self.update_count = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Take part."""
        try:
            with Client(
                home=self._home, address=self._address, retry=RetryPolicy(total_time_s=120)
            ) as client:
                summary = run(client, self._train, training_session_id=self._session_id)
                self.update_count = summary.update_count
        except BaseException as error:
            self.failure = error
            raise

    def _train(
        self, arrays: dict[str, np.ndarray], task: TrainingTask
    ) -> tuple[dict[str, np.ndarray], int, dict[str, float]]:
        made = trained(arrays, self._index, task.round_number)
        return made, 10 + self._index, {"loss": 1.0 / task.round_number}
