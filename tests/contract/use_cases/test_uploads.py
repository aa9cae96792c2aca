"""An update is accepted once, whole, and only where the round takes it; whatever else comes leaves nothing."""

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qflare.crypto.signing import PublicKey, SigningKey
from qflare.tensors import Array, Manifest, chunks, payload_digest
from qflare.v1 import training_pb2
from qflare_server.errors import (
    DeviceRevokedError,
    DeviceSuspendedError,
    DigestMismatchError,
    DisconnectedError,
    DuplicateUpdateError,
    InvalidManifestError,
    InvalidRequestError,
    InvalidSignatureError,
    InvalidUpdateError,
    NotSelectedError,
    QflareError,
    RoundNotOpenError,
    StaleBaseVersionError,
    StoreUnavailableError,
    TrainingSessionNotFoundError,
    UpdateTooLargeError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, ModelUpdate, Payload, PayloadChunk, Upload
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.updates.upload import MAX_UPLOADS_OF_DEVICE, Uploads
from tests.conftest import START, FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, Draft, vector

WAIT_S = 30.0
QUORUM_4 = training_pb2.RoundPolicy(quorum=4)
BIG = 700_000  # elements: three chunks of float32
WRITTEN = (ModelUpdate, Payload, AuditLog)


@pytest.fixture
def identity(core: CoordinatorHarness) -> str:
    return core.start(rounds=QUORUM_4)


@pytest.fixture
def draft(core: CoordinatorHarness, identity: str) -> Draft:
    return core.draft("device-0", identity, vector(1.0), loss=0.5, accuracy=0.25, epochs=2)


@pytest.fixture
def big_identity(large: CoordinatorHarness) -> str:
    return large.start(vector(0.0, BIG), rounds=QUORUM_4)


@pytest.fixture
def big(large: CoordinatorHarness, big_identity: str) -> Draft:
    return large.draft("device-0", big_identity, vector(1.0, BIG))


def refuse(core: CoordinatorHarness, draft: Draft, error: type[QflareError]) -> QflareError:
    """Send an update that is refused; nothing may have been written."""
    before = [core.count(model) for model in WRITTEN]

    with pytest.raises(error) as caught:
        core.send(draft)

    assert [core.count(model) for model in WRITTEN] == before
    return caught.value


# Receipts


def test_receipt_names_what_was_accepted(
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    receipt = core.send(draft)

    assert receipt.update_id == draft.statement.update_id
    assert receipt.statement_digest == draft.statement_digest
    assert (receipt.training_session_id, receipt.round_number) == (identity, 1)
    assert (receipt.acceptance_sequence, receipt.accepted_at) == (1, START)


def test_row_holds_what_the_device_stated(
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    core.send(draft)

    (row,) = core.updates(identity, 1)
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
    identity = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    draft = core.draft("device-0", identity, vector(1.0))
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
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    other = core.draft("device-0", identity, vector(2.0))
    core.send(draft)

    refuse(core, other, DuplicateUpdateError)


def test_update_id_of_another_device_is_refused(
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    core.send(draft)
    other = core.draft("device-1", identity, vector(1.0))
    other.statement.update_id = draft.statement.update_id

    refuse(core, other, DuplicateUpdateError)


@pytest.mark.parametrize("same", [True, False])
def test_one_of_many_at_once_is_accepted(
    core: CoordinatorHarness, identity: str, same: bool
) -> None:
    count = 6
    drafts = [core.draft("device-0", identity, vector(1.0)) for _ in range(count)]
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
    identity = cores[0].start(rounds=training_pb2.RoundPolicy(quorum=count))
    drafts = [cores[0].draft(name, identity, vector(1.0)) for name in names]
    barrier = threading.Barrier(count)

    def send(number: int) -> int:
        barrier.wait(WAIT_S)
        return cores[number % 2].send(drafts[number]).acceptance_sequence

    with ThreadPoolExecutor(count) as pool:
        sequences = list(pool.map(send, range(count)))

    assert sorted(sequences) == list(range(1, count + 1))
    assert cores[0].round(identity).state == "closed"
    assert cores[0].round(identity).accepted_count == count


def test_last_place_closes_the_round_and_wakes_the_worker(core: CoordinatorHarness) -> None:
    identity = core.start(rounds=training_pb2.RoundPolicy(quorum=2))
    core.submit("device-0", identity)
    core.woken.clear()

    core.submit("device-1", identity)

    assert core.round(identity).state == "closed"
    assert core.woken.is_set()


# Where the round does not take it


def test_update_for_a_closed_round_is_refused(core: CoordinatorHarness) -> None:
    identity = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    late = core.draft("device-1", identity, vector(1.0))
    core.submit("device-0", identity)

    refuse(core, late, RoundNotOpenError)


def test_update_for_an_older_version_is_refused_with_the_current_one(
    core: CoordinatorHarness,
) -> None:
    identity = core.start(rounds=training_pb2.RoundPolicy(quorum=1))
    late = core.draft("device-1", identity, vector(1.0))
    core.submit("device-0", identity)
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
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    core.training.pause(SYSTEM, identity)

    refuse(core, draft, RoundNotOpenError)


def test_update_of_a_cancelled_session_is_refused(
    core: CoordinatorHarness, identity: str, draft: Draft
) -> None:
    core.training.cancel(SYSTEM, identity, "")

    refuse(core, draft, RoundNotOpenError)


def test_round_that_has_not_been_opened_is_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.statement.round_number = 2

    refuse(core, draft, RoundNotOpenError)


def test_unknown_session_is_refused(core: CoordinatorHarness, draft: Draft) -> None:
    draft.statement.training_session_id = str(uuid.uuid4())

    refuse(core, draft, TrainingSessionNotFoundError)


def test_device_that_was_not_selected_is_refused(core: CoordinatorHarness) -> None:
    core.devices.add(SYSTEM, "phone-1", Profile(device_type="phone"))
    identity = core.start(selection=training_pb2.SelectionPolicy(device_types=["phone"]))
    draft = core.draft("phone-1", identity, vector(1.0))
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


def test_epochs_that_fit_no_column_are_left_out(core: CoordinatorHarness, identity: str) -> None:
    core.submit("device-0", identity, epochs=1e300)

    (row,) = core.updates(identity, 1)
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


def test_layout_of_another_model_is_refused(core: CoordinatorHarness, identity: str) -> None:
    draft = core.draft("device-0", identity, {"v": np.zeros(3, np.float32)})

    refuse(core, draft, InvalidManifestError)


def test_payload_over_the_bound_is_refused(make_core: MakeCore, core: CoordinatorHarness) -> None:
    identity = core.start()
    small = make_core(max_payload_bytes=8)
    draft = core.draft("device-0", identity, vector(1.0))

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
    core: CoordinatorHarness, identity: str, value: float
) -> None:
    draft = core.draft("device-0", identity, vector(value))

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


# Signatures


@pytest.fixture
def signing(make_core: MakeCore, signing_key: SigningKey) -> tuple[CoordinatorHarness, Draft]:
    """Return a coordinator that wants signatures, and a signed update of a device with a key."""
    core = make_core(require_signatures=True)
    public = signing_key.public
    columns = {
        "signature_algorithm": int(public.algorithm),
        "signature_public_key": public.data,
        "signature_key_id": public.key_id,
    }
    core.devices.add(SYSTEM, "device-0", Profile(), **columns)
    draft = core.draft("device-0", core.start(rounds=QUORUM_4), vector(1.0))
    draft.device = replace(
        draft.device,
        key_id=public.key_id,
        algorithm=int(public.algorithm),
        public_key=public.data,
    )
    draft.statement.key_id = public.key_id
    draft.signing_key = signing_key
    return core, draft


def test_signature_is_kept_with_the_update(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing

    core.send(draft)

    (row,) = core.updates(draft.statement.training_session_id, 1)
    assert row.key_id == draft.statement.key_id
    assert row.signature is not None


def test_update_without_a_signature_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    draft.signing_key = None

    refuse(core, draft, InvalidSignatureError)


def test_signature_of_another_key_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    draft.signing_key = SigningKey.generate()

    refuse(core, draft, InvalidSignatureError)


def test_signature_over_other_bytes_than_those_that_travel_is_refused(
    signing: tuple[CoordinatorHarness, Draft],
) -> None:
    core, draft = signing
    draft.statement.wire_digest = "0" * 64

    refuse(core, draft, InvalidRequestError)


def test_statement_changed_after_signing_is_refused(
    signing: tuple[CoordinatorHarness, Draft],
) -> None:
    core, draft = signing
    header = draft.header()
    draft.statement.example_count += 1
    header.statement.payload = draft.statement.SerializeToString(deterministic=True)

    with pytest.raises(InvalidSignatureError):
        core.uploads.submit(SYSTEM, draft.device, header, iter(draft.chunks))

    assert core.count(ModelUpdate) == 0


def test_signature_of_a_device_without_a_key_is_refused(
    core: CoordinatorHarness, draft: Draft, signing_key: SigningKey
) -> None:
    draft.signing_key = signing_key

    refuse(core, draft, InvalidSignatureError)


def test_two_signatures_are_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    header = draft.header()
    header.statement.signatures.append(header.statement.signatures[0])

    with pytest.raises(InvalidSignatureError):
        core.uploads.submit(SYSTEM, draft.device, header, iter(draft.chunks))


def test_key_of_another_device_is_refused(signing: tuple[CoordinatorHarness, Draft]) -> None:
    core, draft = signing
    other: PublicKey = SigningKey.generate().public
    draft.device = replace(draft.device, key_id=other.key_id, public_key=other.data)

    refuse(core, draft, InvalidSignatureError)


# Large payloads


class BrokenError(Exception):
    """The stream ends in the middle, as when the connection is lost."""


def broken(draft: Draft, count: int) -> Iterator[tuple[int, bytes]]:
    yield from draft.chunks[:count]
    raise BrokenError


def unread() -> Iterator[tuple[int, bytes]]:
    """A stream that must not be read."""
    yield from iter(_fail, None)


def _fail() -> tuple[int, bytes] | None:
    raise AssertionError("read a payload in vain")


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
    identity = large.start(vector(0.0, BIG), rounds=training_pb2.RoundPolicy(quorum=1))
    draft = large.draft("device-0", identity, {"w": values})
    with pytest.raises(BrokenError):
        large.send(draft, broken(draft, 2))

    large.send(draft, draft.chunks[2:])
    large.settle()

    assert large.weights(identity, 1) == values.tobytes()


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
    large: CoordinatorHarness, big_identity: str
) -> None:
    for _ in range(MAX_UPLOADS_OF_DEVICE):
        draft = large.draft("device-0", big_identity, vector(float("nan"), BIG))
        with pytest.raises(InvalidUpdateError):
            large.send(draft)

    large.submit("device-0", big_identity, vector(1.0, BIG))


def unfinished(core: CoordinatorHarness) -> tuple[int, int]:
    """Return the number of unfinished uploads, and of chunks that the store holds."""
    engine = core.store._engine  # type: ignore[attr-defined]
    with engine.connect() as connection:
        chunk_count = connection.execute(
            select(func.count()).select_from(PayloadChunk)
        ).scalar_one()
    return core.count(Upload), chunk_count


def test_a_device_with_many_unfinished_uploads_abandons_the_oldest(
    large: CoordinatorHarness, big_identity: str, clock: FakeClock
) -> None:
    drafts = []
    _, chunks_before = unfinished(large)
    for _ in range(MAX_UPLOADS_OF_DEVICE + 3):
        drafts.append(large.draft("device-0", big_identity, vector(1.0, BIG)))
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


def test_integers_travel_with_the_floats(core: CoordinatorHarness) -> None:
    arrays: dict[str, Array] = {"n": np.array([7, -7], np.int64), "w": np.ones(2, np.float32)}
    identity = core.start(arrays, rounds=training_pb2.RoundPolicy(quorum=1))

    core.submit("device-0", identity, arrays)
    core.settle()

    assert core.weights(identity, 1) == b"".join(chunks(arrays, Manifest.from_arrays(arrays)))


# Threads that wait for each other


def test_thread_that_gave_up_waiting_does_not_block_those_behind_it(
    make_core: MakeCore, clock: FakeClock
) -> None:
    core = make_core(database_timeout_s=0.1)
    core.add_devices(4)
    identity = core.start(rounds=QUORUM_4)
    drafts = [core.draft(f"device-{number}", identity, vector(1.0)) for number in range(3)]
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
