"""Receipts of accepted updates: the first one, repeated, and those of many at once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy.orm import Session

from qflare.tensors import Array, Manifest, chunks
from qflare.v1 import training_pb2
from qflare_server.errors import (
    DuplicateUpdateError,
    QflareError,
    StoreUnavailableError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, ModelUpdate
from qflare_server.use_cases.updates.upload import Uploads
from tests.conftest import START, FakeClock
from tests.contract.conftest import MakeCore
from tests.support.uploads import (
    QUORUM_4,
    WAIT_S,
    refuse,
)
from tests.support.use_cases import CoordinatorHarness, Draft, vector


def test_receipt_names_what_was_accepted(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    receipt = core.send(draft)

    assert receipt.update_id == draft.statement.update_id
    assert receipt.statement_digest == draft.statement_digest
    assert (receipt.training_session_id, receipt.round_number) == (training_session_id, 1)
    assert (receipt.acceptance_sequence, receipt.accepted_at) == (1, START)


def test_row_holds_what_the_device_stated(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    core.send(draft)

    (row,) = core.updates(training_session_id, 1)
    assert (row.device_id, row.base_version, row.example_count) == ("device-0", 0, 10)
    assert (row.loss, row.accuracy, row.local_epochs) == (0.5, 0.25, 2)
    assert row.payload_digest == draft.statement.payload_digest
    assert row.statement == draft.header().statement.payload
    assert row.state == "pending"


def test_update_is_audited_with_it(core: CoordinatorHarness, draft: Draft) -> None:
    before = core.count(AuditLog)

    core.send(draft)

    assert core.count(AuditLog) == before + 1


def test_same_update_again_gets_the_first_receipt(
    core: CoordinatorHarness, draft: Draft, clock: FakeClock
) -> None:
    first = core.send(draft)
    clock.advance(5)

    second = core.send(draft)

    assert second == first
    assert core.count(ModelUpdate) == 1


def test_same_update_after_the_version_gets_the_first_receipt(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    draft = core.draft("device-0", training_session_id, vector(1.0))
    first = core.send(draft)
    core.settle()

    assert core.send(draft) == first


def test_same_update_of_a_revoked_device_gets_the_first_receipt(
    core: CoordinatorHarness, draft: Draft
) -> None:
    first = core.send(draft)
    core.devices.revoke(SYSTEM, "device-0", "")

    assert core.send(draft) == first


def test_same_update_to_a_restarted_coordinator_gets_the_first_receipt(
    core: CoordinatorHarness, make_core: MakeCore, draft: Draft
) -> None:
    first = core.send(draft)

    assert make_core().send(draft) == first


def test_different_update_for_the_round_is_refused(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    other = core.draft("device-0", training_session_id, vector(2.0))
    core.send(draft)

    refuse(core, other, DuplicateUpdateError)


def test_update_id_of_another_device_is_refused(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    core.send(draft)
    other = core.draft("device-1", training_session_id, vector(1.0))
    other.statement.update_id = draft.statement.update_id

    refuse(core, other, DuplicateUpdateError)


@pytest.mark.parametrize("same", [True, False])
def test_one_of_many_at_once_is_accepted(
    core: CoordinatorHarness, training_session_id: str, same: bool
) -> None:
    count = 6
    drafts = [core.draft("device-0", training_session_id, vector(1.0)) for _ in range(count)]
    barrier = threading.Barrier(count)

    def send(draft: Draft) -> object:
        barrier.wait(WAIT_S)
        try:
            return core.send(draft)
        except QflareError as error:
            return error.reason

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(send, [drafts[0]] * count if same else drafts))

    assert core.count(ModelUpdate) == 1
    receipts = [answer for answer in answers if not isinstance(answer, str)]
    refusals = {answer for answer in answers if isinstance(answer, str)}
    assert len(receipts) == (count if same else 1)
    assert refusals == (set() if same else {"DUPLICATE_UPDATE"})


def test_sequences_of_many_at_once_have_no_gap(make_core: MakeCore) -> None:
    count = 12
    cores = [make_core(), make_core()]
    names = cores[0].add_devices(count)
    training_session_id = cores[0].start(rounds=training_pb2.RoundPolicy(quorum=count))
    drafts = [cores[0].draft(name, training_session_id, vector(1.0)) for name in names]
    barrier = threading.Barrier(count)

    def send(number: int) -> int:
        barrier.wait(WAIT_S)
        return cores[number % 2].send(drafts[number]).acceptance_sequence

    with ThreadPoolExecutor(count) as pool:
        sequences = list(pool.map(send, range(count)))

    assert sorted(sequences) == list(range(1, count + 1))
    assert cores[0].round(training_session_id).state == "closed"
    assert cores[0].round(training_session_id).accepted_count == count


def test_last_place_closes_the_round_and_wakes_the_worker(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=2))
    core.submit("device-0", training_session_id)
    core.woken.clear()

    core.submit("device-1", training_session_id)

    assert core.round(training_session_id).state == "closed"
    assert core.woken.is_set()


def test_integers_travel_with_the_floats(core: CoordinatorHarness) -> None:
    arrays: dict[str, Array] = {"n": np.array([7, -7], np.int64), "w": np.ones(2, np.float32)}
    training_session_id = core.start(arrays, rounds=training_pb2.RoundPolicy(quorum=1))

    core.submit("device-0", training_session_id, arrays)
    core.settle()

    assert core.weights(training_session_id, 1) == b"".join(
        chunks(arrays, Manifest.from_arrays(arrays))
    )


# Threads that wait for each other


def test_thread_that_gave_up_waiting_does_not_block_those_behind_it(
    make_core: MakeCore, clock: FakeClock
) -> None:
    core = make_core(database_timeout_s=0.1)
    core.add_devices(4)
    training_session_id = core.start(rounds=QUORUM_4)
    drafts = [
        core.draft(f"device-{number}", training_session_id, vector(1.0)) for number in range(3)
    ]
    slow = SlowDatabase(core, clock)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.uploads.submit, SYSTEM, drafts[0].device, *parts(drafts[0]))
        assert slow.entered.wait(WAIT_S)
        with pytest.raises(StoreUnavailableError):
            slow.uploads.submit(SYSTEM, drafts[1].device, *parts(drafts[1]))
        slow.release.set()
        first.result(WAIT_S)
        third = pool.submit(slow.uploads.submit, SYSTEM, drafts[2].device, *parts(drafts[2]))
        assert third.result(WAIT_S).acceptance_sequence == 2


def parts(draft: Draft) -> tuple[Any, Iterator[tuple[int, bytes]]]:
    return draft.header(), iter(draft.chunks)


class SlowDatabase:
    """Uploads over a database whose first write takes until it is released."""

    def __init__(self, core: CoordinatorHarness, clock: FakeClock) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        inner = core.database
        outer = self

        class Held(type(inner)):  # type: ignore[misc]
            def __init__(self) -> None:
                self.engine, self.is_sqlite = inner.engine, inner.is_sqlite

            def read(self) -> Any:
                return inner.read()

            def write(self, work: Callable[[Session], Any]) -> Any:
                outer.entered.set()
                assert outer.release.wait(WAIT_S)
                return inner.write(work)

        context = replace(core.context, database=Held(), clock=clock)
        self.uploads = Uploads(context, core.executor)
