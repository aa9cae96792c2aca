"""Aggregation of rounds into versions.

A pass (`Aggregator.run_once`) folds what was accepted since the last one, closes rounds that are due and publishes
those that are closed. Passes are safe to repeat and to run twice at once: a lease keeps two coordinators from
doing the same work in vain, but nothing depends on it; a version is published only by a transaction that finds
the training session still at the base version and the round closed with exactly the updates that were folded.
Scheduling belongs to `AggregationWorker`.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.evidence.statements import StatementError
from qflare.processors import usable_processor_count
from qflare.tensors import InvalidManifestError, InvalidPayloadError
from qflare_server.aggregation.divided_passes import PassDivider
from qflare_server.aggregation.fold import RoundFold
from qflare_server.aggregation.folds import open_fold
from qflare_server.aggregation.neighbor_fold import NeighborRoundFold
from qflare_server.aggregation.plan import RoundPlan, read_plan
from qflare_server.aggregation.publication import (
    Publication,
    prepare_publication,
    sign_following_task,
)
from qflare_server.aggregation.row_integrity import record_refusals
from qflare_server.context import Context
from qflare_server.errors import (
    ConflictError,
    DamagedPayloadError,
    HelperRefusedError,
    HelperUnavailableError,
    InvalidUpdateError,
    StorageFullError,
    StoreUnavailableError,
)
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import leases, training_sessions, updates
from qflare_server.storage.repository.training_sessions import RoundInProgress
from qflare_server.storage.tables import RoundState, TrainingSessionState
from qflare_server.strategies import (
    NotEnoughUpdatesError,
    PrivacyBudgetExceededError,
    SpareTotal,
)
from qflare_server.training.failures import find_too_many
from qflare_server.training.premises import PremisesChangedError
from qflare_server.training.privacy import PrivacyCharge, allowance, noise_seed
from qflare_server.training.quarantine import quarantine_repeaters
from qflare_server.training.release_journal import (
    FILE,
    ReleaseJournal,
    reconcile,
    record_release,
)
from qflare_server.training.retention import prune_payloads
from qflare_server.training.rounds import (
    RoundTask,
    await_helper,
    end_for_failures,
    end_session,
    fail_round,
    go_on_without_version,
    handle_missed_quorum,
    is_collecting,
    opens_after_failures,
    opens_after_missed_quorum,
)

logger = logging.getLogger(__name__)

COALESCE_S: Final = 0.003  # updates that come together are folded together
ASKERS: Final = 4
"""Threads that ask helpers for secure aggregation, one for each round that waits for them."""
HELPER_REST_S: Final = 2.0
"""Seconds before a helper that did not answer is asked again."""
REST_S: Final = 5.0  # before a round that failed for a reason of its own is tried again
MAX_DOUBLINGS: Final = 10
THREADS: Final = min(
    4, usable_processor_count()
)  # that fold a large model; each takes up to 100 MB

Key = tuple[str, int]


class Aggregator:
    """Folds, closes and publishes rounds; not thread-safe.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        holder: Name of this coordinator in leases; the same after a restart.
        only: The one training session to work on, without a lease, which only saves work done twice; None means all.
        waits_for_helpers: Whether a pass waits for helpers for secure aggregation, instead of asking them in threads.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        holder: str,
        *,
        only: str | None = None,
        waits_for_helpers: bool = False,
    ) -> None:
        self._context = context
        self._executor = executor
        self._holder = holder
        self._only = only
        self._waits_for_helpers = waits_for_helpers
        self._folds: dict[Key, RoundFold] = {}
        self._leases: dict[str, datetime] = {}
        self._resting: dict[Key, datetime] = {}
        self._damaged: set[Key] = set()  # rounds with bytes that are not those that were received
        self._journal = ReleaseJournal(context.config.data_dir / FILE)
        self._reconciled: set[str] = set()
        self._asking: ThreadPoolExecutor | None = None
        self._spare = SpareTotal()
        self._divider = PassDivider(context, executor, holder, self._leads)

    def run_once(self) -> bool:
        """Run one pass; return whether another may follow at once."""
        with self._context.database.read() as session:
            rounds = training_sessions.rounds_in_progress(session)
        current = {(item.training_session_id, item.number) for item in rounds}
        self._folds = {key: fold for key, fold in self._folds.items() if key in current}
        self._resting = {key: until for key, until in self._resting.items() if key in current}
        self._damaged &= current
        self._spare.retain({session_id for session_id, _ in current})
        results = [
            self._advance(item)
            for item in rounds
            if not self._rests(item) and self._leads(item.training_session_id)
        ]
        return any(results)

    def next_deadline(self) -> datetime | None:
        """Return when the next open round that this coordinator works on is due, None without one."""
        with self._context.database.read() as session:
            rounds = training_sessions.rounds_in_progress(session)
        due = [
            item.deadline_at
            for item in rounds
            if item.state == RoundState.OPEN.value
            and item.training_session_id in self._leases
            and not self._rests(item)
        ]
        steps = [self._next_step(item) for item in rounds if not self._rests(item)]
        return min((at for at in (*due, *steps) if at is not None), default=None)

    def _next_step(self, item: RoundInProgress) -> datetime | None:
        """Return when a step of a round with neighbors ends for lack of time."""
        fold = self._folds.get((item.training_session_id, item.number))
        return fold.next_deadline() if isinstance(fold, NeighborRoundFold) else None

    def _rests(self, item: RoundInProgress) -> bool:
        until = self._resting.get((item.training_session_id, item.number))
        return until is not None and self._is_within(until, REST_S)

    def _is_within(self, until: datetime, span_s: float, *, least_s: float = 0.0) -> bool:
        """Return whether the time left is above a minimum, and not above the span, as after a clock is set back."""
        left_s = (until - self._context.clock()).total_seconds()
        return least_s < left_s <= span_s

    def close(self) -> None:
        """Release the leases, so that another coordinator can continue at once; end requests to helpers."""
        if self._asking is not None:
            if self._context.helpers is not None:
                self._context.helpers.close()
            self._asking.shutdown(cancel_futures=True)
        if self._leases:
            self._context.database.write(lambda session: leases.release(session, self._holder))

    def _leads(self, training_session_id: str) -> bool:
        """Return whether this coordinator works on a training session, taking or renewing the lease."""
        if self._only is not None:
            return training_session_id == self._only
        life_s = self._context.config.lease_s
        until = self._leases.get(training_session_id)
        if until is not None and self._is_within(until, life_s, least_s=life_s / 2):
            return True
        now, life = self._context.clock(), timedelta(seconds=life_s)
        name = f"aggregate:{training_session_id}"
        try:
            taken = self._context.database.write(
                lambda session: leases.acquire(session, name, self._holder, now, now + life)
            )
        except ConflictError:
            taken = False
        if taken:
            self._leases[training_session_id] = now + life
        else:
            self._leases.pop(training_session_id, None)
            self._drop(training_session_id)
        return taken

    def _drop(self, training_session_id: str) -> None:
        self._folds = {
            key: fold for key, fold in self._folds.items() if key[0] != training_session_id
        }

    def _advance(self, item: RoundInProgress) -> bool:
        """Advance one round; a failure is logged and does not stop the other rounds."""
        key = (item.training_session_id, item.number)
        try:
            return self._advance_round(item)
        except (StoreUnavailableError, StorageFullError):
            self._folds.pop(key, None)
            raise
        except InvalidManifestError as error:
            self._folds.pop(key, None)
            problem = f"the model cannot be trained under its configuration: {error}"
            return self._context.database.write(
                lambda session: self._end_untrainable(session, item, problem)
            )
        except PremisesChangedError:
            self._folds.pop(key, None)  # planned under a configuration that was replaced
            return True
        except DamagedPayloadError as error:
            self._folds.pop(key, None)
            self._damaged.add(key)
            self._rest(key)
            logger.warning("round not aggregated: session=%s round=%d: %s", *key, error)
            return False
        except HelperUnavailableError as error:
            return self._wait_for_helper(item, str(error))
        except Exception:
            self._folds.pop(key, None)
            self._rest(key)
            logger.exception("round not aggregated: session=%s round=%d", *key)
            return False

    def _rest(self, key: Key) -> None:
        self._resting[key] = self._context.clock() + timedelta(seconds=REST_S)

    def _wait_for_helper(self, item: RoundInProgress, problem: str) -> bool:
        """Ask the helpers of a closed round again after a rest, or give the round up when it has waited too long."""
        key, now = (item.training_session_id, item.number), self._context.clock()
        self._folds.pop(key, None)
        logger.warning("helper for secure aggregation: session=%s round=%d: %s", *key, problem)
        waited = timedelta(0) if item.closed_at is None else now - item.closed_at
        if waited < timedelta(seconds=self._context.config.helper_wait_s):
            self._context.database.write(lambda session: await_helper(session, item, problem, now))
            self._resting[key] = now + timedelta(seconds=HELPER_REST_S)
            return False
        fold = self._fold(item)
        while self._take(fold, item):
            pass
        self._folds.pop(key, None)
        return self._give_up(item, fold, f"no version could be made: {problem}")

    def _advance_round(self, item: RoundInProgress) -> bool:
        fold = self._fold(item)
        if isinstance(fold, NeighborRoundFold) and self._advance_groups(item, fold):
            return True
        more = self._take(fold, item)
        if item.state == RoundState.OPEN.value:
            if item.deadline_at <= self._context.clock():
                return self._close_due(item)
            return self._end_failing(item, fold) or more
        if more or fold.last_sequence < item.accepted_count:
            return more
        if self._is_outdated(fold):
            self._drop(item.training_session_id)
            return True
        return fold.is_ready() and self._publish(item, fold)

    def _advance_groups(self, item: RoundInProgress, fold: NeighborRoundFold) -> bool:
        """Decide what is due in a round of secure aggregation with neighbors; return whether anything was."""
        if not fold.awaits_decision():
            return False

        def work(session: Session) -> bool:
            locked = _lock(session, item)
            if locked is None or not _is_in_progress(*locked):
                return False
            return fold.decide(session, *locked, self._context.clock())

        return self._context.database.write(work)

    def _is_outdated(self, fold: RoundFold) -> bool:
        """Return whether an administrator has replaced the configuration that a fold was planned under."""
        with self._context.database.read() as session:
            found = training_sessions.get_session(session, fold.plan.training_session_id)
        return found is not None and found.config != fold.plan.config

    def _askers(self) -> ThreadPoolExecutor:
        """Return the threads that ask helpers for secure aggregation."""
        if self._asking is None:
            self._asking = ThreadPoolExecutor(ASKERS, "ask-helper")
        return self._asking

    def _fold(self, item: RoundInProgress) -> RoundFold:
        key = (item.training_session_id, item.number)
        if key not in self._folds:
            with self._context.database.read() as session:
                plan = read_plan(session, *key, item.base_version)
            seed = noise_seed(self._context, plan.config, key[0], plan.privacy_state)
            self._folds[key] = open_fold(
                self._context,
                plan,
                asker=None if self._waits_for_helpers else self._askers,
                noise_seed=seed,
                thread_count=THREADS,
                refuses_damaged=key in self._damaged,
                division=self._divider.division(),
                spare=self._spare,
            )
        return self._folds[key]

    def _take(self, fold: RoundFold, item: RoundInProgress) -> bool:
        """Fold one batch of accepted updates; return whether the batch was full."""
        if fold.last_sequence >= item.accepted_count:
            return False
        with self._context.database.read() as session:
            batch = updates.accepted_after(
                session, item.training_session_id, item.number, fold.last_sequence, fold.batch_size
            )
        telemetry, started = self._context.telemetry, time.monotonic()
        with telemetry.span(
            "qflare.round.fold", links=[update.update_id for update in batch], **_names(item)
        ):
            fold.take(batch)
        size_bytes = sum(update.size_bytes for update in batch)
        telemetry.updates_folded(len(batch), size_bytes, time.monotonic() - started)
        return len(batch) == fold.batch_size

    def _close_due(self, item: RoundInProgress) -> bool:
        """Close a round whose deadline has passed, or apply the missed-quorum action."""
        next_task = self._task_after_missed_quorum(item)

        def work(session: Session) -> bool:
            locked = _lock(session, item)
            if locked is None or locked[1].state != RoundState.OPEN.value:
                return False
            training_session, current = locked
            now = self._context.clock()
            if (
                training_session.state != TrainingSessionState.RUNNING.value
                or current.deadline_at > now
            ):
                return False
            if current.accepted_count >= current.quorum:
                values = {"state": RoundState.CLOSED.value, "closed_at": now}
                training_sessions.update_round(session, training_session.id, current.number, values)
            else:
                handle_missed_quorum(session, training_session, current, next_task, now)
            return True

        return self._ended(item, self._context.database.write(work))

    def _end_failing(self, item: RoundInProgress, fold: RoundFold) -> bool:
        """End an open round in which too many devices failed; return whether it was ended."""
        config = fold.plan.config
        if not config.failures.action:
            return False
        with self._context.database.read() as session:
            current = training_sessions.get_round(session, item.training_session_id, item.number)
            if current is None or find_too_many(session, config, current) is None:
                return False
        next_task = self._sign_retry(fold.plan) if opens_after_failures(config, current) else None

        def work(session: Session) -> bool:
            locked = _lock(session, item)
            if locked is None or not is_collecting(*locked):
                return False
            found = find_too_many(session, locked[0].config, locked[1])
            if found is not None:
                now = self._context.clock()
                end_for_failures(session, *locked, found, next_task, now)
            return found is not None

        return self._ended(item, self._context.database.write(work))

    def _task_after_missed_quorum(self, item: RoundInProgress) -> RoundTask | None:
        """Sign the task of the round that follows one whose deadline passes without a quorum, if one does."""
        if item.accepted_count >= item.quorum:
            return None
        plan = self._fold(item).plan
        return self._sign_retry(plan) if opens_after_missed_quorum(plan.config) else None

    def _sign_retry(self, plan: RoundPlan) -> RoundTask:
        """Sign the task of a round that follows one of the same base version."""
        return sign_following_task(self._context, plan, plan.base_version, plan.parent.digest)

    def _publish(self, item: RoundInProgress, fold: RoundFold) -> bool:
        """Write the version's bytes, then publish it in one transaction."""
        try:
            with self._context.telemetry.span(
                "qflare.version.publish",
                links=[update_id for update_id, _ in fold.taken],
                **_names(item),
            ):
                return self._publish_version(item, fold)
        finally:
            fold.end()

    def _publish_version(self, item: RoundInProgress, fold: RoundFold) -> bool:
        write = self._context.database.write
        try:
            publication = self._prepare(item, fold)
        except PrivacyBudgetExceededError as error:
            reason = f"privacy budget exceeded: {error}"
            return self._ended(
                item, write(lambda session: self._exhaust(session, item, reason, fold))
            )
        except (
            NotEnoughUpdatesError,
            InvalidPayloadError,
            InvalidUpdateError,
            HelperRefusedError,
        ) as error:
            return self._give_up(item, fold, f"no version could be made: {error}")
        except StatementError as error:
            logger.exception("version not published: no device would take its statement")
            return self._give_up(item, fold, f"no version could be published: {error}")
        finally:
            self._folds.pop((item.training_session_id, item.number), None)
        published = write(publication.run)
        if published:
            logger.info(
                "version published: session=%s version=%d round=%d updates=%d",
                item.training_session_id,
                item.base_version + 1,
                item.number,
                fold.last_sequence,
            )
            self._tell(item, publication)
            if publication.allowance is not None:
                digest, number = publication.version.digest, item.base_version + 1
                record_release(self._journal, item.training_session_id, digest, number)
        return self._ended(item, published)

    def _give_up(self, item: RoundInProgress, fold: RoundFold, problem: str) -> bool:
        task = self._sign_retry(fold.plan)
        write = self._context.database.write
        return self._ended(
            item, write(lambda session: self._retry(session, item, problem, fold, task))
        )

    def _ended(self, item: RoundInProgress, has_ended: bool) -> bool:
        """Prune payloads beyond retention after the end of a round; return whether it has ended."""
        if has_ended:
            prune_payloads(self._context, item.training_session_id)
        return has_ended

    def _prepare(self, item: RoundInProgress, fold: RoundFold) -> Publication:
        """Account for a version, then write its bytes and sign it.

        Raises:
            PrivacyBudgetExceededError: It must not be released.
            NotEnoughUpdatesError: Or another of its kind: it cannot be made.
            StatementError: Its statement would fail verification.
        """
        spending = self._allowance(fold.plan)
        assert item.closed_at is not None
        return prepare_publication(self._context, self._executor, fold, item.closed_at, spending)

    def _allowance(self, plan: RoundPlan) -> PrivacyCharge | None:
        if not plan.config.privacy.noise_multiplier:
            return None
        if plan.training_session_id not in self._reconciled:
            reconcile(self._context, self._journal, plan.config, plan.training_session_id)
            self._reconciled.add(plan.training_session_id)
        with self._context.database.read() as session:
            training_session = training_sessions.get_session(session, plan.training_session_id)
            state = None if training_session is None else training_session.privacy_state
        return allowance(plan.config, state)

    def _tell(self, item: RoundInProgress, publication: Publication) -> None:
        """Report a published version to telemetry."""
        assert item.closed_at is not None
        used = len(publication.version.draft.contributors)
        self._context.telemetry.round_published(
            used,
            len(publication.fold.taken) - used,
            max(0.0, (item.closed_at - item.opened_at).total_seconds()),
            max(0.0, (self._context.clock() - item.closed_at).total_seconds()),
        )

    def _exhaust(
        self, session: Session, item: RoundInProgress, reason: str, fold: RoundFold
    ) -> bool:
        """End a training session whose next version would exceed the privacy budget."""
        locked = _lock(session, item)
        if locked is None or locked[1].state != RoundState.CLOSED.value:
            return False
        training_session, current = locked
        now = self._context.clock()
        record_refusals(session, training_session.id, current.number, fold.refusals, now)
        fail_round(session, training_session, current, reason, now)
        if training_session.state != TrainingSessionState.CANCELLED.value:
            end_session(session, training_session, TrainingSessionState.COMPLETED, reason, now)
        return True

    def _end_untrainable(self, session: Session, item: RoundInProgress, reason: str) -> bool:
        """End a training session that an earlier release created and that no update can serve."""
        locked = _lock(session, item)
        if locked is None:
            return False
        training_session, current = locked
        now = self._context.clock()
        fail_round(session, training_session, current, reason, now)
        end_session(session, training_session, TrainingSessionState.FAILED, reason, now)
        return True

    def _retry(
        self,
        session: Session,
        item: RoundInProgress,
        reason: str,
        fold: RoundFold,
        next_task: RoundTask,
    ) -> bool:
        """Fail a round that makes no version, and open another from the same base version."""
        locked = _lock(session, item)
        if locked is None or locked[1].state != RoundState.CLOSED.value:
            return False
        training_session, current = locked
        now = self._context.clock()
        rejected = fold.outcome.rejected
        updates.mark_rejected(session, rejected, now)
        record_refusals(session, training_session.id, current.number, fold.refusals, now)
        fail_round(session, training_session, current, reason, now)
        judged = sorted(rejected.keys() - fold.refusals.keys())
        quarantine_repeaters(session, training_session, judged, now)
        if training_session.state in {
            TrainingSessionState.RUNNING.value,
            TrainingSessionState.PAUSED.value,
        }:
            go_on_without_version(session, training_session, reason, next_task, now)
        return True


def _names(item: RoundInProgress) -> dict[str, Any]:
    """Return the attributes of a round's tracing span."""
    return {"training_session_id": item.training_session_id, "round_number": item.number}


def _is_in_progress(training_session: TrainingSession, current: Round) -> bool:
    return training_session.state == TrainingSessionState.RUNNING.value and current.state in {
        RoundState.OPEN.value,
        RoundState.CLOSED.value,
    }


def _lock(session: Session, item: RoundInProgress) -> tuple[TrainingSession, Round] | None:
    """Lock a training session and its round in progress; None if either is gone."""
    training_session = training_sessions.lock_session(session, item.training_session_id)
    current = training_sessions.lock_round(session, item.training_session_id, item.number)
    return None if training_session is None or current is None else (training_session, current)
