"""Helpers for secure aggregation as processes of their own, to be killed and restarted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from google.protobuf import json_format

from qflare.evidence.unmasking import open_helper
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_helper.__main__ import main


class HelperProcess:
    """A `qflare-helper` with a folder of its own.

    Args:
        home: Its folder.
        bootstrap: Bundle of the deployment.
        bundle_dir: Folder of helper bundles of a coordinator, where its own is written.
        min_cohort: Of its policy.

    Attributes:
        interpreter: The command that `serve` and its options follow.
    """

    def __init__(
        self,
        home: Path,
        bootstrap: security_pb2.BootstrapBundle,
        bundle_dir: Path,
        min_cohort: int = 2,
    ) -> None:
        self.home = home
        self.interpreter: tuple[str, ...] = (sys.executable, "-m", "qflare_helper")
        self.bundle_file = bundle_dir / f"{home.name}.json"
        self._port = self.metrics_port = self.health_port = 0
        self._process: subprocess.Popen[str] | None = None
        bundle_dir.mkdir(parents=True, exist_ok=True)
        bootstrap_file = home.parent / f"{home.name}-bootstrap.json"
        bootstrap_file.write_text(json_format.MessageToJson(bootstrap))
        words = ("init", "--bootstrap", str(bootstrap_file), "--address", "127.0.0.1:1")
        policy = ("--min-cohort", str(min_cohort), "--output", str(self.bundle_file))
        assert main(["--home", str(home), *words, *policy]) == 0
        self._realm = bootstrap.realm

    def run(self, *words: str, code: int = 0) -> str:
        """Run a command to its end and return its output."""
        command = [sys.executable, "-m", "qflare_helper", "--home", str(self.home), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    @property
    def helper_id(self) -> str:
        """Id of the helper."""
        return open_helper(self._bundle().document, self._realm).helper_id

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id, while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self, *options: str) -> None:
        """Start it and wait until it serves; its bundle names its port afterwards.

        Args:
            options: Further options of `serve`.
        """
        command = [*self.interpreter, "--home", str(self.home)]
        with (self.home.parent / f"{self.home.name}.log").open("a") as log:
            self._process = subprocess.Popen(
                [*command, "serve", "--listen", f"127.0.0.1:{self._port}", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("metrics on port "):
                self.metrics_port = int(line.rpartition(" ")[2])
            if line.startswith("health on port "):
                self.health_port = int(line.rpartition(" ")[2])
            if line.startswith("serving on "):
                self._port = int(line.rpartition(":")[2])
                break
        else:
            raise AssertionError("the helper did not start")
        bundle = self._bundle()
        bundle.address = self.address
        self.bundle_file.write_text(json_format.MessageToJson(bundle))

    def kill(self) -> None:
        """Kill it without warning."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Let it end by itself; one that has ended is left alone."""
        self._end(signal.SIGTERM)

    def halt(self) -> None:
        """Let it do nothing until `resume`; its connections stay open."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `halt`."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        os.kill(self._process.pid, number)
        os.kill(self._process.pid, signal.SIGCONT)  # one that was halted ends only when it goes on
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def _bundle(self) -> helper_service_pb2.HelperBundle:
        bundle = helper_service_pb2.HelperBundle()
        return json_format.Parse(self.bundle_file.read_text(), bundle)
