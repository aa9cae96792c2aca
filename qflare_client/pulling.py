"""Tasks in the pull style: the program owns the loop, and asks for the next task when it wants one.

    for task in client.tasks(session_id):
        trained = fit(task.arrays, task.config)
        task.submit(trained, example_count=100, metrics={"loss": 0.3})

It polls as `qflare_client.run` does. A task that is left without a submission is not given again; the round goes on
without this device.
"""

import logging
import math
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from qflare.tensors import Array
from qflare_client import arguments
from qflare_client.errors import (
    DuplicateUpdateError,
    FailedPreconditionError,
    NotFoundError,
    QflareClientError,
    RejectedError,
    RepeatedTaskError,
    UnavailableError,
)
from qflare_client.models.download import GlobalModel
from qflare_client.models.upload import Receipt
from qflare_client.privacy import LocalPrivacy
from qflare_client.rpc.lifetime import Lifetime
from qflare_client.tasks import Task, TaskKind, TrainingTask

_log = logging.getLogger(__name__)

_LEAST_DELAY_S: Final = 0.01
_OUTAGE_DELAY_S: Final = 5.0
_LATE_DELAY_S: Final = 0.5
_LATE: Final = (FailedPreconditionError, DuplicateUpdateError, NotFoundError, RepeatedTaskError)
"""The round or the version closed while the device was busy, or the device sent its update before."""


class Device(Protocol):
    """What pulling needs of a client."""

    @property
    def lifetime(self) -> Lifetime:
        """Deadline and cancellation of its calls."""

    def get_task(self, training_session_id: str | None, *, trains_only: bool) -> Task:
        """Fetch the next task."""

    def send_kept(self) -> list[Receipt | RejectedError]:
        """Send updates that an earlier process left."""

    def download_base(self, task: Task) -> GlobalModel:
        """Download the version that a task starts from."""

    def local_tensors(self, training_session_id: str) -> dict[str, Array]:
        """Return the tensors that stay on the device."""

    def submit(
        self,
        task: Task,
        base: GlobalModel,
        arrays: Mapping[str, Array],
        example_count: int,
        metrics: Mapping[str, float] | None,
        *,
        privacy: LocalPrivacy | None,
    ) -> Receipt:
        """Send an update."""

    def report_failure(self, task: Task, kind: str, text: str) -> None:
        """Report that the work on a task failed."""


class PulledTask:
    """A training task with the model to train from."""

    def __init__(
        self, device: Device, task: Task, base: GlobalModel, local: dict[str, Array]
    ) -> None:
        self._device = device
        self._task = task
        self._base = base
        self.arrays: dict[str, Array] = {
            name: array.copy() for name, array in base.arrays.items()
        } | local
        """Copy of the tensors to train from, with those that stay on the device; may be changed."""

    @property
    def config(self) -> TrainingTask:
        """Settings of the training."""
        return self._task.config

    @property
    def training_session_id(self) -> str:
        """Training session, a UUID."""
        return self._task.training_session_id

    @property
    def round_number(self) -> int:
        """Round, from 1."""
        return self._task.round_number

    def submit(
        self,
        arrays: Mapping[str, Array],
        example_count: int,
        metrics: Mapping[str, float] | None = None,
        *,
        privacy: LocalPrivacy | None = None,
    ) -> Receipt | None:
        """Send the update of this task and return its receipt, or None if the round closed in the meantime.

        Args:
            arrays: Trained tensors, with the names and shapes of `arrays`.
            example_count: Number of local examples, 1 to 2^40.
            metrics: Metrics by name, finite.
            privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.

        Raises:
            InvalidArgumentError: An argument cannot be used.
            TrainingFunctionError: The arrays, the example count or the metrics cannot be sent.
            QflareClientError: The call failed; the update is kept and sent before the next task.
        """
        try:
            return self._device.submit(
                self._task, self._base, arrays, example_count, metrics, privacy=privacy
            )
        except _LATE as error:
            _log.info("task abandoned: %s", error)
            return None

    def fail(self, kind: str, text: str = "") -> None:
        """Report that this task failed, so that the administrator sees it.

        Args:
            kind: Class of the failure, such as OutOfMemoryError.
            text: One line without data; may be empty.

        Raises:
            InvalidArgumentError: An argument cannot be used.
            QflareClientError: The call failed.
        """
        self._device.report_failure(self._task, kind, text)


def pull(
    device: Device,
    training_session_id: str | None,
    stop: threading.Event | None,
    patience_s: float,
) -> Iterator[PulledTask]:
    """Return the tasks of a device as they come; see `Client.tasks`.

    Raises:
        InvalidArgumentError: An argument cannot be used.
    """
    patience_s = arguments.not_negative("patience_s", patience_s, math.inf)
    arguments.optional("stop", stop, threading.Event)
    arguments.session_id(training_session_id, "")
    return _pulled(device, training_session_id, stop, patience_s)


def _pulled(
    device: Device, training_session_id: str | None, stop: threading.Event | None, patience_s: float
) -> Iterator[PulledTask]:
    lifetime, given = device.lifetime, ""
    while not lifetime.is_closed and not (stop is not None and stop.is_set()):
        with lifetime.bounded(stop, patience_s):
            found = _wait_for(device, training_session_id, given)
        if found is None:
            return
        given = found[0].nonce
        yield PulledTask(device, *found)


def _wait_for(
    device: Device, training_session_id: str | None, given: str
) -> tuple[Task, GlobalModel, dict[str, Array]] | None:
    """Wait for a training task other than the one given last; None at the end.

    Raises:
        QflareClientError: The device is refused, or the coordinator is unreachable for too long.
    """
    lifetime = device.lifetime
    while not lifetime.is_ending():
        try:
            device.send_kept()
            task = device.get_task(training_session_id, trains_only=True)
            if task.kind is TaskKind.DONE:
                return None
            if task.kind is TaskKind.TRAIN and task.nonce != given:
                base = device.download_base(task)
                return task, base, device.local_tensors(task.training_session_id)
            pause_s = max(task.poll_delay_s, _LEAST_DELAY_S)
        except _LATE as error:
            _log.info("task abandoned: %s", error)
            pause_s = _LATE_DELAY_S
        except UnavailableError as error:
            pause_s = _outage_pause_s(lifetime, error)
        except QflareClientError:
            if lifetime.is_closed:
                return None  # a client that is being closed may fail in any way
            raise
        lifetime.wait(pause_s * random.uniform(0.75, 1.25))  # noqa: S311  # no secret
    return None


def _outage_pause_s(lifetime: Lifetime, error: UnavailableError) -> float:
    """Return the pause in seconds; raise the error when the patience is exhausted."""
    bounds = lifetime.bounds
    if lifetime.is_ending():
        return 0.0
    if bounds is None or bounds.left_s <= 0:
        raise error
    _log.warning("the coordinator is unavailable, retrying: %s", error)
    return min(max(_OUTAGE_DELAY_S, error.retry_after_s or 0.0), bounds.left_s)
