"""The device loop: polls for tasks, trains, and submits updates.

    def train(arrays, config):
        ...
        return arrays, example_count, {"loss": 0.3}

    run(client, train)

Invariants: the pause between polls is the one that the coordinator asks for, at most an hour, spread by a random
quarter so that devices do not call in step; a version that is already held is not downloaded again; an outage of the
coordinator ends the loop after `patience_s`, counted once for the loop and its calls; a finished update outlives an
outage and the process, and is sent before any other work; a round that closed while the device was training costs that
round's work and nothing else.

What it does not do: catch what the training function raises.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from qflare.tensors import Array
from qflare_client.client import Client
from qflare_client.errors import (
    DuplicateUpdateError,
    FailedPreconditionError,
    NotFoundError,
    QflareClientError,
    RejectedError,
    RepeatedTaskError,
    TlsError,
    TrainingFunctionError,
    UnavailableError,
)
from qflare_client.models.download import GlobalModel
from qflare_client.models.upload import Receipt
from qflare_client.privacy import LocalPrivacy
from qflare_client.rpc.lifetime import Bounds
from qflare_client.rpc.tracing import span
from qflare_client.tasks import Task, TaskKind, TrainingTask

TrainFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask], tuple[Mapping[str, Array], int, Mapping[str, float]]
]
"""From the global model's arrays (a copy) and the settings to (trained arrays, example count, metrics)."""

EvaluateFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask], tuple[int, Mapping[str, float]]
]
"""From a version's arrays (a copy) and the settings to (example count, metrics)."""

_log = logging.getLogger(__name__)

_LEAST_POLL_DELAY_S = 0.01
_OUTAGE_DELAY_S = 5.0
_LEAST_LATE_DELAY_S = 0.02
_MOST_LATE_DELAY_S = 5.0


@dataclass
class RunSummary:
    """What a device did in one run of the loop."""

    update_count: int = 0
    """Updates that were accepted."""

    late_count: int = 0
    """Trainings whose round took no update any more when they were done."""

    evaluation_count: int = 0
    """Evaluations that were reported."""

    last_version: int = -1
    """Highest version that was downloaded; -1 for none."""


def run(
    client: Client,
    train: TrainFunction,
    *,
    evaluate: EvaluateFunction | None = None,
    training_session_id: str | None = None,
    stop: threading.Event | None = None,
    patience_s: float = 900.0,
    privacy: LocalPrivacy | None = None,
    on_receipt: Callable[[Receipt], None] | None = None,
) -> RunSummary:
    """Take part until the training session ends or `stop` is set.

    Args:
        client: An open client of an enrolled device.
        train: Trains on the local data.
        evaluate: Measures on data held back; None leaves evaluations to other devices.
        training_session_id: Training session; None means any, and then only `stop` ends the loop.
        stop: Ends the loop: pauses and retries at once, calls in flight after 5 s; never in the middle of a training.
        patience_s: How long the coordinator may be unreachable before its error is raised, in seconds.
        privacy: Clips what training changed and adds noise, before it leaves the device; None sends it as it is.
        on_receipt: Told every accepted update.

    Closing the client, from any thread, ends the loop as well.

    Raises:
        TrainingFunctionError: A function returned something that cannot be sent.
        TlsError: The first connection fails for good, over its certificates.
        QflareClientError: The coordinator refused this device, could not be reached for `patience_s`, or
            sent something that does not verify.
    """
    lifetime = client.lifetime
    with lifetime.bounded(stop, patience_s) as bounds:
        loop = _Loop(client, train, evaluate, training_session_id, privacy, on_receipt, bounds)
        while not (loop.is_done or lifetime.is_ending()):
            try:
                pause_s = loop.step()
                bounds.seen()
            except UnavailableError as error:
                if lifetime.is_ending():
                    break
                pause_s = _outage_pause_s(bounds, error)
            except QflareClientError:
                if lifetime.is_closed:
                    break  # what is half closed may fail in any way
                raise
            if pause_s > 0:
                lifetime.wait(pause_s * random.uniform(0.75, 1.25))  # noqa: S311  # no secret
    return loop.summary


def _outage_pause_s(bounds: Bounds, error: UnavailableError) -> float:
    """Return how long to pause, in seconds; raise the error when patience has ended.

    Certificates that are wrong at the first connection are a mistake of configuration; those that expire later are
    an outage, until somebody renews them.
    """
    if bounds.left_s <= 0 or (isinstance(error, TlsError) and not bounds.was_seen):
        raise error
    _log.warning("the coordinator is not available, trying again: %s", error)
    return min(max(_OUTAGE_DELAY_S, error.retry_after_s or 0.0), bounds.left_s)


class _Loop:
    """The device between two polls: what it holds, and what it does with a task."""

    def __init__(
        self,
        client: Client,
        train: TrainFunction,
        evaluate: EvaluateFunction | None,
        training_session_id: str | None,
        privacy: LocalPrivacy | None,
        on_receipt: Callable[[Receipt], None] | None,
        bounds: Bounds,
    ) -> None:
        self.summary = RunSummary()
        self.is_done = False
        self._client = client
        self._bounds = bounds
        self._train = train
        self._evaluate = evaluate
        self._training_session_id = training_session_id
        self._on_receipt = on_receipt or (lambda _: None)
        self._privacy = privacy
        self._held: GlobalModel | None = None
        self._late_in_a_row = 0

    def step(self) -> float:
        """Send what is kept, ask for a task, do it, and return the seconds to pause before the next poll."""
        self._settle(self._client.send_kept())
        task = self._client.get_task(self._training_session_id, trains_only=self._evaluate is None)
        self.is_done = task.kind is TaskKind.DONE
        return 0.0 if self.is_done else self._do(task)

    def _settle(self, outcomes: Iterable[Receipt | RejectedError]) -> None:
        """Count what became of updates that an outage or an earlier process had left unsent."""
        for outcome in outcomes:
            if isinstance(outcome, Receipt):
                self._accepted(outcome)
            else:
                _log.info("kept update refused: %s", outcome)
                self.summary.late_count += 1

    def _accepted(self, receipt: Receipt) -> None:
        self.summary.update_count += 1
        self._on_receipt(receipt)

    def _do(self, task: Task) -> float:
        """Do a task and return the seconds to pause before the next poll."""
        try:
            if task.kind is TaskKind.TRAIN:
                self._take_part(task)
                self._late_in_a_row = 0
                return 0.0
            if task.kind is TaskKind.EVALUATE:
                return self._measure(task)
        except (
            FailedPreconditionError,
            DuplicateUpdateError,
            NotFoundError,
            RepeatedTaskError,
        ) as error:
            # The round or the version went by while this device was busy, or it has already sent its update, in
            # an earlier process or before its coordinator lost it: there will be another round.
            _log.info("task left: %s", error)
            self.summary.late_count += 1
            self._late_in_a_row += 1
            backoff_s = _LEAST_LATE_DELAY_S * 2.0 ** min(self._late_in_a_row, 10)
            return max(task.poll_delay_s, min(backoff_s, _MOST_LATE_DELAY_S))
        return max(task.poll_delay_s, _LEAST_POLL_DELAY_S)

    def _take_part(self, task: Task) -> None:
        with span(
            "qflare.device.round",
            training_session_id=task.training_session_id,
            round_number=task.round_number,
        ):
            self._contribute(task)

    def _contribute(self, task: Task) -> None:
        if self._privacy is not None:
            self._client.require_release(task, self._privacy)
        base = self._model(task)
        if self._client.lifetime.is_ending():
            return
        with span("qflare.device.train"):
            arrays, example_count, metrics = _triple(self._train(_copy(base), task.config))
        self._bounds.seen()
        self._accepted(
            self._client.submit(task, base, arrays, example_count, metrics, privacy=self._privacy)
        )

    def _measure(self, task: Task) -> float:
        if self._evaluate is None:
            return max(task.poll_delay_s, _LEAST_POLL_DELAY_S)
        model = self._model(task)
        if self._client.lifetime.is_ending():
            return 0.0
        result = self._evaluate(_copy(model), task.config)
        self._bounds.seen()
        try:
            example_count, metrics = result
        except (TypeError, ValueError):
            raise TrainingFunctionError(
                "the evaluation function must return (example count, metrics)"
            ) from None
        self._client.report_evaluation(task, example_count, metrics)
        self.summary.evaluation_count += 1
        return 0.0

    def _model(self, task: Task) -> GlobalModel:
        held = self._held
        wanted = (task.base_digest, task.download_encoding)
        if held is None or (held.digest, held.encoding) != wanted:
            held = self._client.download_base(task)
            self._held = held
            self.summary.last_version = max(self.summary.last_version, held.version)
        return held


def _copy(model: GlobalModel) -> dict[str, Array]:
    """Copy, because training functions change arrays in place and the next round may need these."""
    return {name: array.copy() for name, array in model.arrays.items()}


def _triple(result: object) -> tuple[Mapping[str, Array], int, Mapping[str, float]]:
    if not isinstance(result, tuple) or len(result) != 3:  # noqa: PLR2004
        raise TrainingFunctionError(
            "the training function must return (arrays, example count, metrics)"
        )
    return result
