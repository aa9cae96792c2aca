"""The aggregation plan of a round."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from qflare.evidence.lineage import ModelVersion
from qflare.tensors import Manifest
from qflare.v1 import training_pb2
from qflare_server.errors import GlobalModelNotFoundError, TrainingSessionNotFoundError
from qflare_server.storage.payload_records import StoredPayload, describe
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import global_models, payloads, training_sessions
from qflare_server.training.versions import manifest_of, version_of


@dataclass(frozen=True)
class RoundPlan:
    """Inputs of a round's aggregation, read once.

    `is_last` says whether the version of the round is that of the last of `total_rounds`.
    """

    training_session_id: str
    number: int
    base_version: int
    parent: ModelVersion
    manifest: Manifest
    config: training_pb2.TrainingConfig
    base: StoredPayload
    strategy_state: Mapping[str, Any]
    vectors: Mapping[str, StoredPayload]
    privacy_state: Mapping[str, Any] | None = None
    is_last: bool = False


def read_plan(
    session: Session, training_session_id: str, number: int, base_version: int
) -> RoundPlan:
    """Read the inputs of a round's aggregation.

    Raises:
        TrainingSessionNotFoundError: There is no such training session.
        GlobalModelNotFoundError: Its base version is missing.
    """
    training_session = training_sessions.get_session(session, training_session_id)
    if training_session is None:
        raise TrainingSessionNotFoundError
    base = global_models.get_model(session, training_session_id, base_version)
    if base is None:
        raise GlobalModelNotFoundError
    vectors = {
        name: describe(payloads.get_payload(session, payload_id))
        for name, payload_id in base.strategy_state.get("vectors", {}).items()
    }
    return RoundPlan(
        training_session_id,
        number,
        base_version,
        version_of(base),
        manifest_of(base),
        training_session.config,
        describe(payloads.get_payload(session, base.payload_id)),
        base.strategy_state,
        vectors,
        training_session.privacy_state,
        _is_last(session, training_session, number),
    )


def _is_last(session: Session, training_session: TrainingSession, number: int) -> bool:
    """Return whether a round is the last if it makes a version; rounds that made none do not count."""
    wanted = training_session.config.total_rounds
    if number < wanted:
        return False
    made = training_sessions.count_published(session, training_session.id)
    return bool(made + 1 >= wanted)
