"""Create, start, pause, resume, cancel and inspect training sessions."""

import uuid
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare.references import ManyMeantError
from qflare.tensors import Manifest
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    InvalidRequestError,
    RoundNotFoundError,
    TrainingSessionNotFoundError,
    WrongStateError,
)
from qflare_server.storage.paging import Page, PageRequest, sent_bytes
from qflare_server.storage.payload_records import Download, ReceivedPayload
from qflare_server.storage.records import GlobalModel, ModelUpdate, Round, TrainingSession
from qflare_server.storage.repository import (
    audit,
    global_models,
    membership,
    neighbors,
    references,
    training_sessions,
    updates,
    views,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.idempotent_calls import run_once
from qflare_server.storage.repository.neighbors import GroupProgress
from qflare_server.storage.tables import (
    ENDED,
    QUERY_MODEL_TYPE,
    RiskLevel,
    RoundState,
    TrainingSessionState,
)
from qflare_server.storage.training_configs import to_json
from qflare_server.training.analytics import is_query
from qflare_server.training.config import complete, deadline_s, is_one_line
from qflare_server.training.masking import require_helpers
from qflare_server.training.neighbor_stages import has_neighbors, step_timeout
from qflare_server.training.premises import PremisesChangedError, repeat
from qflare_server.training.privacy import require_affordable
from qflare_server.training.retention import prune_payloads
from qflare_server.training.rounds import RoundTask, cancel_round, open_round, sign_next_task
from qflare_server.training.strategy import add_device_settings, build_strategy
from qflare_server.training.versions import VersionDraft, publish, sign_version
from qflare_server.use_cases.training_sessions.progress import Participation, Progress

MAX_ABSENT = 100
MAX_ARCHITECTURE_BYTES: Final = 2**19


def checked(
    name: str,
    model_type: str,
    config: training_pb2.TrainingConfig,
    architecture: Mapping[str, str] | None = None,
) -> training_pb2.TrainingConfig:
    """Validate a configuration and return it with every default filled in.

    Raises:
        InvalidRequestError: A field is out of range.
        StrategyRefusedError: The strategy's settings contradict each other.
    """
    _text("name", name, 1, 200)
    _text("model_type", model_type, 0, 100)
    _check_architecture(architecture or {})
    done = complete(config)
    if model_type == QUERY_MODEL_TYPE and not is_query(done):
        raise InvalidRequestError(
            f"model_type: {QUERY_MODEL_TYPE} is reserved for queries of federated analytics",
            field="model_type",
        )
    add_device_settings(done, build_strategy(done))
    require_affordable(done)
    return done


class Training:
    """Training-session administration use cases."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def create(
        self,
        caller: Caller,
        *,
        name: str,
        model_type: str,
        architecture: Mapping[str, str],
        config: training_pb2.TrainingConfig,
    ) -> TrainingSession:
        """Create a training session; it waits for an initial model and for its start.

        Args:
            caller: For the audit log; with a claim, repeated calls create one training session.
            name: 1 to 200 characters.
            model_type: At most 100 characters.
            architecture: Free text by name.
            config: Configuration; unset fields take their defaults.

        Raises:
            InvalidRequestError: A field is out of range.
            StrategyRefusedError: The strategy's settings contradict each other.
        """
        done = checked(name, model_type, config, architecture)
        require_helpers(self._context, done)
        at = self._context.clock()
        training_session_id = str(uuid.UUID(bytes=self._context.draw_random(16), version=4))

        def work(session: Session) -> TrainingSession:
            training_sessions.insert_session(
                session,
                {
                    "id": training_session_id,
                    "name": name,
                    "model_type": QUERY_MODEL_TYPE if is_query(done) else model_type,
                    "architecture": dict(architecture),
                    "state": TrainingSessionState.CREATED.value,
                    "config": to_json(done),
                    "created_at": at,
                },
            )
            membership.insert_session_groups(session, training_session_id, done.groups)
            self._record(
                session, caller, "training_session.created", training_session_id, at, name=name
            )
            return _get(session, training_session_id)

        return self._once(caller, work)

    def add_initial_model(
        self,
        caller: Caller,
        training_session_id: str,
        manifest: Manifest,
        payload: ReceivedPayload,
        download: Download | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GlobalModel:
        """Publish the initial model as version 0.

        Args:
            caller: For the audit log.
            training_session_id: Training session without an initial model.
            manifest: Layout of the model.
            payload: Bytes of the model.
            download: The model in the download encoding, if the training session configures one.
            metadata: Metadata of the model's file.

        Raises:
            WrongStateError: The training session has been started, or has an initial model.
        """
        at = self._context.clock()
        draft = VersionDraft(
            version=0,
            base_version=-1,
            round_number=0,
            payload=payload,
            manifest=manifest,
            created_at=at,
            download=download,
            metadata=metadata or {},
        )
        waiting = self.get(training_session_id)
        config = waiting.config
        signed = sign_version(self._context, waiting.id, config, draft, None)

        def work(session: Session) -> GlobalModel:
            training_session = self._lock(
                session, training_session_id, TrainingSessionState.CREATED
            )
            if training_session.current_version >= 0:
                raise WrongStateError("the training session has an initial model")
            publish(session, training_session, signed, at)
            self._record(
                session, caller, "model.uploaded", training_session.id, at, digest=signed.digest
            )
            model = global_models.get_model(session, training_session.id, 0)
            assert model is not None
            return model

        return self._context.database.write(work)

    def require_waiting(self, training_session_id: str) -> TrainingSession:
        """Return a training session that accepts an initial model; checked before the upload starts.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            WrongStateError: It has been started, or has an initial model.
        """
        training_session = self.get(training_session_id)
        if (
            training_session.state != TrainingSessionState.CREATED.value
            or training_session.current_version >= 0
        ):
            raise WrongStateError("an initial model can only be uploaded once, before the start")
        return training_session

    def start(self, caller: Caller, training_session_id: str) -> TrainingSession:
        """Start the first round. Idempotent.

        Raises:
            WrongStateError: It is paused or has ended, or has no initial model.
        """
        return repeat(lambda: self._start(caller, training_session_id))

    def _start(self, caller: Caller, training_session_id: str) -> TrainingSession:
        task = self._first_task(training_session_id)

        def work(session: Session) -> TrainingSession:
            at = self._context.clock()
            training_session = self._lock(session, training_session_id)
            if training_session.state == TrainingSessionState.RUNNING.value:
                return _get(session, training_session.id)
            _require_state(training_session, TrainingSessionState.CREATED)
            if task is None:
                raise PremisesChangedError("the training session was running a moment ago")
            values = {"state": TrainingSessionState.RUNNING.value, "started_at": at}
            training_sessions.update_session(session, training_session.id, values)
            open_round(session, training_session, task, at)
            self._record(session, caller, "training_session.started", training_session.id, at)
            return _get(session, training_session.id)

        return self._changed(caller, work)

    def _first_task(self, training_session_id: str) -> RoundTask | None:
        """Return the signed task of the first round; None if the training session is running already.

        Raises:
            WrongStateError: It is paused or has ended, or has no initial model.
        """
        with self._context.database.read() as session:
            waiting = _get(session, training_session_id)
            if waiting.state == TrainingSessionState.RUNNING.value:
                return None
            _require_state(waiting, TrainingSessionState.CREATED)
            base = global_models.get_model(session, waiting.id, waiting.current_version)
            if base is None:
                raise WrongStateError("the training session has no initial model")
        return sign_next_task(self._context, waiting, base.version, base.digest)

    def pause(self, caller: Caller, training_session_id: str) -> TrainingSession:
        """Pause a training session: it accepts no updates until it is resumed. Idempotent.

        A closed round is still published.

        Raises:
            WrongStateError: It has not been started, or has ended.
        """

        def work(session: Session) -> TrainingSession:
            at = self._context.clock()
            training_session = self._lock(session, training_session_id)
            if training_session.state == TrainingSessionState.PAUSED.value:
                return _get(session, training_session.id)
            _require_state(training_session, TrainingSessionState.RUNNING)
            training_sessions.update_session(
                session, training_session.id, {"state": TrainingSessionState.PAUSED.value}
            )
            self._record(session, caller, "training_session.paused", training_session.id, at)
            return _get(session, training_session.id)

        return self._changed(caller, work)

    def resume(self, caller: Caller, training_session_id: str) -> TrainingSession:
        """Resume a paused training session; deadlines of the open round and of its groups restart. Idempotent.

        Raises:
            WrongStateError: It has not been started, or has ended.
        """

        def work(session: Session) -> TrainingSession:
            at = self._context.clock()
            training_session = self._lock(session, training_session_id)
            if training_session.state == TrainingSessionState.RUNNING.value:
                return _get(session, training_session.id)
            _require_state(training_session, TrainingSessionState.PAUSED)
            training_sessions.update_session(
                session, training_session.id, {"state": TrainingSessionState.RUNNING.value}
            )
            current = training_sessions.lock_round(
                session, training_session.id, training_session.current_round
            )
            if current is not None and has_neighbors(training_session.config):
                until = at + step_timeout(training_session.config)
                neighbors.extend_steps(session, training_session.id, current.number, until)
            if current is not None and current.state == RoundState.OPEN.value:
                limit = timedelta(seconds=deadline_s(training_session.config))
                values = {"deadline_at": max(current.deadline_at, at + limit)}
                training_sessions.update_round(session, training_session.id, current.number, values)
            self._record(session, caller, "training_session.resumed", training_session.id, at)
            return _get(session, training_session.id)

        return self._changed(caller, work)

    def cancel(self, caller: Caller, training_session_id: str, reason: str) -> TrainingSession:
        """Cancel a training session: its versions are kept, its pending updates are rejected. Idempotent.

        Raises:
            WrongStateError: It has completed or failed.
        """
        _text("reason", reason, 0, 500, is_name=False)

        def work(session: Session) -> TrainingSession:
            at = self._context.clock()
            training_session = self._lock(session, training_session_id)
            if training_session.state == TrainingSessionState.CANCELLED.value:
                return _get(session, training_session.id)
            if training_session.state in ENDED:
                raise WrongStateError(f"the training session is {training_session.state}")
            values = {
                "state": TrainingSessionState.CANCELLED.value,
                "state_reason": reason,
                "ended_at": at,
            }
            training_sessions.update_session(session, training_session.id, values)
            cancel_round(session, training_session, "training session cancelled", at)
            self._record(
                session,
                caller,
                "training_session.cancelled",
                training_session.id,
                at,
                reason=reason,
            )
            return _get(session, training_session.id)

        cancelled = self._changed(caller, work)
        prune_payloads(self._context, training_session_id)
        return cancelled

    def get(self, training_session_id: str) -> TrainingSession:
        """Return a training session.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            return _get(session, training_session_id)

    def progress(self, training_session_id: str) -> Progress:
        """Return a training session's aggregation progress.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            training_session = _get(session, training_session_id)
            current = training_sessions.get_round(
                session, training_session.id, training_session.current_round
            )
            latest = global_models.get_model(
                session, training_session.id, training_session.current_version
            )
            pending = updates.count_pending(session, training_session.id)
            number = training_session.current_round
            groups = neighbors.progress_of(session, training_session.id, [number])
        remaining = None
        if current is not None and current.state == RoundState.OPEN.value:
            remaining = max(0.0, (current.deadline_at - self._context.clock()).total_seconds())
        return Progress(training_session, current, pending, latest, remaining, groups.get(number))

    def list(
        self, request: PageRequest, state: str = "", reference: str = ""
    ) -> Page[TrainingSession]:
        """Return training sessions, newest first: those in one state and those that a reference may mean, if given."""
        with self._context.database.read() as session:
            return training_sessions.list_sessions(session, request, state, reference)

    def list_queries(self, request: PageRequest) -> Page[TrainingSession]:
        """Return queries of federated analytics, newest first."""
        with self._context.database.read() as session:
            return training_sessions.list_sessions(session, request, model_type=QUERY_MODEL_TYPE)

    def find_id(self, reference: str) -> str:
        """Return the id of the training session that a person refers to by id, beginning of an id, or name.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            InvalidRequestError: There are several; the message lists them.
        """
        try:
            with self._context.database.read() as session:
                session_id = references.find_session_id(session, reference)
        except ManyMeantError as error:
            raise InvalidRequestError(str(error), field="reference") from error
        if session_id is None:
            raise TrainingSessionNotFoundError
        return session_id

    def list_rounds(self, training_session_id: str, request: PageRequest) -> Page[Round]:
        """Return the rounds of a training session, newest first."""
        with self._context.database.read() as session:
            _get(session, training_session_id)
            return training_sessions.list_rounds(session, training_session_id, request)

    def group_progress(
        self, training_session_id: str, round_numbers: Collection[int]
    ) -> Mapping[int, GroupProgress]:
        """Return how far the groups of rounds with secure aggregation with neighbors are; without other rounds."""
        with self._context.database.read() as session:
            return neighbors.progress_of(session, training_session_id, round_numbers)

    def participation(self, training_session_id: str, round_number: int) -> Participation:
        """Return a round, and its selected devices that sent no update, ordered by id.

        Raises:
            RoundNotFoundError: There is no such round.
        """
        with self._context.database.read() as session:
            found = training_sessions.get_round(session, training_session_id, round_number)
            if found is None:
                raise RoundNotFoundError(f"no round {round_number}")
            absent = views.list_absent(session, training_session_id, round_number, MAX_ABSENT)
        return Participation(found, absent)

    def list_models(self, training_session_id: str, request: PageRequest) -> Page[GlobalModel]:
        """Return the versions of a training session, newest first."""
        with self._context.database.read() as session:
            _get(session, training_session_id)
            return global_models.list_models(session, training_session_id, request)

    def list_updates(
        self, training_session_id: str, round_number: int, request: PageRequest
    ) -> Page[ModelUpdate]:
        """Return the updates of a round in the order of their acceptance.

        Raises:
            RoundNotFoundError: There is no such round.
        """
        with self._context.database.read() as session:
            if training_sessions.get_round(session, training_session_id, round_number) is None:
                raise RoundNotFoundError(f"no round {round_number}")
            return updates.list_updates(session, training_session_id, round_number, request)

    def _lock(
        self, session: Session, training_session_id: str, wanted: TrainingSessionState | None = None
    ) -> TrainingSession:
        training_session = require_found(
            training_sessions.lock_session(session, training_session_id), training_session_id
        )
        if wanted is not None:
            _require_state(training_session, wanted)
        return training_session

    def _once(self, caller: Caller, work: Callable[[Session], TrainingSession]) -> TrainingSession:
        at = self._context.clock()
        return self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )

    def _changed(
        self, caller: Caller, work: Callable[[Session], TrainingSession]
    ) -> TrainingSession:
        changed = self._once(caller, work)
        self._context.wake()
        return changed

    def _record(
        self,
        session: Session,
        caller: Caller,
        event_type: str,
        training_session_id: str,
        at: datetime,
        **details: str,
    ) -> None:
        event = Event(
            event_type, f"training_session:{training_session_id}", RiskLevel.MEDIUM, dict(details)
        )
        audit.record(session, caller, event, at)


def require_found(
    training_session: TrainingSession | None, training_session_id: str
) -> TrainingSession:
    """Return the result of a lookup, if a training session was found.

    Raises:
        TrainingSessionNotFoundError: There is no training session of this id.
    """
    if training_session is None:
        raise TrainingSessionNotFoundError(f"no training session {training_session_id[:64]!r}")
    return training_session


def _get(session: Session, training_session_id: str) -> TrainingSession:
    return require_found(
        training_sessions.get_session(session, training_session_id), training_session_id
    )


def _require_state(training_session: TrainingSession, wanted: TrainingSessionState) -> None:
    if training_session.state != wanted.value:
        raise WrongStateError(
            f"the training session is {training_session.state}, want {wanted.value}"
        )


def _check_architecture(architecture: Mapping[str, str]) -> None:
    """Refuse a description that is too large for a version's header."""
    size_bytes = sent_bytes(architecture)
    if size_bytes > MAX_ARCHITECTURE_BYTES:
        raise InvalidRequestError(
            f"architecture: got {size_bytes} bytes, want at most {MAX_ARCHITECTURE_BYTES}",
            field="architecture",
        )


def _text(name: str, value: str, least: int, most: int, *, is_name: bool = True) -> None:
    """Refuse a text that is too short or too long, or a name with control characters or line breaks."""
    if not least <= len(value) <= most:
        raise InvalidRequestError(
            f"{name}: got {len(value)} characters, want {least} to {most}", field=name
        )
    if "\0" in value or (is_name and not is_one_line(value)):
        raise InvalidRequestError(f"{name}: holds a control character or a line break", field=name)
