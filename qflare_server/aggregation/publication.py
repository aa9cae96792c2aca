"""Publication of the version of a round: written and signed first, then made known in one transaction.

The transaction holds everything that must become true together: the version with its statement, the outcome of every
update, what privacy has cost, and how the training session goes on. It does nothing where the round or the ledger is
no longer what the version was made from.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare_server.aggregation.fold import RoundFold, WrittenVersion
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.aggregation.row_integrity import record_refusals
from qflare_server.context import Context
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import (
    audit,
    training_sessions,
    unmaskings,
    updates,
    views,
)
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import (
    LEFT_OUT_REASON,
    RiskLevel,
    RoundState,
    TrainingSessionState,
)
from qflare_server.strategies import Outcome
from qflare_server.training.early_stopping import stop_reason
from qflare_server.training.evaluation import summarize
from qflare_server.training.objective import HISTORY
from qflare_server.training.privacy import PrivacyCharge, ledger_rows, with_ledger
from qflare_server.training.quarantine import quarantine_repeaters
from qflare_server.training.rounds import (
    HELPER_AWAITED,
    RoundTask,
    end_session,
    open_round,
    sign_task,
)
from qflare_server.training.versions import SignedVersion, VersionDraft, publish, sign_version

NEARLY_SPENT: Final = 0.9
"""Share of the privacy budget from which it is nearly spent."""


@dataclass(frozen=True)
class Publication:
    """A version that is written and signed, about to be published.

    Attributes:
        context: The coordinator's parts.
        fold: The finished aggregation.
        outcome: Its facts.
        version: The signed version.
        payloads: What is stored beside the version: its strategy's vectors, and the record of every update's outcome.
        next_task: For the round that trains from the version; None where it is known that none does.
        allowance: What the version costs in privacy; None without privacy.
    """

    context: Context
    fold: RoundFold
    outcome: Outcome
    version: SignedVersion
    payloads: Sequence[ReceivedPayload]
    next_task: RoundTask | None
    allowance: PrivacyCharge | None

    def run(self, session: Session) -> bool:
        """Publish the version; return whether it was, False if the round or the ledger has changed."""
        plan, now = self.fold.plan, self.context.clock()
        training_session = training_sessions.lock_session(session, plan.training_session_id)
        current = training_sessions.lock_round(session, plan.training_session_id, plan.number)
        if (
            training_session is None
            or current is None
            or not self._still_holds(training_session, current)
        ):
            return False
        spent_before = training_session.epsilon_spent or 0.0
        for payload in self.payloads:
            payload.insert(session, now)
        training_session = publish(session, training_session, self.version, now)
        self._record_unmaskings(session, now)
        if self.allowance is not None:
            state = with_ledger(training_session.privacy_state, self.allowance.after)
            training_sessions.update_session(session, training_session.id, {"privacy_state": state})
        draft = self.version.draft
        self._settle(session, training_session, current, draft, now)
        self._warn_of_budget(session, plan.training_session_id, spent_before, now)
        self._go_on(session, training_session, current, now)
        return True

    def _record_unmaskings(self, session: Session, now: datetime) -> None:
        """Store the answers of helpers for secure aggregation, each with an entry in the audit log."""
        plan, answers = self.fold.plan, self.fold.unmaskings
        if not answers:
            return
        unmaskings.insert_unmaskings(session, plan.training_session_id, plan.number, answers)
        statement = self.version.statement.unmasking
        for answer, digest in zip(answers, statement.answer_digests, strict=True):
            details = {
                "round": plan.number,
                "helper_id": answer.helper_id,
                "counter": answer.counter,
                "answer_digest": digest,
                "members": len(self.version.draft.contributors),
                "refused": len(answer.refused),
            }
            subject = f"training_session:{plan.training_session_id}"
            audit.record(session, SYSTEM, Event("round.unmasked", subject, details=details), now)

    def _still_holds(self, training_session: TrainingSession, current: Round) -> bool:
        if current.state != RoundState.CLOSED.value:
            return False
        if training_session.config != self.fold.plan.config:
            return False  # an administrator changed the rule of the rounds
        if current.accepted_count != self.fold.last_sequence:
            return False
        if current.closed_at != self.version.draft.created_at:
            return False
        if training_session.current_version != self.fold.plan.base_version:
            return False  # what is sealed is sealed for the version after it
        return (
            self.allowance is None
            or ledger_rows(training_session.privacy_state) == self.allowance.before
        )

    def _settle(
        self,
        session: Session,
        training_session: TrainingSession,
        current: Round,
        draft: VersionDraft,
        now: datetime,
    ) -> None:
        """Record which updates are rejected, and mark the round as published: all others are in its version."""
        fold, outcome = self.fold, self.outcome
        rejected = outcome.rejected
        left_out = dict.fromkeys(
            outcome.left_out, f"{LEFT_OUT_REASON}{outcome.strategy} gave it no share"
        )
        updates.mark_rejected(session, rejected | left_out, now)
        record_refusals(session, training_session.id, current.number, fold.refusals, now)
        scores = {
            entry.update_id: entry.cosine
            for entry in outcome.judgements
            if entry.cosine is not None
        }
        updates.record_scores(session, scores)
        values: dict[str, Any] = {
            "state": RoundState.PUBLISHED.value,
            "version": draft.version,
            "rejected_count": len(rejected) + len(left_out),
            "example_count": draft.example_count,
            "published_at": now,
        }
        if current.state_reason.startswith(HELPER_AWAITED):
            values["state_reason"] = ""
        training_sessions.update_round(session, training_session.id, current.number, values)
        judged = sorted(rejected.keys() - fold.refusals.keys())
        quarantine_repeaters(session, training_session, judged, now)
        self._record(session, training_session, current, draft, now)

    def _record(
        self,
        session: Session,
        training_session: TrainingSession,
        current: Round,
        draft: VersionDraft,
        now: datetime,
    ) -> None:
        details: dict[str, Any] = {
            "version": draft.version,
            "round": current.number,
            "contributors": len(draft.contributors),
            "payload_digest": draft.payload.content_digest,
        }
        if draft.epsilon is not None:
            details["epsilon"] = draft.epsilon
        event = Event(
            "version.published", f"training_session:{training_session.id}", details=details
        )
        audit.record(session, SYSTEM, event, now)

    def _warn_of_budget(
        self, session: Session, training_session_id: str, spent_before: float, now: datetime
    ) -> None:
        """Record once that the privacy budget of a training session is nearly spent."""
        allowance, plan = self.allowance, self.fold.plan
        if allowance is None:
            return
        budget = plan.config.privacy.epsilon_budget
        bound = NEARLY_SPENT * budget
        spent = allowance.after.epsilon
        if spent_before >= bound or not (spent >= bound or allowance.is_last):
            return
        details = {
            "round": plan.number,
            "version": self.version.draft.version,
            "epsilon": spent,
            "epsilon_budget": budget,
        }
        subject = f"training_session:{training_session_id}"
        event = Event("privacy.budget_nearly_spent", subject, RiskLevel.MEDIUM, details)
        audit.record(session, SYSTEM, event, now)

    def _go_on(
        self, session: Session, training_session: TrainingSession, current: Round, now: datetime
    ) -> None:
        """Open the next round, or end the training session."""
        if training_session.state == TrainingSessionState.CANCELLED.value:
            return
        config = self.fold.plan.config
        if config.evaluation.every_rounds:
            summarize(session, training_session, current.base_version, now)
        reason = _last_reason(self.fold.plan, self.allowance)
        if not reason and config.early_stop.metric:
            history = views.latest_metrics(session, training_session.id, HISTORY)
            reason = stop_reason(config.early_stop, history)
        if reason:
            end_session(session, training_session, TrainingSessionState.COMPLETED, reason, now)
            return
        assert self.next_task is not None
        open_round(session, training_session, self.next_task, now)


def prepare_publication(
    context: Context,
    executor: ThreadPoolExecutor,
    fold: RoundFold,
    closed_at: datetime,
    allowance: PrivacyCharge | None = None,
) -> Publication:
    """Write the bytes of a version, sign it, and sign the task of the round after it.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        fold: The finished aggregation of a closed round.
        closed_at: When that round closed.
        allowance: What the version costs in privacy; None without privacy.

    Raises:
        NotEnoughUpdatesError: Or another of its kind: no version can be made.
        StatementError: Its statement would fail verification.
    """
    at = context.clock()
    written = fold.write(executor, at)
    plan, outcome = fold.plan, fold.outcome
    record = fold.write_outcome(executor, outcome, at)
    draft = _draft(fold, outcome, written, record, closed_at, allowance)
    draft = replace(
        draft, publish_duration_s=max(0.0, (context.clock() - closed_at).total_seconds())
    )
    version = sign_version(context, plan.training_session_id, plan.config, draft, plan.parent)
    task = (
        None
        if _last_reason(plan, allowance)
        else sign_following_task(context, plan, draft.version, version.digest)
    )
    payloads = [*written.vectors.values(), record, *fold.extra_payloads]
    return Publication(context, fold, outcome, version, payloads, task, allowance)


def _draft(
    fold: RoundFold,
    outcome: Outcome,
    written: WrittenVersion,
    record: ReceivedPayload,
    closed_at: datetime,
    allowance: PrivacyCharge | None,
) -> VersionDraft:
    plan, spent = fold.plan, None if allowance is None else allowance.after
    return VersionDraft(
        version=plan.base_version + 1,
        base_version=plan.base_version,
        round_number=plan.number,
        payload=written.payload,
        download=written.download,
        manifest=plan.manifest,
        created_at=closed_at,
        contributors=fold.contributors(outcome),
        example_count=fold.totals().example_count,
        weight_sum=outcome.weight_sum,
        metrics=fold.metrics(),
        strategy_state={
            "scalars": dict(outcome.scalars),
            "vectors": {name: item.payload_id for name, item in written.vectors.items()},
            "outcome": record.payload_id,
            "revision": fold.revision,
        },
        unmasking=fold.unmasking(),
        epsilon=None if spent is None else spent.epsilon,
        delta=None if spent is None else spent.delta,
    )


def sign_following_task(
    context: Context, plan: RoundPlan, base_version: int, base_digest: str
) -> RoundTask:
    """Sign the task of the round that follows one that was aggregated."""
    return sign_task(
        context,
        plan.training_session_id,
        plan.config,
        number=plan.number + 1,
        base_version=base_version,
        base_digest=base_digest,
    )


def _last_reason(plan: RoundPlan, allowance: PrivacyCharge | None) -> str:
    """Return why it is known beforehand that training ends with a version, empty if it is not."""
    if plan.is_last:
        return "all rounds are done"
    if allowance is not None and allowance.is_last:
        spent = allowance.after
        return (
            f"privacy budget spent: epsilon {spent.epsilon:.6g} of "
            f"{plan.config.privacy.epsilon_budget:.6g} at delta {spent.delta:.3g}"
        )
    return ""
