"""The course of a simulation: an event loop in virtual time around the coordinator's own use cases.

A device that gets a task at a time answers at a later one, drawn from the configuration; nothing waits in between.
Devices train in the order of their answers, a bounded number ahead of the virtual time, so that a thousand slow devices
cost as little memory as ten. An update that could not arrive before its round closes is never computed.

With secure aggregation with neighbors, `group_steps` takes the steps before and after training, and the devices that
groups wait for train.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

from qflare_client.privacy import LocalPrivacy, gaussian_epsilon
from qflare_server.errors import QflareError
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.tables import ENDED, RoundState
from qflare_server.training.neighbor_stages import has_neighbors
from qflare_server.training.rhythm import is_asynchronous
from qflare_simulation import worker
from qflare_simulation.clock import after
from qflare_simulation.config import SimulationConfig
from qflare_simulation.coordinator import Groups, SimulatedCoordinator
from qflare_simulation.errors import SimulationError, TrainingFailedError
from qflare_simulation.group_steps import SHOWN_BYTES, TRAIN, GroupSteps, lost_at
from qflare_simulation.pool import Pool
from qflare_simulation.worker import Brief, Failed, Left, Programs, Trained

BATCH: Final = 64
CHUNK: Final = 16
MAX_AHEAD_BYTES: Final = 64 * 2**20
MAX_IDLE_ROUNDS: Final = 100
Notice = Callable[[int, int, int, int], None]
"""Called with version, rounds in all, updates of the open round, and its target."""


class Job(NamedTuple):
    """A device under way, ordered by the time of its answer.

    Attributes:
        at: When it answers, or is heard of again.
        order: Tells jobs of one time apart.
        device: Its index.
        round_number: The round of its task.
        base_version: Version that it trains from.
        is_lost: Whether it never answers.
    """

    at: datetime
    order: int
    device: int
    round_number: int
    base_version: int
    is_lost: bool


@dataclass
class Counts:
    """What became of the tasks of one round.

    Attributes:
        asked: Devices that got the task.
        lost: Devices that never answered, or that could not go on with their group.
        late: Devices that answered after it had closed.
        failed: Devices whose training raised.
        refused: Updates, and steps of groups, that the coordinator refused.
        spent: Devices that had no local privacy budget left.
    """

    asked: int = 0
    lost: int = 0
    late: int = 0
    failed: int = 0
    refused: int = 0
    spent: int = 0


@dataclass
class Course:
    """What a simulation saw that no database row holds.

    Attributes:
        counts: By number of the round.
        evaluations: Metrics by version.
        refusals: Reasons of refused updates, with how often.
        local_epsilon: Largest epsilon that a device has spent by local privacy; None without.
    """

    counts: dict[int, Counts] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    local_epsilon: float | None = None

    def of(self, number: int) -> Counts:
        """Return the counts of a round."""
        return self.counts.setdefault(number, Counts())


class Budgets:
    """What devices have released under local privacy: as the device SDK's ledger, one release for each update.

    Args:
        privacy: Of every device; None for none.
    """

    def __init__(self, privacy: LocalPrivacy | None) -> None:
        self._privacy = privacy
        self._released: Counter[int] = Counter()

    def has_room(self, device: int) -> bool:
        """Return whether a device may release another update."""
        privacy = self._privacy
        if privacy is None or privacy.max_epsilon is None:
            return True
        return _epsilon(privacy, self._released[device] + 1) <= privacy.max_epsilon

    def charge(self, device: int) -> None:
        """Charge an update to a device."""
        if self._privacy is not None:
            self._released[device] += 1

    def epsilon(self) -> float | None:
        """Return the largest epsilon that a device has spent; None without local privacy."""
        if self._privacy is None:
            return None
        return _epsilon(self._privacy, max(self._released.values(), default=0))


@lru_cache(maxsize=1024)
def _epsilon(privacy: LocalPrivacy, releases: int) -> float:
    if releases and privacy.is_without_noise:
        return math.inf
    return gaussian_epsilon(math.sqrt(releases * privacy.cost), privacy.delta)


def _stragglers(config: SimulationConfig) -> frozenset[int]:
    """Return the devices that are always slow."""
    if not config.straggler_share:
        return frozenset()
    return frozenset(
        device
        for device in range(config.devices)
        if random.Random(f"{config.seed}:device:{device}").random() < config.straggler_share  # noqa: S311 - repeatable on purpose
    )


def _evaluators(config: SimulationConfig, programs: Programs) -> frozenset[int]:
    """Return the devices that measure versions: all that hold something out."""
    held_out = programs.held_out
    if held_out is None or not config.training.evaluation.every_rounds:
        return frozenset()
    return frozenset(index for index in range(config.devices) if held_out[index] is not None)


class Engine:
    """Runs one training session to its end.

    Args:
        coordinator: With a training session that has been started.
        pool: Where devices train.
        config: The configuration.
        notice: Called as the simulation proceeds.
        programs: What the pool runs.
    """

    def __init__(
        self,
        coordinator: SimulatedCoordinator,
        pool: Pool,
        config: SimulationConfig,
        notice: Notice,
        programs: Programs,
    ) -> None:
        self.course = Course()
        self._coordinator = coordinator
        self._pool = pool
        self._config = config
        self._notice = notice
        self._programs = programs
        has_test = programs.test is not None or programs.held_out is None
        self._evaluates = programs.evaluate is not None and has_test and config.evaluate_every > 0
        self._evaluators = _evaluators(config, programs)
        self._budgets = Budgets(programs.privacy)
        self._stragglers = _stragglers(config)
        self._idle = set(range(config.devices))
        self._asked = dict.fromkeys(range(config.devices), 0)
        self._under_way: list[Job] = []
        self._order = 0
        self._results: dict[int, tuple[Callable[[], Any], int]] = {}
        self._briefs: dict[tuple[int, int], Brief] = {}
        self._measuring: list[tuple[int, Callable[[], dict[str, float]]]] = []
        self._measured = -1
        self._idle_rounds = 0
        self._last_version = 0
        self._barren_since = 0
        self._groups: GroupSteps | None = None
        if has_neighbors(config.training):
            self._groups = GroupSteps(coordinator, pool, config, self._lose, self._refuse)

    def run(self) -> None:
        """Run until the training session ends.

        Raises:
            TrainingFailedError: Too many devices failed in one round.
            SimulationError: The training session makes no progress.
        """
        while True:
            owner, current = self._coordinator.state()
            self._publish_seen(owner)
            self._notice(
                owner.current_version,
                owner.config.total_rounds,
                current.accepted_count,
                current.target,
            )
            if owner.state in ENDED:
                break
            self._step(owner, current)
        for version, result in self._measuring:
            self.course.evaluations[version] = result()
        self._evaluate(owner.current_version, range(self._config.devices), is_last=True)
        self.course.local_epsilon = self._budgets.epsilon()

    def _step(self, owner: TrainingSession, current: Round) -> None:
        """Take the next event: tasks for idle devices, answers, or the deadline."""
        if self._groups is not None:
            self._step_with_neighbors(owner, current, self._groups)
        elif current.state != RoundState.OPEN.value:
            self._coordinator.aggregate()
        else:
            self._send_off(self._ask(current), current)
            self._await(owner, current, current.deadline_at)

    def _step_with_neighbors(
        self, owner: TrainingSession, current: Round, steps: GroupSteps
    ) -> None:
        """Take the next event: steps of devices that are due, answers, or the end of the time for them."""
        groups = self._coordinator.groups(owner, current)
        if self._step_in_groups(owner, current, groups, steps):
            return
        until = self._until(current, groups)
        if current.state == RoundState.OPEN.value:
            self._await(owner, current, until)
        else:
            self._coordinator.clock.advance(until)
            self._coordinator.aggregate()

    def _await(self, owner: TrainingSession, current: Round, until: datetime) -> None:
        """Take the next answers before a time, or let it pass if there are none."""
        due = self._due(current, until)
        if due:
            self._take(owner, current, due)
        else:
            self._pass_deadline(current, until)

    def _step_in_groups(
        self, owner: TrainingSession, current: Round, groups: Groups, steps: GroupSteps
    ) -> bool:
        """Let devices of a round with neighbors take the steps that are due; return whether anything has changed.

        Raises:
            SimulationError: No round makes a version.
        """
        steps.begin(current)
        self._require_version(owner, current)
        if current.state != RoundState.OPEN.value or groups.are_formed:
            has_changed = steps.take(self._brief(current), groups)
        else:
            self._ask(current)
            devices = self._coordinator.asked(sorted(self._idle - groups.advertised))
            room = current.target - len(groups.advertised)
            has_changed = steps.advertise(current, self._brief(current), devices, room)
        self._send_off(steps.trainers(groups), current)
        return self._coordinator.aggregate() or has_changed

    def _until(self, current: Round, groups: Groups) -> datetime:
        """Return when a round with neighbors goes on without those that it waits for.

        Raises:
            SimulationError: It waits for nothing, and does not go on.
        """
        if current.state == RoundState.OPEN.value:
            return min(current.deadline_at, groups.next_deadline or current.deadline_at)
        if groups.next_deadline is None:
            raise SimulationError(f"round {current.number} is closed and makes no progress")
        return groups.next_deadline

    def _require_version(self, owner: TrainingSession, current: Round) -> None:
        """Refuse to go on if many rounds with neighbors in a row have made no version."""
        if owner.current_version != self._last_version:
            self._last_version, self._barren_since = owner.current_version, current.number - 1
        if current.number - self._barren_since > MAX_IDLE_ROUNDS:
            raise SimulationError(
                f"no version in {MAX_IDLE_ROUNDS} rounds: groups lose more devices than "
                "secure_aggregation.dropout_fraction allows, with simulation.drop_out and rounds.deadline"
            )

    def _ask(self, current: Round) -> list[int]:
        """Return the idle devices that get the task of a round, and were not asked for it yet; let them evaluate."""
        candidates = [i for i in sorted(self._idle) if self._asked[i] != current.number]
        if not candidates:
            return []
        for device in candidates:
            self._asked[device] = current.number
        devices = self._coordinator.asked(candidates)
        if devices:
            self.course.of(current.number).asked += len(devices)
            self._evaluate(current.base_version, devices, is_last=False)
        return devices

    def _send_off(self, devices: Sequence[int], current: Round) -> None:
        """Let devices begin to train."""
        if devices:
            self._brief(current)
        for device in devices:
            self._idle.discard(device)
            heapq.heappush(self._under_way, self._job(device, current))

    def _brief(self, current: Round) -> Brief:
        """Return the work of a round."""
        key = current.number, current.base_version
        if key not in self._briefs:
            self._briefs[key] = self._coordinator.brief(current)
        return self._briefs[key]

    def _lose(self, round_number: int) -> None:
        self.course.of(round_number).lost += 1

    def _refuse(self, round_number: int, error: QflareError) -> None:
        self.course.of(round_number).refused += 1
        self.course.refusals[error.reason] = self.course.refusals.get(error.reason, 0) + 1

    def _evaluate(self, version: int, devices: Iterable[int], *, is_last: bool) -> None:
        """Let the devices that are asked measure a version on what they hold out; it takes no virtual time.

        Raises:
            TrainingFailedError: Too many of them failed.
        """
        candidates = [
            index
            for index in devices
            if index in self._evaluators and not self._is_lost(index, "evaluation", version)
        ]
        asked = (
            self._coordinator.evaluations(candidates, version, is_last=is_last)
            if candidates
            else []
        )
        if not asked:
            return
        brief = self._coordinator.version_brief(version, as_devices_get_it=True)
        results = [
            self._measure(brief, asked[start : start + CHUNK])
            for start in range(0, len(asked), CHUNK)
        ]
        answers = [answer for result in results for answer in result()]
        failures = [answer for answer in answers if isinstance(answer, Failed)]
        share = self._config.failure_share
        if share < 1 and len(failures) > share * len(asked):
            raise TrainingFailedError(
                f"{len(failures)} of {len(asked)} evaluations of version {version} failed, at most "
                f"{share * len(asked):g} may; a device raised:\n{failures[0].text.rstrip()}"
            )
        for (index, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, Failed):
                self._coordinator.report_failure(index, 0, answer)
            else:
                self._coordinator.report_evaluation(index, answer)

    def _measure(self, brief: Brief, asked: Sequence[tuple[int, str]]) -> Callable[[], Any]:
        devices = [device for device, _ in asked]
        return self._pool.submit(worker.measure_all, brief, asked, devices=devices)

    def _is_lost(self, device: int, *what: object) -> bool:
        """Return whether a device drops out of something."""
        label = ":".join(str(part) for part in (self._config.seed, device, *what))
        return random.Random(label).random() < self._config.drop_out  # noqa: S311 - repeatable on purpose

    def _job(self, device: int, current: Round) -> Job:
        config, self._order = self._config, self._order + 1
        is_lost, seconds = False, config.duration_s
        if config.drop_out or config.duration_spread:
            draw = random.Random(f"{config.seed}:{device}:{current.number}:{current.base_version}")  # noqa: S311
            is_lost = draw.random() < config.drop_out
            seconds *= math.exp(draw.gauss(0.0, config.duration_spread))
        if self._groups is not None:
            is_lost = lost_at(config, device, current.number) == TRAIN
        seconds *= config.straggler_factor if device in self._stragglers else 1.0
        at = after(self._coordinator.clock(), seconds)
        return Job(at, self._order, device, current.number, current.base_version, is_lost)

    def _due(self, current: Round, until: datetime) -> list[Job]:
        """Return the next answers, as many as may arrive before anything else happens, and before a time."""
        taken: list[Job] = []
        left = max(1, current.target - current.accepted_count)
        while self._under_way and len(taken) < min(BATCH, left):
            job = self._under_way[0]
            if job.at >= until or (taken and job.at != taken[0].at):
                break
            taken.append(heapq.heappop(self._under_way))
        return taken

    def _take(self, owner: TrainingSession, current: Round, due: Sequence[Job]) -> None:
        self._coordinator.clock.advance(due[-1].at)
        self._idle.update(job.device for job in due)
        late: list[tuple[int, int]] = []
        answering = [job for job in due if self._answers(owner, current, job, late)]
        self._coordinator.record_late(late)
        self._compute(answering, owner, current)
        self._submit(current, [(job, self._result(job)) for job in answering])
        self._drop_briefs(current)

    def _answers(
        self, owner: TrainingSession, current: Round, job: Job, late: list[tuple[int, int]]
    ) -> bool:
        """Return whether a device's update may still count; count it otherwise, and add it to those that are late."""
        if job.is_lost:
            self._lose(job.round_number)
        elif not self._budgets.has_room(job.device):
            self.course.of(job.round_number).spent += 1
        elif job.round_number != current.number and not is_asynchronous(owner.config):
            self.course.of(job.round_number).late += 1
            self._budgets.charge(job.device)  # the device has sent it
            late.append((job.device, job.round_number))
        else:
            return True
        self._abandon(job)
        return False

    def _abandon(self, job: Job) -> None:
        """Forget a training that was begun; with neighbors, only when it has written the state of its device."""
        found = self._results.pop(job.order, None)
        if found is not None and self._groups is not None:
            found[0]()

    def _compute(self, due: Sequence[Job], owner: TrainingSession, current: Round) -> None:
        """Start the training of devices that answer now or next."""
        if all(job.order in self._results for job in due):
            return
        job_bytes = max(1, self._job_bytes(current))
        most = max(len(due), min(2 * BATCH * self._pool.size, MAX_AHEAD_BYTES // job_bytes))
        ahead = heapq.nsmallest(most - len(due), self._under_way)
        waiting = [
            job
            for job in (*due, *ahead)
            if job.order not in self._results
            and not job.is_lost
            and self._budgets.has_room(job.device)
            and (self._counts_in(job, current) or is_asynchronous(owner.config))
        ]
        by_round: dict[tuple[int, int], list[Job]] = {}
        for job in waiting:
            by_round.setdefault((job.round_number, job.base_version), []).append(job)
        size = max(1, min(CHUNK, MAX_AHEAD_BYTES // job_bytes))
        for key, jobs in by_round.items():
            for start in range(0, len(jobs), size):
                self._start(self._briefs[key], jobs[start : start + size])

    @staticmethod
    def _counts_in(job: Job, current: Round) -> bool:
        return job.round_number == current.number and job.at < current.deadline_at

    def _start(self, brief: Brief, jobs: Sequence[Job]) -> None:
        devices = [job.device for job in jobs]
        shown: Sequence[bytes] = ()
        if self._groups is not None:
            shown = [self._groups.shown(device) for device in devices]
        result = self._pool.submit(worker.train_all, brief, devices, shown, devices=devices)
        for position, job in enumerate(jobs):
            self._results[job.order] = result, position

    def _result(self, job: Job) -> Trained | Failed | Left:
        result, position = self._results.pop(job.order)
        found: Trained | Failed | Left = result()[position]
        return found

    def _job_bytes(self, current: Round) -> int:
        """Return what a training holds in memory: its update, and what its device is shown of its group."""
        shown = 0 if self._groups is None else SHOWN_BYTES
        return self._coordinator.size_bytes(current.base_version) + shown

    def _submit(
        self, current: Round, answers: Sequence[tuple[Job, Trained | Failed | Left]]
    ) -> None:
        for job, answer in answers:
            if isinstance(answer, Failed):
                self._fail(job, answer)
            if isinstance(answer, Left):
                self._lose(job.round_number)
        updates = [(job, answer) for job, answer in answers if isinstance(answer, Trained)]
        for job, _ in updates:
            self._budgets.charge(job.device)
        receipts = self._coordinator.submit([(job.device, answer) for job, answer in updates])
        for (job, update), receipt in zip(updates, receipts, strict=True):
            if isinstance(receipt, QflareError):
                self._refuse(job.round_number, receipt)
                continue
            self._idle_rounds = 0
            if update.kept:
                self._coordinator.keep(job.device, update.kept)
        has_failed = len(updates) < len(answers)
        if has_failed or current.accepted_count + len(updates) >= current.target:
            self._coordinator.aggregate()

    def _fail(self, job: Job, failed: Failed) -> None:
        counts = self.course.of(job.round_number)
        counts.failed += 1
        self._coordinator.report_failure(job.device, job.round_number, failed)
        most = self._config.failure_share * counts.asked
        if counts.failed > most and self._config.failure_share < 1:
            raise TrainingFailedError(
                f"{counts.failed} of {counts.asked} trainings of round {job.round_number} failed, "
                f"at most {most:g} may; a device raised:\n{failed.text.rstrip()}"
            )

    def _pass_deadline(self, current: Round, until: datetime) -> None:
        """Wait for a deadline, of the round or of a step, and let the coordinator do what is due then."""
        self._idle_rounds += until == current.deadline_at and not current.accepted_count
        if self._idle_rounds > MAX_IDLE_ROUNDS:
            raise SimulationError(
                f"no device answered in {MAX_IDLE_ROUNDS} rounds: a deadline below "
                "simulation.duration_s, simulation.drop_out too high, or the budget of "
                "simulation.local_privacy spent"
            )
        self._coordinator.clock.advance(until)
        self._coordinator.aggregate()

    def _publish_seen(self, owner: TrainingSession) -> None:
        """Start the evaluation of versions that were published since."""
        for version in range(self._measured + 1, owner.current_version + 1):
            is_last = version == owner.config.total_rounds or owner.state in ENDED
            due = version % max(1, self._config.evaluate_every) == 0 or is_last
            if self._evaluates and due:
                brief = self._coordinator.version_brief(version)
                self._measuring.append((version, self._pool.submit(worker.evaluate, brief)))
            self._measured = version
        if len(self._measuring) > 1:  # an evaluation that is done holds no file any more
            version, result = self._measuring.pop(0)
            self.course.evaluations[version] = result()

    def _drop_briefs(self, current: Round) -> None:
        """Forget versions that no device trains from any more."""
        oldest = min((job.base_version for job in self._under_way), default=current.base_version)
        measured = min((version for version, _ in self._measuring), default=oldest)
        self._coordinator.forget(min(oldest, measured, current.base_version))
        self._briefs = {
            key: brief
            for key, brief in self._briefs.items()
            if key[1] >= min(oldest, current.base_version)
        }
