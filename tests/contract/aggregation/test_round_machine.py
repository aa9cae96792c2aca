"""Any interleaving of what devices, administrators, clocks and crashes do keeps the promises of a round.

Versions have no gap, no update counts twice, and none that was acknowledged is lost: what the machine's small model
has accepted is what the database has, in that order, until a version, a failed round or a cancellation settles it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qflare.crypto.signing import SigningKey
from qflare.v1 import training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.config import ServerConfig
from qflare_server.errors import (
    DeviceRevokedError,
    DuplicateUpdateError,
    QflareError,
    RoundNotOpenError,
    StaleBaseVersionError,
)
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.use_cases.devices.administration import Profile
from tests.conftest import FakeClock
from tests.support.use_cases import (
    CoordinatorHarness,
    CrashError,
    CrashingDatabase,
    Draft,
    Fuse,
    floats,
    vector,
)

DEVICES = 5
DEADLINE_S = 60
ACTIONS = (
    training_pb2.MISSED_QUORUM_ACTION_EXTEND,
    training_pb2.MISSED_QUORUM_ACTION_RETRY,
)


@dataclass
class ModelledRound:
    """What a round has taken, by the model."""

    base_version: int
    deadline_s: float
    accepted: list[Draft] = field(default_factory=list)
    state: str = "open"


class RoundMachine(RuleBasedStateMachine):
    """A coordinator beside a model of it that is a few lists and numbers."""

    config: ServerConfig
    key: SigningKey
    count = 0

    @initialize(quorum=st.integers(1, 3), extra=st.integers(0, 2), action=st.sampled_from(ACTIONS))
    def begin(self, quorum: int, extra: int, action: Any) -> None:
        self.clock = FakeClock()
        self.database = Database(make_engine(self.config))
        self.core = CoordinatorHarness(
            self.config, self.database, self.clock, self.key, name="machine"
        )
        type(self).count += 1
        self.devices = [f"device-{self.count}-{number}" for number in range(DEVICES)]
        for name in self.devices:
            self.core.devices.add(SYSTEM, name, Profile())
        self.quorum, self.target, self.action = quorum, quorum + extra, action
        rounds = training_pb2.RoundPolicy(
            quorum=quorum,
            target=self.target,
            deadline=Duration(seconds=DEADLINE_S),
            missed_quorum_action=action,
        )
        self.training_session_id = self.core.start(total_rounds=10_000, rounds=rounds)
        self.at_s = 0.0
        self.paused = False
        self.revoked: set[str] = set()
        self.versions: list[list[Draft]] = []
        self.rounds = [ModelledRound(0, DEADLINE_S)]
        self.sent: list[tuple[Draft, UpdateReceipt]] = []
        self.held: list[Draft] = []

    @property
    def current(self) -> ModelledRound:
        return self.rounds[-1]

    # Devices

    def task_of(self, device: str) -> Draft | None:
        if self.core.tasks.next_task(device, self.training_session_id).round is None:
            return None
        value = float(len(self.sent) + len(self.held))
        return self.core.draft(
            device, self.training_session_id, vector(value), examples=1 + len(self.held)
        )

    @rule(number=st.integers(0, DEVICES - 1))
    def take_task(self, number: int) -> None:
        """A device trains; its update is sent later, or never."""
        draft = self.task_of(self.devices[number])
        if draft is not None:
            self.held.append(draft)

    @rule(number=st.integers(0, DEVICES - 1))
    def submit(self, number: int) -> None:
        """A device trains and sends at once."""
        draft = self.task_of(self.devices[number])
        if draft is not None:
            self.send(draft)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def submit_held(self, data: st.DataObject) -> None:
        """An update comes that was trained some time ago."""
        self.send(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A device sends again what was accepted."""
        draft, first = data.draw(st.sampled_from(self.sent))

        assert self.core.send(draft) == first

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def contradict(self, data: st.DataObject) -> None:
        """A device sends something else under the id of what was accepted."""
        draft, _ = data.draw(st.sampled_from(self.sent))
        other = replace(draft, statement=type(draft.statement)())
        other.statement.CopyFrom(draft.statement)
        other.statement.example_count += 1

        with pytest.raises(DuplicateUpdateError):
            self.core.send(other)

    def send(self, draft: Draft) -> None:
        wanted = self.refusal(draft)
        if wanted is not None:
            with pytest.raises(wanted):
                self.core.send(draft)
            return
        receipt = self.core.send(draft)
        assert receipt.acceptance_sequence == len(self.current.accepted) + 1
        self.current.accepted.append(draft)
        self.sent.append((draft, receipt))
        if len(self.current.accepted) == self.target:
            self.current.state = "closed"

    def refusal(self, draft: Draft) -> type[QflareError] | None:
        number = draft.statement.round_number
        modeled = self.rounds[number - 1]
        if any(known.device == draft.device for known in modeled.accepted):
            return DuplicateUpdateError
        if draft.device.device_id in self.revoked:
            return DeviceRevokedError
        if self.paused:
            return RoundNotOpenError
        if modeled.state != "open":
            stale = len(self.versions) > draft.statement.base_version
            return StaleBaseVersionError if stale else RoundNotOpenError
        return RoundNotOpenError if self.at_s >= modeled.deadline_s else None

    # Administrators

    @rule(number=st.integers(0, DEVICES - 1))
    def revoke(self, number: int) -> None:
        if len(self.revoked) < DEVICES - self.target:
            self.core.devices.revoke(SYSTEM, self.devices[number], "")
            self.revoked.add(self.devices[number])

    @precondition(lambda self: not self.paused)
    @rule()
    def pause(self) -> None:
        self.core.training.pause(SYSTEM, self.training_session_id)
        self.paused = True

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        self.core.training.resume(SYSTEM, self.training_session_id)
        self.paused = False
        if self.current.state == "open":
            self.current.deadline_s = max(self.current.deadline_s, self.at_s + DEADLINE_S)

    # Time, passes and crashes

    @rule(seconds=st.sampled_from([1, DEADLINE_S // 2, DEADLINE_S]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.at_s += seconds

    @rule()
    def aggregate(self) -> None:
        """The worker does all that there is to do."""
        self.core.settle()
        self.follow()

    @rule()
    def restart(self) -> None:
        """The process ends and begins anew: what is only in memory is lost."""
        self.core.close()
        self.core = CoordinatorHarness(
            self.config, self.database, self.clock, self.key, name="machine"
        )

    @rule(step=st.integers(1, 12))
    def crash(self, step: int) -> None:
        """The process ends in the middle of a pass; another completes it."""
        context = replace(self.core.context, database=CrashingDatabase(self.database, Fuse(step)))
        doomed = Aggregator(context, self.core.executor, "machine")
        try:
            while doomed.run_once():
                pass
        except CrashError:
            self.core.aggregator = Aggregator(self.core.context, self.core.executor, "machine")
        self.core.settle()
        self.follow()

    def follow(self) -> None:
        """Let the model do what all passes together do."""
        while self.step():
            pass

    def step(self) -> bool:
        current = self.current
        if current.state == "closed":
            current.state = "published"
            self.versions.append(current.accepted)
            self.rounds.append(ModelledRound(len(self.versions), self.at_s + DEADLINE_S))
            return True
        if self.paused or self.at_s < current.deadline_s:
            return False
        if len(current.accepted) >= self.quorum:
            current.state = "closed"
        elif self.action == training_pb2.MISSED_QUORUM_ACTION_EXTEND:
            current.deadline_s = self.at_s + DEADLINE_S
        else:
            current.state = "failed"
            self.rounds.append(ModelledRound(current.base_version, self.at_s + DEADLINE_S))
        return True

    # Promises

    @invariant()
    def versions_have_no_gap(self) -> None:
        rows = self.core.versions(self.training_session_id)

        assert [row.version for row in rows] == list(range(len(self.versions) + 1))
        assert [row.participant_count for row in rows[1:]] == [len(v) for v in self.versions]

    @invariant()
    def every_acknowledged_update_is_where_it_belongs(self) -> None:
        rows = self.core.training.list_rounds(self.training_session_id, PageRequest(1000)).rows[
            ::-1
        ]

        assert [row.state for row in rows] == [modeled.state for modeled in self.rounds]
        for row, modeled in zip(rows, self.rounds, strict=True):
            updates = self.core.updates(self.training_session_id, row.number)
            assert [update.id for update in updates] == [
                draft.statement.update_id for draft in modeled.accepted
            ]
            assert [update.acceptance_sequence for update in updates] == list(
                range(1, len(updates) + 1)
            )
            assert {update.state for update in updates} <= {STATES[modeled.state]}
            assert {update.aggregated_version for update in updates} <= {row.version}

    @invariant()
    def latest_version_is_the_mean_of_its_updates(self) -> None:
        if not self.versions:
            return
        drafts = self.versions[-1]
        total = sum(draft.statement.example_count for draft in drafts)
        mean = (
            sum(draft.statement.example_count * floats(draft.chunks[0][1])[0] for draft in drafts)
            / total
        )

        assert floats(self.core.weights(self.training_session_id)) == pytest.approx(
            [mean] * 3, rel=1e-6
        )

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.core.close()
            self.database.close()


STATES = {"open": "pending", "closed": "pending", "published": "aggregated", "failed": "rejected"}

Machine = type[RoundMachine]


@pytest.fixture
def machine(unsigned_config: ServerConfig, signing_key: SigningKey, tmp_path: Path) -> Machine:
    config = replace(unsigned_config, data_dir=tmp_path)
    return type("Machine", (RoundMachine,), {"config": config, "key": signing_key})


def test_rounds_keep_their_promises_in_any_order(machine: type[RoundMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
