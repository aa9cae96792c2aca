"""Watching a training session: a stream of its events.

Events are derived by comparing two snapshots of the database, so every replica sees the changes of all others and
writers need no knowledge of watchers. A snapshot takes two or three reads by primary key. A watch holds no
transaction or connection between two snapshots, is bounded in time, and ends at once when the coordinator drains.
`serving.rpc.limits.StreamLimits` bounds the number of watches.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qflare_server.context import Context
from qflare_server.errors import (
    DrainingError,
    InvalidRequestError,
    TrainingSessionNotFoundError,
)
from qflare_server.storage.records import GlobalModel, Round, TrainingSession
from qflare_server.storage.repository import global_models, training_sessions, views
from qflare_server.storage.tables import ENDED, RoundState
from qflare_server.use_cases.training_sessions.explanation import Explanations, Notice

UNSETTLED = frozenset({RoundState.OPEN.value, RoundState.CLOSED.value})
GIVEN_UP = frozenset({RoundState.FAILED.value, RoundState.CANCELLED.value})
RECENT_VERSIONS = 3
MAX_ROUNDS = 1000
EXPLAIN_S = 2.0
"""Interval between two computations of a training session's notices, in seconds."""


class Kind(StrEnum):
    """Kind of an event."""

    SNAPSHOT = "snapshot"
    STATE_CHANGED = "state_changed"
    ROUND_OPENED = "round_opened"
    ROUND_PROGRESSED = "round_progressed"
    ROUND_CLOSED = "round_closed"
    ROUND_FAILED = "round_failed"
    VERSION_PUBLISHED = "version_published"
    VERSION_CHANGED = "version_changed"
    KEEPALIVE = "keepalive"
    NOTICED = "noticed"


@dataclass(frozen=True)
class View:
    """Snapshot of a training session: its unsettled rounds and its latest versions."""

    session: TrainingSession
    rounds: Mapping[int, Round]
    versions: Mapping[int, views.VersionFacts]


@dataclass(frozen=True)
class Change:
    """A difference between two snapshots."""

    kind: Kind
    round_number: int | None = None
    version: int | None = None


@dataclass(frozen=True)
class SessionEvent:
    """An event of a training session."""

    kind: Kind
    session: TrainingSession | None = None
    round: Round | None = None
    model: GlobalModel | None = None
    notices: Sequence[Notice] = ()


def changes(before: View, after: View) -> Iterator[Change]:
    """Yield the events between two snapshots, in causal order."""
    for number in sorted(after.rounds):
        yield from _round_changes(before.rounds.get(number), after.rounds[number])
    for version, facts in sorted(after.versions.items()):
        known = before.versions.get(version)
        if known is None and not facts.round_number:
            yield Change(Kind.VERSION_PUBLISHED, version=version)
        elif known is not None and known != facts:
            yield Change(Kind.VERSION_CHANGED, version=version)
    if before.session.state != after.session.state:
        yield Change(Kind.STATE_CHANGED)


def _round_changes(before: Round | None, after: Round) -> Iterator[Change]:
    number = after.number
    state = RoundState.OPEN.value if before is None else before.state
    if before is None:
        yield Change(Kind.ROUND_OPENED, number)
    if after.accepted_count > (0 if before is None else before.accepted_count):
        yield Change(Kind.ROUND_PROGRESSED, number)
    if after.state == state:
        return
    if after.state in GIVEN_UP:
        yield Change(Kind.ROUND_FAILED, number)
        return
    if state == RoundState.OPEN.value:
        yield Change(Kind.ROUND_CLOSED, number)
    if after.state == RoundState.PUBLISHED.value:
        yield Change(Kind.VERSION_PUBLISHED, number, after.version)


class Watching:
    """Streams the events of a training session; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._explanations = Explanations(context)
        self._lock = threading.Lock()
        self._watchers: set[threading.Event] = set()
        self._closed = False

    @property
    def watcher_count(self) -> int:
        """Number of active watchers."""
        return len(self._watchers)

    def close(self) -> None:
        """End every watch and refuse new ones."""
        with self._lock:
            self._closed = True
            for gone in self._watchers:
                gone.set()

    def watch(
        self,
        training_session_id: str,
        gone: threading.Event,
        *,
        known_round: int | None = None,
        duration_s: float | None = None,
    ) -> Iterator[SessionEvent]:
        """Yield a snapshot and then the events of a training session, until it has ended or the time limit is reached.

        Args:
            training_session_id: Training session.
            gone: Set when the caller has disconnected.
            known_round: Last round whose events the caller has received; None means all past events.
            duration_s: Time limit in seconds; None means the configured limit.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            DrainingError: The coordinator is shutting down.
        """
        limit_s = self._limit_s(duration_s)
        with self._place(gone):
            view = self._look(training_session_id, None, known_round)
            yield self._snapshot(view)
            yield from self._follow(_as_known(view, known_round), view, gone, limit_s)

    def _limit_s(self, duration_s: float | None) -> float:
        longest = self._context.config.watch_s
        if duration_s is None:
            return longest
        if duration_s <= 0:
            raise InvalidRequestError(
                f"duration: got {duration_s:g} s, want above 0", field="duration"
            )
        return min(duration_s, longest)

    @contextmanager
    def _place(self, gone: threading.Event) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise DrainingError
            self._watchers.add(gone)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.discard(gone)

    def _follow(
        self, before: View, after: View, gone: threading.Event, limit_s: float
    ) -> Iterator[SessionEvent]:
        config = self._context.config
        quiet_s = min(15.0, config.stall_timeout_s / 2)
        until = time.monotonic() + limit_s
        told_at = explained_at = time.monotonic()
        known = self._explanations.find(after.session.id)
        while True:
            for change in changes(before, after):
                told_at = time.monotonic()
                yield self._happening(change, after)
            if time.monotonic() - explained_at >= EXPLAIN_S:
                explained_at = time.monotonic()
                found = self._explanations.find(after.session.id)
                if found != known:
                    known, told_at = found, explained_at
                    current = after.rounds.get(after.session.current_round)
                    yield SessionEvent(Kind.NOTICED, after.session, current, notices=found)
            if _is_over(after) or time.monotonic() >= until:
                return
            if time.monotonic() - told_at >= quiet_s:
                told_at = time.monotonic()
                yield SessionEvent(Kind.KEEPALIVE)
            if gone.wait(min(config.watch_poll_s, max(0.0, until - time.monotonic()))):
                if self._closed:
                    raise DrainingError
                return
            before, after = after, self._look(after.session.id, after)

    def _look(
        self, training_session_id: str, before: View | None, known_round: int | None = None
    ) -> View:
        with self._context.database.read() as session:
            training_session = training_sessions.get_session(session, training_session_id)
            if training_session is None:
                raise TrainingSessionNotFoundError
            first = _first_round(training_session, before, known_round)
            rounds = views.rounds_from(session, training_session.id, first, MAX_ROUNDS)
            oldest = max(0, training_session.current_version - RECENT_VERSIONS + 1)
            versions = views.versions_from(session, training_session.id, oldest)
        return View(training_session, {item.number: item for item in rounds}, versions)

    def _snapshot(self, view: View) -> SessionEvent:
        current = view.rounds.get(view.session.current_round)
        model = self._model(view.session.id, view.session.current_version)
        notices = self._explanations.find(view.session.id)
        return SessionEvent(Kind.SNAPSHOT, view.session, current, model, notices)

    def _happening(self, change: Change, view: View) -> SessionEvent:
        number = change.round_number
        return SessionEvent(
            change.kind,
            view.session,
            None if number is None else view.rounds[number],
            None if change.version is None else self._model(view.session.id, change.version),
        )

    def _model(self, training_session_id: str, version: int) -> GlobalModel | None:
        with self._context.database.read() as session:
            return global_models.get_model(session, training_session_id, version)


def _first_round(
    training_session: TrainingSession, before: View | None, known_round: int | None
) -> int:
    """Return the first round that can still produce events."""
    if before is None:
        return (
            training_session.current_round
            if known_round is None
            else min(known_round + 1, training_session.current_round)
        )
    unsettled = [number for number, item in before.rounds.items() if item.state in UNSETTLED]
    return min([*unsettled, max(before.rounds, default=before.session.current_round) + 1])


def _as_known(view: View, known_round: int | None) -> View:
    """Return the snapshot known to the caller; the first comparison yields the missed events."""
    if known_round is None:
        return view
    rounds: dict[int, Any] = {
        number: item for number, item in view.rounds.items() if number <= known_round
    }
    return View(view.session, rounds, view.versions)


def _is_over(view: View) -> bool:
    """Return whether only evaluation events can still occur."""
    current = view.rounds.get(view.session.current_round)
    return view.session.state in ENDED and (current is None or current.state not in UNSETTLED)
