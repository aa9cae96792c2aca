"""The training session of embedding programs: lookup and creation.

Its id is `in-process-N`. The first that has not ended is the current one; a reset ends it. The first contribution
creates the session, with an initial model of zeros, and fixes the vector length. Its rounds have no task, so enrolled
devices are not selected. Their quorum is out of reach, so they close only when the program closes them.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import count
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from sqlalchemy.orm import Session

from qflare.tensors import CHUNK_BYTES, Manifest
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import ConflictError, InvalidUpdateError
from qflare_server.payloads.writer import PayloadWriter
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import audit, global_models, training_sessions
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import ENDED, TrainingSessionState
from qflare_server.storage.training_configs import to_json
from qflare_server.training.config import MAX_DEADLINE_S, complete
from qflare_server.training.rounds import IN_PROCESS_PREFIX, RoundTask, open_round, sign_task
from qflare_server.training.versions import SignedVersion, VersionDraft, publish, sign_version

NAME: Final = "in-process"
NEVER: Final = 10_000_000  # out of reach for any round
MAX_ROUNDS: Final = 1_000_000
OPENING_ATTEMPTS: Final = 3


def find_in_use(session: Session) -> tuple[str, TrainingSession | None]:
    """Return the id of the current training session, and the session itself if it has been created."""
    for generation in count(1):
        training_session_id = f"{IN_PROCESS_PREFIX}{generation}"
        training_session = training_sessions.get_session(session, training_session_id)
        if training_session is None or training_session.state not in ENDED:
            return training_session_id, training_session
    raise AssertionError("unreachable")


def require_layout(session: Session, training_session_id: str, manifest: Manifest) -> None:
    """Require the vector length of the training session.

    Raises:
        InvalidUpdateError: The length differs.
    """
    base = global_models.get_model(session, training_session_id, 0)
    assert base is not None
    if base.layout_digest != manifest.layout_digest:
        raise InvalidUpdateError(
            f"weights: got {manifest.size_bytes} bytes, want {base.size_bytes}"
        )


def ensure_begun(
    context: Context, executor: ThreadPoolExecutor, caller: Caller, manifest: Manifest
) -> str:
    """Return the id of the current training session; create one of this layout if there is none.

    Raises:
        InvalidUpdateError: The current one has another layout.
    """
    for _ in range(OPENING_ATTEMPTS):
        with context.database.read() as session:
            training_session_id, training_session = find_in_use(session)
            if training_session is not None:
                require_layout(session, training_session_id, manifest)
                return training_session_id
        _begin(context, executor, caller, training_session_id, manifest)
    raise ConflictError("the training session was ended again and again")


def _begin(
    context: Context,
    executor: ThreadPoolExecutor,
    caller: Caller,
    training_session_id: str,
    manifest: Manifest,
) -> None:
    at = context.clock()
    config = complete(training_pb2.TrainingConfig(total_rounds=MAX_ROUNDS, rounds=_rounds()))
    writer = PayloadWriter(context, executor, manifest, at)
    for start in range(0, manifest.size_bytes, CHUNK_BYTES):
        writer.feed(bytes(min(CHUNK_BYTES, manifest.size_bytes - start)))
    draft = VersionDraft(0, -1, 0, writer.finish(), manifest, at)
    signed = sign_version(context, training_session_id, config, draft, None)
    task = sign_task(
        context, training_session_id, config, number=1, base_version=0, base_digest=signed.digest
    )
    row = _session_row(training_session_id, config, at)
    try:
        context.database.write(lambda session: _insert(session, caller, row, signed, task, at))
    except ConflictError:
        return  # created concurrently by another program


def _insert(
    session: Session,
    caller: Caller,
    row: Mapping[str, Any],
    signed: SignedVersion,
    task: RoundTask,
    at: datetime,
) -> None:
    """Insert a training session with its initial model and its first round in one transaction."""
    training_session_id = row["id"]
    if training_sessions.get_session(session, training_session_id) is not None:
        return
    training_sessions.insert_session(session, row)
    training_session = training_sessions.lock_session(session, training_session_id)
    assert training_session is not None
    publish(session, training_session, signed, at)
    open_round(session, training_session, task, at)
    event = Event("training_session.started", f"training_session:{training_session_id}")
    audit.record(session, caller, event, at)


def _rounds() -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(
        quorum=NEVER, target=NEVER, deadline=Duration(seconds=MAX_DEADLINE_S)
    )


def _session_row(
    training_session_id: str, config: training_pb2.TrainingConfig, at: datetime
) -> dict[str, Any]:
    return {
        "id": training_session_id,
        "name": NAME,
        "model_type": "float32 vector",
        "architecture": {},
        "state": TrainingSessionState.RUNNING.value,
        "config": to_json(config),
        "created_at": at,
        "started_at": at,
    }
