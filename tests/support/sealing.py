"""Sealed training sessions for tests, and updates of which every part can be spoiled on its own."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import PayloadSealer, SealContext
from qflare.crypto.sealing import KemPublicKey
from qflare.v1 import security_pb2
from qflare_client import Client, Task, TaskKind
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import rotate_online
from qflare_server.keys.secret_files import Cost
from tests.integration.conftest import Deployment
from tests.support.raw_device import Draft

MARK = b"QFLARE PLAINTEXT"
"""Sixteen bytes that are four finite float32: they are in every update and version, and must be seen nowhere."""

ROUND_COUNT = 3
SMALL = 12
"""Elements of a model that is kept in its row."""

LARGE = 700_000
"""Elements of a model of three segments."""

Arrays = dict[str, np.ndarray[Any, Any]]
Segments = list[bytes]


def key_folder(deployment: Deployment) -> KeyFolder:
    """Return the folder of a coordinator's keys, whose secrets are written cheaply."""
    directory = KeyFolder.from_config(deployment.config).directory
    return KeyFolder(directory, cost=Cost(iterations=1, memory_kib=1024, lanes=1))


def rotate(deployment: Deployment, count: int = 1) -> None:
    """Exchange the coordinator's online keys, and let it see that at once."""
    folder, parts = key_folder(deployment), deployment.coordinator.parts
    for _ in range(count):
        rotate_online(folder, parts.database, parts.context.clock())
    parts.keys._look()


def marked(element_count: int) -> Arrays:
    """Return a tensor of float32 that begins and ends with the mark."""
    mark = np.frombuffer(MARK, np.float32)
    array = np.zeros(element_count, np.float32)
    array[: len(mark)] = array[-len(mark) :] = mark
    return {"w": array}


def start(
    deployment: Deployment, element_count: int = SMALL, device_count: int = 1, **config: Any
) -> str:
    """Start a sealed training session that keeps all payloads, and return its id."""
    transfer = {"sealed": True, "payload_retention": "PAYLOAD_RETENTION_ALL"}
    transfer |= config.pop("transfer", {})
    rounds = {"quorum": device_count, "target": device_count}
    settings = {"total_rounds": ROUND_COUNT, "rounds": rounds, **config}
    return deployment.session(marked(element_count), transfer=transfer, **settings)


def next_task(client: Client, session_id: str) -> Task:
    """Return the next task that is not to wait."""
    for _ in range(1000):
        task = client.get_task(session_id)
        if task.kind is not TaskKind.WAIT:
            return task
        threading.Event().wait(0.02)
    raise AssertionError("no task came")


def train_once(client: Client, session_id: str, step: float = 1.0) -> Arrays:
    """Do a device's next task: raise the middle of the weights; return what was downloaded."""
    task = next_task(client, session_id)
    base = client.download_base(task)
    arrays = {name: array.copy() for name, array in base.arrays.items()}
    arrays["w"][len(arrays["w"]) // 2] += np.float32(step)
    client.submit(task, base, arrays, 10, {"loss": 1.0})
    return base.arrays


def seal(
    draft: Draft,
    recipient: KemPublicKey,
    *,
    spoil: Callable[[Segments], Segments] = lambda segments: segments,
    **context: Any,
) -> security_pb2.SealedPayloadHeader:
    """Seal an update in place, and return what its header carries: a test may spoil that as well.

    Args:
        draft: Of `RawDevice.draft`.
        recipient: Whom its key is wrapped for.
        spoil: Changes the segments before they are hashed and signed, as a dishonest device might.
        context: What is other than it ought to be in the context that it is sealed for.
    """
    seal_context = replace(SealContext.from_update(draft.statement), **context)
    sealer = PayloadSealer(seal_context, len(draft.payload))
    segments = spoil(list(sealer.seal([draft.payload])))
    leaf_hashes = [merkle.leaf_hash(segment) for segment in segments]
    draft.payload = b"".join(segments)
    draft.chunk_digests = b"".join(leaf_hashes)
    draft.statement.sealed = True
    draft.statement.wire_digest = merkle.root(leaf_hashes).hex()
    message = security_pb2.SealedPayloadHeader(
        header=sealer.key.header, wrapped_keys=[sealer.key.wrap(recipient)]
    )
    name_header(draft, message)
    draft.spoil_header = lambda header: header.sealed.CopyFrom(message)
    return message


def name_header(draft: Draft, message: security_pb2.SealedPayloadHeader) -> None:
    """Make the statement name a header, whatever it is."""
    draft.statement.sealed_header_digest = hashlib.sha256(message.header).hexdigest()
