"""A copy of a database cannot delete from the payload folder or bucket of the original, which loses nothing by it."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import PayloadPlaceTakenError
from qflare_server.serving.maintenance import Maintenance
from qflare_server.storage import place_ownership
from qflare_server.storage.place_ownership import PlaceKeeper, claim, renew, require_owner
from qflare_server.training.retention import sweep, sweep_orphans
from qflare_server.use_cases.payload_moves import PayloadMover
from qflare_server.verification import recompute_version
from qflare_server.verification.payload_stores import verify_payloads
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
ONE = training_pb2.RoundPolicy(quorum=1)
FORGETFUL = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_NONE)
LASTING = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL)
WAIT_S = 60.0


class BrokenError(Exception):
    """The stream ends in the middle."""


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return the URL of a database of the test's own; its rows say the same with both databases."""
    return sqlite_url


@pytest.fixture(params=["files", "object"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return settings that put every payload into the store under test."""
    placed = (
        request.getfixturevalue("object_settings")
        if request.param == "object"
        else {"payload_store": "files"}
    )
    return {**placed, "inline_payload_bytes": 0, "upload_batch_bytes": 2**20}


@pytest.fixture
def core(make_core: MakeCore, settings: dict[str, Any]) -> CoordinatorHarness:
    made = make_core(**settings)
    made.add_devices(3)
    return made


CopyCore = Callable[[], CoordinatorHarness]


@pytest.fixture
def copy_core(
    make_core: MakeCore, settings: dict[str, Any], sqlite_url: str, tmp_path: Path
) -> CopyCore:
    """Return a function that opens a coordinator on a copy of the database and on the same folder or bucket."""

    def copied() -> CoordinatorHarness:
        target = tmp_path / "copy.db"
        with (
            closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as reader,
            closing(sqlite3.connect(target)) as writer,
        ):
            reader.backup(writer)
        return make_core(**settings, database_url=f"sqlite:///{target}")

    return copied


def start(core: CoordinatorHarness, **config: Any) -> str:
    return core.start(vector(0.0, BIG), rounds=ONE, total_rounds=20, **config)


def train(
    core: CoordinatorHarness, session_id: str, value: float, device: str = "device-0"
) -> None:
    core.submit(device, session_id, vector(value, BIG))
    core.settle()


def join(core: CoordinatorHarness) -> None:
    """Join the coordinators of a database, as a starting process does."""
    unused = cast("Any", None)
    Maintenance(core.context, unused, unused, "one", "127.0.0.1:1", lambda **_: None).join()


def problems(core: CoordinatorHarness) -> list[str]:
    return [verdict.problem for verdict in verify_payloads(core.context) if verdict.problem]


def owner_of(core: CoordinatorHarness) -> str:
    return require_owner(core.database, core.store)


def break_off(core: CoordinatorHarness, session_id: str) -> Any:
    """Send two of three chunks of an update; return the update."""
    draft = core.draft("device-2", session_id, vector(9.0, BIG))

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield from draft.chunks[:2]
        raise BrokenError

    with pytest.raises(BrokenError):
        core.send(draft, pieces())
    return draft


def test_a_copy_of_the_database_deletes_nothing_of_a_running_original(
    core: CoordinatorHarness, copy_core: CopyCore, clock: FakeClock
) -> None:
    two = training_pb2.RoundPolicy(quorum=2)
    session_id = core.start(vector(0.0, BIG), rounds=two, total_rounds=20, transfer=LASTING)
    train(core, session_id, 1.0)
    train(core, session_id, 1.0, "device-1")
    draft = break_off(core, session_id)  # in the copy, an upload that expires
    core.submit("device-1", session_id, vector(2.0, BIG))  # in the copy, an update that is pruned
    copy = copy_core()
    renew(core.database, core.store)
    following, _ = core.uploads.find(draft.device, draft.statement.update_id)
    core.send(draft, draft.chunks[following:])

    with pytest.raises(PayloadPlaceTakenError):
        copy.submit("device-0", session_id, vector(3.0, BIG))
    again = recompute_version(copy.context, session_id, 1)  # reading is harmless
    assert (again.recomputed, again.differences) == (True, ())
    clock.advance(core.config.upload_expiry_s + 1)
    with pytest.raises(PayloadPlaceTakenError):
        join(copy)
    with pytest.raises(PayloadPlaceTakenError):
        sweep(copy.context)
    with pytest.raises(PayloadPlaceTakenError):
        sweep_orphans(copy.context)
    with pytest.raises(PayloadPlaceTakenError):
        PayloadMover(copy.context, "database").run()

    assert problems(core) == []
    core.settle()
    assert core.weights(session_id, 2) == np.full(BIG, 5.5, "<f4").tobytes()


def test_a_copy_that_takes_over_stops_the_original(
    core: CoordinatorHarness, copy_core: CopyCore, clock: FakeClock
) -> None:
    session_id = start(core, transfer=FORGETFUL)
    train(core, session_id, 1.0)
    copy = copy_core()
    renew(core.database, core.store)
    keeper = PlaceKeeper(core.database, core.store)
    keeper.keep()

    claim(copy.database, copy.store)

    for refused in (
        PlaceKeeper(core.database, core.store).keep,
        lambda: renew(core.database, core.store),
        lambda: sweep_orphans(core.context),
        lambda: core.submit("device-0", session_id, vector(3.0, BIG)),
        lambda: join(core),
    ):
        with pytest.raises(PayloadPlaceTakenError) as caught:
            refused()
        assert "payloads claim" in caught.value.remedy
    join(copy)
    clock.advance(core.config.lease_s + 1)  # the copied row says that the original aggregates
    train(copy, session_id, 2.0)
    sweep_orphans(copy.context)
    sweep(copy.context)
    assert problems(copy) == []
    assert copy.weights(session_id, 2) == np.full(BIG, 2.0, "<f4").tobytes()


def test_the_original_is_unhealthy_once_a_copy_has_taken_over(
    core: CoordinatorHarness, copy_core: CopyCore
) -> None:
    renew(core.database, core.store)
    copy = copy_core()
    claim(copy.database, copy.store)
    states: list[bool] = []
    unused = cast("Any", None)
    kept = Maintenance(
        core.context,
        unused,
        unused,
        "one",
        "127.0.0.1:1",
        lambda *, healthy: states.append(healthy),
    )

    kept.tick()

    assert states == [False]


def test_a_copy_is_found_out_before_it_changes_the_name(
    core: CoordinatorHarness, copy_core: CopyCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that knows the name in force watches first; the original renews it meanwhile."""
    monkeypatch.setattr(place_ownership, "LOOK_S", 0.0)
    renew(core.database, core.store)
    copy = copy_core()
    watching = PlaceKeeper(copy.database, copy.store)
    watching.keep()
    before = owner_of(core)
    monkeypatch.setattr(place_ownership, "FIRST_S", -1.0)
    monkeypatch.setattr(place_ownership, "RENEW_S", -1.0)

    original = PlaceKeeper(core.database, core.store)
    original.keep()
    original.keep()

    assert owner_of(core) != before
    with pytest.raises(PayloadPlaceTakenError):
        watching.keep()


def test_coordinators_of_one_database_share_its_ownership(
    core: CoordinatorHarness, make_core: MakeCore, settings: dict[str, Any]
) -> None:
    others = [core, *(make_core(**settings) for _ in range(3))]
    barrier = threading.Barrier(len(others))

    def keep(other: CoordinatorHarness) -> None:
        barrier.wait(WAIT_S)
        for _ in range(5):
            with suppress(PayloadPlaceTakenError):  # the others were faster, several times
                renew(other.database, other.store)

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(keep, others))

    assert len({owner_of(other) for other in others}) == 1
    renew(core.database, core.store)


def test_a_crash_between_any_two_steps_leaves_the_owner_in_charge(core: CoordinatorHarness) -> None:
    crash_count = 0
    for step in range(1, 16):
        fuse = Fuse(step)
        database, store = CrashingDatabase(core.database, fuse), CrashingStore(core.store, fuse)
        try:
            renew(database, cast("Any", store))
        except CrashError:
            crash_count += 1
        before = owner_of(core)
        renew(core.database, core.store)  # finishes what the crash left
        renew(core.database, core.store)
        assert owner_of(core) != before

    assert crash_count > 5


def test_a_frozen_coordinator_takes_nothing_back(
    core: CoordinatorHarness, copy_core: CopyCore
) -> None:
    renew(core.database, core.store)
    copy = copy_core()
    before = core.store.owner()
    claim(copy.database, copy.store)

    core.store.replace_owner(before, "of a coordinator that was frozen")

    assert owner_of(copy) == copy.store.owner()
    with pytest.raises(PayloadPlaceTakenError):
        owner_of(core)


def test_a_place_without_an_owner_belongs_to_who_comes_first(core: CoordinatorHarness) -> None:
    assert owner_of(core) == ""

    core.store.replace_owner("", "first")
    core.store.replace_owner("", "second")

    assert core.store.owner() == "first"
    assert list(core.store.payload_ids()) == []
