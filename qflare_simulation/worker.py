"""One virtual device at work: trains, encodes its update and states it, with the code of the device SDK.

It runs in a process of the pool. A process holds the data of all devices once, and the arrays of the version under way.
"""

import hashlib
import random
import sys
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from threadpoolctl import threadpool_limits

from qflare.analytics.answers import answer
from qflare.analytics.queries import TENSOR, Query
from qflare.evidence.unmasking import Masking, masking_of
from qflare.tensors import CHUNK_BYTES, Array, Manifest, assemble
from qflare.tensors.encodings import Encoding
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, tensor_pb2
from qflare_client import TrainingTask
from qflare_client.models.download import GlobalModel
from qflare_client.models.masked_update import add_masks, quantize_update, seal_seeds
from qflare_client.models.submission import (
    Contribution,
    checked,
    is_sparse,
    make_evaluation_statement,
    make_payload_with_residual,
    make_statement,
)
from qflare_client.models.upload import Payload
from qflare_client.privacy import LocalPrivacy
from qflare_client.tasks import Task, TrainingDefaults
from qflare_simulation.clock import START
from qflare_simulation.memory import DeviceMemory, Home
from qflare_simulation.seeds import SeededBytes, SeededNoise

TrainFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask, Any], tuple[Mapping[str, Array], int, Mapping[str, float]]
]
"""Maps a copy of the version's arrays, the task and the device's data to (arrays, example count, metrics)."""

EvaluateFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask, Any], tuple[int, Mapping[str, float]]
]
"""Maps a copy of a version's arrays, the task and the test data to (example count, metrics)."""

QueryFunction: TypeAlias = Callable[[Query, Any], Iterable[Any]]
"""Maps a query of federated analytics and the device's data to the values of its column."""

MAX_TEXT: Final = 4000


@dataclass(frozen=True)
class Programs:
    """What the devices run, and on what.

    Attributes:
        train: The training function; None where devices only answer queries.
        evaluate: Measures versions, on test data and on what devices hold out.
        data: The training data of each device.
        test: Test data; None for none.
        held_out: What each device measures versions on, None for a device that measures none.
        privacy: Local privacy of every device.
        seed: Seed of trainings and of noise.
        realm: Name of the deployment.
        home: Where the files are that devices keep between rounds.
        columns: Functions by column of queries.
    """

    train: TrainFunction | None
    evaluate: EvaluateFunction | None
    data: Sequence[Any]
    test: Any
    held_out: Sequence[Any] | None
    privacy: LocalPrivacy | None
    seed: int
    realm: str
    home: Home
    columns: Mapping[str, QueryFunction] = field(default_factory=dict)


class Source(Protocol):
    """Where the payload of a version is; two that are equal have equal bytes."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the payload in chunks."""


class ModelFile(NamedTuple):
    """The payload of a version in a file of this machine.

    Attributes:
        path: Of the file.
    """

    path: str

    def chunks(self) -> Iterator[bytes]:
        """Yield the payload in chunks."""
        with Path(self.path).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


class Brief(NamedTuple):
    """The work of a round, the same for all its devices.

    Attributes:
        statement: The serialized task statement, as devices get it.
        model: Where the payload of the base version is.
        manifest: Its serialized layout.
    """

    statement: bytes
    model: Source
    manifest: bytes


class Trained(NamedTuple):
    """An update, ready to be sent.

    Attributes:
        statement: Its serialized statement.
        chunk_digests: Digests of its chunks.
        chunks: Its payload.
        kept: Id of the update if the device keeps something with it, empty otherwise.
    """

    statement: bytes
    chunk_digests: bytes
    chunks: list[bytes]
    kept: str


class Failed(NamedTuple):
    """A training or evaluation function that raised."""

    kind: str
    text: str


_PROGRAMS: list[Programs] = []
"""Of this process; set once when it starts."""


def start(programs: Programs) -> None:
    """Take what the devices of this process run."""
    _PROGRAMS[:] = [programs]
    threadpool_limits(1)


def move_to(home: Home) -> None:
    """Let the devices of this process read and write their files elsewhere."""
    _PROGRAMS[:] = [replace(_PROGRAMS[0], home=home)]


def is_ready() -> bool:
    """Return whether this process has started."""
    return bool(_PROGRAMS)


def device_id(index: int) -> str:
    """Return the id of a virtual device, so that the order of ids is that of indices."""
    return f"device-{index:07d}"


def train_all(brief: Brief, devices: Sequence[int]) -> list[Trained | Failed]:
    """Train devices one after the other; returns an update or a failure of each."""
    return [_train(brief, index) for index in devices]


def evaluate(brief: Brief) -> dict[str, float]:
    """Return the metrics of a version on the test data."""
    programs = _PROGRAMS[0]
    assert programs.evaluate is not None
    task = _task(brief.statement)
    _seed(programs.seed, 0, task.base_version)
    arrays = {name: array.copy() for name, array in _model(brief).arrays.items()}
    _, metrics = programs.evaluate(arrays, task.config, programs.test)
    return {name: float(value) for name, value in metrics.items()}


def _train(brief: Brief, index: int) -> Trained | Failed:
    programs = _PROGRAMS[0]
    task, base = _task(brief.statement), _model(brief)
    _seed(programs.seed, index + 1, task.round_number)
    memory = DeviceMemory(programs.home, index)
    update_id = _update_id(programs.seed, index, task)
    try:
        contribution = _contribution(programs, memory, task, base, index)
        payload, mask_seeds, is_kept = _payload(memory, task, contribution, update_id)
        statement = make_statement(
            task, contribution, payload, realm=programs.realm, device_id=device_id(index)
        )
        statement.update_id = update_id
        statement.create_time.FromDatetime(START)
        if task.masking is not None:
            seal_seeds(task.masking, mask_seeds, statement)
    except Exception as error:  # noqa: BLE001 - whatever a training function raises is a failure of its device
        return _failed(error)
    return Trained(
        statement.SerializeToString(deterministic=True),
        payload.chunk_digests,
        [bytes(chunk) for chunk in payload.chunks_from(0)],
        update_id if is_kept else "",
    )


def _contribution(
    programs: Programs, memory: DeviceMemory, task: Task, base: GlobalModel, index: int
) -> Contribution:
    """Train, split off what stays on the device, and protect the rest as the device's local privacy says."""
    if task.analytics is not None:
        return _answer(programs, task.analytics.query, base, index)
    assert programs.train is not None
    given = {name: array.copy() for name, array in base.arrays.items()}
    given |= memory.local.read(task.training_session_id)
    arrays, example_count, metrics = programs.train(given, task.config, programs.data[index])
    shared, local = memory.local.split(task, arrays)
    contribution = checked(Contribution(base, shared, example_count, metrics, local))
    if programs.privacy is None:
        return contribution
    noise = np.random.default_rng([programs.seed, index, task.round_number, task.base_version])
    protected = programs.privacy.protect(contribution.arrays, base.arrays, noise)
    return replace(contribution, arrays=protected)


def _answer(programs: Programs, query: Query, base: GlobalModel, index: int) -> Contribution:
    """Answer a query with the values of its column."""
    values = programs.columns[query.column](query, programs.data[index])
    return Contribution(base, {TENSOR: base.arrays[TENSOR] + answer(query, values)}, 1, {})


def _payload(
    memory: DeviceMemory, task: Task, contribution: Contribution, update_id: str
) -> tuple[Payload, tuple[bytes, ...], bool]:
    """Encode an update and stage what the device keeps with it.

    Returns:
        The payload, the seeds of its masks, and whether the device keeps anything.
    """
    session_id = task.training_session_id
    memory.local.stage(session_id, update_id, contribution.local)
    if task.masking is not None:
        payload, seeds = _masked(task.masking, contribution, update_id)
        return payload, seeds, bool(contribution.local)
    has_residual = is_sparse(task.transfer)
    known: Mapping[str, Array] = {}
    if has_residual:
        known = memory.feedback.residual(session_id, contribution.base.manifest)
    payload, residual = make_payload_with_residual(contribution, task.transfer, known)
    if has_residual:
        memory.feedback.stage(session_id, update_id, residual)
    return payload, (), has_residual or bool(contribution.local)


def _masked(
    masking: Masking, contribution: Contribution, update_id: str
) -> tuple[Payload, tuple[bytes, ...]]:
    """Mask an update with seeds that equal runs share; return the payload and the seeds."""
    seeds = SeededBytes(_PROGRAMS[0].seed, "masks", update_id)
    quantized = quantize_update(
        masking,
        contribution.base.manifest,
        contribution.arrays,
        contribution.base.arrays,
        contribution.example_count,
        contribution.metrics,
        draw_seed=seeds.draw,
        draw_noise=SeededNoise(_PROGRAMS[0].seed, "noise", update_id).draw,
    )
    drawn = add_masks(masking, quantized, draw_seed=seeds.draw)
    return quantized.payload(), drawn


def measure_all(
    brief: Brief, devices: Sequence[tuple[int, str]]
) -> list[security_pb2.EvaluationStatement | Failed]:
    """Measure a version on what devices hold out, one after the other.

    Args:
        brief: The version.
        devices: Index of each device, and the nonce of its evaluation.

    Returns:
        A statement, not signed, or a failure of each device.
    """
    return [_measured(brief, index, nonce) for index, nonce in devices]


def _measured(brief: Brief, index: int, nonce: str) -> security_pb2.EvaluationStatement | Failed:
    programs = _PROGRAMS[0]
    assert programs.evaluate is not None
    assert programs.held_out is not None
    task = replace(_task(brief.statement), nonce=nonce)
    _seed(programs.seed, index + 1, task.base_version)
    try:
        given = {name: array.copy() for name, array in _model(brief).arrays.items()}
        given |= DeviceMemory(programs.home, index).local.read(task.training_session_id)
        result = programs.evaluate(given, task.config, programs.held_out[index])
        statement = make_evaluation_statement(
            task, *result, realm=programs.realm, device_id=device_id(index)
        )
    except Exception as error:  # noqa: BLE001 - as of a training function
        return _failed(error)
    statement.create_time.FromDatetime(START)
    return statement


def _failed(error: Exception) -> Failed:
    return Failed(type(error).__name__[:64], "".join(traceback.format_exception(error))[-MAX_TEXT:])


def _update_id(seed: int, index: int, task: Task) -> str:
    """Return an id that equal runs share, since the noise of differential privacy depends on statements."""
    label = f"update:{seed}:{index}:{task.round_number}:{task.base_version}"
    return str(uuid.UUID(bytes=hashlib.sha256(label.encode()).digest()[:16], version=4))


def _seed(seed: int, device: int, number: int) -> None:
    """Seed the global generators, so that a training depends on nothing that ran before it in this process."""
    state = zlib.crc32(f"{seed}:{device}:{number}".encode())
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002 - training functions may use it
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(state)


@lru_cache(maxsize=8)
def _task(payload: bytes) -> Task:
    statement = security_pb2.TaskStatement.FromString(payload)
    message = messages.GetTaskResponse(
        kind=messages.TASK_KIND_TRAIN,
        training_session_id=statement.training_session_id,
        round_number=statement.round_number,
        base_version=statement.base_version,
        base_digest=statement.base_digest,
        deadline_time=statement.deadline_time,
        device_training=statement.device_training,
        transfer=statement.transfer,
    )
    masking = None
    if statement.HasField("masking"):
        masking = masking_of(security_pb2.SignedEnvelope(payload=payload))
    return Task.from_proto(message, statement, TrainingDefaults(), masking)


@lru_cache(maxsize=2)
def _model(brief: Brief) -> GlobalModel:
    """Return the base version of a brief, as the device SDK has it after a download."""
    task = _task(brief.statement)
    manifest = Manifest.from_proto(tensor_pb2.Manifest.FromString(brief.manifest))
    return GlobalModel(
        training_session_id=task.training_session_id,
        version=task.base_version,
        digest=task.base_digest,
        arrays=assemble(manifest, brief.model.chunks()),
        manifest=manifest,
        metrics={},
        model_type="",
        architecture={},
        released=False,
        statement=security_pb2.ModelStatement(),
        envelope=security_pb2.SignedEnvelope(),
        encoding=Encoding.from_number(task.transfer.download_encoding),
    )


def close() -> None:
    """Forget what the devices run; for simulations that train in their own process."""
    with suppress(IndexError):
        _PROGRAMS.pop()
    _task.cache_clear()
    _model.cache_clear()
