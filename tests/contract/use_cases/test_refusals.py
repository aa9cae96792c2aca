"""Updates that are refused: by the round, by the device, by their header or by their payload; nothing is written."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import (
    DeviceRevokedError,
    DeviceSuspendedError,
    DigestMismatchError,
    InvalidManifestError,
    InvalidRequestError,
    InvalidUpdateError,
    NotSelectedError,
    QflareError,
    RoundNotOpenError,
    StaleBaseVersionError,
    TrainingSessionNotFoundError,
    UpdateTooLargeError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import ModelUpdate
from qflare_server.use_cases.devices.administration import Profile
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.uploads import refuse
from tests.support.use_cases import CoordinatorHarness, Draft, vector

# Where the round does not take it


def test_update_for_a_closed_round_is_refused(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    late = core.draft("device-1", training_session_id, vector(1.0))
    core.submit("device-0", training_session_id)

    refuse(core, late, RoundNotOpenError)


def test_update_for_an_older_version_is_refused_with_the_current_one(
    core: CoordinatorHarness,
) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    late = core.draft("device-1", training_session_id, vector(1.0))
    core.submit("device-0", training_session_id)
    core.settle()

    error = refuse(core, late, StaleBaseVersionError)

    assert error.metadata == {"current_version": "1"}


@pytest.mark.parametrize("version", [1, 2**31 - 1])
def test_base_version_of_the_future_is_refused(
    core: CoordinatorHarness, draft: Draft, version: int
) -> None:
    draft.statement.base_version = version

    refuse(core, draft, StaleBaseVersionError)


def test_update_past_the_deadline_is_refused(
    core: CoordinatorHarness, draft: Draft, clock: FakeClock
) -> None:
    clock.advance(600)

    refuse(core, draft, RoundNotOpenError)


def test_update_of_a_paused_session_is_refused(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    core.training.pause(SYSTEM, training_session_id)

    refuse(core, draft, RoundNotOpenError)


def test_update_of_a_cancelled_session_is_refused(
    core: CoordinatorHarness, training_session_id: str, draft: Draft
) -> None:
    core.training.cancel(SYSTEM, training_session_id, "")

    refuse(core, draft, RoundNotOpenError)


def test_round_that_has_not_been_opened_is_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.statement.round_number = 2

    refuse(core, draft, RoundNotOpenError)


def test_unknown_session_is_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.statement.training_session_id = str(uuid.uuid4())

    refuse(core, draft, TrainingSessionNotFoundError)


def test_device_that_was_not_selected_is_refused(core: CoordinatorHarness) -> None:
    core.devices.add(SYSTEM, "phone-1", Profile(device_type="phone"))
    training_session_id = core.start(selection=training_pb2.SelectionPolicy(device_types=["phone"]))
    draft = core.draft("phone-1", training_session_id, vector(1.0))
    draft.device = replace(draft.device, device_id="device-0")
    draft.statement.device_id = "device-0"

    refuse(core, draft, NotSelectedError)


Move = Callable[[CoordinatorHarness], object]


def revoke(core: CoordinatorHarness) -> object:
    return core.devices.revoke(SYSTEM, "device-0", "")


def suspend(core: CoordinatorHarness) -> object:
    return core.devices.suspend(SYSTEM, "device-0", "")


MOVES = pytest.mark.parametrize(
    ("move", "error"), [(revoke, DeviceRevokedError), (suspend, DeviceSuspendedError)]
)


@MOVES
def test_device_that_may_not_call_is_refused(
    core: CoordinatorHarness, draft: Draft, move: Move, error: type[QflareError]
) -> None:
    move(core)

    refuse(core, draft, error)


@MOVES
def test_device_that_is_stopped_in_mid_upload_is_refused(
    large: CoordinatorHarness, big: Draft, move: Move, error: type[QflareError]
) -> None:
    def pieces() -> Iterator[tuple[int, bytes]]:
        yield big.chunks[0]
        move(large)
        yield from big.chunks[1:]

    with pytest.raises(error):
        large.send(big, pieces())

    assert large.count(ModelUpdate) == 0


# Headers that are not what they have to be


Spoil = Callable[[Any], None]


def assign(name: str, value: object) -> Spoil:
    return lambda statement: setattr(statement, name, value)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (assign("realm", "other"), InvalidRequestError),
        (assign("device_id", "device-1"), InvalidRequestError),
        (assign("update_id", ""), InvalidRequestError),
        (assign("update_id", "not a uuid"), InvalidRequestError),
        (assign("update_id", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"), InvalidRequestError),
        (assign("update_id", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"), InvalidRequestError),
        (assign("round_number", 0), InvalidRequestError),
        (assign("round_number", -1), InvalidRequestError),
        (assign("base_version", -1), InvalidRequestError),
        (assign("base_digest", "0" * 64), InvalidRequestError),
        (assign("task_nonce", "0" * 64), InvalidRequestError),
        (assign("example_count", 0), InvalidRequestError),
        (assign("example_count", -5), InvalidRequestError),
        (assign("example_count", 2**40 + 1), InvalidRequestError),
        (assign("kind", training_pb2.UPDATE_KIND_DELTA), InvalidRequestError),
        (assign("encoding", training_pb2.ENCODING_FLOAT16), InvalidRequestError),
        (assign("layout_digest", "0" * 64), InvalidManifestError),
        (assign("size_bytes", 11), InvalidManifestError),
        (assign("payload_digest", "0" * 64), DigestMismatchError),
        (lambda statement: statement.metrics.update({"loss": float("nan")}), InvalidRequestError),
        (lambda statement: statement.metrics.update({"": 1.0}), InvalidRequestError),
        (lambda statement: statement.metrics.update({"a\nb": 1.0}), InvalidRequestError),
        (
            lambda statement: statement.metrics.update({str(n): 1.0 for n in range(65)}),
            InvalidRequestError,
        ),
    ],
)
def test_wrong_statement_is_refused(
    core: CoordinatorHarness, draft: Draft, spoil: Spoil, error: type[QflareError]
) -> None:
    spoil(draft.statement)

    refuse(core, draft, error)


def test_epochs_that_fit_no_column_are_left_out(
    core: CoordinatorHarness, training_session_id: str
) -> None:
    core.submit("device-0", training_session_id, epochs=1e300)

    (row,) = core.updates(training_session_id, 1)
    assert row.local_epochs is None
    assert row.metrics == {"epochs": 1e300}


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", bytes(65_537)])
def test_bytes_that_are_no_statement_are_refused(
    core: CoordinatorHarness, draft: Draft, payload: bytes
) -> None:
    header = draft.header()
    header.statement.payload = payload

    with pytest.raises(InvalidRequestError):
        core.uploads.submit(SYSTEM, draft.device, header, iter(draft.chunks))


def test_layout_of_another_model_is_refused(
    core: CoordinatorHarness, training_session_id: str
) -> None:
    draft = core.draft("device-0", training_session_id, {"v": np.zeros(3, np.float32)})

    refuse(core, draft, InvalidManifestError)


def test_payload_over_the_bound_is_refused(make_core: MakeCore, core: CoordinatorHarness) -> None:
    training_session_id = core.start()
    small = make_core(max_payload_bytes=8)
    draft = core.draft("device-0", training_session_id, vector(1.0))

    refuse(small, draft, UpdateTooLargeError)


# Payloads that are not what was stated


def test_too_few_bytes_are_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.chunks = [(0, draft.chunks[0][1][:-1])]

    refuse(core, draft, InvalidUpdateError)


def test_too_many_bytes_are_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.chunks = [(0, draft.chunks[0][1] + b"\0")]

    refuse(core, draft, InvalidUpdateError)


@pytest.mark.parametrize("extra", [b"", b"\0", bytes(2**20)])
def test_chunk_after_the_last_one_is_refused(
    core: CoordinatorHarness, draft: Draft, extra: bytes
) -> None:
    draft.chunks.append((1, extra))

    refuse(core, draft, InvalidUpdateError)


def test_chunk_after_the_last_one_of_a_large_update_is_refused(
    large: CoordinatorHarness, big: Draft
) -> None:
    big.chunks.append((3, b""))

    refuse(large, big, InvalidUpdateError)


def test_no_bytes_are_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.chunks = []

    refuse(core, draft, InvalidUpdateError)


@pytest.mark.parametrize("index", [1, -1, 2**31 - 1])
def test_chunk_out_of_order_is_refused(core: CoordinatorHarness, draft: Draft, index: int) -> None:
    draft.chunks = [(index, draft.chunks[0][1])]

    refuse(core, draft, InvalidUpdateError)


def test_changed_bytes_are_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.chunks = [(0, bytes(12))]

    refuse(core, draft, DigestMismatchError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_elements_that_are_not_finite_are_refused(
    core: CoordinatorHarness, training_session_id: str, value: float
) -> None:
    draft = core.draft("device-0", training_session_id, vector(value))

    refuse(core, draft, InvalidUpdateError)


def test_chunk_digests_of_another_payload_are_refused(
    core: CoordinatorHarness, draft: Draft
) -> None:
    draft.chunk_digests = bytes(32)

    refuse(core, draft, DigestMismatchError)


def test_chunk_digests_of_a_wrong_length_are_refused(
    core: CoordinatorHarness, draft: Draft
) -> None:
    draft.chunk_digests = bytes(31)

    refuse(core, draft, DigestMismatchError)


def test_several_chunks_without_digests_are_refused_before_the_first(
    large: CoordinatorHarness, big: Draft
) -> None:
    big.chunk_digests = b""

    with pytest.raises(DigestMismatchError, match="want 3"):
        large.send(big, iter(()))


def test_wrong_chunk_is_refused_at_once_where_digests_are_stated(
    large: CoordinatorHarness, big: Draft
) -> None:
    def pieces() -> Iterator[tuple[int, bytes]]:
        yield 0, bytes(len(big.chunks[0][1]))
        raise AssertionError("read on after a wrong chunk")

    with pytest.raises(DigestMismatchError):
        large.send(big, pieces())

    assert large.count(ModelUpdate) == 0
