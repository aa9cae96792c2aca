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
from qflare.evidence.statements import digest_of
from qflare.evidence.unmasking import Masking, masking_of
from qflare.tensors import CHUNK_BYTES, Array, Manifest, assemble
from qflare.tensors.encodings import Encoding
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, tensor_pb2
from qflare_client import TrainingTask
from qflare_client.errors import InvalidStatementError
from qflare_client.models.download import GlobalModel
from qflare_client.models.masked_update import add_masks, quantize_update, seal_seeds
from qflare_client.models.neighbor_rounds import Author, GroupAbandonedError, NeighborMember
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
from qflare_client.tasks import STEPS, Task, TrainingDefaults
from qflare_simulation.clock import START
from qflare_simulation.members import KnownRegistrars, VirtualStore, member_of, signing_key
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

Complete: TypeAlias = Callable[[security_pb2.UpdateStatement], None]
"""States the masks of an update in its statement, which lacks nothing else."""

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
        registrars: Algorithm and bytes of the keys that vouch for devices, with neighbors.
    """

    statement: bytes
    model: Source
    manifest: bytes
    registrars: tuple[tuple[int, bytes], ...] = ()


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


class Left(NamedTuple):
    """A device that cannot go on with its group, as too many of its neighbors have dropped out."""

    reason: str


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


def device_index(name: str) -> int:
    """Return the index of a virtual device by its id."""
    return int(name.removeprefix("device-"))


def train_all(
    brief: Brief, devices: Sequence[int], shown: Sequence[bytes] = ()
) -> list[Trained | Failed | Left]:
    """Train devices one after the other; returns an update or a failure of each.

    Args:
        brief: The work.
        devices: Indices.
        shown: What the coordinator shows each device of its group, a serialized `GetTaskResponse`; empty without
            neighbors.
    """
    answers = shown or [b""] * len(devices)
    return [_train(brief, index, answer) for index, answer in zip(devices, answers, strict=True)]


def take_steps(brief: Brief, shown: Sequence[tuple[int, bytes]]) -> list[bytes | Left]:
    """Let devices take a step of a round with neighbors, before or after training, one after the other.

    Args:
        brief: The work of the round.
        shown: Index of each device, and the serialized `GetTaskResponse` that asks for the step.

    Returns:
        The serialized `SecureAggregationStepRequest` of each device, or that it has left its group.
    """
    return [_take_step(brief, index, answer) for index, answer in shown]


def _take_step(brief: Brief, index: int, answer: bytes) -> bytes | Left:
    group = _Group.of(brief, index, answer)
    if group.answer.kind not in STEPS:
        return Left("too few of its neighbors have confirmed the set of updates")
    try:
        made = group.member.make_step(group.answer, group.masking)
    except (GroupAbandonedError, InvalidStatementError) as error:
        return Left(str(error))
    return made.SerializeToString()


class _Group(NamedTuple):
    """The group of a device in a round with neighbors.

    Attributes:
        member: The device.
        answer: What the coordinator shows.
        masking: Of the task.
        key_id: Of the device's signature key.
    """

    member: NeighborMember
    answer: messages.GetTaskResponse
    masking: Masking
    key_id: str

    @classmethod
    def of(cls, brief: Brief, index: int, answer: bytes) -> "_Group":
        """Return the group of a device."""
        programs, task = _PROGRAMS[0], _task(brief.statement)
        assert task.masking is not None
        name = device_id(index)
        author = Author(programs.realm, name, signing_key(programs.seed, index))
        store = VirtualStore(programs.home.files(index), name)
        registrars = KnownRegistrars(brief.registrars)
        member = member_of(store, author, registrars, programs.seed, index, task.round_number)
        shown = messages.GetTaskResponse.FromString(answer)
        return cls(member, shown, task.masking, author.key.public.key_id)

    def mask(self, vector: Array) -> Callable[[security_pb2.UpdateStatement], None]:
        """Add the device's masks to an update, in place; return what completes its statement."""
        named = self.member.mask(self.answer, self.masking, vector)

        def complete(statement: security_pb2.UpdateStatement) -> None:
            seal_seeds(self.masking, (), statement)
            statement.masking.neighbors.CopyFrom(named)
            statement.key_id = self.key_id
            signed = statement.SerializeToString(deterministic=True)
            self.member.record_update(statement, digest_of(signed))

        return complete


def evaluate(brief: Brief) -> dict[str, float]:
    """Return the metrics of a version on the test data."""
    programs = _PROGRAMS[0]
    assert programs.evaluate is not None
    task = _task(brief.statement)
    _seed(programs.seed, 0, task.base_version)
    arrays = {name: array.copy() for name, array in _model(brief).arrays.items()}
    _, metrics = programs.evaluate(arrays, task.config, programs.test)
    return {name: float(value) for name, value in metrics.items()}


def _train(brief: Brief, index: int, answer: bytes) -> Trained | Failed | Left:
    programs = _PROGRAMS[0]
    task, base = _task(brief.statement), _model(brief)
    _seed(programs.seed, index + 1, task.round_number)
    memory = DeviceMemory(programs.home, index)
    update_id = _update_id(programs.seed, index, task)
    group = _Group.of(brief, index, answer) if answer else None
    try:
        if group is not None:
            group.member.prepare(group.answer, group.masking)
        contribution = _contribution(programs, memory, task, base, index)
        payload, complete, is_kept = _payload(memory, task, contribution, update_id, group)
        statement = make_statement(
            task, contribution, payload, realm=programs.realm, device_id=device_id(index)
        )
        statement.update_id = update_id
        statement.create_time.FromDatetime(START)
        complete(statement)
    except (GroupAbandonedError, InvalidStatementError) as error:
        return Left(str(error))
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
    memory: DeviceMemory,
    task: Task,
    contribution: Contribution,
    update_id: str,
    group: _Group | None,
) -> tuple[Payload, Complete, bool]:
    """Encode an update and stage what the device keeps with it.

    Returns:
        The payload, what completes its statement, and whether the device keeps anything.
    """
    session_id = task.training_session_id
    memory.local.stage(session_id, update_id, contribution.local)
    if task.masking is not None:
        payload, complete = _masked(task.masking, contribution, update_id, group)
        return payload, complete, bool(contribution.local)
    has_residual = is_sparse(task.transfer)
    known: Mapping[str, Array] = {}
    if has_residual:
        known = memory.feedback.residual(session_id, contribution.base.manifest)
    payload, residual = make_payload_with_residual(contribution, task.transfer, known)
    if has_residual:
        memory.feedback.stage(session_id, update_id, residual)
    return payload, lambda _: None, has_residual or bool(contribution.local)


def _masked(
    masking: Masking, contribution: Contribution, update_id: str, group: _Group | None
) -> tuple[Payload, Complete]:
    """Mask an update with seeds that equal runs share; return the payload, and what completes its statement."""
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
    if group is not None:
        complete = group.mask(quantized.vector)
        return quantized.payload(), complete
    drawn = add_masks(masking, quantized, draw_seed=seeds.draw)
    return quantized.payload(), lambda statement: seal_seeds(masking, drawn, statement)


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
