"""Tasks of a device: `Task`, and `TrainingTask`, which is passed to training code.

All are plain values, independent of the network and protobuf. Settings that the training session leaves open default to
the device's own `TrainingDefaults`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Self

import numpy as np

from qflare.analytics.queries import InvalidQueryError, Query
from qflare.evidence.statements import digest_of
from qflare.evidence.unmasking import Masking
from qflare.tensors import Array, DType, InvalidManifestError
from qflare.tensors.encodings import Encoding
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import device_pb2, security_pb2, training_pb2
from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError, UnsupportedTaskError
from qflare_client.times import delay_s, moment

_MAX_INT32: Final = 2**31 - 1


class TaskKind(enum.Enum):
    """Kind of a task."""

    WAIT = "wait"
    TRAIN = "train"
    EVALUATE = "evaluate"
    DONE = "done"


@dataclass(frozen=True)
class TrainingDefaults:
    """The device's own training settings, used as defaults of a training session."""

    local_epochs: int = 1
    """Passes over the local data, 1 or more."""

    batch_size: int = 32
    """Examples in a batch, 1 or more."""

    learning_rate: float = 0.01
    """Step size, above 0."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            InvalidArgumentError: A field is out of its range.
        """
        arguments.whole("local_epochs", self.local_epochs, 1, _MAX_INT32)
        arguments.whole("batch_size", self.batch_size, 1, _MAX_INT32)
        arguments.positive("learning_rate", self.learning_rate)

    def to_proto(self) -> device_pb2.DeviceTrainingDefaults:
        """Return the wire form."""
        return device_pb2.DeviceTrainingDefaults(
            local_epochs=self.local_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )


@dataclass(frozen=True)
class Heartbeat:
    """Response to a heartbeat."""

    server_time: datetime
    """The coordinator's time, UTC."""

    device_state: str
    """State of the device, such as active or quarantined; `unknown` for a state that this SDK does not know."""

    device_name: str
    """Name of the device at the coordinator; empty from one that gives none."""

    @classmethod
    def from_proto(cls, answer: messages.HeartbeatResponse) -> Self:
        """Convert a response."""
        known = device_pb2.DeviceState.values()
        name = device_pb2.DeviceState.Name(answer.state) if answer.state in known else "unknown"
        state = name.removeprefix("DEVICE_STATE_").lower()
        return cls(moment(answer.server_time), state, answer.device_name)


@dataclass(frozen=True)
class TrainingTask:
    """Settings that are passed to a training function with the arrays."""

    training_session_id: str
    """Training session, a UUID."""

    round_number: int
    """Round, from 1; 0 for an evaluation."""

    base_version: int
    """Version of the arrays."""

    local_epochs: int
    """Passes over the local data, 1 or more."""

    batch_size: int
    """Examples in a batch, 1 or more."""

    learning_rate: float
    """Step size, above 0."""

    parameters: Mapping[str, float] = field(default_factory=dict)
    """Further settings as numbers."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Further settings as text."""

    @property
    def proximal_mu(self) -> float:
        """Weight of the proximal term of FedProx, >= 0; 0 means none. See `proximal_gradient`."""
        return self.parameters.get("proximal_mu", 0.0)


@dataclass(frozen=True)
class AnalyticsTask:
    """Query of federated analytics that a signed task asks a device to answer."""

    query: Query
    """What is asked."""

    epsilon: float
    """Epsilon of the result, above 0."""

    delta: float
    """Delta of the result, within (0, 1)."""

    min_cohort: int
    """Fewest answers in the result."""

    task_digest: str
    """Digest of the signed task, 64 hex digits."""

    @classmethod
    def from_statement(cls, statement: security_pb2.TaskStatement, task_digest: str) -> Self | None:
        """Return the query of a verified task statement; None if it trains a model.

        Args:
            statement: The statement.
            task_digest: Digest of its bytes as they were signed.

        Raises:
            UnsupportedTaskError: This SDK does not support the query.
        """
        if not statement.HasField("analytics"):
            return None
        message = statement.analytics
        try:
            query = Query.from_proto(message.query)
        except InvalidQueryError as error:
            raise UnsupportedTaskError(f"query: {error}") from error
        return cls(query, message.epsilon, message.delta, message.min_cohort, task_digest)


@dataclass(frozen=True)
class Task:
    """What to do next."""

    kind: TaskKind
    """What to do."""

    poll_delay_s: float
    """Seconds to wait before the next poll if there is nothing to do, at most 3600."""

    training_session_id: str
    """Training session; empty for WAIT."""

    round_number: int
    """Round; 0 unless TRAIN."""

    base_version: int
    """Version to train from or to evaluate."""

    base_digest: str
    """Digest of that version's statement, 64 hex digits; empty for WAIT and DONE."""

    deadline: datetime | None
    """Deadline of the round, UTC; None unless TRAIN."""

    config: TrainingTask
    """Settings for the training function."""

    transfer: training_pb2.TransferPolicy
    """Transfer settings of the version and the update."""

    nonce: str
    """Value that the update or the evaluation has to repeat; empty unless TRAIN or EVALUATE."""

    masking: Masking | None = None
    """Masking that the signed task requires; None for none."""

    answer: messages.GetTaskResponse | None = field(default=None, repr=False, compare=False)
    """The response, kept in rounds with neighbors, whose steps and masks need what it shows of the group."""

    analytics: AnalyticsTask | None = None
    """Query to answer instead of training; None for none."""

    @property
    def download_encoding(self) -> Encoding:
        """Encoding in which to download the version.

        Raises:
            UnsupportedTaskError: This SDK does not support it.
        """
        try:
            return Encoding.from_number(self.transfer.download_encoding)
        except InvalidManifestError as error:
            raise UnsupportedTaskError(f"download {error}") from error

    @classmethod
    def from_proto(
        cls,
        message: messages.GetTaskResponse,
        statement: security_pb2.TaskStatement,
        defaults: TrainingDefaults,
        masking: Masking | None = None,
    ) -> "Task":
        """Convert a response to GetTask.

        Args:
            message: The response.
            statement: Its verified task statement; empty if the response has none.
            defaults: The device's own settings.
            masking: Verified masking of the task; None for none.

        Raises:
            UnsupportedTaskError: This SDK does not know its kind.
        """
        if message.kind not in _KINDS:
            raise UnsupportedTaskError(
                f"task kind: got number {message.kind}; if a later release made it, upgrade qflare"
            )
        deadline = message.deadline_time
        return cls(
            kind=_KINDS[message.kind],
            poll_delay_s=delay_s(message.poll_delay),
            training_session_id=message.training_session_id,
            round_number=message.round_number,
            base_version=message.base_version,
            base_digest=message.base_digest,
            deadline=moment(deadline) if message.HasField("deadline_time") else None,
            config=_training_task(message, defaults),
            transfer=message.transfer,
            nonce=statement.task_nonce or message.evaluation_nonce,
            masking=masking,
            answer=message if message.kind in STEPS or message.HasField("neighbors") else None,
            analytics=AnalyticsTask.from_statement(statement, digest_of(message.task.payload)),
        )


STEPS: Final = frozenset(
    {
        messages.TASK_KIND_ADVERTISE,
        messages.TASK_KIND_SHARE,
        messages.TASK_KIND_CONFIRM,
        messages.TASK_KIND_REVEAL,
    }
)
"""Kinds of responses that ask for a step of a round with neighbors, before or after training."""

_KINDS = {
    messages.TASK_KIND_WAIT: TaskKind.WAIT,
    messages.TASK_KIND_TRAIN: TaskKind.TRAIN,
    messages.TASK_KIND_EVALUATE: TaskKind.EVALUATE,
    messages.TASK_KIND_DONE: TaskKind.DONE,
    **dict.fromkeys(STEPS, TaskKind.WAIT),
}


def _training_task(message: messages.GetTaskResponse, defaults: TrainingDefaults) -> TrainingTask:
    settings = message.device_training
    return TrainingTask(
        training_session_id=message.training_session_id,
        round_number=message.round_number,
        base_version=message.base_version,
        local_epochs=settings.local_epochs or defaults.local_epochs,
        batch_size=settings.batch_size or defaults.batch_size,
        learning_rate=settings.learning_rate or defaults.learning_rate,
        parameters=dict(settings.parameters),
        labels=dict(settings.labels),
    )


def proximal_gradient(
    weights: Mapping[str, Array], base: Mapping[str, Array], mu: float
) -> dict[str, Array]:
    """Return the FedProx term of the local gradient: ``mu * (weights - base)``.

    Args:
        weights: The weights at this step.
        base: The global model from which training started; same names and shapes.
        mu: Weight of the proximal term, >= 0: `TrainingTask.proximal_mu`.

    Returns:
        One array for each floating-point tensor, with its shape and dtype; none for the others.

    Raises:
        InvalidArgumentError: A tensor is not in the base, or `mu` is no finite number.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127,
        equation 2.
    """
    factor = arguments.number("mu", mu)
    weights, base = arguments.tensors("weights", weights), arguments.tensors("base", base)
    if not weights.keys() <= base.keys():
        raise InvalidArgumentError("weights: a tensor is not in the base")
    return {
        name: np.multiply(array - base[name], factor).astype(array.dtype)
        for name, array in weights.items()
        if DType.from_numpy(array.dtype).is_float
    }
