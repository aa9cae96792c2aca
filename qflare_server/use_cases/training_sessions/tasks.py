"""Task assignment for devices."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from qflare.references import ManyMeantError, Named, choose
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import InvalidRequestError, TrainingSessionNotFoundError
from qflare_server.storage.epochs import Epochs
from qflare_server.storage.repository import global_models, references, training_sessions
from qflare_server.storage.repository.training_sessions import OpenRound
from qflare_server.storage.tables import ENDED
from qflare_server.training.evaluation import (
    Measurement,
    find_last_measurement,
    find_measurement,
)
from qflare_server.training.selection import find_relation
from qflare_server.use_cases.access.presence import Presence

MAX_REMEMBERED = 200_000
MAX_REMEMBERED_VERSIONS = 64
MAX_MEANT = 100
"""Newest training sessions of one name among which a device's own is looked for."""


@dataclass(frozen=True)
class NextTask:
    """A device's next task: a `measurement`, a `round` to contribute to, a wait of `poll_delay_s`, or none any more.

    The last is the case if `ended_session_id` names the requested training session.
    """

    poll_delay_s: float
    round: OpenRound | None = None
    base_digest: str = ""
    config: training_pb2.TrainingConfig | None = None
    ended_session_id: str = ""
    measurement: Measurement | None = None


class Tasks:
    """Task assignment use cases."""

    def __init__(self, context: Context, presence: Presence) -> None:
        self._context = context
        self._presence = presence
        self._idle: dict[tuple[str, str, bool, bool], tuple[Epochs, bool]] = {}
        self._facts: dict[tuple[str, int], tuple[str, training_pb2.TrainingConfig]] = {}

    def next_task(
        self,
        device_id: str,
        training_session_id: str,
        *,
        trains_only: bool = False,
        answers_queries: bool = False,
    ) -> NextTask:
        """Return the device's next task, in one read.

        The absence of work is cached until work appears: an idle poll costs no read. Work that another coordinator
        makes is noticed within `storage.epochs.MAX_AGE_S`.

        Args:
            device_id: The calling device.
            training_session_id: The requested training session; empty means any.
            trains_only: Whether the device does not evaluate.
            answers_queries: Whether it answers queries of federated analytics.

        Raises:
            TrainingSessionNotFoundError: It asked for a training session that does not exist.
        """
        key = (device_id, training_session_id, trains_only, answers_queries)
        epochs = self._context.database.recent_epochs()
        idle = self.remembered(*key, epochs)
        if idle is not None:
            return idle
        delay = self._presence.poll_delay_s()
        at = self._context.clock()
        with self._context.database.read() as session:
            found = training_sessions.find_open_round(
                session, device_id, training_session_id, at, answers_queries=answers_queries
            )
            if found is not None:
                return self._task(session, found, delay, "" if trains_only else device_id)
            done = _is_over(session, training_session_id)
            training_session = (
                training_sessions.get_session(session, training_session_id) if done else None
            )
            if training_session is not None and not trains_only:
                last = find_last_measurement(
                    self._context, session, training_session, device_id, at
                )
                if last is not None:
                    return NextTask(delay, measurement=last)
        if len(self._idle) >= MAX_REMEMBERED:
            self._idle.clear()
        self._idle[key] = (epochs, done)
        return NextTask(delay, ended_session_id=training_session_id if done else "")

    def remembered(
        self,
        device_id: str,
        training_session_id: str,
        trains_only: bool,
        answers_queries: bool,
        epochs: Epochs,
    ) -> NextTask | None:
        """Return that a device has no task, if memory, current at some counters, says so; None otherwise."""
        idle = self._idle.get((device_id, training_session_id, trains_only, answers_queries))
        if idle is None or idle[0] != epochs:
            return None
        ended = training_session_id if idle[1] else ""
        return NextTask(self._presence.poll_delay_s(), ended_session_id=ended)

    def find_session(self, device_id: str, reference: str) -> Named:
        """Return the training session that a device refers to, among those in which it may take part.

        Args:
            device_id: The calling device.
            reference: Id, beginning of an id, or name; the 100 newest that it may mean count.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            InvalidRequestError: There are several; the message lists them.
        """
        with self._context.database.read() as session:
            own = [
                each
                for each in references.meant_sessions(session, reference, MAX_MEANT)
                if find_relation(session, each.id, device_id) is not None
            ]
        try:
            session_id = choose(reference, own)
        except ManyMeantError as error:
            raise InvalidRequestError(str(error), field="reference") from error
        if session_id is None:
            raise TrainingSessionNotFoundError
        return next(each for each in own if each.id == session_id)

    def _task(self, session: Session, found: OpenRound, delay: float, evaluator: str) -> NextTask:
        """Return the task of an open round: an evaluation of its base version first, if one is due."""
        key = (found.training_session_id, found.base_version)
        facts = self._facts.get(key)
        if facts is None:
            facts = _read_facts(session, *key)
            if len(self._facts) >= MAX_REMEMBERED_VERSIONS:
                self._facts.clear()
            self._facts[key] = facts
        digest, config = facts
        if evaluator and config.evaluation.every_rounds:
            training_session = training_sessions.get_session(session, found.training_session_id)
            assert training_session is not None
            first = find_measurement(
                self._context, session, training_session, found.base_version, evaluator
            )
            if first is not None:
                return NextTask(delay, measurement=first)
        if found.is_full:
            return NextTask(delay)
        return NextTask(delay, found, digest, config)


def _read_facts(
    session: Session, training_session_id: str, version: int
) -> tuple[str, training_pb2.TrainingConfig]:
    """Return a version's digest and its training session's configuration; both are immutable."""
    base = global_models.get_model(session, training_session_id, version)
    training_session = training_sessions.get_session(session, training_session_id)
    assert base is not None
    assert training_session is not None
    return base.digest, training_session.config


def _is_over(session: Session, training_session_id: str) -> bool:
    """Return whether the requested training session has ended; False if the device requested any."""
    if not training_session_id:
        return False
    state = training_sessions.state_of(session, training_session_id)
    if state is None:
        raise TrainingSessionNotFoundError
    return state in ENDED
