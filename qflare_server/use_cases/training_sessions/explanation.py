"""Notices: why a training session is waiting, and the remedy.

Command line, dashboard, log, metrics and watches print the notices of `Explanations` unchanged. A round that is
collecting updates gets a notice only when too few devices can take part, when a device reports a failure, when the
round has missed its quorum, or when half of its time has passed without enough updates. A closed round gets one when
the helpers for secure aggregation do not answer. With neighbors, a round gets one when more than half of the time for
a step has passed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import (
    device_failures,
    device_names,
    neighbors,
    training_sessions,
)
from qflare_server.storage.repository.device_failures import MissingDevice
from qflare_server.storage.tables import GroupStage, RoundState, TrainingSessionState
from qflare_server.training.evaluation import awaits_evaluation
from qflare_server.training.failures import TOO_MANY_FAILED
from qflare_server.training.neighbor_stages import (
    advertising_ends_at,
    has_neighbors,
    is_awaited,
    step_timeout,
)
from qflare_server.training.rounds import HELPER_AWAITED, MISSED_QUORUM

MAX_LOOKED_AT: Final = 100
MAX_NAMED: Final = 5
LEAST_SILENCE_S: Final = 60.0
WORK: Final = "wait for them, or look at their logs"
RUN: Final = "check that they run and reach the coordinator, or suspend them"
MEND: Final = "read their logs and mend the cause; they are asked again in this round"
AVOID: Final = (
    "read the logs of the devices that failed and mend the cause before the rounds run out"
)
ASK_HELPER: Final = (
    "check that the helper runs and that this coordinator reaches it, or ask its operator"
)
HELPER_PATIENCE_S: Final = 5.0
STEP_S: Final = 10.0
"""Seconds between two texts of a notice that tells how long a helper has not answered."""
STEPS: Final = {
    GroupStage.SHARE.value: "shares",
    GroupStage.TRAIN.value: "updates",
    GroupStage.CONFIRM.value: "confirmations of updates",
    GroupStage.REVEAL.value: "shares that open sums",
}
"""What a group waits for at each stage."""
ENROLL: Final = "enroll more devices, or create a training session with a smaller quorum"


@dataclass(frozen=True)
class Notice:
    """Reason why a training session is waiting.

    Attributes:
        code: Kind of the notice: a stable lower-case word.
        text: The reason, one sentence without a period.
        remedy: Action for the administrator.
        device_ids: Ids of the devices that the notice is about.
        device_names: Their names, in the same order.
    """

    code: str
    text: str
    remedy: str
    device_ids: Sequence[str] = ()
    device_names: Sequence[str] = ()


class Explanations:
    """Explains why training sessions wait; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def find(self, training_session_id: str) -> Sequence[Notice]:
        """Return the notices of a training session; none if there is no such training session."""
        with self._context.database.read() as session:
            found = training_sessions.get_session(session, training_session_id)
            return [] if found is None else self._explain(session, found)

    def list_running(
        self, limit: int = MAX_LOOKED_AT
    ) -> Sequence[tuple[TrainingSession, Sequence[Notice]]]:
        """Return the newest running training sessions with their notices."""
        running = TrainingSessionState.RUNNING.value
        with self._context.database.read() as session:
            rows = training_sessions.list_sessions(session, PageRequest(limit), running).rows
            return [(row, self._explain(session, row)) for row in rows]

    def _explain(self, session: Session, row: TrainingSession) -> list[Notice]:
        if row.state == TrainingSessionState.CREATED.value:
            return [_not_started(row)]
        if row.state == TrainingSessionState.PAUSED.value:
            text = "it is paused and takes no updates"
            return [Notice("paused", text, f"qflare-admin session resume {row.id}")]
        if row.state != TrainingSessionState.RUNNING.value:
            return []
        current = training_sessions.get_round(session, row.id, row.current_round)
        if has_neighbors(row.config):
            return [] if current is None else self._explain_groups(session, row, current)
        if current is not None and current.state == RoundState.CLOSED.value:
            return list(_awaits_helper(row, current, self._context.clock()))
        if current is None or current.state != RoundState.OPEN.value:
            return []
        before = training_sessions.get_round(session, row.id, row.current_round - 1)
        return [
            *_missed_before(before),
            *_failed_before(before),
            *self._explain_round(session, row, current, self._context.clock()),
        ]

    def _explain_groups(
        self, session: Session, row: TrainingSession, current: Round
    ) -> list[Notice]:
        """Return what a round with secure aggregation with neighbors waits for."""
        now, found = self._context.clock(), list[Notice]()
        if current.state == RoundState.OPEN.value:
            before = training_sessions.get_round(session, row.id, row.current_round - 1)
            found += [*_missed_before(before), *_failed_before(before)]
            is_drawn = current.selected_count != 0
            count = device_failures.count_participants(
                session, row.id, current.number, is_drawn=is_drawn
            )
            if count < current.quorum:
                found.append(_too_few(current, count, is_drawn=is_drawn))
            missing = device_failures.list_missing(
                session, row.id, current.number, is_drawn=is_drawn, limit=MAX_LOOKED_AT
            )
            failed = [item for item in missing if item.kind is not None]
            if failed:
                expected = max(count, current.accepted_count)
                found.append(self._waits(current, expected, failed, now))
        if current.state in {RoundState.OPEN.value, RoundState.CLOSED.value}:
            found += _awaited_devices(session, row, current, now)
        return found

    def _explain_round(
        self, session: Session, row: TrainingSession, current: Round, now: datetime
    ) -> Iterator[Notice]:
        if current.accepted_count >= current.target:
            if awaits_evaluation(session, row.id, row.config, current.base_version):
                yield _awaits(row, current)
            return
        is_drawn = current.selected_count != 0
        count = device_failures.count_participants(
            session, row.id, current.number, is_drawn=is_drawn
        )
        if count < current.quorum:
            yield _too_few(current, count, is_drawn=is_drawn)
        missing = device_failures.list_missing(
            session, row.id, current.number, is_drawn=is_drawn, limit=MAX_LOOKED_AT
        )
        failed = [item for item in missing if item.kind is not None]
        missed = current.state_reason.startswith(MISSED_QUORUM)
        if missing and (failed or missed or _is_half_over(current, now)):
            yield self._waits(current, max(count, current.accepted_count), missing, now)

    def _waits(
        self, current: Round, expected: int, missing: Sequence[MissingDevice], now: datetime
    ) -> Notice:
        failed = [item for item in missing if item.kind is not None]
        others = [item for item in missing if item.kind is None]
        silent = [item for item in others if self._silent_s(item, now) is not None]
        working = [item for item in others if self._silent_s(item, now) is None]
        parts = [
            *self._seen(silent, now),
            *(_failure(item) for item in failed[:MAX_NAMED]),
            *_working(working),
        ]
        has_missed = current.state_reason.startswith(MISSED_QUORUM)
        what = f"round {current.number} "
        if has_missed:
            what += f"{current.state_reason}, was extended and "
        what += f"waits for {expected - current.accepted_count} of {expected} device{'s' if expected != 1 else ''}"
        code = "device_failed" if failed else "device_silent" if silent else "round_waits"
        remedies = [MEND] if failed else []
        remedies += [RUN] if silent else []
        about = (*failed, *silent, *working)
        text = f"{what}: {', '.join(parts)}" if parts else what
        return Notice(
            code,
            text,
            "; ".join(remedies) or WORK,
            [item.device_id for item in about],
            [item.name for item in about],
        )

    def _silent_s(self, item: MissingDevice, now: datetime) -> float | None:
        """Return a silent device's seconds since its last call: infinite without a call, None if it is not silent."""
        if item.last_seen_at is None:
            return float("inf")
        silent_s = (now - item.last_seen_at).total_seconds()
        # A device polls as rarely as every `max_poll_s`, and its last call is written with a delay.
        config = self._context.config
        usual_s = max(LEAST_SILENCE_S, config.max_poll_s + 3 * config.last_seen_interval_s)
        return silent_s if silent_s > usual_s else None

    def _seen(self, silent: Sequence[MissingDevice], now: datetime) -> Iterator[str]:
        """Yield when silent devices were last seen, grouped by minute."""
        groups: dict[str, list[str]] = {}
        for item in silent:
            silent_s = self._silent_s(item, now)
            assert silent_s is not None
            when = "never seen" if item.last_seen_at is None else f"last seen {_ago(silent_s)} ago"
            groups.setdefault(when, []).append(item.name)
        for when, names in groups.items():
            yield f"{_list(names)} {'was' if len(names) == 1 else 'were'} {when}"


def _not_started(row: TrainingSession) -> Notice:
    if row.current_version < 0:
        remedy = f"qflare-admin model upload {row.id} FILE"
        return Notice("no_model", "it waits for an initial model", remedy)
    return Notice("not_started", "it waits to be started", f"qflare-admin session start {row.id}")


def _missed_before(before: Round | None) -> Iterator[Notice]:
    if before is not None and before.state_reason.startswith(MISSED_QUORUM):
        text = f"round {before.number} {before.state_reason}"
        yield Notice("missed_quorum", text, ENROLL)


def _failed_before(before: Round | None) -> Iterator[Notice]:
    if before is not None and before.state_reason.startswith(TOO_MANY_FAILED):
        text = f"round {before.number} ended early: {before.state_reason}"
        yield Notice("too_many_failures", text, AVOID)


def _too_few(current: Round, count: int, *, is_drawn: bool) -> Notice:
    how = "were selected and are active" if is_drawn else "can take part"
    text = f"round {current.number} needs {current.quorum} devices, but {count} {how}"
    return Notice("too_few_devices", text, ENROLL)


def _awaited_devices(
    session: Session, row: TrainingSession, current: Round, now: datetime
) -> Iterator[Notice]:
    """Explain a round whose groups wait for steps of devices for more than half of the time for it."""
    groups = neighbors.groups_of(session, row.id, current.number)
    half, number = step_timeout(row.config) / 2, current.number
    if not groups:
        if now >= advertising_ends_at(row.config, current) - half:
            count = neighbors.count_members(session, row.id, number)
            text = f"round {number} forms groups when {current.target} devices have advertised keys; {count} have"
            yield Notice("neighbors_awaited", text, RUN)
        return
    begun = {
        group.number: group.stage
        for group in groups
        if not group.has_ended
        and (
            _is_half_over(current, now)
            if group.stage == GroupStage.TRAIN.value
            else now >= group.deadline_at - half
        )
    }
    if not begun:
        return
    updated = neighbors.update_digests(session, row.id, number)
    missing: dict[str, list[str]] = {}
    for item in neighbors.members_of(session, row.id, number):
        stage = begun.get(item.group_number or 0, "")
        if is_awaited(item, stage, updated):
            missing.setdefault(stage, []).append(item.device_id)
    ids = sorted(device for found in missing.values() for device in found)[:MAX_LOOKED_AT]
    if not ids:
        return
    names = device_names.names_of(session, ids)
    parts = [f"{STEPS[stage]} by {_counted(len(found))}" for stage, found in missing.items()]
    text = f"round {current.number} waits for {', '.join(parts)}: "
    shown = [names.get(device, device) for device in ids]
    yield Notice("neighbors_awaited", text + _list(shown), RUN, ids, shown)


def _counted(count: int) -> str:
    return f"{count} device{'s' if count != 1 else ''}"


def _awaits(row: TrainingSession, current: Round) -> Notice:
    quorum = row.config.evaluation.quorum or row.config.rounds.quorum
    text = (
        f"round {current.number} has its updates and waits for evaluations of version "
        f"{current.base_version} by {quorum} devices, until its deadline at most"
    )
    remedy = "run devices with an evaluation function, or lower evaluation.quorum in the next one"
    return Notice("evaluation_awaited", text, remedy)


def _awaits_helper(row: TrainingSession, current: Round, now: datetime) -> Iterator[Notice]:
    """Explain a closed round with secure aggregation whose masks are not summed yet."""
    policy = row.config.secure_aggregation
    if not policy.mode or current.closed_at is None:
        return
    waited_s = (now - current.closed_at).total_seconds()
    cause = current.state_reason.removeprefix(HELPER_AWAITED)
    if cause == current.state_reason:
        cause = ""
        if waited_s < HELPER_PATIENCE_S:
            return
    helpers = _list([helper_id[:16] for helper_id in policy.helpers])
    verb = "has" if len(policy.helpers) == 1 else "have"
    text = (
        f"round {current.number} is closed with {current.accepted_count} masked updates, and helper {helpers} {verb} "
        f"not answered for {_ago(waited_s - waited_s % STEP_S) if waited_s >= STEP_S else 'some seconds'}"
    )
    yield Notice("helper_awaited", f"{text}: {cause}" if cause else text, ASK_HELPER)


def _is_half_over(current: Round, now: datetime) -> bool:
    return now - current.opened_at > (current.deadline_at - current.opened_at) / 2


def _failure(item: MissingDevice) -> str:
    told = f": {item.text}" if item.text else ""
    return f"{item.name} reported {item.kind}{told}"


def _working(working: Sequence[MissingDevice]) -> Iterator[str]:
    if working:
        names = [item.name for item in working]
        yield f"{_list(names)} {'is' if len(names) == 1 else 'are'} at work"


def _list(names: Sequence[str]) -> str:
    """Return names as a list for a sentence, shortened to the first five."""
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
