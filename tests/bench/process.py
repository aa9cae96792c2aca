"""Programs that are measured from outside: started, watched, stopped.

The coordinator under test and the servers of the ceilings run as processes of their own, so that the load
generator's work is not counted as theirs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
SETTLE_S = 0.3
ANNOUNCEMENT = "serving on "


def cpu_of(pid: int) -> float:
    """Return the processor time that a process has used so far, in seconds."""
    # Fields 14 and 15 of proc(5)'s stat; what stands before the last parenthesis may hold blanks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid: int) -> int:
    """Return the most memory that a process has held resident at once, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not say how much memory a process has held")


class ServerProcess:
    """A server that prints `serving on ADDRESS`; use it as a context manager.

    Args:
        arguments: Words after the interpreter's name.
        environment: Variables beside those of this process.
        log_path: Takes its standard error.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> None:
        self._log_path = log_path
        kept = {name: text for name, text in os.environ.items() if not name.startswith("QFLARE_")}
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**kept, **environment},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = self._await_address()

    def _await_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANNOUNCEMENT):
                return line.removeprefix(ANNOUNCEMENT).strip()
        raise RuntimeError(f"the server did not start:\n{self._log_path.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def cpu_s(self) -> float:
        """Return the processor time that it has used so far, in seconds."""
        return cpu_of(self.pid)

    def settle(self) -> None:
        """Wait until it has nothing more to do: until it uses less than a tenth of a core."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            before = self.cpu_s()
            time.sleep(SETTLE_S)
            if self.cpu_s() - before < 0.1 * SETTLE_S:
                return

    def peak_bytes(self) -> int:
        """Return the most memory that it has held resident at once, in bytes."""
        return peak_of(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end and wait for it; kill it when it does not."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
