"""Rounds become versions exactly once, to the same bytes whatever crashes and whoever aggregates."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.evidence.lineage import contributors_digest
from qflare.v1 import training_pb2
from qflare_server.aggregation.aggregator import REST_S, Aggregator
from qflare_server.aggregation.worker import AggregationWorker
from qflare_server.context import Context
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import GlobalModel
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import (
    CoordinatorHarness,
    CrashError,
    CrashingDatabase,
    CrashingStore,
    Fuse,
    floats,
    vector,
)

WAIT_S = 30.0
HOUR_S = 3600.0
PAGE = PageRequest(1000)
LARGE = 300_000  # elements: two chunks of float32


def policy(quorum: int, **settings: Any) -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(quorum=quorum, deadline=Duration(seconds=60), **settings)


def crashing(core: CoordinatorHarness, fuse: Fuse) -> Aggregator:
    """Return the aggregator of a process that ends where the fuse says."""
    context = dataclasses.replace(
        core.context,
        database=CrashingDatabase(core.database, fuse),
        store=CrashingStore(core.store, fuse),
    )
    return Aggregator(context, core.executor, "one")


# Closing and publishing


def test_quorum_makes_the_example_weighted_mean(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(3))
    for number, examples in enumerate((1, 2, 5)):
        core.submit(
            f"device-{number}", training_session_id, vector(float(number)), examples=examples
        )

    core.settle()

    assert floats(core.weights(training_session_id)) == [1.5, 1.5, 1.5]


def test_version_names_what_made_it(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(2))
    receipts = [
        core.submit(f"device-{n}", training_session_id, loss=float(n), examples=10) for n in (0, 1)
    ]

    core.settle()

    version = core.versions(training_session_id)[1]
    assert (version.version, version.base_version, version.round_number) == (1, 0, 1)
    assert (version.participant_count, version.example_count) == (2, 20)
    assert version.parent_digest == core.versions(training_session_id)[0].digest
    assert version.contributors_digest == contributors_digest(
        tuple(receipt.statement_digest for receipt in receipts)
    )
    assert (version.aggregation_method, version.loss) == ("fedavg", 0.5)


def test_published_round_and_its_updates_say_so(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(2))
    for number in range(2):
        core.submit(f"device-{number}", training_session_id)

    core.settle()

    published = core.round(training_session_id, 1)
    assert (published.state, published.version, published.accepted_count) == ("published", 1, 2)
    assert {
        (row.state, row.aggregated_version) for row in core.updates(training_session_id, 1)
    } == {("aggregated", 1)}
    assert (
        core.round(training_session_id).number,
        core.round(training_session_id).base_version,
    ) == (2, 1)


def test_nothing_is_published_below_the_quorum(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(3))
    core.submit("device-0", training_session_id)

    core.settle()

    assert len(core.versions(training_session_id)) == 1
    assert core.round(training_session_id).state == "open"


def test_round_takes_more_than_its_quorum_until_its_target(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1, target=2))
    core.submit("device-0", training_session_id)
    core.settle()
    before = len(core.versions(training_session_id))

    core.submit("device-1", training_session_id)
    core.settle()

    assert (before, len(core.versions(training_session_id))) == (1, 2)


def test_deadline_closes_a_round_that_has_its_quorum(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(rounds=policy(1, target=4))
    core.submit("device-0", training_session_id, vector(3.0))
    clock.advance(60)

    core.settle()

    assert floats(core.weights(training_session_id)) == [3.0, 3.0, 3.0]
    assert core.versions(training_session_id)[1].participant_count == 1


def test_missed_quorum_extends_and_keeps_what_came(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(rounds=policy(2))
    core.submit("device-0", training_session_id)
    clock.advance(60)
    core.settle()

    core.submit("device-1", training_session_id)
    core.settle()

    assert len(core.versions(training_session_id)) == 2
    assert core.round(training_session_id, 1).accepted_count == 2


def test_missed_quorum_retries_with_another_round(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(
        rounds=policy(2, missed_quorum_action=training_pb2.MISSED_QUORUM_ACTION_RETRY)
    )
    core.submit("device-0", training_session_id)
    clock.advance(60)

    core.settle()

    assert core.round(training_session_id, 1).state == "failed"
    assert [row.state for row in core.updates(training_session_id, 1)] == ["rejected"]
    assert (
        core.round(training_session_id).number,
        core.round(training_session_id).base_version,
    ) == (2, 0)
    core.submit("device-0", training_session_id)  # it may contribute again


def test_rounds_that_missed_their_quorum_do_not_count(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    retry = policy(2, missed_quorum_action=training_pb2.MISSED_QUORUM_ACTION_RETRY)
    training_session_id = core.start(total_rounds=2, rounds=retry)
    for number in (1, 2, 3):
        for device in range(number % 2 + 1):
            core.submit(f"device-{device}", training_session_id)
        clock.advance(60)
        core.settle()

    assert [core.round(training_session_id, number).state for number in (1, 2, 3)] == [
        "published",
        "failed",
        "published",
    ]
    assert core.training.get(training_session_id).state == "completed"
    assert len(core.versions(training_session_id)) == 3


def test_missed_quorum_fails_the_session(core: CoordinatorHarness, clock: FakeClock) -> None:
    training_session_id = core.start(
        rounds=policy(2, missed_quorum_action=training_pb2.MISSED_QUORUM_ACTION_FAIL)
    )
    core.submit("device-0", training_session_id)
    clock.advance(60)

    core.settle()

    ended = core.training.get(training_session_id)
    assert (ended.state, ended.ended_at) == ("failed", clock())
    assert "got 1, want 2" in ended.state_reason
    assert len(core.training.list_rounds(training_session_id, PAGE).rows) == 1


def test_last_round_completes_the_session(core: CoordinatorHarness) -> None:
    training_session_id = core.start(total_rounds=2, rounds=policy(1))

    for _ in range(2):
        core.submit("device-0", training_session_id)
        core.settle()

    assert core.training.get(training_session_id).state == "completed"
    assert [row.version for row in core.versions(training_session_id)] == [0, 1, 2]


def test_best_accuracy_is_that_of_the_best_version(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1))

    for accuracy in (0.5, 0.75, 0.25):
        core.submit("device-0", training_session_id, accuracy=accuracy)
        core.settle()

    row = core.training.get(training_session_id)
    assert (row.best_value, row.best_version) == (0.75, 2)


def test_delta_updates_are_added_to_the_base(core: CoordinatorHarness) -> None:
    transfer = training_pb2.TransferPolicy(update_kind=training_pb2.UPDATE_KIND_DELTA)
    training_session_id = core.start(vector(10.0), rounds=policy(2), transfer=transfer)
    for number in range(2):
        draft = core.draft(f"device-{number}", training_session_id, vector(float(number)))
        draft.statement.kind = training_pb2.UPDATE_KIND_DELTA
        core.send(draft)

    core.settle()

    assert floats(core.weights(training_session_id)) == [10.5, 10.5, 10.5]


def test_integers_come_from_the_update_with_the_most_examples(core: CoordinatorHarness) -> None:
    def arrays(number: int) -> dict[str, Any]:
        return {"n": np.array(number, np.int64), "w": np.full(2, number, np.float32)}

    training_session_id = core.start(arrays(0), rounds=policy(3))
    for number, examples in ((1, 5), (2, 9), (3, 9)):
        core.submit(f"device-{number}", training_session_id, arrays(number), examples=examples)

    core.settle()

    assert np.frombuffer(core.weights(training_session_id)[:8], "<i8")[0] == 2


def test_order_of_acceptance_is_the_order_of_folding(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(3))
    for number in (2, 0, 1):
        core.submit(
            f"device-{number}", training_session_id, vector(0.1 * (number + 1)), examples=number + 1
        )

    core.settle()

    assert [row.device_id for row in core.updates(training_session_id, 1)] == [
        "device-2",
        "device-0",
        "device-1",
    ]
    expected = np.float32(sum((n + 1) * float(np.float32(0.1 * (n + 1))) for n in (2, 0, 1)) / 6)
    assert floats(core.weights(training_session_id)) == [expected] * 3


# Pause, resume, cancel


def test_closed_round_of_a_paused_session_is_published(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1))
    core.submit("device-0", training_session_id)
    core.training.pause(SYSTEM, training_session_id)

    core.settle()

    assert len(core.versions(training_session_id)) == 2
    assert core.training.get(training_session_id).state == "paused"
    assert core.tasks.next_task("device-1", training_session_id).round is None


def test_open_round_of_a_paused_session_is_left_alone(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(
        rounds=policy(1, target=2, missed_quorum_action=training_pb2.MISSED_QUORUM_ACTION_FAIL)
    )
    core.submit("device-0", training_session_id)
    core.training.pause(SYSTEM, training_session_id)
    clock.advance(1000)

    core.settle()

    assert core.round(training_session_id).state == "open"
    assert core.training.get(training_session_id).state == "paused"


def test_resumed_session_goes_on_with_what_it_had(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(2))
    core.submit("device-0", training_session_id)
    core.training.pause(SYSTEM, training_session_id)
    core.settle()
    core.training.resume(SYSTEM, training_session_id)

    core.submit("device-1", training_session_id)
    core.settle()

    assert core.versions(training_session_id)[1].participant_count == 2


def test_closed_round_of_a_cancelled_session_is_not_published(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1))
    core.submit("device-0", training_session_id)
    core.training.cancel(SYSTEM, training_session_id, "")

    core.settle()

    assert len(core.versions(training_session_id)) == 1


def test_sessions_are_served_side_by_side(core: CoordinatorHarness) -> None:
    identities = [core.start(rounds=policy(1)) for _ in range(3)]
    for number, training_session_id in enumerate(identities):
        core.submit("device-0", training_session_id, vector(float(number)))

    core.settle()

    assert [floats(core.weights(training_session_id))[0] for training_session_id in identities] == [
        0.0,
        1.0,
        2.0,
    ]


def test_session_that_cannot_be_aggregated_does_not_stop_the_others(
    core: CoordinatorHarness,
) -> None:
    broken = core.start(vector(0.0, LARGE), rounds=policy(1))
    core.submit("device-0", broken, vector(1.0, LARGE))
    (update,) = core.updates(broken, 1)
    core.store.delete([update.payload_id])
    healthy = core.start(rounds=policy(1))
    core.submit("device-0", healthy)

    core.settle()

    assert len(core.versions(healthy)) == 2
    assert len(core.versions(broken)) == 1


def test_round_that_could_not_be_aggregated_is_tried_again(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(vector(0.0, LARGE), rounds=policy(1))
    core.submit("device-0", training_session_id, vector(1.0, LARGE))
    (update,) = core.updates(training_session_id, 1)
    kept = core.store.read(update.payload_id, 0, 10)
    core.store.delete([update.payload_id])
    core.settle()
    core.store.append(update.payload_id, 0, kept)

    clock.advance(REST_S)
    core.settle()

    assert core.weights(training_session_id, 1) == vector(1.0, LARGE)["w"].tobytes()


def test_failed_round_does_not_rest_until_a_clock_that_was_set_back_has_caught_up(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start(vector(0.0, LARGE), rounds=policy(1))
    core.submit("device-0", training_session_id, vector(1.0, LARGE))
    (update,) = core.updates(training_session_id, 1)
    kept = core.store.read(update.payload_id, 0, 10)
    core.store.delete([update.payload_id])
    core.settle()
    core.store.append(update.payload_id, 0, kept)

    clock.advance(-HOUR_S)
    core.settle()

    assert core.weights(training_session_id, 1) == vector(1.0, LARGE)["w"].tobytes()


def test_deadline_of_a_round_that_another_works_on_is_not_ours(make_core: MakeCore) -> None:
    first, second = make_core(name="first"), make_core(name="second")
    training_session_id = first.start(rounds=policy(1))
    first.aggregator.run_once()

    second.aggregator.run_once()

    assert first.aggregator.next_deadline() == first.round(training_session_id).deadline_at
    assert second.aggregator.next_deadline() is None


def test_rounds_follow_each_other_from_every_version(core: CoordinatorHarness) -> None:
    training_session_id = core.start(total_rounds=5, rounds=policy(2))

    for number in range(5):
        for device in range(2):
            core.submit(f"device-{device}", training_session_id, vector(float(number + device)))
        core.settle()

    rows = core.versions(training_session_id)
    assert [row.version for row in rows] == list(range(6))
    assert [row.base_version for row in rows[1:]] == list(range(5))
    assert [row.parent_digest for row in rows[1:]] == [row.digest for row in rows[:-1]]


# Crashes


def prepare(core: CoordinatorHarness, size: int, *, sealed: bool = False) -> str:
    """Return a training session whose first round is closed with three updates."""
    transfer = training_pb2.TransferPolicy(sealed=sealed)
    training_session_id = core.start(
        vector(0.0, size), total_rounds=2, rounds=policy(3), transfer=transfer
    )
    for number in range(3):
        value = np.linspace(-1, number, size, dtype=np.float32)
        core.submit(f"device-{number}", training_session_id, {"w": value}, examples=number + 1)
    return training_session_id


def content_of(core: CoordinatorHarness, training_session_id: str) -> bytes:
    """Return the bytes of the latest version, opened if it is sealed."""
    delivery = core.deliveries.find(training_session_id)
    return b"".join(data for _, data in core.deliveries.opened(SYSTEM, delivery, 0))


def run_out(aggregator: Aggregator) -> None:
    while aggregator.run_once():
        pass


@pytest.mark.parametrize(
    ("inline_bytes", "size", "sealed"),
    [(2**18, 50, False), (0, LARGE, False), (2**18, 50, True), (0, LARGE, True)],
)
def test_crash_between_any_two_steps_gives_the_same_bytes(
    make_core: MakeCore, inline_bytes: int, size: int, sealed: bool
) -> None:
    core = make_core(inline_payload_bytes=inline_bytes, upload_batch_bytes=2**20)
    core.add_devices(3)
    undisturbed = prepare(core, size, sealed=sealed)
    fuse = Fuse()
    run_out(crashing(core, fuse))
    wanted = content_of(core, undisturbed)

    for step in range(1, fuse.count + 1):
        training_session_id = prepare(core, size, sealed=sealed)
        with pytest.raises(CrashError):
            run_out(crashing(core, Fuse(step)))
        run_out(Aggregator(core.context, core.executor, "one"))

        rows = core.versions(training_session_id)
        assert [row.version for row in rows] == [0, 1], f"crash at step {step}"
        assert content_of(core, training_session_id) == wanted, f"crash at step {step}"
        assert {row.state for row in core.updates(training_session_id, 1)} == {"aggregated"}
        core.training.cancel(SYSTEM, training_session_id, "")

    assert fuse.count > 5


def test_the_cache_of_summed_updates_is_freed_before_the_version_is_written(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(payload_store="files", inline_payload_bytes=0, upload_batch_bytes=2**20)
    core.add_devices(3)
    prepare(core, LARGE)
    store, events = core.context.store, list[tuple[str, str]]()
    append = store.append

    def noted_append(payload_id: str, *rest: Any) -> None:
        events.append(("append", payload_id))
        append(payload_id, *rest)

    monkeypatch.setattr(store, "append", noted_append)
    monkeypatch.setattr(store, "forget", lambda name: events.append(("forget", name)))
    core.settle()

    kinds = [kind for kind, _ in events]
    before = events[: kinds.index("append")]
    assert kinds[: len(before)] == ["forget"] * 3
    assert len(set(before)) == 3
    assert set(before) < {event for event in events if event[0] == "forget"}  # the base, at the end


def test_crash_while_folding_early_gives_the_same_bytes(core: CoordinatorHarness) -> None:
    undisturbed = prepare(core, 50)
    core.settle()
    wanted = core.versions(undisturbed)[1].payload_digest
    training_session_id = core.start(vector(0.0, 50), total_rounds=2, rounds=policy(3))

    for number in range(3):
        value = np.linspace(-1, number, 50, dtype=np.float32)
        core.submit(f"device-{number}", training_session_id, {"w": value}, examples=number + 1)
        core.aggregator = Aggregator(core.context, core.executor, "one")
        core.aggregator.run_once()
    core.settle()

    assert core.versions(training_session_id)[1].payload_digest == wanted


def test_crash_of_a_deadline_pass_leaves_one_version(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    for step in range(1, 200):
        training_session_id = core.start(total_rounds=1, rounds=policy(1, target=4))
        core.submit("device-0", training_session_id)
        clock.advance(60)
        fuse = Fuse(step)
        try:
            run_out(crashing(core, fuse))
        except CrashError:
            run_out(Aggregator(core.context, core.executor, "one"))
        assert [row.version for row in core.versions(training_session_id)] == [0, 1], f"step {step}"
        if fuse.count < step:
            break

    assert fuse.count > 5


# Several aggregators


def test_two_aggregators_publish_each_version_once(make_core: MakeCore) -> None:
    rounds, cores = 4, [make_core(name=f"process-{number}", lease_s=0.0) for number in range(2)]
    cores[0].add_devices(4)
    training_session_id = cores[0].start(total_rounds=rounds, rounds=policy(4))

    with ThreadPoolExecutor(2) as pool:
        for number in range(rounds):
            for device in range(4):
                cores[device % 2].submit(
                    f"device-{device}", training_session_id, vector(float(number))
                )
            barrier = threading.Barrier(2)

            def work(core: CoordinatorHarness, barrier: threading.Barrier = barrier) -> None:
                barrier.wait(WAIT_S)
                core.settle()

            list(pool.map(work, cores))

    rows = cores[0].versions(training_session_id)
    assert [row.version for row in rows] == list(range(rounds + 1))
    assert [row.participant_count for row in rows[1:]] == [4] * rounds
    assert cores[0].count(GlobalModel) == rounds + 1


def test_aggregator_that_computed_in_vain_publishes_nothing(make_core: MakeCore) -> None:
    first, second = make_core(lease_s=0.0), make_core(lease_s=0.0)
    first.add_devices(2)
    training_session_id = first.start(rounds=policy(2))
    first.submit("device-0", training_session_id)
    first.aggregator.run_once()
    second.aggregator.run_once()
    first.submit("device-1", training_session_id)

    second.settle()
    first.settle()

    assert len(first.versions(training_session_id)) == 2


def test_lease_keeps_the_second_from_working_until_it_expires(
    make_core: MakeCore, clock: FakeClock
) -> None:
    first, second = make_core(name="first"), make_core(name="second")
    first.add_devices(1)
    training_session_id = first.start(rounds=policy(1))
    first.aggregator.run_once()
    first.submit("device-0", training_session_id)

    second.settle()
    during = len(first.versions(training_session_id))
    clock.advance(first.config.lease_s)
    second.settle()

    assert (during, len(first.versions(training_session_id))) == (1, 2)


def test_lease_from_before_the_clock_was_set_back_has_expired(
    make_core: MakeCore, clock: FakeClock
) -> None:
    first, second = make_core(name="first"), make_core(name="second")
    first.add_devices(1)
    training_session_id = first.start(rounds=policy(1))
    first.aggregator.run_once()
    first.submit("device-0", training_session_id)

    clock.advance(-HOUR_S)
    second.settle()

    assert len(second.versions(training_session_id)) == 2


def test_leader_renews_its_lease_after_the_clock_was_set_back(
    make_core: MakeCore, clock: FakeClock
) -> None:
    first, second = make_core(name="first"), make_core(name="second")
    first.add_devices(1)
    training_session_id = first.start(rounds=policy(1))
    first.aggregator.run_once()
    clock.advance(-HOUR_S)
    first.aggregator.run_once()
    first.submit("device-0", training_session_id)

    second.settle()

    assert len(second.versions(training_session_id)) == 1


def test_lease_given_back_lets_the_second_go_on_at_once(make_core: MakeCore) -> None:
    first, second = make_core(name="first"), make_core(name="second")
    first.add_devices(1)
    training_session_id = first.start(rounds=policy(1))
    first.aggregator.run_once()
    first.submit("device-0", training_session_id)

    first.aggregator.close()
    second.settle()

    assert len(second.versions(training_session_id)) == 2


# The worker


class Observed:
    """An aggregator that says when a pass has ended."""

    def __init__(self, inner: Aggregator) -> None:
        self._inner = inner
        self.passed = threading.Event()
        self.failures = 0

    def run_once(self) -> bool:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no")
        more = self._inner.run_once()
        if not more:
            self.passed.set()
        return more

    def next_deadline(self) -> Any:
        return self._inner.next_deadline()

    def close(self) -> None:
        self._inner.close()


def worker_of(
    core: CoordinatorHarness, **settings: Any
) -> tuple[AggregationWorker, Observed, threading.Event]:
    wake = threading.Event()
    context: Context = dataclasses.replace(
        core.context, config=dataclasses.replace(core.config, **settings), wake=wake.set
    )
    observed = Observed(core.aggregator)
    worker = AggregationWorker(observed, context, wake)  # type: ignore[arg-type]
    return worker, observed, wake


def test_worker_publishes_when_it_is_woken(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1))
    worker, observed, wake = worker_of(core, worker_poll_s=WAIT_S)
    worker.start()
    assert observed.passed.wait(WAIT_S)
    core.submit("device-0", training_session_id)

    observed.passed.clear()
    wake.set()
    assert observed.passed.wait(WAIT_S)
    worker.stop(WAIT_S)

    assert len(core.versions(training_session_id)) == 2


def test_worker_looks_now_and_then_where_nothing_wakes_it(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=policy(1))
    worker, observed, _ = worker_of(core, worker_poll_s=0.01)
    worker.start()
    assert observed.passed.wait(WAIT_S)
    core.submit("device-0", training_session_id)

    while len(core.versions(training_session_id)) < 2:
        observed.passed.clear()
        assert observed.passed.wait(WAIT_S)
    worker.stop(WAIT_S)


def test_worker_goes_on_after_a_failed_pass(core: CoordinatorHarness) -> None:
    core.start(rounds=policy(1))
    worker, observed, _ = worker_of(core, worker_poll_s=0.01)
    observed.failures = 2

    worker.start()

    assert observed.passed.wait(WAIT_S)
    worker.stop(WAIT_S)


def test_worker_stopped_before_its_start_ends_at_once(core: CoordinatorHarness) -> None:
    worker, _, _ = worker_of(core, worker_poll_s=WAIT_S)

    worker.stop()
    worker.start()
    worker.stop(WAIT_S)

    assert not worker._thread.is_alive()
