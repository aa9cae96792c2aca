"""Training pages: sessions, metric curves, rounds, and the participants of a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from qflare.v1 import training_pb2
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext, whole
from qflare_server.serving.dashboard.pages import curves
from qflare_server.serving.dashboard.pages.roll import roll
from qflare_server.storage.records import ModelUpdate, Round, TrainingSession
from qflare_server.storage.repository.neighbors import GroupProgress
from qflare_server.storage.tables import GroupStage, RoundState, TrainingSessionState, UpdateOrigin
from qflare_server.training.objective import objective_of
from qflare_server.use_cases.training_sessions.progress import Progress

ROWS: Final = 25


@dataclass(frozen=True)
class SessionRow:
    """A training session in a list."""

    session_id: str
    name: str
    model_type: str
    state: str
    state_reason: str
    strategy: str
    round_number: int
    round_count: int
    version: int
    best_value: float | None
    best_version: int | None
    metric: str
    metric_data: str
    released_version: int | None
    epsilon_spent: float | None
    created: Moment | None
    started: Moment | None
    ended: Moment | None
    took_s: float | None


@dataclass(frozen=True)
class RoundRow:
    """A round in a list; `selected` is None if every active device may participate."""

    number: int
    state: str
    state_reason: str
    base_version: int
    version: int | None
    quorum: int
    target: int
    selected: int | None
    accepted_count: int
    rejected_count: int
    late_count: int
    failed_count: int
    example_count: int
    collecting_s: float | None
    publishing_s: float | None
    opened: Moment | None
    closed: Moment | None
    published: Moment | None
    deadline: Moment | None


NEIGHBOR_STAGES: Final = {
    RoundState.OPEN.value: "devices form groups, share secrets and send masked updates",
    RoundState.CLOSED.value: "devices confirm the updates and open the sums of their groups",
}
"""Stage of secure aggregation with neighbors by state of the round, where it is another one."""

GROUP_STAGES: Final = {
    GroupStage.SHARE.value: "waiting for shares",
    GroupStage.TRAIN.value: "waiting for updates",
    GroupStage.CONFIRM.value: "waiting for confirmations",
    GroupStage.REVEAL.value: "waiting for revealed shares",
    GroupStage.OPENED.value: "opened",
    GroupStage.ABORTED.value: "aborted",
}
"""Stage of a group."""

MASKING_STAGES: Final = {
    RoundState.OPEN.value: "takes masked updates",
    RoundState.CLOSED.value: "asks the helpers for the sum of the masks",
    RoundState.PUBLISHED.value: "unmasked: the sum is known, single updates are not",
    RoundState.FAILED.value: "not unmasked",
    RoundState.CANCELLED.value: "not unmasked",
}
"""Stage of secure aggregation by state of the round."""


@dataclass(frozen=True)
class UpdateRow:
    """An update in a list."""

    device_id: str
    device_name: str
    is_in_process: bool
    state: str
    state_reason: str
    example_count: int
    accuracy: float | None
    loss: float | None
    training_s: float | None
    size_bytes: int
    after_s: float
    score: float | None


@dataclass(frozen=True)
class MaskedRound:
    """Secure aggregation of a round."""

    stage: str
    cohort_count: int
    min_cohort: int
    max_cohort: int
    helper_ids: Sequence[str]
    groups: str
    devices: str


@dataclass(frozen=True)
class CurrentRound:
    """The current round."""

    round: RoundRow
    pending_count: int
    missing_count: int
    remaining_s: float | None


def session_row(row: TrainingSession, visit: PageContext) -> SessionRow:
    """Return the list entry of a training session."""
    config = row.config
    objective = objective_of(config)
    end = row.ended_at or visit.at
    return SessionRow(
        session_id=row.id,
        name=row.name,
        model_type=row.model_type,
        state=row.state,
        state_reason=row.state_reason,
        strategy=config.strategy.name,
        round_number=row.current_round,
        round_count=max(
            row.current_round, config.total_rounds
        ),  # rounds without a version do not count
        version=row.current_version,
        best_value=row.best_value,
        best_version=row.best_version,
        metric=objective.metric,
        metric_data=objective.data,
        released_version=row.released_version,
        epsilon_spent=row.epsilon_spent,
        created=moment(row.created_at, visit.at),
        started=moment(row.started_at, visit.at),
        ended=moment(row.ended_at, visit.at),
        took_s=None if row.started_at is None else (end - row.started_at).total_seconds(),
    )


def round_row(row: Round, visit: PageContext) -> RoundRow:
    """Return the list entry of a round; a running phase lasts until now."""
    collecting, publishing = curves.phases(row, visit)
    return RoundRow(
        number=row.number,
        state=row.state,
        state_reason=row.state_reason,
        base_version=row.base_version,
        version=row.version,
        quorum=row.quorum,
        target=row.target,
        selected=max(0, row.selected_count) if row.selected_count else None,
        accepted_count=row.accepted_count,
        rejected_count=row.rejected_count,
        late_count=row.late_count,
        failed_count=row.failed_count,
        example_count=row.example_count,
        collecting_s=collecting,
        publishing_s=publishing,
        opened=moment(row.opened_at, visit.at),
        closed=moment(row.closed_at, visit.at),
        published=moment(row.published_at, visit.at),
        deadline=moment(row.deadline_at, visit.at),
    )


def masked_round(
    owner: TrainingSession, row: Round, groups: GroupProgress | None
) -> MaskedRound | None:
    """Return the stage and the cohort of a round with secure aggregation; None without it."""
    policy = owner.config.secure_aggregation
    if not policy.mode:
        return None
    stages = MASKING_STAGES
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        stages = MASKING_STAGES | NEIGHBOR_STAGES
    return MaskedRound(
        stages[row.state],
        max(0, row.accepted_count - row.rejected_count),
        policy.min_cohort,
        policy.max_cohort,
        [helper_id[:16] for helper_id in policy.helpers],
        shown_groups(groups),
        shown_devices(groups),
    )


def shown_groups(found: GroupProgress | None) -> str:
    """Return how many groups are at each stage; empty without groups."""
    counts = {} if found is None else found.groups
    return ", ".join(
        f"{counts[stage]} {text}" for stage, text in GROUP_STAGES.items() if stage in counts
    )


def shown_devices(found: GroupProgress | None) -> str:
    """Return how many devices have come how far in secure aggregation with neighbors; empty without it."""
    if found is None:
        return ""
    return (
        f"{found.advertised_count} advertised, {found.sharer_count} shared secrets, "
        f"{found.survivor_count} are in sums"
    )


def current(progress: Progress, visit: PageContext) -> CurrentRound | None:
    """Return the current round; None if there is none."""
    row = progress.round
    if row is None or row.state not in {RoundState.OPEN.value, RoundState.CLOSED.value}:
        return None
    return CurrentRound(
        round_row(row, visit),
        progress.pending_count,
        progress.missing_count,
        progress.remaining_s,
    )


def build_list(visit: PageContext) -> Mapping[str, Any]:
    """Build the list of training sessions."""
    state = visit.one_of("state", TrainingSessionState)
    page = visit.use_cases.training.list(visit.rows(ROWS), state)
    return {
        "rows": [session_row(row, visit) for row in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
        "state": state,
        "states": [item.value for item in TrainingSessionState],
        "counts": visit.recent.report().session_counts,
    }


def build_round(visit: PageContext) -> Mapping[str, Any]:
    """Build the page of one round with its participants."""
    training_session_id, number = visit.part("session_id"), whole(visit.part("number"), "round")
    found = visit.use_cases.training.participation(training_session_id, number)
    page = visit.use_cases.training.list_updates(training_session_id, number, visit.rows(50))
    owner = visit.use_cases.training.get(training_session_id)
    groups = visit.use_cases.training.group_progress(training_session_id, [number])
    names = visit.use_cases.devices.names_of(
        [*(row.device_id for row in page.rows), *found.absent_ids]
    )
    return {
        "session": session_row(owner, visit),
        "roll": roll(owner, found.round, visit),
        "round": round_row(found.round, visit),
        "masked": masked_round(owner, found.round, groups.get(number)),
        "updates": [_update_row(row, found.round.opened_at, names) for row in page.rows],
        "absent": [(item, names.get(item, item)) for item in found.absent_ids],
        "next_token": page.next_token,
        "first": not visit.text("page"),
    }


def _update_row(row: ModelUpdate, opened_at: datetime, names: Mapping[str, str]) -> UpdateRow:
    return UpdateRow(
        device_id=row.device_id,
        device_name=names.get(row.device_id, row.device_id),
        is_in_process=row.origin == UpdateOrigin.IN_PROCESS.value,
        state=row.state,
        state_reason=row.state_reason,
        example_count=row.example_count,
        accuracy=row.accuracy,
        loss=row.loss,
        training_s=row.training_time_s,
        size_bytes=row.size_bytes,
        after_s=(row.accepted_at - opened_at).total_seconds(),
        score=row.validation_score,
    )
