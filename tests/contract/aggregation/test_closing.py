"""What a round of many updates costs when it closes: its statements do not multiply with the updates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, select

from qflare.v1 import training_pb2
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.tables import Payload, Round
from qflare_server.training import retention
from qflare_server.training.retention import prune_payloads
from tests.support.use_cases import CoordinatorHarness

NONE = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_NONE)


@contextmanager
def statements(core: CoordinatorHarness) -> Iterator[list[str]]:
    """Give the texts of the statements that the block runs."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, text: Any, *_rest: Any) -> None:
        found.append(str(text))

    event.listen(core.database.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(core.database.engine, "before_cursor_execute", note)


def closed(core: CoordinatorHarness, count: int) -> list[str]:
    """Run a round of so many updates; return the statements from after the last one on."""
    rounds = training_pb2.RoundPolicy(quorum=count)
    training_session_id = core.start(rounds=rounds, transfer=NONE)
    for number in range(count):
        core.submit(f"device-{number}", training_session_id)
    with statements(core) as found:
        core.settle()
    assert core.versions(training_session_id)[1].participant_count == count
    assert {row.state for row in core.updates(training_session_id, 1)} == {"aggregated"}
    return found


def test_closing_runs_as_many_statements_for_many_updates_as_for_few(
    core: CoordinatorHarness,
) -> None:
    few, many = closed(core, 1), closed(core, 4)

    assert len(many) == len(few)
    assert not [text for text in many if text.startswith("UPDATE model_updates")]


def test_pruning_looks_only_at_rounds_that_were_not_pruned(core: CoordinatorHarness) -> None:
    training_session_id = core.start(
        rounds=training_pb2.RoundPolicy(quorum=1), total_rounds=5, transfer=NONE
    )
    for number in range(4):
        core.submit(f"device-{number}", training_session_id)
        core.settle()

    with statements(core) as found:
        prune_payloads(core.context, training_session_id)

    assert not [text for text in found if "payloads" in text]
    with core.database.read() as session:
        assert training_sessions.unpruned_rounds(session, training_session_id, ()) == []
        pruned = session.scalars(select(Round.pruned_at).order_by(Round.number)).all()
    assert [at is None for at in pruned] == [False] * 4 + [True]


def test_pruning_that_was_cut_short_goes_on(
    core: CoordinatorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = training_pb2.TransferPolicy(
        payload_retention=training_pb2.PAYLOAD_RETENTION_LAST_ROUNDS, retained_rounds=1
    )
    training_session_id = core.start(
        rounds=training_pb2.RoundPolicy(quorum=3), total_rounds=5, transfer=keep
    )
    monkeypatch.setattr(retention, "PRUNE_BATCH", 2)
    for number in range(3):
        core.submit(f"device-{number}", training_session_id)
    core.settle()
    core.database.write(
        lambda session: retention._prune(core.context, training_session_id, 1, 2, session)
    )
    with core.database.read() as session:
        assert training_sessions.unpruned_rounds(session, training_session_id, ()) == [(1, 3)]
        left = session.scalars(select(Payload.pruned_at).where(Payload.pruned_at.is_not(None)))
        assert len(left.all()) == 2

    for number in range(3):
        core.submit(f"device-{number}", training_session_id)
    core.settle()

    ids = [row.payload_id for row in core.updates(training_session_id, 1)]
    with core.database.read() as session:
        places = session.scalars(select(Payload.location).where(Payload.id.in_(ids))).all()
    assert places == ["none"] * 3
