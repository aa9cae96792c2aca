"""Task assignment for devices."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from qflare.references import ManyMeantError, Named, choose
from qflare.v1 import coordinator_service_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.errors import InvalidRequestError, TrainingSessionNotFoundError
from qflare_server.storage.epochs import Epochs
from qflare_server.storage.repository import (
    global_models,
    neighbors,
    references,
    training_sessions,
)
from qflare_server.storage.repository.neighbors import Work
from qflare_server.storage.repository.training_sessions import OpenRound
from qflare_server.storage.tables import ENDED
from qflare_server.training.evaluation import (
    Measurement,
    find_last_measurement,
    find_measurement,
)
from qflare_server.training.neighbor_stages import has_neighbors, step_timeout
from qflare_server.training.selection import find_relation
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.training_sessions.neighbor_views import view_of

MAX_REMEMBERED = 200_000
MAX_REMEMBERED_VERSIONS = 64
ADVERTISE = "advertise"
"""First step of a round with neighbors, before there are groups."""
POLLS_OF_STEP = 6
"""How often a member of a group polls in the time of a step, at least."""
MAX_MEANT = 100
"""Newest training sessions of one name among which a device's own is looked for."""


@dataclass(frozen=True)
class NextTask:
    """A device's next task: a `measurement`, a `round` to contribute to, a wait of `poll_delay_s`, or none any more.

    The last is the case if `ended_session_id` names the requested training session. In a round with secure aggregation
    with neighbors, `step` is the stage that waits for the device, and `neighbors` what it needs for it.
    """

    poll_delay_s: float
    round: OpenRound | None = None
    base_digest: str = ""
    config: training_pb2.TrainingConfig | None = None
    ended_session_id: str = ""
    measurement: Measurement | None = None
    step: str = ""
    neighbors: coordinator_service_pb2.NeighborView | None = None


class Tasks:
    """Task assignment use cases."""

    def __init__(self, context: Context, presence: Presence) -> None:
        self._context = context
        self._presence = presence
        self._idle: dict[tuple[str, str, bool, bool], tuple[Epochs, bool, float]] = {}
        self._facts: dict[tuple[str, int], tuple[str, training_pb2.TrainingConfig]] = {}

    def next_task(
        self,
        device_id: str,
        training_session_id: str,
        *,
        trains_only: bool = False,
        answers_queries: bool = False,
        first_member: int = 0,
    ) -> NextTask:
        """Return the device's next task, in one read.

        The absence of work is cached until work appears: an idle poll costs no read. Work that another coordinator
        makes is noticed within `storage.epochs.MAX_AGE_S`.

        Args:
            device_id: The calling device.
            training_session_id: The requested training session; empty means any.
            trains_only: Whether the device does not evaluate.
            answers_queries: Whether it answers queries of federated analytics.
            first_member: Neighbors that the device knows from earlier answers to the same step.

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
            work = neighbors.find_work(
                session, device_id, training_session_id, at, answers_queries=answers_queries
            )
            if work is not None:
                step = self._step(session, work, delay, device_id, first_member)
                if step is not None:
                    return step
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
            most = self._most_delay_s(session, device_id)
        if len(self._idle) >= MAX_REMEMBERED:
            self._idle.clear()
        self._idle[key] = (epochs, done, most)
        return NextTask(min(delay, most), ended_session_id=training_session_id if done else "")

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
        return NextTask(min(self._presence.poll_delay_s(), idle[2]), ended_session_id=ended)

    def _most_delay_s(self, session: Session, device_id: str) -> float:
        """Return how long a device may stay away without missing a step of its group; infinite without one."""
        waits = neighbors.find_waiting(session, device_id)
        if waits is None:
            return float("inf")
        return _step_delay_s(self._facts_of(session, *waits)[1])

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
        digest, config = self._facts_of(session, found.training_session_id, found.base_version)
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
        if has_neighbors(config):
            delay = min(delay, _step_delay_s(config))
            return NextTask(delay, found, digest, config, step=ADVERTISE)
        return NextTask(delay, found, digest, config)

    def _step(
        self, session: Session, work: Work, delay: float, device_id: str, first_member: int
    ) -> NextTask | None:
        """Return a later step of a round with neighbors; None if the device cannot take it."""
        digest, config = self._facts_of(session, work.training_session_id, work.base_version)
        round_ = OpenRound(
            work.training_session_id,
            work.round_number,
            work.base_version,
            work.deadline_at,
            work.task,
            is_full=False,
        )
        view = view_of(session, config, work, device_id, first_member)
        if view is None:
            return None
        delay = min(delay, _step_delay_s(config))
        return NextTask(delay, round_, digest, config, step=work.stage, neighbors=view)

    def _facts_of(
        self, session: Session, training_session_id: str, version: int
    ) -> tuple[str, training_pb2.TrainingConfig]:
        key = training_session_id, version
        facts = self._facts.get(key)
        if facts is None:
            facts = _read_facts(session, *key)
            if len(self._facts) >= MAX_REMEMBERED_VERSIONS:
                self._facts.clear()
            self._facts[key] = facts
        return facts


def _step_delay_s(config: training_pb2.TrainingConfig) -> float:
    """Return the poll interval of the members of groups: short enough to see each step before its time is up."""
    return step_timeout(config).total_seconds() / POLLS_OF_STEP


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
