"""Work on rounds that other coordinators lead: one slice at a time, in a thread of its own (`divided_passes`)."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.aggregation.aggregator import THREADS
from qflare_server.aggregation.divided_passes import Keeper, divides, has_others
from qflare_server.aggregation.fold import Division, RoundFold
from qflare_server.aggregation.pass_inputs import (
    FORMAT,
    ChangedInputsError,
    PassInputs,
    PassUpdate,
)
from qflare_server.aggregation.plan import read_plan
from qflare_server.aggregation.slice_results import LeaseLostError, store_result
from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.storage.repository import fold_slices, updates
from qflare_server.storage.repository.fold_slices import FoldPass, SliceLease
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.strategies.blocks import BLOCK, SLICE

logger = logging.getLogger(__name__)

PART_BYTES: Final = 2**28
"""Bytes of updates that are folded between two looks at the lease, per thread."""
LOOK_S: Final = 5.0
"""Seconds between two looks for other coordinators, and for slices while there is no other."""
REMEMBERED: Final = 100
"""Passes that failed here and are left to other coordinators."""


class SliceWorker:
    """Computes slices of rounds that other coordinators lead; not thread-safe.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        holder: Name of this coordinator.
        stopping: Set to give the slice under way back.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        holder: str,
        stopping: threading.Event | None = None,
    ) -> None:
        self._context = context
        self._executor = executor
        self._holder = holder
        self._stopping = stopping or threading.Event()
        self._failed: deque[str] = deque(maxlen=REMEMBERED)
        self._current: tuple[FoldPass, RoundFold] | None = None

    def run_once(self) -> bool:
        """Acquire a slice and compute it; return whether there was one."""
        with self._context.database.read() as session:
            if not fold_slices.has_free_slice(session, self._holder, FORMAT, list(self._failed)):
                self._current = None
                return False
        lease = self._acquire()
        if lease is None:
            return False
        started, outcome = time.monotonic(), "failed"
        try:
            outcome = self._compute(lease)
        except QflareError as error:
            self._give_up(lease, str(error))
        except Exception as error:
            logger.exception(
                "slice not computed: pass=%s slice=%d", lease.pass_id, lease.slice_index
            )
            self._give_up(lease, type(error).__name__)
        self._context.telemetry.slice_folded(outcome, time.monotonic() - started)
        return True

    def _acquire(self) -> SliceLease | None:
        life_s, failed = self._context.config.lease_s, list(self._failed)

        def work(session: Session) -> SliceLease | None:
            return fold_slices.acquire_any(session, self._holder, FORMAT, failed, life_s)

        return self._context.database.write(work)

    def _give_up(self, lease: SliceLease, problem: str) -> None:
        """Leave a pass to others, and give the slice back at once where the database answers."""
        logger.warning("pass %s left to other coordinators: %s", lease.pass_id, problem)
        self._failed.append(lease.pass_id)
        self._current = None
        try:
            self._context.database.write(partial(fold_slices.release, lease=lease))
        except QflareError:
            logger.warning("slice not given back; its lease expires by itself")

    def _compute(self, lease: SliceLease) -> str:
        """Compute a slice and record its result; return the outcome."""
        opened = self._open(lease.pass_id)
        if opened is None:
            return "refused"
        found, fold = opened
        keeper = Keeper(self._context, lease)

        def keep() -> None:
            if self._stopping.is_set():
                self._context.database.write(partial(fold_slices.release, lease=lease))
                raise LeaseLostError
            keeper.keep()

        name = PassInputs.from_json(found.inputs).name
        values = fold.compute(name, lease.first_element, lease.end_element)
        try:
            store_result(self._context, self._executor, fold.plan, found, lease, values, keep)
        except LeaseLostError:
            logger.warning(
                "result refused: pass=%s slice=%d fence=%d is not the current one",
                lease.pass_id,
                lease.slice_index,
                lease.fence,
            )
            self._current = None
            return "refused"
        return "recorded"

    def _open(self, pass_id: str) -> tuple[FoldPass, RoundFold] | None:
        """Return a pass and the fold that computes its slices; None if it has ended."""
        if self._current is None or self._current[0].id != pass_id:
            with self._context.database.read() as session:
                found = fold_slices.get_pass(session, pass_id)
            self._current = None if found is None else (found, self._fold(found))
        return self._current

    def _fold(self, found: FoldPass) -> RoundFold:
        inputs = PassInputs.from_json(found.inputs)
        with self._context.database.read() as session:
            plan = read_plan(
                session, inputs.training_session_id, inputs.round_number, inputs.base_version
            )
        inputs.require(plan)
        fold = RoundFold(
            self._context,
            plan,
            thread_count=THREADS,
            recorded={entry.update_id: entry for entry in inputs.judgements},
            revision=inputs.revision,
            division=Division(None, 0, _part_elements(inputs)),
        )
        taken: list[PassUpdate] = []
        for batch in self._batches(inputs, fold.batch_size):
            taken += [PassUpdate.of(update) for update in batch]
            fold.take_known(batch)
        if tuple(taken) != inputs.updates:
            raise ChangedInputsError("other updates")
        return fold

    def _batches(self, inputs: PassInputs, limit: int) -> Iterator[list[AcceptedUpdate]]:
        """Read the updates of a pass in acceptance order."""
        wanted, after = {update.update_id for update in inputs.updates}, 0
        while after < inputs.last_sequence:
            with self._context.database.read() as session:
                batch = updates.accepted_after(
                    session, inputs.training_session_id, inputs.round_number, after, limit
                )
            if not batch:
                return
            after = batch[-1].acceptance_sequence
            yield [update for update in batch if update.update_id in wanted]


def _part_elements(inputs: PassInputs) -> int:
    """Return how many elements are folded at once, so that the lease is kept in time."""
    fitting = PART_BYTES // (4 * max(1, len(inputs.updates)))
    return max(BLOCK, min(SLICE, fitting // BLOCK * BLOCK))


class SliceWorkerThread:
    """Background thread that computes slices of others' rounds; does nothing where rounds are not divided.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        holder: Name of this coordinator.
    """

    def __init__(self, context: Context, executor: ThreadPoolExecutor, holder: str) -> None:
        self._context = context
        self._holder = holder
        self._looked_at = -LOOK_S
        self._is_alone = True
        self._stop = threading.Event()
        self._worker = SliceWorker(context, executor, holder, self._stop)
        self._thread = threading.Thread(target=self._run, name="slice-worker", daemon=True)

    def start(self) -> None:
        """Start the thread if rounds are divided."""
        if divides(self._context):
            self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Give the slice under way back and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            try:
                is_busy = self._worker.run_once()
                self._look()
            except QflareError as error:
                logger.warning("slices of other coordinators deferred: %s", error)
                is_busy = False
            except Exception:
                logger.exception("slices of other coordinators failed; they are tried again")
                is_busy = False
            wait_s = 0.0 if is_busy else self._idle_s()

    def _look(self) -> None:
        """Look for other coordinators from time to time."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._is_alone = not has_others(self._context, self._holder)

    def _idle_s(self) -> float:
        """Return how long to wait for the next slice; a coordinator alone asks the database less often."""
        poll_s = self._context.config.worker_poll_s
        return max(poll_s, LOOK_S) if self._is_alone else poll_s
