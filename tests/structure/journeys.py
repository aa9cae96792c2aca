"""Journeys through the code: which functions one enrollment, one small update and one download really run.

A coordinator and a device run in this process under a profile hook, which sees every call of every thread.
"""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import numpy as np

from qflare_client import Client, enroll
from qflare_server.config import ServerConfig
from qflare_server.context import Telemetry, utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import initialize
from tests.integration.conftest import Deployment
from tests.structure.rooms import PACKAGES, ROOT

TIMEOUT_S: Final = 60
MAIN: Final = "MainThread"
UNNAMED: Final = "Thread-"
"""What the threads that gRPC starts are called."""
BACKGROUND: Final = frozenset(
    {"calls", "database-watchdog", "housekeeping", "maintenance", "stream-watchdog"}
)
"""Threads that work beside every journey; what they run is not part of it."""
WORKER: Final = "aggregation"


@dataclass(frozen=True)
class Call:
    """A function that ran.

    Attributes:
        path: Its file, relative to the repository.
        function: Its qualified name.
        thread: Name of the thread, without the number that a pool adds; `grpc` for gRPC's own, empty for the caller's.
    """

    path: str
    function: str
    thread: str


@dataclass
class Journey:
    """The functions of our packages that ran, each once, in the order of their first call."""

    calls: dict[Call, None] = field(default_factory=dict)

    def files(self, package: str) -> list[str]:
        """Return the files of a package that were run."""
        return sorted({call.path for call in self.calls if call.path.startswith(f"{package}/")})

    def rooms(self, package: str) -> list[str]:
        """Return the rooms of a package that were passed."""
        return sorted({path.split("/")[1].removesuffix(".py") for path in self.files(package)})

    def ran(self, path: str, function: str) -> set[str]:
        """Return the threads in which a function ran; empty if it did not."""
        return {
            call.thread for call in self.calls if (call.path, call.function) == (path, function)
        }


class CallRecorder:
    """Sees the calls of all threads that start while it is open; writes them down during a journey."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = f"{root}/"
        self._prefixes = tuple(f"{root}/{package}/" for package in PACKAGES)
        self._journey: Journey | None = None
        self._left_out: frozenset[str] = BACKGROUND

    def __enter__(self) -> Self:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @contextmanager
    def journey(self, *left_out: str) -> Iterator[Journey]:
        """Write down the calls of a block, or of the time until `end` if that is earlier.

        Args:
            left_out: Names of threads that do not belong to the journey.
        """
        self._left_out = BACKGROUND | set(left_out)
        self._journey = Journey()
        try:
            yield self._journey
        finally:
            self.end()

    def end(self) -> None:
        """End the journey."""
        self._journey = None

    def _seen(self, frame: FrameType, event: str, _argument: Any) -> None:
        journey = self._journey
        code = frame.f_code
        if journey is None or event != "call" or not code.co_filename.startswith(self._prefixes):
            return
        thread = re.sub(r"[-_]\d+$", "", threading.current_thread().name)
        if thread not in self._left_out:
            path = code.co_filename.removeprefix(self._root)
            thread = "grpc" if thread.startswith(UNNAMED) else thread
            journey.calls[Call(path, code.co_qualname, "" if thread == MAIN else thread)] = None


class _Publications(Telemetry):
    """Ends the journey of an update where its version is published."""

    def __init__(self, recorder: CallRecorder) -> None:
        self._recorder = recorder
        self.published = threading.Event()

    def round_published(
        self, aggregated_count: int, rejected_count: int, collected_s: float, published_s: float
    ) -> None:
        del aggregated_count, rejected_count, collected_s, published_s
        self._recorder.end()
        self.published.set()


@dataclass(frozen=True)
class Journeys:
    """What ran for each of the three."""

    enrollment: Journey
    update: Journey
    download: Journey


def travel(folder: Path) -> Journeys:
    """Enroll a device, let it submit one small update, and let it download the version that this makes.

    Args:
        folder: Empty; becomes the home of a coordinator on SQLite and of a device.
    """
    config = ServerConfig(data_dir=folder / "coordinator", listen="127.0.0.1:0").checked()
    cheap = Cost(iterations=1, memory_kib=1024, lanes=1)
    initialize(KeyFolder(folder / "coordinator" / "keys", cost=cheap), "qflare", utc_now())
    with CallRecorder() as recorder:
        publications = _Publications(recorder)
        deployment = Deployment(config, folder, telemetry=publications)
        try:
            return _travel(recorder, publications, deployment)
        finally:
            deployment.close()


def _travel(
    recorder: CallRecorder, publications: _Publications, deployment: Deployment
) -> Journeys:
    session_id = deployment.session(total_rounds=2, rounds={"quorum": 1, "target": 1})
    bundle = deployment.bundle()
    home = deployment.folder / "device"
    with recorder.journey(WORKER) as enrollment:
        enroll(bundle, home=home)
    with Client(home=home) as client:
        task = client.get_task(session_id)
        base = client.download_base(task)
        trained = {name: values + np.float32(1) for name, values in base.arrays.items()}
        with recorder.journey() as update:
            client.submit(task, base, trained, example_count=1)
            assert publications.published.wait(TIMEOUT_S), "no version was published"
        with recorder.journey(WORKER) as download:
            client.download(session_id)
    return Journeys(enrollment, update, download)
