"""The device loop: polls for tasks, trains, and submits updates.

    def train(arrays, config):
        ...
        return arrays, example_count, {"loss": 0.3}

    run(client, train)

Invariants: the pause between polls is the one that the coordinator asks for, at most an hour, randomized by a quarter
so that devices do not poll in lockstep; a version that the device already holds is not downloaded again; an outage of
the coordinator ends the loop after `patience_s`, counted once for the loop and its calls; a finished update survives an
outage and a restart, and is sent before any other work; if a round closes while the device is training, only that
round's work is lost.

What a training or evaluation function raises is reported to the coordinator. By the setting `on_failure`, the loop then
ends with the exception, or logs it and continues after a pause that doubles with each failure in a row.
"""

import logging
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from qflare.analytics.queries import Query
from qflare.tensors import Array
from qflare_client import arguments
from qflare_client.client import Client
from qflare_client.errors import (
    DuplicateUpdateError,
    FailedPreconditionError,
    InsufficientTaskError,
    InvalidArgumentError,
    NotFoundError,
    PrivacyBudgetExceededError,
    QflareClientError,
    RejectedError,
    RepeatedTaskError,
    TaskFailedError,
    TlsError,
    TrainingFunctionError,
    UnavailableError,
)
from qflare_client.models.download import GlobalModel
from qflare_client.models.submission import needs_base
from qflare_client.models.upload import Receipt
from qflare_client.privacy import LocalPrivacy
from qflare_client.rpc.lifetime import Bounds, Lifetime
from qflare_client.rpc.tracing import span
from qflare_client.tasks import Task, TaskKind, TrainingTask

TrainFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask], tuple[Mapping[str, Array], int, Mapping[str, float]]
]
"""Maps a copy of the global model's arrays and the settings to (trained arrays, example count, metrics).

The tensors that stay on the device (`transfer.local_tensors`) are among the arrays from the second training on; at the
first the function begins with its own."""

EvaluateFunction: TypeAlias = Callable[
    [dict[str, Array], TrainingTask], tuple[int, Mapping[str, float]]
]
"""Maps a copy of a version's arrays and the settings to (example count, metrics)."""

QueryFunction: TypeAlias = Callable[[Query], Iterable[Any]]
"""Maps a query of federated analytics to the values of its column: numbers, or one label for each value."""

OnFailure: TypeAlias = Literal["stop", "continue"]
"""Whether a failure of a function ends the loop."""

_TRAINED: Final = ("arrays by name", "example count", "metrics by name")
_EVALUATED: Final = ("example count", "metrics by name")

_log = logging.getLogger(__name__)

_LEAST_POLL_DELAY_S = 0.01
_OUTAGE_DELAY_S = 5.0
_REPORT_TIMEOUT_S = 5.0
_MAX_KIND = 64
_MAX_REASON = 200
_LEAST_LATE_DELAY_S = 0.02
_MOST_LATE_DELAY_S = 5.0
_LEAST_FAILURE_DELAY_S = 1.0
_MOST_FAILURE_DELAY_S = 256.0
_ON_FAILURE: Final[tuple[OnFailure, ...]] = ("stop", "continue")
_LARGE_BYTES: Final = 64 * 2**20
"""Size from which a version is rather downloaded again, after a failed round, than held twice."""


class _WorkFailedError(Exception):
    """A function failed, which was reported and logged; the loop continues."""


@dataclass
class RunSummary:
    """Summary of one run of the loop."""

    update_count: int = 0
    """Number of accepted updates."""

    late_count: int = 0
    """Number of trainings that finished after their round had closed."""

    evaluation_count: int = 0
    """Number of reported evaluations."""

    last_version: int = -1
    """Highest downloaded version; -1 for none."""

    failure_count: int = 0
    """Number of failed trainings and evaluations after which the loop continued."""

    answer_count: int = 0
    """Number of answered queries of federated analytics."""

    refused_query_count: int = 0
    """Number of queries that a policy of the device did not allow, or whose column it does not have."""


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
    on_failure: OnFailure = "stop",
    analytics: Mapping[str, QueryFunction] | None = None,
) -> RunSummary:
    """Participate until the training session ends or `stop` is set.

    Args:
        client: An open client of an enrolled device.
        train: Trains on the local data.
        evaluate: Evaluates on held-out data; None requests no evaluation tasks.
        training_session_id: Training session; None means any, and then only `stop` ends the loop.
        stop: Ends the loop: pauses and retries immediately, calls in flight after 5 s; a running training is finished
            first.
        patience_s: How long the coordinator may be unreachable before its error is raised, in seconds.
        privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.
        on_receipt: Called with the receipt of each accepted update.
        on_failure: After an exception of `train` or `evaluate`, or a result that cannot be sent, which is reported to
            the coordinator in either case: "stop" raises it; "continue" logs it and asks for the next task after a
            pause of 1 s, twice as long after each failure in a row, 256 s at most.
        analytics: Returns the values of each column that queries may ask for; the client needs a policy for queries. A
            query that the policy does not allow is refused, logged and reported, and the loop goes on.

    Closing the client, from any thread, ends the loop as well.

    Raises:
        InvalidArgumentError: An argument cannot be used.
        TrainingFunctionError: A function returned something that cannot be sent.
        TlsError: The first connection fails permanently because of its certificates.
        QflareClientError: The coordinator refused this device, could not be reached for `patience_s`, or
            sent something that does not verify.
    """
    lifetime = arguments.instance("client", client, Client).lifetime
    patience_s = arguments.not_negative("patience_s", patience_s, math.inf)
    arguments.optional("privacy", privacy, LocalPrivacy)
    arguments.optional("stop", stop, threading.Event)
    arguments.check_callable("train", train)
    arguments.check_callable("evaluate", evaluate, is_optional=True)
    arguments.check_callable("on_receipt", on_receipt, is_optional=True)
    arguments.one_of("on_failure", on_failure, _ON_FAILURE)
    columns = _checked_columns(client, analytics)
    with lifetime.bounded(stop, patience_s) as bounds:
        loop = _Loop(
            client,
            train,
            evaluate,
            training_session_id,
            privacy,
            on_receipt,
            bounds,
            continues=on_failure == "continue",
            columns=columns,
        )
        _take_part(loop, lifetime, bounds)
    return loop.summary


def _take_part(loop: "_Loop", lifetime: Lifetime, bounds: Bounds) -> None:
    """Take steps until the training session or the lifetime ends."""
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
                break  # a client that is being closed may fail in any way
            raise
        if pause_s > 0:
            lifetime.wait(pause_s * random.uniform(0.75, 1.25))  # noqa: S311  # no secret


def _outage_pause_s(bounds: Bounds, error: UnavailableError) -> float:
    """Return the pause in seconds; raise the error when the patience is exhausted.

    Wrong certificates at the first connection are a configuration error; certificates that expire later are an outage
    until they are renewed.
    """
    if bounds.left_s <= 0 or (isinstance(error, TlsError) and not bounds.was_seen):
        raise error
    _log.warning("the coordinator is unavailable, retrying: %s", error)
    return min(max(_OUTAGE_DELAY_S, error.retry_after_s or 0.0), bounds.left_s)


class _Loop:
    """State of the loop between polls, and the execution of tasks."""

    def __init__(
        self,
        client: Client,
        train: TrainFunction,
        evaluate: EvaluateFunction | None,
        training_session_id: str | None,
        privacy: LocalPrivacy | None,
        on_receipt: Callable[[Receipt], None] | None,
        bounds: Bounds,
        *,
        continues: bool,
        columns: Mapping[str, QueryFunction],
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
        self._continues = continues
        self._failed_in_a_row = 0
        self._columns = columns
        self._refused_query = ""
        self._was_refused = False

    def step(self) -> float:
        """Send kept updates, fetch a task, execute it, and return the pause before the next poll in seconds."""
        self._settle(self._client.send_kept())
        answers = bool(self._columns) and not self._was_refused
        self._was_refused = False
        task = self._client.get_task(
            self._training_session_id,
            trains_only=self._evaluate is None,
            answers_queries=answers,
            takes_steps=False,
        )
        if task.analytics is None:
            task = self._client.take_step(task)
        self.is_done = task.kind is TaskKind.DONE
        return 0.0 if self.is_done else self._handle_task(task)

    def _settle(self, outcomes: Iterable[Receipt | RejectedError]) -> None:
        """Send updates that an outage or an earlier process left unsent, and count the results."""
        for outcome in outcomes:
            if isinstance(outcome, Receipt):
                self._accepted(outcome)
            else:
                _log.info("kept update refused: %s", outcome)
                self.summary.late_count += 1

    def _accepted(self, receipt: Receipt) -> None:
        self.summary.update_count += 1
        self._on_receipt(receipt)

    def _handle_task(self, task: Task) -> float:
        """Execute a task and return the pause before the next poll in seconds."""
        try:
            if task.analytics is not None:
                return self._answer(task, task.analytics.query)
            if task.kind is TaskKind.TRAIN:
                self._take_part(task)
                self._late_in_a_row = self._failed_in_a_row = 0
                return 0.0
            if task.kind is TaskKind.EVALUATE:
                return self._measure(task)
        except (
            FailedPreconditionError,
            DuplicateUpdateError,
            NotFoundError,
            RepeatedTaskError,
        ) as error:
            # The round or the version closed while this device was busy, or the device already sent its update, in # an
            # earlier process or before the coordinator was restored. It continues with the next round.
            _log.info("task abandoned: %s", error)
            self.summary.late_count += 1
            self._late_in_a_row += 1
            backoff_s = _LEAST_LATE_DELAY_S * 2.0 ** min(self._late_in_a_row, 10)
            return max(task.poll_delay_s, min(backoff_s, _MOST_LATE_DELAY_S))
        except _WorkFailedError:
            pause_s = _LEAST_FAILURE_DELAY_S * 2.0 ** min(self._failed_in_a_row, 10)
            self._failed_in_a_row += 1
            self.summary.failure_count += 1
            return max(task.poll_delay_s, min(pause_s, _MOST_FAILURE_DELAY_S))
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
        with span("qflare.device.train"), self._failures_reported(task):
            given, base = self._handed_over(task, base)
            given |= self._client.local_tensors(task.training_session_id)
            arrays, example_count, metrics = _returned(
                self._train(given, task.config), "training", _TRAINED
            )
            del given  # what was trained may be other arrays
        self._bounds.seen()
        with self._failures_reported(task, TrainingFunctionError):
            receipt = self._client.submit(
                task, base, arrays, example_count, metrics, privacy=self._privacy
            )
        self._accepted(receipt)

    def _handed_over(self, task: Task, base: GlobalModel) -> tuple[dict[str, Array], GlobalModel]:
        """Return arrays for a training function, and what stays of the version beside them.

        They are a copy, except for a large version that is needed for nothing else: it would be in memory twice.
        """
        is_needed = self._evaluate is not None or self._privacy is not None
        if is_needed or base.manifest.size_bytes < _LARGE_BYTES or needs_base(task.transfer):
            return _copy(base), base
        self._held = None
        return dict(base.arrays), replace(base, arrays={})

    def _answer(self, task: Task, query: Query) -> float:
        """Answer a query, or refuse it: the next poll is then for other work, which the query must not keep away."""
        try:
            self._client.require_query(task)
            if query.column not in self._columns:
                raise InsufficientTaskError(f"there is no column {query.column[:100]!r}")  # noqa: TRY301
            task = self._client.take_step(task)
            if task.kind is not TaskKind.TRAIN:
                return max(task.poll_delay_s, _LEAST_POLL_DELAY_S)
            with self._failures_reported(task):
                values = self._columns[query.column](query)
            self._bounds.seen()
            with self._failures_reported(task, TrainingFunctionError):
                receipt = self._client.answer(task, values)
        except (InsufficientTaskError, PrivacyBudgetExceededError) as error:
            self._refuse(task, error)
            return _LEAST_POLL_DELAY_S
        self._failed_in_a_row = 0
        self.summary.answer_count += 1
        self._on_receipt(receipt)
        return 0.0

    def _refuse(self, task: Task, error: QflareClientError) -> None:
        self._was_refused = True
        if self._refused_query == task.nonce:
            return
        self._refused_query = task.nonce
        self.summary.refused_query_count += 1
        _log.warning("query refused: %s", error)
        try:
            self._client.report_failure(task, "QueryRefused", timeout_s=_REPORT_TIMEOUT_S)
        except QflareClientError as unsent:
            _log.warning("refusal not reported: %s", unsent)

    def _measure(self, task: Task) -> float:
        if self._evaluate is None:
            return max(task.poll_delay_s, _LEAST_POLL_DELAY_S)
        model = self._model(task)
        if self._client.lifetime.is_ending():
            return 0.0
        with self._failures_reported(task):
            given = _copy(model) | self._client.local_tensors(task.training_session_id)
            result = self._evaluate(given, task.config)
            example_count, metrics = _returned(result, "evaluation", _EVALUATED)
        self._bounds.seen()
        with self._failures_reported(task, TrainingFunctionError):
            self._client.report_evaluation(task, example_count, metrics)
        self._failed_in_a_row = 0
        self.summary.evaluation_count += 1
        return 0.0

    @contextmanager
    def _failures_reported(
        self, task: Task, failure: type[Exception] = Exception
    ) -> Iterator[None]:
        """Report what the block raises by its class and, of `TaskFailedError` alone, its text; then raise it again.

        Args:
            task: The task that the block works on.
            failure: Class of the exceptions that are failures of a function.

        Raises:
            _WorkFailedError: In place of the failure, if the loop continues.
        """
        try:
            yield
        except failure as error:
            kind, text = _described(error)
            try:
                self._client.report_failure(task, kind, text, timeout_s=_REPORT_TIMEOUT_S)
            except QflareClientError as unsent:
                _log.warning("failure not reported: %s", unsent)
            if not self._continues:
                raise
            _log.exception("round %d: failed, the loop continues", task.round_number)
            raise _WorkFailedError from error

    def _model(self, task: Task) -> GlobalModel:
        held = self._held
        wanted = (task.base_digest, task.download_encoding)
        if held is None or (held.digest, held.encoding) != wanted:
            held = self._client.download_base(task)
            self._held = held
            self.summary.last_version = max(self.summary.last_version, held.version)
        return held


def _checked_columns(
    client: Client, analytics: Mapping[str, QueryFunction] | None
) -> Mapping[str, QueryFunction]:
    """Return the functions of columns by name.

    Raises:
        InvalidArgumentError: They are no functions by name, or the client has no policy for queries.
    """
    if analytics is None:
        return {}
    if not isinstance(analytics, Mapping):
        raise InvalidArgumentError(
            f"analytics: got {type(analytics).__name__}, want functions by name of their column"
        )
    for name, function in analytics.items():
        arguments.check_callable(
            f"analytics of {arguments.text('analytics', name)!r:.100}", function
        )
    if analytics and not client.answers_queries:
        raise InvalidArgumentError(
            "analytics: the client has no policy for queries: Client(analytics=...)"
        )
    return dict(analytics)


def _described(error: Exception) -> tuple[str, str]:
    """Return kind and text of a failure, as they are sent."""
    if not isinstance(error, TaskFailedError):
        return type(error).__name__[:_MAX_KIND], ""
    cause = error.__cause__ or error
    text = "".join(mark if mark.isprintable() else " " for mark in error.text[:_MAX_REASON])
    return type(cause).__name__[:_MAX_KIND], text.strip()


def _copy(model: GlobalModel) -> dict[str, Array]:
    """Copy the arrays, because training functions modify them in place and the next round may need the originals."""
    return {name: array.copy() for name, array in model.arrays.items()}


def _returned(result: object, which: str, wanted: tuple[str, ...]) -> Any:
    """Return the parts of what a function returned; it may be a tuple or a list of them."""
    if isinstance(result, tuple | list) and len(result) == len(wanted):
        return result
    got = type(result).__name__
    if isinstance(result, tuple | list):
        got += f" of {len(result)}"
    raise TrainingFunctionError(
        f"the {which} function must return ({', '.join(wanted)}), got {got}"
    )
