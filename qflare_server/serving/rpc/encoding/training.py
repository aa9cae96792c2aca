"""Encoding of training sessions, rounds and their events."""

from collections.abc import Iterable
from datetime import datetime

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_server.serving.rpc.encoding import values, versions
from qflare_server.serving.rpc.encoding.values import duration, timestamp
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository.neighbors import GroupProgress
from qflare_server.storage.tables import GroupStage
from qflare_server.training.objective import objective_of
from qflare_server.training.strategy import warnings_of
from qflare_server.use_cases.training_sessions.explanation import Notice
from qflare_server.use_cases.training_sessions.watching import SessionEvent


def training_session(row: TrainingSession) -> training_pb2.TrainingSession:
    """Encode a training session."""
    config = row.config
    return training_pb2.TrainingSession(
        training_session_id=row.id,
        name=row.name,
        model_type=row.model_type,
        state=training_pb2.TrainingSessionState.Value(
            f"TRAINING_SESSION_STATE_{row.state.upper()}"
        ),
        state_reason=row.state_reason,
        config=config,
        current_round=row.current_round,
        current_version=row.current_version,
        best=_best(row),
        released_version=row.released_version,
        epsilon_spent=row.epsilon_spent,
        create_time=timestamp(row.created_at),
        start_time=timestamp(row.started_at),
        end_time=timestamp(row.ended_at),
        warnings=warnings_of(config),
    )


def _best(row: TrainingSession) -> training_pb2.BestVersion | None:
    """Encode the best version with the data that its metric was measured on, None where none is known."""
    if row.best_version is None or row.best_value is None:
        return None
    objective = objective_of(row.config)
    return training_pb2.BestVersion(
        version=row.best_version,
        metric=objective.metric,
        value=row.best_value,
        goal=(
            training_pb2.METRIC_GOAL_MINIMIZE
            if objective.minimizes
            else training_pb2.METRIC_GOAL_MAXIMIZE
        ),
        source=(
            training_pb2.METRIC_SOURCE_HELD_OUT
            if objective.is_held_out
            else training_pb2.METRIC_SOURCE_TRAINING
        ),
    )


def validated(
    request: pb.CreateTrainingSessionRequest, config: training_pb2.TrainingConfig
) -> training_pb2.TrainingSession:
    """Encode what a request would create; without id, state and times."""
    return training_pb2.TrainingSession(
        name=request.name,
        model_type=request.model_type,
        config=config,
        current_version=-1,
        warnings=warnings_of(config),
    )


def group_progress(found: GroupProgress | None) -> training_pb2.NeighborProgress | None:
    """Encode how far the groups of a round are; None for none."""
    if found is None:
        return None
    groups = found.groups
    return training_pb2.NeighborProgress(
        advertised_count=found.advertised_count,
        sharer_count=found.sharer_count,
        survivor_count=found.survivor_count,
        sharing_group_count=groups.get(GroupStage.SHARE.value, 0),
        training_group_count=groups.get(GroupStage.TRAIN.value, 0),
        confirming_group_count=groups.get(GroupStage.CONFIRM.value, 0),
        revealing_group_count=groups.get(GroupStage.REVEAL.value, 0),
        opened_group_count=groups.get(GroupStage.OPENED.value, 0),
        aborted_group_count=groups.get(GroupStage.ABORTED.value, 0),
    )


def training_round(
    row: Round | None, groups: GroupProgress | None = None
) -> training_pb2.Round | None:
    """Encode a round, with how far its groups are; None for none."""
    if row is None:
        return None
    took = None
    if row.published_at is not None and row.closed_at is not None:
        took = (row.published_at - row.closed_at).total_seconds()
    return training_pb2.Round(
        training_session_id=row.training_session_id,
        round_number=row.number,
        state=training_pb2.RoundState.Value(f"ROUND_STATE_{row.state.upper()}"),
        state_reason=row.state_reason,
        base_version=row.base_version,
        version=row.version,
        selected_count=max(0, row.selected_count),
        accepted_count=row.accepted_count,
        rejected_count=row.rejected_count,
        late_count=row.late_count,
        failed_count=row.failed_count,
        example_count=row.example_count,
        open_time=timestamp(row.opened_at),
        deadline_time=timestamp(row.deadline_at),
        close_time=timestamp(row.closed_at),
        publish_time=timestamp(row.published_at),
        publish_duration=duration(took),
        neighbors=group_progress(groups),
    )


def notices(found: Iterable[Notice]) -> list[training_pb2.Notice]:
    """Encode what a training session waits for."""
    return [
        training_pb2.Notice(
            code=item.code,
            text=item.text,
            remedy=item.remedy,
            device_ids=item.device_ids,
            device_names=item.device_names,
        )
        for item in found
    ]


def session_event(happening: SessionEvent, at: datetime) -> pb.WatchTrainingSessionResponse:
    """Encode the events of a training session."""
    session, model = happening.session, happening.model
    return pb.WatchTrainingSessionResponse(
        kind=pb.TrainingSessionEventKind.Value(
            f"TRAINING_SESSION_EVENT_KIND_{happening.kind.upper()}"
        ),
        event_time=values.timestamp(at),
        training_session=None if session is None else training_session(session),
        round=training_round(happening.round),
        global_model=None if model is None else versions.global_model(model),
        notices=notices(happening.notices),
    )
