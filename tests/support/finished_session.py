"""A training session that two real devices have finished, for tests of what can be shown of it afterwards."""

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from qflare.evidence.verification import Report, verify_bundle
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import verification_pb2
from qflare_client import Client, TaskKind
from qflare_server.config import ServerConfig
from tests.integration.conftest import Deployment

Bundle = verification_pb2.VerificationBundle
ROUND_COUNT = 2


@dataclasses.dataclass
class Trained:
    """A finished training session and its coordinator."""

    deployment: Deployment
    session_id: str
    devices: list[Client]

    @property
    def pins(self) -> list[str]:
        return list(self.deployment.coordinator.parts.keys.root_key_ids)

    def bundle(self, version: int | None = None) -> Bundle:
        """Export a version as an auditor would."""
        request = admin_pb2.ExportVerificationBundleRequest(
            training_session_id=self.session_id, version=version
        )
        stub = self.deployment.admin
        parts = stub.ExportVerificationBundle(request, metadata=self.deployment.metadata)
        return Bundle.FromString(b"".join(part.bundle.SerializeToString() for part in parts))

    def verify(self, bundle: Bundle) -> Report:
        """Check a bundle with nothing but the ids of the root keys."""
        return verify_bundle(bundle, self.pins, datetime.now(UTC))


def _take_part(client: Client, session_id: str, step: float) -> None:
    """Add a step to the weights in every round, and measure every version."""
    while (task := client.get_task(session_id)).kind is not TaskKind.DONE:
        if task.kind is TaskKind.WAIT:
            threading.Event().wait(task.poll_delay_s)
            continue
        base = client.download_base(task)
        if task.kind is TaskKind.EVALUATE:
            client.report_evaluation(task, 10, {"accuracy": step / 10})
            continue
        arrays = {name: array + array.dtype.type(step) for name, array in base.arrays.items()}
        client.submit(task, base, arrays, 10, {"loss": 1.0})


def train(deployment: Deployment, **enrollment: Any) -> Trained:
    """Let two devices, one of which has rotated its keys, finish a training session with payloads of two chunks."""
    devices = [deployment.device(name, **enrollment) for name in ("one", "two")]
    devices[1].rotate_keys()
    session_id = deployment.session(
        {"w": np.zeros((600, 500), np.float32), "b": np.zeros(3, np.float32)},
        total_rounds=ROUND_COUNT,
        rounds={"quorum": 2, "target": 2},
        transfer={"payload_retention": "PAYLOAD_RETENTION_ALL"},
        evaluation={"every_rounds": 1},
    )
    with ThreadPoolExecutor(2) as executor:
        work = [
            executor.submit(_take_part, device, session_id, number + 1.0)
            for number, device in enumerate(devices)
        ]
    for part in work:
        part.result()
    return Trained(deployment, session_id, devices)


@contextmanager
def finished(database_url: str, folder: Path, keys: Path) -> Iterator[Trained]:
    """Run a coordinator on a database and yield its finished training session."""
    shutil.copytree(keys, folder / "coordinator" / "keys")
    config = ServerConfig(
        data_dir=folder / "coordinator",
        database_url=database_url,
        listen="127.0.0.1:0",
        database_pool_size=8,
    )
    deployment = Deployment(config.checked(), folder)
    try:
        yield train(deployment)
    finally:
        deployment.close()
