"""Payloads move between stores while coordinators serve; none is lost, and nothing is left behind."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from qflare.tensors import BytesLike
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import ConflictError, PayloadStoreNotConfiguredError
from qflare_server.payloads.reader import read_range
from qflare_server.storage.payload_records import describe
from qflare_server.storage.payload_store import PayloadStore
from qflare_server.storage.repository import leases, payloads
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import Payload, Upload
from qflare_server.training.retention import discard_uploads, sweep, sweep_orphans
from qflare_server.use_cases.payload_moves import LEASE, LEASE_TIME, PayloadMover
from qflare_server.verification.payload_stores import PayloadVerdict, verify_payloads
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import (
    CoordinatorHarness,
    CrashError,
    CrashingDatabase,
    CrashingStore,
    Fuse,
    vector,
)

BIG = 700_000  # elements: three chunks of float32
POLICY = training_pb2.RoundPolicy(quorum=2)
TO_AND_FRO = [
    ("database", "files"),
    ("files", "database"),
    ("database", "object"),
    ("object", "files"),
]


@pytest.fixture
def make_core(request: pytest.FixtureRequest, make_core: MakeCore) -> MakeCore:
    """Return a function that makes a coordinator, to which the object store is configured if the test names it."""
    named = getattr(request.node, "callspec", None)
    if named is None or "object" not in named.params.values():
        return make_core
    settings = request.getfixturevalue("object_settings")
    return lambda **given: make_core(**(settings | given))


def store_in(make_core: MakeCore, name: str) -> CoordinatorHarness:
    """Return a coordinator process that puts every payload into a store."""
    return make_core(payload_store=name, inline_payload_bytes=0, upload_batch_bytes=2**20)


@pytest.fixture
def core(make_core: MakeCore) -> CoordinatorHarness:
    made = store_in(make_core, "database")
    made.add_devices(3)
    return made


def train(core: CoordinatorHarness, **config: Any) -> str:
    """Publish one version, and accept one update of the next round; return the training session."""
    session_id = core.start(vector(0.0, BIG), rounds=POLICY, **config)
    for number in (0, 1):
        core.submit(f"device-{number}", session_id, vector(float(number), BIG))
    core.settle()
    core.submit("device-0", session_id, vector(3.0, BIG))
    return session_id


def places(core: CoordinatorHarness) -> set[str | None]:
    """Return the stores that rows of payloads name."""
    with core.database.read() as session:
        return set(session.scalars(select(Payload.store).where(Payload.location == "store")))


def verdicts(core: CoordinatorHarness) -> list[PayloadVerdict]:
    return [verdict for verdict in verify_payloads(core.context) if verdict.problem]


def finish(core: CoordinatorHarness, session_id: str) -> bytes:
    """Finish the second round; return the weights of its version."""
    core.submit("device-1", session_id, vector(5.0, BIG))
    core.settle()
    return core.weights(session_id, 2)


@pytest.mark.parametrize(("source", "target"), TO_AND_FRO)
@pytest.mark.parametrize("sealed", [False, True])
def test_training_goes_on_with_moved_payloads(
    make_core: MakeCore, source: str, target: str, sealed: bool
) -> None:
    core = store_in(make_core, source)
    core.add_devices(2)
    session_id = train(core, transfer=training_pb2.TransferPolicy(sealed=sealed))
    before = core.weights(session_id, 1)

    report = PayloadMover(core.context, target).run()

    assert (report.moved_count, report.skipped) == (core.count(Payload), [])
    assert places(core) == {target}
    assert (core.count(Upload), list(core.context.store_of(source).payload_ids())) == (0, [])
    assert verdicts(core) == []
    assert core.weights(session_id, 1) == before
    after = finish(core, session_id)
    assert sealed or after == np.full(BIG, 4.0, "<f4").tobytes()
    assert len(core.versions(session_id)) == 3
    assert places(core) == {source, target}


def test_a_move_can_be_repeated(core: CoordinatorHarness) -> None:
    train(core)
    PayloadMover(core.context, "files").run()

    again = PayloadMover(core.context, "files").run()

    assert (again.moved_count, again.moved_bytes, again.skipped) == (0, 0, [])


def test_a_download_under_way_goes_on_after_a_move(core: CoordinatorHarness) -> None:
    session_id = train(core)
    wanted = core.weights(session_id, 1)
    delivery = core.deliveries.find(session_id, 1)
    got = b""
    for index in range(3):  # each piece as a call of its own, which resumes
        pieces = core.deliveries.chunks(delivery, index)
        got += next(pieces)[1]
        PayloadMover(core.context, ("files", "database")[index % 2]).run()

    assert got == wanted


def crashing(core: CoordinatorHarness, fuse: Fuse) -> Context:
    """Return the context of a process that ends where the fuse says."""
    others = {name: CrashingStore(store, fuse) for name, store in core.context.other_stores.items()}
    return dataclasses.replace(
        core.context,
        database=CrashingDatabase(core.database, fuse),
        store=CrashingStore(core.store, fuse),
        other_stores=others,
    )


def test_no_payload_is_lost_wherever_a_move_crashes(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = train(core)
    crash_count = 0
    for step in range(1, 40):
        try:
            PayloadMover(crashing(core, Fuse(step)), ("files", "database")[step % 2]).run()
        except CrashError:
            crash_count += 1
        assert verdicts(core) == []
        clock.advance(LEASE_TIME.total_seconds() + 1)
    clock.advance(core.config.upload_expiry_s + 1)
    PayloadMover(core.context, "files").run()
    sweep(core.context)

    assert crash_count > 20
    assert (core.count(Upload), list(core.store.payload_ids())) == (0, [])
    assert len(list(core.context.store_of("files").payload_ids())) == core.count(Payload)
    assert verdicts(core) == []
    assert core.weights(session_id, 1) == np.full(BIG, 0.5, "<f4").tobytes()


def test_two_moves_at_once_are_refused(core: CoordinatorHarness, clock: FakeClock) -> None:
    train(core)
    now = clock()
    core.database.write(
        lambda session: leases.acquire(session, LEASE, "another", now, now + LEASE_TIME)
    )

    with pytest.raises(ConflictError):
        PayloadMover(core.context, "files").run()
    clock.advance(LEASE_TIME.total_seconds() + 1)

    assert PayloadMover(core.context, "files").run().skipped == []


class Interfering:
    """A payload store in which something happens after the first batch that is written."""

    def __init__(self, inner: PayloadStore, happening: Any) -> None:
        self._inner, self._happening = inner, happening

    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        self._inner.append(payload_id, first_index, chunks)
        happening, self._happening = self._happening, lambda: None
        happening()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def interfered(core: CoordinatorHarness, happening: Any) -> Context:
    files = Interfering(core.context.store_of("files"), happening)
    return dataclasses.replace(core.context, other_stores={"files": files})


def test_a_payload_that_is_pruned_while_it_is_moved_leaves_nothing(
    core: CoordinatorHarness,
) -> None:
    train(core)

    def prune() -> None:
        core.database.write(prune_all)

    def prune_all(session: Any) -> None:
        for row in payloads.in_stores(session, None, "", 100):
            payloads.mark_pruned(session, [row.id], core.clock())
            payloads.begin_upload(
                session,
                payload_id=row.chunks_id or "",
                store=row.store or "",
                at=payloads.LONG_AGO,
            )

    report = PayloadMover(interfered(core, prune), "files").run()
    sweep(core.context)

    assert report.moved_count == 0
    assert [list(store.payload_ids()) for store in core.context.stores] == [[], []]


def test_a_copy_that_was_swept_is_not_referred_to(core: CoordinatorHarness) -> None:
    session_id = train(core)

    def expire() -> None:
        with core.database.read() as session:
            query = select(Upload.payload_id, Upload.store)
            found = [payloads.ChunkSet(*row) for row in session.execute(query)]
        discard_uploads(core.context, found)

    report = PayloadMover(interfered(core, expire), "files").run()

    assert len(report.skipped) == 1
    assert verdicts(core) == []
    sweep(core.context)
    assert finish(core, session_id) == np.full(BIG, 4.0, "<f4").tobytes()


def alter(store: PayloadStore, payload_id: str) -> None:
    (chunk,) = store.read(payload_id, 1, 1)
    store.append(payload_id, 1, [bytes([chunk[0] ^ 1]) + chunk[1:]])


def lose(store: PayloadStore, payload_id: str) -> None:
    store.truncate(payload_id, 2)


@pytest.mark.parametrize("harm", [alter, lose])
@pytest.mark.parametrize("name", ["files", "database", "object"])
def test_a_harmed_payload_is_found_and_stays_where_it_is(
    make_core: MakeCore, harm: Any, name: str
) -> None:
    core = store_in(make_core, name)
    core.add_devices(2)
    train(core)
    harmed = next(one for one in core.store.payload_ids() if core.store.stored_count(one) == 3)
    harm(core.store, harmed)

    (found,) = verdicts(core)
    report = PayloadMover(core.context, "database" if name == "files" else "files").run()

    assert (found.payload_id, found.store) == (harmed, name)
    assert report.skipped == [harmed]
    assert list(core.store.payload_ids()) == [harmed]


def test_chunks_that_no_row_refers_to_are_swept_and_no_others(core: CoordinatorHarness) -> None:
    session_id = train(core)
    draft = core.draft("device-2", session_id, vector(9.0, BIG))

    def stalling() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks[:2]
        for name in ("files", "database"):
            store = core.context.store_of(name)
            store.append("orphan_of_" + store.name, 0, [b"a"])
        assert sweep_orphans(core.context) == 2
        yield draft.chunks[2]

    core.send(draft, stalling())
    core.settle()

    assert verdicts(core) == []
    assert core.weights(session_id, 2) == np.full(BIG, 6.0, "<f4").tobytes()
    assert sweep_orphans(core.context) == 0


# A store that is switched, or not there any more


class BrokenError(Exception):
    """The stream ends in the middle."""


def break_off(core: CoordinatorHarness, session_id: str) -> Any:
    """Send two of three chunks of an update; return the update."""
    draft = core.draft("device-2", session_id, vector(6.0, BIG))

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks[:2]
        raise BrokenError

    with pytest.raises(BrokenError):
        core.send(draft, pieces())
    return draft


@pytest.mark.parametrize(("before", "after"), TO_AND_FRO)
def test_an_upload_goes_on_in_the_store_in_which_it_began(
    make_core: MakeCore, before: str, after: str
) -> None:
    first = store_in(make_core, before)
    first.add_devices(3)
    session_id = first.start(vector(0.0, BIG))
    draft = break_off(first, session_id)
    second = store_in(make_core, after)

    following, _ = second.uploads.find(draft.device, draft.statement.update_id)
    second.send(draft, draft.chunks[following:])
    second.settle()

    assert following == 2
    assert second.weights(session_id, 1) == np.full(BIG, 6.0, "<f4").tobytes()


def test_an_upload_begins_again_if_its_store_is_not_configured_any_more(
    make_core: MakeCore,
) -> None:
    first = store_in(make_core, "files")
    first.add_devices(3)
    session_id = first.start(vector(0.0, BIG))
    draft = break_off(first, session_id)
    PayloadMover(first.context, "database").run()
    second = store_in(make_core, "database")
    without = dataclasses.replace(second.context, other_stores={})
    uploads = type(second.uploads)(without, second.executor)

    following, _ = uploads.find(draft.device, draft.statement.update_id)
    uploads.submit(SYSTEM, draft.device, draft.header(), iter(draft.chunks))
    second.settle()

    assert following == 0
    assert second.weights(session_id, 1) == np.full(BIG, 6.0, "<f4").tobytes()
    assert sweep(without) == 0
    assert sweep(second.context) == 1
    assert list(first.store.payload_ids()) == []


def test_a_payload_in_a_store_that_is_not_configured_is_a_typed_error(
    core: CoordinatorHarness,
) -> None:
    train(core)
    PayloadMover(core.context, "files").run()
    without = dataclasses.replace(core.context, other_stores={})
    with core.database.read() as session:
        (stored, *_) = [describe(row) for row in payloads.in_stores(session, None, "", 10)]

    with pytest.raises(PayloadStoreNotConfiguredError):
        read_range(without, stored, 0, 1)
    with pytest.raises(PayloadStoreNotConfiguredError):
        PayloadMover(without, "files")
    with pytest.raises(PayloadStoreNotConfiguredError):
        PayloadMover(without, "database").run()
    assert all("not configured" in verdict.problem for verdict in verify_payloads(without))
