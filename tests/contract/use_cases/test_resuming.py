"""Large updates: resumed where they broke, refused before their bytes, and swept when abandoned."""

import uuid
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from qflare.tensors import payload_digest
from qflare.v1 import training_pb2
from qflare_server.errors import (
    DigestMismatchError,
    DisconnectedError,
    InvalidUpdateError,
    RoundNotOpenError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import ModelUpdate, Upload
from qflare_server.use_cases.updates.upload import MAX_UPLOADS_OF_DEVICE
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.uploads import BIG, BrokenError, broken, unread
from tests.support.use_cases import CoordinatorHarness, Draft, vector


def test_large_update_is_accepted(large: CoordinatorHarness, big: Draft) -> None:
    receipt = large.send(big)

    assert receipt.acceptance_sequence == 1
    assert len(big.chunks) == 3


def test_large_update_goes_on_where_it_broke(large: CoordinatorHarness, big: Draft) -> None:
    with pytest.raises(BrokenError):
        large.send(big, broken(big, 2))

    following, _ = large.uploads.find(big.device, big.statement.update_id)
    large.send(big, big.chunks[following:])

    assert following == 2
    assert large.updates(big.statement.training_session_id, 1)[0].payload_digest == payload_digest(
        [data for _, data in big.chunks]
    )


def test_large_update_goes_on_after_a_restart(
    large: CoordinatorHarness, make_core: MakeCore, big: Draft
) -> None:
    with pytest.raises(BrokenError):
        large.send(big, broken(big, 1))
    restarted = make_core(inline_payload_bytes=0)

    following, _ = restarted.uploads.find(big.device, big.statement.update_id)
    restarted.send(big, big.chunks[following:])

    assert following == 1
    restarted.training.pause(SYSTEM, big.statement.training_session_id)
    assert restarted.count(ModelUpdate) == 1


def test_version_of_a_resumed_update_holds_all_of_it(large: CoordinatorHarness) -> None:
    values = np.arange(BIG, dtype=np.float32)
    training_session_id = large.start(vector(0.0, BIG), rounds=training_pb2.RoundPolicy(quorum=1))
    draft = large.draft("device-0", training_session_id, {"w": values})
    with pytest.raises(BrokenError):
        large.send(draft, broken(draft, 2))

    large.send(draft, draft.chunks[2:])
    large.settle()

    assert large.weights(training_session_id, 1) == values.tobytes()


def test_accepted_update_is_found_with_its_receipt(large: CoordinatorHarness, big: Draft) -> None:
    receipt = large.send(big)

    assert large.uploads.find(big.device, big.statement.update_id) == (0, receipt)


def test_upload_of_another_device_is_not_found(large: CoordinatorHarness, big: Draft) -> None:
    with pytest.raises(BrokenError):
        large.send(big, broken(big, 2))

    other = replace(big.device, device_id="device-1")

    assert large.uploads.find(other, big.statement.update_id) == (0, None)


def test_upload_that_nobody_began_starts_at_the_first_chunk(
    core: CoordinatorHarness, draft: Draft
) -> None:
    assert core.uploads.find(draft.device, str(uuid.uuid4())) == (0, None)


def _unread(problem: str) -> Iterator[tuple[int, bytes]]:
    raise AssertionError(problem)


def test_large_update_is_refused_before_its_bytes_where_it_cannot_be_accepted(
    large: CoordinatorHarness, big: Draft
) -> None:
    large.training.pause(SYSTEM, big.statement.training_session_id)

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield from _unread("read the payload of an update that cannot be accepted")

    with pytest.raises(RoundNotOpenError):
        large.send(big, pieces())


def test_large_update_sent_again_is_not_read_again(large: CoordinatorHarness, big: Draft) -> None:
    receipt = large.send(big)

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield from _unread("read the payload of an update that is accepted")

    assert large.send(big, pieces()) == receipt


@pytest.mark.parametrize("index", [0, 2])
def test_wrong_large_update_can_be_sent_right_afterwards(
    large: CoordinatorHarness, big: Draft, index: int
) -> None:
    right = big.chunks
    wrong = list(right)
    wrong[index] = (index, bytes(len(right[index][1])))

    with pytest.raises(DigestMismatchError):
        large.send(big, wrong)
    following, _ = large.uploads.find(big.device, big.statement.update_id)
    large.send(big, right[following:])

    assert following == 0
    assert large.count(ModelUpdate) == 1


def test_wrong_large_updates_do_not_use_up_the_device_s_share(
    large: CoordinatorHarness, big_session_id: str
) -> None:
    for _ in range(MAX_UPLOADS_OF_DEVICE):
        draft = large.draft("device-0", big_session_id, vector(float("nan"), BIG))
        with pytest.raises(InvalidUpdateError):
            large.send(draft)

    large.submit("device-0", big_session_id, vector(1.0, BIG))


def unfinished(core: CoordinatorHarness) -> tuple[int, int]:
    """Return the number of unfinished uploads, and of chunks that the store holds."""
    ids = core.store.payload_ids()
    return core.count(Upload), sum(core.store.stored_count(payload_id) for payload_id in ids)


def test_a_device_with_many_unfinished_uploads_abandons_the_oldest(
    large: CoordinatorHarness, big_session_id: str, clock: FakeClock
) -> None:
    drafts = []
    _, chunks_before = unfinished(large)
    for _ in range(MAX_UPLOADS_OF_DEVICE + 3):
        drafts.append(large.draft("device-0", big_session_id, vector(1.0, BIG)))
        with pytest.raises(BrokenError):
            large.send(drafts[-1], broken(drafts[-1], 1))
        clock.advance(1)

    kept = [large.uploads.find(each.device, each.statement.update_id)[0] for each in drafts]

    assert kept == [0] * 3 + [1] * MAX_UPLOADS_OF_DEVICE
    assert unfinished(large) == (MAX_UPLOADS_OF_DEVICE, chunks_before + MAX_UPLOADS_OF_DEVICE)
    assert large.send(drafts[-1], drafts[-1].chunks[1:]).acceptance_sequence == 1


@pytest.mark.parametrize("is_sent_again", [False, True])
def test_uploads_that_are_refused_for_good_leave_nothing(
    large: CoordinatorHarness, is_sent_again: bool
) -> None:
    for _ in range(MAX_UPLOADS_OF_DEVICE + 1):
        session_id = large.start(vector(0.0, BIG), rounds=training_pb2.RoundPolicy(quorum=1))
        before = unfinished(large)
        draft = large.draft("device-0", session_id, vector(1.0, BIG))
        if is_sent_again:
            with pytest.raises(BrokenError):
                large.send(draft, broken(draft, 2))

        def late(draft: Draft = draft, session_id: str = session_id) -> Iterator[tuple[int, bytes]]:
            yield from draft.chunks
            large.training.cancel(SYSTEM, session_id, "over")

        if is_sent_again:
            large.training.cancel(SYSTEM, session_id, "over")
        with pytest.raises(RoundNotOpenError):
            large.send(draft, unread() if is_sent_again else late())

        assert unfinished(large) == before


def test_disconnection_keeps_nothing_that_counts(large: CoordinatorHarness, big: Draft) -> None:
    def pieces() -> Iterator[tuple[int, bytes]]:
        yield big.chunks[0]
        raise DisconnectedError

    with pytest.raises(DisconnectedError):
        large.send(big, pieces())

    assert large.count(ModelUpdate) == 0
    assert large.round(big.statement.training_session_id).accepted_count == 0
