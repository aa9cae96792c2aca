"""Model versions: statement, signature and publication.

The statement of a version names its parent, its strategy, its contributors and its payload; its SHA-256 is the
version's digest. Its timestamp is the time its round closed, not the time of computing, so that a pass repeated after a
crash yields the same statement. `sign_version` runs before the transaction in which `publish` writes the version.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

import qflare
from qflare.evidence.lineage import ModelVersion, check_step, contributors_digest
from qflare.evidence.verification import VERSION_SIGNED
from qflare.tensors import Manifest
from qflare.tensors.encodings import Encoding
from qflare.times import timestamp_of
from qflare.v1 import security_pb2, tensor_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.errors import GlobalModelNotFoundError, TrainingSessionNotFoundError
from qflare_server.storage.payload_records import Download, ReceivedPayload
from qflare_server.storage.records import GlobalModel, TrainingSession
from qflare_server.storage.repository import audit, global_models, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.training.config import download_encoding
from qflare_server.training.objective import best_changes
from qflare_server.training.premises import PremisesChangedError
from qflare_server.training.reported_metrics import evaluated, stated
from qflare_server.training.rounds import config_digest, is_in_process


@dataclass(frozen=True)
class VersionDraft:
    """The content of a version before its statement is signed."""

    version: int
    base_version: int
    round_number: int
    payload: ReceivedPayload
    manifest: Manifest
    created_at: datetime
    """When its round closed, or when the initial model was uploaded."""
    contributors: tuple[str, ...] = ()
    """Statement digests of the updates in it."""
    example_count: int = 0
    weight_sum: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    strategy_state: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None
    rollback_version: int | None = None
    download: Download | None = None
    """Download encoding for devices, as configured in the training session; None if none is configured."""
    sealed_version: int | None = None
    """Version that the payload of a rollback was sealed for; None for other versions or unsealed payloads."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of an initial model's file; later versions take it from version 0."""
    unmasking: security_pb2.ModelUnmasking | None = None
    """Answers of helpers for secure aggregation; None without it."""
    shares_payload: bool = False
    """Whether the rows of its payloads already exist, as for a rollback."""
    publish_duration_s: float = 0.0


@dataclass(frozen=True)
class SignedVersion:
    """A version whose statement is signed, before the transaction that publishes it.

    Attributes:
        draft: Its content.
        statement: Names it, its parent and its content.
        payload: The statement's deterministic serialization, which is what was signed.
        envelope: The signed statement.
    """

    draft: VersionDraft
    statement: security_pb2.ModelStatement
    payload: bytes
    envelope: security_pb2.SignedEnvelope

    @property
    def digest(self) -> str:
        """The version's name: the hex SHA-256 of its statement."""
        return hashlib.sha256(self.payload).hexdigest()


def sign_version(
    context: Context,
    training_session_id: str,
    config: training_pb2.TrainingConfig,
    draft: VersionDraft,
    parent: ModelVersion | None,
    restored: ModelVersion | None = None,
) -> SignedVersion:
    """Sign the statement of a version.

    Args:
        context: The coordinator's parts.
        training_session_id: Whose version it is.
        config: Of the training session.
        draft: The version's content.
        parent: The version before; None for version 0.
        restored: For a rollback: the version that it restores.

    Raises:
        StatementError: The version's statement would fail verification.
    """
    _require_download(config, draft)
    parent_digest = "" if parent is None else parent.digest
    statement = _statement(context.config.realm, training_session_id, config, parent_digest, draft)
    check_step(statement, parent, None if restored is None else restored.statement)
    payload = statement.SerializeToString(deterministic=True)
    envelope = context.signer.sign(security_pb2.KEY_ROLE_MODEL, payload)
    return SignedVersion(draft, statement, payload, envelope)


def _statement(
    realm: str,
    training_session_id: str,
    config: training_pb2.TrainingConfig,
    parent_digest: str,
    draft: VersionDraft,
) -> security_pb2.ModelStatement:
    statement = security_pb2.ModelStatement(
        realm=realm,
        training_session_id=training_session_id,
        version=draft.version,
        parent_digest=parent_digest,
        base_version=draft.base_version,
        round_number=draft.round_number,
        layout_digest=draft.manifest.layout_digest,
        size_bytes=draft.payload.content_size_bytes,
        payload_digest=draft.payload.content_digest,
        strategy_name=config.strategy.name if draft.round_number else "initial",
        config_digest=config_digest(config),
        code_version=qflare.__version__,
        contributor_count=len(draft.contributors),
        in_process_count=len(draft.contributors) if is_in_process(training_session_id) else 0,
        contributors_digest=contributors_digest(draft.contributors),
        weight_sum=draft.weight_sum,
        example_count=draft.example_count,
        epsilon=draft.epsilon,
        delta=draft.delta,
        metrics=stated(draft.metrics),
        create_time=timestamp_of(draft.created_at),
    )
    if draft.download is not None:
        statement.download.CopyFrom(draft.download.statement())
    if draft.unmasking is not None:
        statement.unmasking.CopyFrom(draft.unmasking)
    seal = draft.payload.seal
    if seal is not None:
        statement.sealed = True
        statement.wire_digest = draft.payload.digest
        statement.sealed_header_digest = hashlib.sha256(seal.header).hexdigest()
        restored = draft.sealed_version
        statement.sealed_version = draft.version if restored is None else restored
    if draft.rollback_version is not None:
        statement.rollback_version = draft.rollback_version
        statement.strategy_name = "rollback"
    return statement


def publish(
    session: Session, training_session: TrainingSession, signed: SignedVersion, at: datetime
) -> TrainingSession:
    """Insert a version with its payload, make it current, and return the updated training session.

    The caller holds the lock on the training session.

    Raises:
        PremisesChangedError: The version is not the training session's next.
    """
    draft, statement = signed.draft, signed.statement
    _require_next(session, training_session, statement)
    config = training_session.config
    if not draft.shares_payload:
        draft.payload.insert(session, draft.created_at)
        if draft.download is not None:
            draft.download.payload.insert(session, draft.created_at)
    released = passes_gate(config.release, draft.metrics)
    global_models.insert_model(
        session,
        {
            "training_session_id": training_session.id,
            "version": draft.version,
            "digest": signed.digest,
            "parent_digest": statement.parent_digest,
            "payload_id": draft.payload.payload_id,
            "payload_digest": statement.payload_digest,
            "size_bytes": statement.size_bytes,
            "manifest": draft.manifest.to_proto().SerializeToString(),
            "layout_digest": draft.manifest.layout_digest,
            "statement": signed.payload,
            "signature": signed.envelope.SerializeToString(),
            "model_type": training_session.model_type,
            "architecture": _architecture(session, training_session, draft),
            "base_version": draft.base_version,
            "round_number": draft.round_number,
            "participant_count": len(draft.contributors),
            "in_process_count": statement.in_process_count,
            "example_count": draft.example_count,
            "aggregation_method": statement.strategy_name,
            "aggregation_parameters": dict(config.strategy.parameters),
            "strategy_state": dict(draft.strategy_state),
            "contributors_digest": statement.contributors_digest,
            "accuracy": draft.metrics.get("train_accuracy"),
            "loss": draft.metrics.get("train_loss"),
            "metrics": dict(draft.metrics),
            "group_metrics": {},
            "epsilon": draft.epsilon,
            "delta": draft.delta,
            "released": released,
            "rollback_version": draft.rollback_version,
            **_download_columns(draft.download),
            "publish_duration_s": draft.publish_duration_s,
            "created_at": draft.created_at,
        },
    )
    event = Event(
        VERSION_SIGNED,
        f"version:{signed.digest}",
        details={"training_session_id": training_session.id, "version": draft.version},
    )
    audit.record(session, SYSTEM, event, at)
    changes = _session_changes(session, training_session, draft, released=released)
    training_sessions.update_session(session, training_session.id, changes)
    return training_session._replace(**changes)


def _architecture(
    session: Session, training_session: TrainingSession, draft: VersionDraft
) -> dict[str, str]:
    """Return the description of a version: the training session's, and the metadata of its initial model's file."""
    initial = global_models.architecture_of(session, training_session.id, 0)
    return {**training_session.architecture, **draft.metadata} if initial is None else initial


def _require_next(
    session: Session, training_session: TrainingSession, statement: security_pb2.ModelStatement
) -> None:
    """Check that a version extends the lineage at the place that its statement names."""
    place = (statement.training_session_id, statement.version)
    if place != (training_session.id, training_session.current_version + 1):
        raise PremisesChangedError("another version was published meanwhile")
    parent = global_models.digest_of(session, training_session.id, statement.version - 1)
    if statement.parent_digest != (parent or ""):
        raise PremisesChangedError("the version's parent is another one")


def _require_download(config: training_pb2.TrainingConfig, draft: VersionDraft) -> None:
    """Check that a version has the download encoding of its training session."""
    got = Encoding.FULL_PRECISION if draft.download is None else draft.download.encoding
    if got is not download_encoding(config):
        raise ValueError(f"download: got {got.name}, want {download_encoding(config).name}")


def _download_columns(download: Download | None) -> dict[str, Any]:
    if download is None:
        return {}
    return {
        "download_encoding": int(download.encoding),
        "download_payload_id": download.payload.payload_id,
        "download_payload_digest": download.payload.digest,
        "download_size_bytes": download.payload.size_bytes,
    }


def _session_changes(
    session: Session, training_session: TrainingSession, draft: VersionDraft, *, released: bool
) -> dict[str, Any]:
    changes: dict[str, Any] = {"current_version": draft.version}
    if released:
        changes["released_version"] = draft.version
    if draft.epsilon is not None:
        changes["epsilon_spent"] = draft.epsilon
    return changes | best_changes(session, training_session, draft.version, draft.metrics)


def passes_gate(policy: training_pb2.ReleasePolicy, metrics: Mapping[str, float]) -> bool:
    """Return whether a version's metrics meet every bound; a missing metric meets none.

    Only what federated evaluation measured counts, not what devices reported with their updates.
    """
    measured = evaluated(metrics)
    for bound in policy.bounds:
        value = measured.get(bound.metric)
        if value is None:
            return False
        if bound.HasField("min_value") and value < bound.min_value:
            return False
        if bound.HasField("max_value") and value > bound.max_value:
            return False
    return True


def find_version(
    session: Session, training_session_id: str, version: int | None
) -> tuple[TrainingSession, GlobalModel]:
    """Return a training session and one of its versions, the current one if no version is given.

    Raises:
        TrainingSessionNotFoundError: There is no such training session.
        GlobalModelNotFoundError: There is no such version.
    """
    training_session = training_sessions.get_session(session, training_session_id)
    if training_session is None:
        raise TrainingSessionNotFoundError(f"no training session {training_session_id[:64]!r}")
    wanted = training_session.current_version if version is None else version
    model = global_models.get_model(session, training_session_id, wanted)
    if model is None:
        raise GlobalModelNotFoundError(f"no version {wanted}")
    return training_session, model


def manifest_of(model: GlobalModel) -> Manifest:
    """Return the layout of a version."""
    return Manifest.from_proto(tensor_pb2.Manifest.FromString(model.manifest))


def version_of(model: GlobalModel) -> ModelVersion:
    """Return the statement of a version with its digest."""
    return ModelVersion(security_pb2.ModelStatement.FromString(model.statement), model.digest)
