"""The transaction that publishes the version of a round.

It holds everything that must become true together: the version with its statement, what became of every update, what
privacy has cost, and how the training session goes on. It does nothing where the round or the ledger is no longer
what the version was made from.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from qflare_server.aggregation.fold import RoundFold, WrittenVersion
from qflare_server.aggregation.row_integrity import record_refusals
from qflare_server.context import Context
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.repository import audit, training_sessions, updates, views
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import (
    LEFT_OUT_REASON,
    Round,
    RoundState,
    TrainingSession,
    TrainingSessionState,
)
from qflare_server.training.config import stored_config
from qflare_server.training.early_stopping import HISTORY, stop_reason
from qflare_server.training.evaluation import summarise
from qflare_server.training.privacy import PrivacyCharge, ledger_rows, with_ledger
from qflare_server.training.quarantine import quarantine_repeaters
from qflare_server.training.rounds import end_session, open_round
from qflare_server.training.versions import VersionDraft, publish


@dataclass(frozen=True)
class Publication:
    """A version whose bytes are written, about to be published.

    Attributes:
        context: The coordinator's parts.
        fold: The finished aggregation.
        written: What it made.
        outcome: The record of what became of every update.
        allowance: What the version costs in privacy; None without privacy.
    """

    context: Context
    fold: RoundFold
    written: WrittenVersion
    outcome: ReceivedPayload
    allowance: PrivacyCharge | None = None

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
        draft = self._draft(training_session, current, now)
        for payload in (*self.written.vectors.values(), self.outcome):
            payload.insert(session, now)
        publish(self.context, session, training_session, draft)
        if self.allowance is not None:
            state = with_ledger(training_session.privacy_state, self.allowance.after)
            training_sessions.update_session(session, training_session.id, {"privacy_state": state})
        self._settle(session, training_session, current, draft, now)
        self._go_on(session, training_session, current, draft, now)
        return True

    def _still_holds(self, training_session: TrainingSession, current: Round) -> bool:
        if current.state != RoundState.CLOSED.value:
            return False
        if current.accepted_count != self.fold.last_sequence:
            return False
        if training_session.current_version != self.fold.plan.base_version:
            return False  # what is sealed is sealed for the version after it
        return (
            self.allowance is None
            or ledger_rows(training_session.privacy_state) == self.allowance.before
        )

    def _draft(
        self, training_session: TrainingSession, current: Round, now: datetime
    ) -> VersionDraft:
        fold = self.fold
        outcome = fold.outcome
        spent = None if self.allowance is None else self.allowance.after
        assert current.closed_at is not None
        return VersionDraft(
            version=training_session.current_version + 1,
            base_version=current.base_version,
            round_number=current.number,
            payload=self.written.payload,
            download=self.written.download,
            manifest=fold.plan.manifest,
            created_at=current.closed_at,
            contributors=fold.contributors(),
            example_count=fold.totals().example_count,
            weight_sum=outcome.weight_sum,
            metrics=fold.metrics(),
            strategy_state={
                "scalars": dict(outcome.scalars),
                "vectors": {name: item.payload_id for name, item in self.written.vectors.items()},
                "outcome": self.outcome.payload_id,
                "revision": fold.revision,
            },
            epsilon=None if spent is None else spent.epsilon,
            delta=None if spent is None else spent.delta,
            publish_duration_s=max(0.0, (now - current.closed_at).total_seconds()),
        )

    def _settle(
        self,
        session: Session,
        training_session: TrainingSession,
        current: Round,
        draft: VersionDraft,
        now: datetime,
    ) -> None:
        """Say of every update what became of it, and of the round that it is published."""
        fold, outcome = self.fold, self.fold.outcome
        rejected = outcome.rejected
        left_out = dict.fromkeys(
            outcome.left_out, f"{LEFT_OUT_REASON}{outcome.strategy} gave it no share"
        )
        updates.mark_rejected(session, rejected | left_out, now)
        record_refusals(session, training_session.id, current.number, fold.refusals, now)
        updates.mark_aggregated(
            session, training_session.id, current.number, fold.last_sequence, draft.version, now
        )
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
            "published_at": now,
        }
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

    def _go_on(
        self,
        session: Session,
        training_session: TrainingSession,
        current: Round,
        draft: VersionDraft,
        now: datetime,
    ) -> None:
        """Open the next round, or end the training session."""
        if training_session.state == TrainingSessionState.CANCELLED.value:
            return
        if stored_config(training_session.id, training_session.config).evaluation.every_rounds:
            summarise(session, training_session, current.base_version, now)
        reason = self._end_reason(session, training_session, current)
        if reason:
            end_session(session, training_session, TrainingSessionState.COMPLETED, reason, now)
            return
        open_round(self.context, session, training_session, draft.version, now)

    def _end_reason(
        self, session: Session, training_session: TrainingSession, current: Round
    ) -> str:
        """Return why training ends with this version, empty if it goes on."""
        config = stored_config(training_session.id, training_session.config)
        if current.number >= config.total_rounds:
            return "all rounds are done"
        if self.allowance is not None and self.allowance.is_last:
            spent = self.allowance.after
            return (
                f"privacy budget spent: epsilon {spent.epsilon:.6g} of "
                f"{config.privacy.epsilon_budget:.6g} at delta {spent.delta:.3g}"
            )
        if not config.early_stop.metric:
            return ""
        return stop_reason(
            config.early_stop, views.latest_metrics(session, training_session.id, HISTORY)
        )
