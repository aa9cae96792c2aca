"""Quorum, target and deadline change in a running session, and verification knows which rule was in force."""

from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import security_pb2, training_pb2
from qflare_server.errors import InvalidRequestError, TrainingSessionNotFoundError, WrongStateError
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import replaced_configs
from qflare_server.storage.repository.audit import SYSTEM, AuditFilter, list_entries
from qflare_server.training.config import complete
from qflare_server.training.rounds import config_digest
from qflare_server.use_cases.training_sessions.round_changes import RoundChange, RoundChanges
from qflare_server.verification.recomputation import recompute_version
from qflare_simulation import replay
from tests.conftest import FakeClock
from tests.support.use_cases import CoordinatorHarness


def policy(quorum: int, target: int = 0) -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(
        quorum=quorum, target=target or quorum, deadline=Duration(seconds=600)
    )


def change(core: CoordinatorHarness, session_id: str, **values: Any) -> training_pb2.TrainingConfig:
    return RoundChanges(core.context).run(SYSTEM, session_id, RoundChange(**values)).config


def entries(core: CoordinatorHarness, session_id: str) -> list[Any]:
    wanted = AuditFilter(event_type="training_session.changed")
    with core.database.read() as session:
        rows = list_entries(session, PageRequest(100), wanted).rows
    return [row.details for row in rows if session_id in row.subject]


def digest_of(core: CoordinatorHarness, session_id: str, version: int) -> str:
    row = core.versions(session_id)[version]
    return security_pb2.ModelStatement.FromString(row.statement).config_digest


def test_a_raised_quorum_waits_and_later_rounds_keep_it(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = core.start(rounds=policy(1, target=4))
    core.submit("device-0", session_id)
    core.settle()

    change(core, session_id, quorum=3)
    clock.advance(600)
    core.settle()
    assert core.round(session_id, 1).state == "open"
    for name in ("device-1", "device-2"):
        core.submit(name, session_id)
    clock.advance(600)
    core.settle()

    assert core.round(session_id, 1).state == "published"
    following = core.round(session_id, 2)
    assert (following.quorum, following.target) == (3, 4)


def test_each_round_is_replayed_under_the_rule_that_was_in_force(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = core.start(
        rounds=policy(1),
        transfer=training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
    )
    core.submit("device-0", session_id)
    core.settle()
    clock.advance(1)
    change(core, session_id, quorum=2, target=2)
    for name in ("device-0", "device-1"):
        core.submit(name, session_id)
    core.settle()

    rounds = replay(core.context, session_id)
    raised = replay(core.context, session_id, settings=["rounds.quorum=2"])

    assert [(row.round, row.outcome, row.updates) for row in rounds] == [
        (1, "version", 1),
        (2, "version", 2),
    ]
    assert [row.outcome for row in raised] == ["missed its quorum: got 1, want 2", "version"]


def test_a_lowered_target_closes_a_round_that_has_it(core: CoordinatorHarness) -> None:
    session_id = core.start(rounds=policy(1, target=4))
    for number in range(2):
        core.submit(f"device-{number}", session_id)
    core.settle()

    change(core, session_id, target=2)
    core.settle()

    assert core.versions(session_id)[1].participant_count == 2


def test_a_deadline_counts_from_the_opening(core: CoordinatorHarness, clock: FakeClock) -> None:
    session_id = core.start(rounds=policy(1, target=4))
    core.submit("device-0", session_id)
    opened_at = core.round(session_id).opened_at
    clock.advance(60)

    change(core, session_id, deadline=Duration(seconds=900))
    assert core.round(session_id).deadline_at == opened_at + timedelta(seconds=900)
    change(core, session_id, deadline=Duration(seconds=30))
    core.settle()

    assert core.round(session_id, 1).state == "published"


def test_statements_name_the_rule_in_force_and_verify_before_and_after(
    core: CoordinatorHarness,
) -> None:
    session_id = core.start(
        rounds=policy(2),
        transfer=training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
    )
    old = config_digest(core.training.get(session_id).config)
    for count in (2, 3):
        if count == 3:
            change(core, session_id, quorum=3, target=3)
        for number in range(count):
            core.submit(f"device-{number}", session_id)
        core.settle()

    new = config_digest(core.training.get(session_id).config)
    assert old != new
    assert [digest_of(core, session_id, version) for version in (0, 1, 2)] == [old, old, new]
    for version in (1, 2):
        found = recompute_version(core.context, session_id, version)
        assert (found.recomputed, found.differences) == (True, ())
    (entry,) = entries(core, session_id)
    assert entry["round"] == 2
    assert (entry["old"]["quorum"], entry["old"]["config_digest"]) == (2, old)
    assert (entry["new"]["quorum"], entry["new"]["config_digest"]) == (3, new)


def test_a_replaced_configuration_explains_no_later_version(core: CoordinatorHarness) -> None:
    session_id = core.start(
        rounds=policy(1),
        transfer=training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
    )
    core.submit("device-0", session_id)
    core.settle()
    core.submit("device-0", session_id)
    core.settle()
    change(core, session_id, target=2)
    replaced = replaced_configs.REPLACED
    core.database.write(lambda session: session.execute(replaced.update().values(last_round=1)))

    found = recompute_version(core.context, session_id, 2)

    assert "configuration" in found.differences[0]


def test_the_same_values_again_change_nothing(core: CoordinatorHarness) -> None:
    session_id = core.start(rounds=policy(2))

    for _ in range(2):
        change(core, session_id, quorum=3, target=3)

    assert len(entries(core, session_id)) == 1
    with core.database.read() as session:
        assert len(replaced_configs.list_replaced(session, session_id)) == 1


def test_a_session_changes_before_its_start(core: CoordinatorHarness) -> None:
    session_id = core.create(rounds=policy(2))

    assert change(core, session_id, quorum=1).rounds.quorum == 1
    core.training.start(SYSTEM, session_id)

    assert core.round(session_id).quorum == 1


@pytest.mark.parametrize(
    "values",
    [
        {"quorum": 5},
        {"target": 1},
        {"quorum": 0},
        {"deadline": Duration(seconds=0)},
        {"deadline": Duration(seconds=91 * 86_400)},
    ],
)
def test_what_creation_refuses_is_refused(core: CoordinatorHarness, values: dict[str, Any]) -> None:
    session_id = core.start(rounds=policy(2, target=4))
    before = core.training.get(session_id)

    with pytest.raises(InvalidRequestError):
        change(core, session_id, **values)

    assert core.training.get(session_id) == before


def test_calibrated_noise_keeps_its_quorum(core: CoordinatorHarness) -> None:
    session_id = core.start(
        rounds=policy(2),
        privacy=training_pb2.PrivacyPolicy(
            noise_multiplier=1, clip_norm=1, delta=1e-5, epsilon_budget=100
        ),
        strategy=training_pb2.StrategyConfig(uniform_weights=True),
    )

    with pytest.raises(InvalidRequestError, match="noise is calibrated"):
        change(core, session_id, quorum=1)
    assert change(core, session_id, deadline=Duration(seconds=60)).rounds.deadline.seconds == 60


def test_an_ended_or_unknown_session_does_not_change(core: CoordinatorHarness) -> None:
    session_id = core.start(rounds=policy(2))
    core.training.cancel(SYSTEM, session_id, "")

    with pytest.raises(WrongStateError):
        change(core, session_id, quorum=1)
    with pytest.raises(TrainingSessionNotFoundError):
        change(core, "no such session", quorum=1)


def test_a_complete_configuration_is_completed_to_itself() -> None:
    config = complete(training_pb2.TrainingConfig(rounds=policy(2, target=4)))

    assert complete(config) == config
