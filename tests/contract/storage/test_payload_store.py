"""Chunks are durable when they are written, read back whole or not at all, and none is left behind for ever."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, func, select
from sqlalchemy.exc import ProgrammingError

from qflare.tensors import CHUNK_BYTES
from qflare.v1 import training_pb2
from qflare_server.errors import (
    ConflictError,
    PayloadPrunedError,
    StorageFullError,
    StoreUnavailableError,
)
from qflare_server.payloads.reader import read_chunks
from qflare_server.storage import records
from qflare_server.storage.engine import normalize_url
from qflare_server.storage.payload_records import describe
from qflare_server.storage.payload_store import (
    PayloadFile,
    PayloadFolder,
    PayloadStore,
    PayloadTable,
)
from qflare_server.storage.repository import payloads
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import ModelUpdate, Payload, Upload
from qflare_server.training import retention
from qflare_server.training.retention import sweep
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, Draft, vector

BIG = 700_000  # elements: three chunks of float32
STORES = (
    ("sqlite", "files"),
    ("sqlite", "database"),
    ("postgresql", "database"),
    ("sqlite", "object"),
)
ROWS_DECIDE = pytest.mark.parametrize("placement", STORES[:3], indirect=True, ids="-".join)
"""For tests of what rows say about payloads, to which an object store would add nothing but time."""
WAIT_S = 30.0
ONE = training_pb2.RoundPolicy(quorum=1)


@pytest.fixture(params=STORES, ids="-".join)
def placement(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return the names of the database and of the payload store under test."""
    database, store = request.param
    return database, store


@pytest.fixture
def database_url(request: pytest.FixtureRequest, placement: tuple[str, str]) -> str:
    """Return the URL of a migrated database of the test's own."""
    name = "sqlite_url" if placement[0] == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def placed(request: pytest.FixtureRequest, placement: tuple[str, str]) -> dict[str, Any]:
    """Return the settings of the store under test."""
    if placement[1] == "object":
        settings: dict[str, Any] = request.getfixturevalue("object_settings")
        return settings
    return {"payload_store": placement[1]}


@pytest.fixture
def make_store(make_core: MakeCore, placed: dict[str, Any]) -> Callable[[], PayloadStore]:
    """Return a function that opens the store as another process would."""
    return lambda: make_core(**placed).store


@pytest.fixture
def core(make_core: MakeCore, placed: dict[str, Any]) -> CoordinatorHarness:
    """Return a coordinator with four devices."""
    made = make_core(**placed)
    made.add_devices(4)
    return made


@pytest.fixture
def large(make_core: MakeCore, placed: dict[str, Any]) -> CoordinatorHarness:
    """Return a coordinator with four devices that puts every payload into the payload store."""
    made = make_core(**placed, inline_payload_bytes=0, upload_batch_bytes=2**20)
    made.add_devices(4)
    return made


@pytest.fixture
def store(make_store: Callable[[], PayloadStore]) -> PayloadStore:
    return make_store()


def chunk_count(core: CoordinatorHarness) -> int:
    """Return the number of chunks in the store."""
    return sum(core.store.stored_count(payload_id) for payload_id in core.store.payload_ids())


def full(letter: bytes) -> bytes:
    """Return a chunk that is not the last one of its payload."""
    return letter * CHUNK_BYTES


def test_full_disk_is_told_and_recovers(tmp_path: Path) -> None:
    file = PayloadFile(tmp_path / "full.payloads", timeout_s=1.0)
    store = file
    store.append("p", 0, [b"a"])
    with file._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(StorageFullError):
        store.append("p", 1, [bytes(2**20)])
    with file._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1073741823")
    store.append("p", 1, [b"b"])

    assert store.read("p", 0, 2) == [b"a", b"b"]
    store.close()


def test_store_that_cannot_be_reached_is_unavailable() -> None:
    engine = create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/nothing")
    store = PayloadTable(engine)

    for call in (
        lambda: store.append("p", 0, [b"a"]),
        lambda: store.read("p", 0, 1),
        lambda: store.stored_count("p"),
        lambda: store.delete(["p"]),
        store.size_bytes,
    ):
        with pytest.raises(StoreUnavailableError):
            call()


def test_broken_copy_is_an_error_of_the_database(postgres_url: str) -> None:
    engine = create_engine(normalize_url(postgres_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE payload_chunks RENAME TO elsewhere")

    with pytest.raises(ProgrammingError):
        PayloadTable(engine).append("p", 0, [b"a"])

    engine.dispose()


def test_chunks_read_back_in_order(store: PayloadStore) -> None:
    store.append("p", 0, [full(b"a"), full(b"b")])
    store.append("p", 2, [b"ccc"])

    assert store.read("p", 0, 10) == [full(b"a"), full(b"b"), b"ccc"]
    assert store.read("p", 1, 1) == [full(b"b")]
    assert store.read("p", 3, 5) == []


def test_payloads_are_apart(store: PayloadStore) -> None:
    store.append("p", 0, [b"a"])
    store.append("q", 0, [b"b"])

    assert store.read("p", 0, 10) == [b"a"]


def test_chunk_that_is_written_again_replaces_the_first(store: PayloadStore) -> None:
    store.append("p", 0, [full(b"a"), full(b"b"), b"c"])

    store.append("p", 1, [full(b"B"), b"C"])

    assert store.read("p", 0, 10) == [full(b"a"), full(b"B"), b"C"]


def test_stored_count_is_that_of_the_chunks(store: PayloadStore) -> None:
    before = store.stored_count("p")
    store.append("p", 0, [full(b"a"), b"b"])

    assert (before, store.stored_count("p")) == (0, 2)


def test_whole_payload_is_complete_and_stays_it(store: PayloadStore) -> None:
    store.append("p", 0, [full(b"a"), b"b"])

    store.complete("p", CHUNK_BYTES + 1)
    store.complete("p", CHUNK_BYTES + 1)

    assert store.read("p", 0, 10) == [full(b"a"), b"b"]
    assert (store.stored_count("p"), list(store.payload_ids())) == (2, ["p"])


@pytest.mark.parametrize("pieces", [[], [full(b"a")]])
def test_payload_that_lacks_chunks_is_not_complete(
    store: PayloadStore, pieces: list[bytes]
) -> None:
    if pieces:
        store.append("p", 0, pieces)

    with pytest.raises(ConflictError):
        store.complete("p", CHUNK_BYTES + 1)


@pytest.mark.parametrize("whole", [False, True])
def test_truncated_payload_goes_on_where_it_was_cut(store: PayloadStore, whole: bool) -> None:
    store.append("p", 0, [full(b"a"), full(b"b"), b"c"])
    if whole:
        store.complete("p", 2 * CHUNK_BYTES + 1)

    store.truncate("p", 1)
    cut = store.stored_count("p")
    store.append("p", 1, [full(b"B"), b"C"])
    store.complete("p", 2 * CHUNK_BYTES + 1)

    assert cut == 1
    assert store.read("p", 0, 10) == [full(b"a"), full(b"B"), b"C"]


def test_payloads_are_listed(store: PayloadStore) -> None:
    store.append("p", 0, [full(b"a"), b"b"])
    store.append("q", 0, [b"b"])
    store.complete("q", 1)

    assert sorted(store.payload_ids()) == ["p", "q"]


def test_deleted_payloads_are_gone_and_unknown_ones_do_no_harm(store: PayloadStore) -> None:
    store.append("p", 0, [b"a"])
    store.append("q", 0, [b"b"])

    store.delete(["p", "unknown"])

    assert store.read("p", 0, 1) == []
    assert store.read("q", 0, 1) == [b"b"]


def test_forgotten_payload_is_still_there_and_an_unknown_one_does_no_harm(
    store: PayloadStore,
) -> None:
    store.append("p", 0, [full(b"a"), b"b"])
    store.forget("p")
    store.complete("p", len(full(b"a")) + 1)

    store.forget("p")
    store.forget("unknown")

    assert store.read("p", 0, 2) == [full(b"a"), b"b"]


def test_store_says_how_much_room_it_takes(store: PayloadStore) -> None:
    before = store.size_bytes()

    store.append("p", 0, [bytes(range(256)) * 4096 for _ in range(2)])

    assert store.size_bytes() > before


def test_chunks_are_there_for_another_process(make_store: Callable[[], PayloadStore]) -> None:
    first, second = make_store(), make_store()

    first.append("p", 0, [b"a"])

    assert second.read("p", 0, 1) == [b"a"]
    assert second.identity() == first.identity()


@given(
    batches=st.lists(st.integers(1, 3), max_size=3),
    last=st.binary(min_size=1, max_size=300),
    first=st.integers(0, 9),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunks_read_back(
    store: PayloadStore, batches: list[int], last: bytes, first: int
) -> None:
    chunks: list[bytes] = []
    for size in batches:
        batch = [full(bytes([len(chunks) + number])) for number in range(size)]
        store.append("p", len(chunks), batch)
        chunks += batch
    store.append("p", len(chunks), [last])
    chunks.append(last)

    assert store.read("p", first, len(chunks)) == chunks[first:]
    store.complete("p", sum(len(chunk) for chunk in chunks))

    store.delete(["p"])


def test_threads_write_payloads_side_by_side(store: PayloadStore) -> None:
    count = 8
    barrier = threading.Barrier(count)

    def write(number: int) -> None:
        barrier.wait(WAIT_S)
        for index in range(4):
            store.append(f"p{number}", index, [full(bytes([16 * number + index]))])

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(write, range(count)))

    for number in range(count):
        wanted = [full(bytes([16 * number + index])) for index in range(4)]
        assert store.read(f"p{number}", 0, 10) == wanted


@ROWS_DECIDE
def test_small_payload_lies_in_its_row(core: CoordinatorHarness) -> None:
    training_session_id = core.start()

    payload = payload_of(core, training_session_id, 0)

    assert payload.location == "row"
    assert chunk_count(core) == 0


def test_large_payload_lies_in_the_store(large: CoordinatorHarness) -> None:
    training_session_id = large.start(vector(0.5, BIG))

    payload = payload_of(large, training_session_id, 0)

    assert payload.location == "store"
    with large.database.read() as session:
        assert payloads.read_data(session, payload.id) is None
    assert chunk_count(large) == 3
    assert large.count(Upload) == 0


def payload_of(core: CoordinatorHarness, training_session_id: str, version: int) -> records.Payload:
    payload_id = core.versions(training_session_id)[version].payload_id
    with core.database.read() as session:
        payload = payloads.get_payload(session, payload_id)
        assert payload is not None
        return payload


def test_payload_reads_from_any_chunk(large: CoordinatorHarness) -> None:
    training_session_id = large.start(vector(0.5, BIG))
    stored = describe(payload_of(large, training_session_id, 0))

    whole = list(read_chunks(large.context, stored))

    assert list(read_chunks(large.context, stored, 2)) == whole[2:]
    assert b"".join(whole) == vector(0.5, BIG)["w"].tobytes()


def test_payload_whose_chunks_were_deleted_is_pruned(large: CoordinatorHarness) -> None:
    training_session_id = large.start(vector(0.5, BIG))
    stored = describe(payload_of(large, training_session_id, 0))
    large.store.delete([stored.payload_id])

    with pytest.raises(PayloadPrunedError):
        list(read_chunks(large.context, stored))


# What is left of uploads


class BrokenError(Exception):
    """The stream ends in the middle."""


def break_off(
    core: CoordinatorHarness, training_session_id: str, device_id: str = "device-0"
) -> Any:
    """Send two of three chunks of an update; return the update."""
    draft = core.draft(device_id, training_session_id, vector(1.0, BIG))

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks[:2]
        raise BrokenError

    with pytest.raises(BrokenError):
        core.send(draft, pieces())
    return draft


@pytest.fixture
def training_session_id(large: CoordinatorHarness) -> str:
    return large.start(vector(0.0, BIG), rounds=training_pb2.RoundPolicy(quorum=3))


def test_upload_that_nobody_continues_is_swept(
    large: CoordinatorHarness, training_session_id: str, clock: FakeClock
) -> None:
    break_off(large, training_session_id)
    clock.advance(large.config.upload_expiry_s + 1)

    swept = sweep(large.context)

    assert swept == 1
    assert (chunk_count(large), large.count(Upload)) == (3, 0)  # those of the initial model


def test_upload_that_may_be_continued_is_not_swept(
    large: CoordinatorHarness, training_session_id: str
) -> None:
    break_off(large, training_session_id)

    assert sweep(large.context) == 0
    assert chunk_count(large) == 5


def test_swept_upload_begins_again(
    large: CoordinatorHarness, training_session_id: str, clock: FakeClock
) -> None:
    draft = break_off(large, training_session_id)
    clock.advance(large.config.upload_expiry_s + 1)
    large.training.pause(SYSTEM, training_session_id)
    large.training.resume(SYSTEM, training_session_id)
    sweep(large.context)

    following, _ = large.uploads.find(draft.device, draft.statement.update_id)
    large.send(draft)

    assert following == 0
    assert large.round(training_session_id).accepted_count == 1


def test_upload_that_is_swept_under_way_is_not_accepted(
    large: CoordinatorHarness, training_session_id: str
) -> None:
    draft = large.draft("device-0", training_session_id, vector(1.0, BIG))

    def stalling() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks[:2]
        give_up(large)
        yield draft.chunks[2]

    with pytest.raises(ConflictError):
        large.send(draft, stalling())

    assert large.count(ModelUpdate) == 0


class LosingFolder(PayloadFolder):
    """Folder on a disk that loses bytes of a payload right after the payload was complete.

    Args:
        folder: As of `PayloadFolder`.
        kept_bytes: Size of the file that is left; None loses the file.
    """

    def __init__(self, folder: Path, kept_bytes: int | None) -> None:
        super().__init__(folder)
        self.loses_next = False
        self._path = folder
        self._kept_bytes = kept_bytes

    def complete(self, payload_id: str, size_bytes: int) -> None:
        super().complete(payload_id, size_bytes)
        if not self.loses_next:
            return
        self.loses_next = False
        if self._kept_bytes is None:
            (self._path / payload_id).unlink()
        else:
            os.truncate(self._path / payload_id, self._kept_bytes)


@pytest.mark.parametrize(
    "placement", [("sqlite", "files"), ("postgresql", "files")], indirect=True, ids="-".join
)
@pytest.mark.parametrize("kept_bytes", [None, CHUNK_BYTES, 4 * BIG - 1])
def test_no_receipt_for_an_update_that_has_lost_bytes_before_its_transaction(
    make_core: MakeCore, tmp_path: Path, kept_bytes: int | None
) -> None:
    store = LosingFolder(tmp_path / "losing", kept_bytes)
    core = make_core(store=store, inline_payload_bytes=0)
    core.add_devices(1)
    session_id = core.start(vector(0.5, BIG), rounds=ONE)
    draft = core.draft("device-0", session_id, vector(1.0, BIG))
    store.loses_next = True

    with pytest.raises(ConflictError):
        core.send(draft)
    accepted = core.count(ModelUpdate), core.round(session_id).accepted_count
    resume(core, draft)
    core.settle()

    assert accepted == (0, 0)
    assert core.weights(session_id) == vector(1.0, BIG)["w"].tobytes()


def resume(core: CoordinatorHarness, draft: Draft) -> None:
    """Send the rest of an update, and ask once more where to go on if the coordinator finds stored bytes damaged."""
    for final in (False, True):
        following, _ = core.uploads.find(draft.device, draft.statement.update_id)
        try:
            core.send(draft, draft.chunks[following:])
        except ConflictError:
            assert not final
        else:
            return


def give_up(core: CoordinatorHarness) -> None:
    """Sweep as if every unfinished upload had expired."""
    with core.database.read() as session:
        query = select(Upload.payload_id, Upload.store)
        found = [payloads.ChunkSet(*row) for row in session.execute(query)]
    core.database.write(lambda session: payloads.give_up_uploads(session, found))
    sweep(core.context)


def test_slow_upload_does_not_expire(large: CoordinatorHarness, clock: FakeClock) -> None:
    rounds = training_pb2.RoundPolicy(quorum=1)
    rounds.deadline.seconds = 86_400
    slow = large.start(vector(0.0, BIG), rounds=rounds)
    draft = large.draft("device-0", slow, vector(1.0, BIG))

    def pieces() -> Iterator[tuple[int, bytes]]:
        for piece in draft.chunks:
            yield piece
            clock.advance(large.config.upload_expiry_s * 0.75)
            sweep(large.context)

    large.send(draft, pieces())
    large.settle()

    assert large.weights(slow, 1) == vector(1.0, BIG)["w"].tobytes()


def test_chunks_of_a_crash_before_the_row_are_swept(
    large: CoordinatorHarness, clock: FakeClock
) -> None:
    large.database.write(
        lambda session: payloads.begin_upload(
            session, payload_id="lost", store=large.store.name, at=clock()
        )
    )
    large.store.append("lost", 0, [b"a"])
    clock.advance(large.config.upload_expiry_s + 1)

    sweep(large.context)

    assert large.store.read("lost", 0, 1) == []


# Retention


def run_rounds(core: CoordinatorHarness, count: int, kept: Any, **transfer: Any) -> str:
    policy = training_pb2.TransferPolicy(payload_retention=kept, **transfer)
    training_session_id = core.start(
        vector(0.0, BIG), total_rounds=count + 1, rounds=ONE, transfer=policy
    )
    for number in range(count):
        core.submit("device-0", training_session_id, vector(float(number), BIG))
        core.settle()
    return training_session_id


def locations(core: CoordinatorHarness, training_session_id: str, count: int) -> list[str]:
    """Return where the payload of each round's update is."""
    found = []
    with core.database.read() as session:
        for number in range(1, count + 1):
            (update,) = core.updates(training_session_id, number)
            payload = payloads.get_payload(session, update.payload_id)
            assert payload is not None
            found.append(payload.location)
    return found


@ROWS_DECIDE
@pytest.mark.parametrize(
    ("setting", "transfer", "kept"),
    [
        (training_pb2.PAYLOAD_RETENTION_ALL, {}, ["store"] * 4),
        (training_pb2.PAYLOAD_RETENTION_NONE, {}, ["none"] * 4),
        (
            training_pb2.PAYLOAD_RETENTION_LAST_ROUNDS,
            {"retained_rounds": 2},
            ["none", "none", "store", "store"],
        ),
    ],
)
def test_payloads_are_kept_as_the_session_says(
    large: CoordinatorHarness, setting: Any, transfer: dict[str, int], kept: list[str]
) -> None:
    training_session_id = run_rounds(large, 4, setting, **transfer)

    assert locations(large, training_session_id, 4) == kept


@ROWS_DECIDE
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("end", ["completed", "cancelled"])
@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        (training_pb2.PAYLOAD_RETENTION_ALL, 4),
        (training_pb2.PAYLOAD_RETENTION_NONE, 0),
        (training_pb2.PAYLOAD_RETENTION_LAST_ROUNDS, None),
    ],
)
def test_the_end_of_a_session_keeps_what_the_session_says(
    large: CoordinatorHarness, end: str, setting: Any, kept: int | None, count: int
) -> None:
    policy = training_pb2.TransferPolicy(payload_retention=setting, retained_rounds=count)
    rounds = training_pb2.RoundPolicy(quorum=1 if end == "completed" else 2)
    training_session_id = large.start(
        vector(0.0, BIG), total_rounds=4, rounds=rounds, transfer=policy
    )
    while large.training.get(training_session_id).state == "running":
        for device in range(rounds.quorum):
            large.submit(f"device-{device}", training_session_id, vector(1.0, BIG))
            if end == "cancelled" and large.training.get(training_session_id).current_round == 3:
                large.training.cancel(SYSTEM, training_session_id, "enough")
                break
        large.settle()

    with large.database.read() as session:
        query = select(func.count()).select_from(ModelUpdate).join(Payload)
        left = session.execute(query.where(Payload.location != "none")).scalar_one()
    if setting == training_pb2.PAYLOAD_RETENTION_ALL:
        assert left == (4 if end == "completed" else 5)
    else:
        assert left == (0 if kept == 0 else count * rounds.quorum)


def test_pruned_payloads_are_swept_and_versions_stay(large: CoordinatorHarness) -> None:
    training_session_id = run_rounds(large, 3, training_pb2.PAYLOAD_RETENTION_NONE)

    sweep(large.context)

    for number in range(1, 4):
        (update,) = large.updates(training_session_id, number)
        assert large.store.read(update.payload_id, 0, 1) == []
    for version in range(1, 4):
        wanted = vector(float(version - 1), BIG)["w"].tobytes()
        assert large.weights(training_session_id, version) == wanted


@ROWS_DECIDE
def test_pruned_payload_says_so(large: CoordinatorHarness) -> None:
    training_session_id = run_rounds(large, 1, training_pb2.PAYLOAD_RETENTION_NONE)
    (update,) = large.updates(training_session_id, 1)

    with large.database.read() as session:
        payload = payloads.get_payload(session, update.payload_id)
        with pytest.raises(PayloadPrunedError):
            describe(payload)
        assert payload is not None
        assert payload.pruned_at is not None


@ROWS_DECIDE
def test_pruning_keeps_up_with_rounds_of_many_updates(
    core: CoordinatorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PRUNE_BATCH", 1)
    policy = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_NONE)
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=3), transfer=policy)
    for number in range(3):
        core.submit(f"device-{number}", training_session_id)

    core.settle()

    with core.database.read() as session:
        query = select(func.count()).select_from(ModelUpdate).join(Payload)
        kept = session.execute(query.where(Payload.location != "none")).scalar_one()
    assert kept == 0
