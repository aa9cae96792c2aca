"""Asynchronous training with a buffer: late updates count once, in the open round, with their staleness."""

import math
from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import (
    DuplicateUpdateError,
    NotSelectedError,
    RoundNotOpenError,
    StaleBaseVersionError,
    StrategyRefusedError,
    TooManyRequestsError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.use_cases.versions.promotion import Promotion
from tests.conftest import FakeClock
from tests.support.use_cases import CoordinatorHarness, Draft, floats, vector

FEDBUFF = training_pb2.StrategyConfig(name="fedbuff")


def start(
    core: CoordinatorHarness, *, quorum: int = 1, max_staleness: int = 2, **config: Any
) -> str:
    rounds = training_pb2.RoundPolicy(quorum=quorum, max_staleness=max_staleness)
    return core.start(strategy=FEDBUFF, rounds=rounds, **config)


def run_round(
    core: CoordinatorHarness, training_session_id: str, device: str = "device-0", value: float = 1.0
) -> None:
    core.send(prepare(core, training_session_id, device, value))
    core.settle()


def prepare(core: CoordinatorHarness, training_session_id: str, device: str, value: float) -> Draft:
    """Return a device's update, of the kind that its training session asks for."""
    draft = core.draft(device, training_session_id, vector(value))
    config = core.training.get(training_session_id).config
    draft.statement.kind = config.transfer.update_kind
    return draft


def late(
    core: CoordinatorHarness, training_session_id: str, value: float = 8.0, rounds: int = 1
) -> Draft:
    """Return an update of version 0 that its device has ready only some versions later."""
    draft = prepare(core, training_session_id, "device-3", value)
    for number in range(rounds):
        run_round(core, training_session_id, value=float(number + 1))
    return draft


def test_a_late_update_counts_in_the_open_round(core: CoordinatorHarness) -> None:
    training_session_id = start(core)

    receipt = core.send(late(core, training_session_id))

    assert (receipt.round_number, receipt.base_version, receipt.acceptance_sequence) == (2, 0, 1)


@pytest.mark.parametrize("kind", [training_pb2.UPDATE_KIND_WEIGHTS, training_pb2.UPDATE_KIND_DELTA])
def test_what_a_late_update_changed_is_scaled_down_by_its_staleness(
    core: CoordinatorHarness, kind: training_pb2.UpdateKind.ValueType
) -> None:
    transfer = training_pb2.TransferPolicy(update_kind=kind)
    training_session_id = start(core, transfer=transfer)
    draft = late(core, training_session_id, 8.0, rounds=2)
    before = floats(core.weights(training_session_id))

    core.send(draft)
    core.settle()

    # The update's change against version 0, which is all zeros, is 8 in either form; it is two versions behind.
    change = np.array(floats(core.weights(training_session_id))) - before
    assert change == pytest.approx(8.0 / math.sqrt(3.0), rel=1e-6)


def test_an_update_past_the_bound_is_refused(core: CoordinatorHarness) -> None:
    training_session_id = start(core, max_staleness=1)

    with pytest.raises(StaleBaseVersionError):
        core.send(late(core, training_session_id, rounds=2))


def test_what_was_trained_from_a_version_that_is_undone_is_refused(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core, max_staleness=10)
    run_round(core, training_session_id)
    draft = prepare(core, training_session_id, "device-3", 8.0)
    run_round(core, training_session_id)

    Promotion(core.context).roll_back(SYSTEM, training_session_id, 0, "version 1 was poisoned")

    with pytest.raises(StaleBaseVersionError):
        core.send(draft)


def test_an_update_is_asked_for_again_while_the_buffer_becomes_a_version(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core)
    draft = core.draft("device-3", training_session_id, vector(8.0))
    core.submit("device-0", training_session_id)  # fills the buffer; nothing is published yet

    with pytest.raises(TooManyRequestsError):
        core.send(draft)
    core.settle()

    assert core.send(draft).round_number == 2


def test_a_device_contributes_once_from_a_version(core: CoordinatorHarness) -> None:
    training_session_id = start(core, quorum=2)
    first = core.draft("device-3", training_session_id, vector(8.0))
    second = core.draft("device-3", training_session_id, vector(8.0))
    core.send(first)
    core.submit("device-0", training_session_id)
    core.settle()

    with pytest.raises(DuplicateUpdateError):
        core.send(second)


def test_a_late_update_that_is_sent_again_gets_its_first_receipt(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    draft = late(core, training_session_id)
    receipt = core.send(draft)
    core.settle()

    assert core.send(draft) == receipt


def test_a_device_waits_for_the_next_version_once_it_has_contributed(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core, quorum=2)
    core.submit("device-3", training_session_id)

    waiting = core.tasks.next_task("device-3", training_session_id)
    run_round(core, training_session_id)
    after = core.tasks.next_task("device-3", training_session_id)

    assert waiting.round is None
    assert after.round is not None
    assert after.round.base_version == 1


def test_a_device_that_was_late_trains_from_the_latest_version_next(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core, quorum=2)
    draft = core.draft("device-3", training_session_id, vector(8.0))
    core.submit("device-0", training_session_id)
    core.submit("device-1", training_session_id)
    core.settle()
    core.send(draft)

    after = core.tasks.next_task("device-3", training_session_id)

    assert after.round is not None
    assert after.round.base_version == 1


def test_selection_is_that_of_the_round_a_device_trained_for(core: CoordinatorHarness) -> None:
    selection = training_pb2.SelectionPolicy(device_count=1, seed=1)
    training_session_id = start(core, selection=selection)
    chosen = next(
        name for name in _names(4) if core.tasks.next_task(name, training_session_id).round
    )
    draft = core.draft(chosen, training_session_id, vector(8.0))
    stranger = next(name for name in _names(4) if name != chosen)
    core.submit(chosen, training_session_id, vector(1.0))
    core.settle()

    draft.statement.device_id = stranger
    draft.device = type(draft.device)(stranger, None)

    with pytest.raises(NotSelectedError):
        core.send(draft)


def _names(count: int) -> list[str]:
    return [f"device-{number}" for number in range(count)]


def test_nothing_is_taken_while_paused(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    draft = late(core, training_session_id)
    core.training.pause(SYSTEM, training_session_id)

    with pytest.raises(RoundNotOpenError):
        core.send(draft)


def test_a_buffer_past_its_deadline_asks_to_send_again(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = start(core, quorum=2)
    core.submit("device-0", training_session_id)
    draft = core.draft("device-3", training_session_id, vector(8.0))
    clock.advance(601)

    with pytest.raises(TooManyRequestsError):
        core.send(draft)
    core.settle()

    assert core.send(draft).acceptance_sequence == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("median", "one fixed cohort"), ("fedavg", "full weight"), ("fedadam", "full weight")],
)
def test_rules_that_need_one_base_version_are_refused(
    core: CoordinatorHarness, name: str, message: str
) -> None:
    rounds = training_pb2.RoundPolicy(
        quorum=3, late_update_action=training_pb2.LATE_UPDATE_ACTION_CARRY
    )
    with pytest.raises(StrategyRefusedError, match=message):
        core.start(strategy=training_pb2.StrategyConfig(name=name), rounds=rounds)
