"""A device that stands in the middle of the upload of a large update, until a test lets it go on."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from qflare.tensors import Array
from qflare_client import Client, Receipt, enroll
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import SYSTEM
from tests.support.jobs import prepare
from tests.support.processes import CoordinatorProcess, addresses

LARGE: Final[dict[str, Array]] = {"w": np.zeros(6 * 2**20, np.float32)}
WAIT_S: Final = 60.0


class Gate:
    """A progress hook that holds an upload up once a third of it has been handed to the network."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Take note of progress."""
        if what == "upload" and 3 * done_bytes >= total_bytes:
            self.reached.set()
            self._opened.wait(WAIT_S)

    def open(self) -> None:
        """Let the upload go on."""
        self._opened.set()


class HeldUpload:
    """A device in the middle of the upload of a large update."""

    def __init__(
        self, client: Client, session_id: str, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        self._gate = gate
        task = client.get_task(session_id)
        base = client.download_base(task)
        trained = {name: values + np.float32(1) for name, values in base.arrays.items()}
        self.receipt: Future[Receipt] = pool.submit(
            client.submit, task, base, trained, 10, {"loss": 0.5}
        )
        assert gate.reached.wait(WAIT_S)

    def finish(self) -> Receipt:
        """Let it go on and return its receipt."""
        self._gate.open()
        return self.receipt.result(WAIT_S)


@contextmanager
def held_upload(parts: Application, home: Path, *at: CoordinatorProcess) -> Iterator[HeldUpload]:
    """Give an upload that waits in its middle, of a device that knows these coordinators."""
    session_id = prepare(parts, LARGE, quorum=1)
    secret = parts.use_cases.tokens.issue_enrollment(SYSTEM)[0].secret
    enroll(bootstrap_bundle(parts.keys.trust, at[0].address, enrollment_token=secret), home=home)
    gate = Gate()
    with (
        Client(home=home, address=addresses(*at), progress=gate) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            yield HeldUpload(client, session_id, gate, pool)
        finally:
            gate.open()
