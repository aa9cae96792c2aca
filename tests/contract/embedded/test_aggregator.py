"""The in-process aggregator: averages of raw float32, durable, audited, and beside a coordinator that serves."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from qflare_server import aggregator, registry
from qflare_server.config import ServerConfig
from qflare_server.errors import StoreUnavailableError
from qflare_server.serving.embedded import CALLER
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, ModelUpdate, RoundState, TrainingSession
from qflare_server.use_cases.in_process.training import Contribution, InProcess
from tests.conftest import START, FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, CrashError, CrashingDatabase, Fuse

FIRST = "in-process-1"
WAIT_S = 30.0
LARGE = 300_000  # elements: two chunks


def weights(value: float, size: int = 3) -> bytes:
    return np.full(size, value, "<f4").tobytes()


def values(data: bytes | None) -> list[float]:
    assert data is not None
    return np.frombuffer(data, "<f4").tolist()  # type: ignore[no-any-return]


def share(core: CoordinatorHarness) -> None:
    """Let this process embed a coordinator with four devices a to d."""
    registry.configure(core)
    for name in "abcd":
        registry.register_device(name)


@pytest.fixture
def program(make_core: MakeCore) -> Iterator[CoordinatorHarness]:
    core = make_core()
    share(core)
    yield core
    aggregator.close()


@pytest.fixture
def large_program(make_core: MakeCore) -> Iterator[CoordinatorHarness]:
    core = make_core(inline_payload_bytes=0, upload_batch_bytes=2**20)
    share(core)
    yield core
    aggregator.close()


def test_average_is_weighted_by_samples(program: CoordinatorHarness) -> None:
    assert aggregator.store_model_update("a", weights(1.0), {"samples_count": 3}) is True
    assert aggregator.store_model_update("b", weights(5.0)) is True

    average = aggregator.aggregate_models()

    assert values(average) == [2.0, 2.0, 2.0]
    assert aggregator.get_global_model() == average
    assert program.weights(FIRST, 1) == average


def test_a_row_of_a_device_is_not_mixed_in(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))
    aggregator.store_model_update("b", weights(5.0))
    edit = update(ModelUpdate).where(ModelUpdate.device_id == "b").values(origin="device")
    program.database.write(lambda session: session.execute(edit))

    assert values(aggregator.aggregate_models()) == [1.0, 1.0, 1.0]
    assert program.versions(FIRST)[1].in_process_count == 1


def test_nothing_is_there_before_the_first_update(program: CoordinatorHarness) -> None:
    assert aggregator.get_global_model() is None
    assert aggregator.aggregate_models() is None
    assert aggregator.get_aggregation_status() == {
        "pending_updates": 0,
        "last_aggregation": None,
        "current_round": 0,
        "ready_for_aggregation": False,
    }
    assert aggregator.clear_pending_updates() is True
    assert aggregator.reset_aggregation_state() is True
    assert program.count(TrainingSession) == 0


def test_status_counts_what_is_pending(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))
    one = aggregator.get_aggregation_status()
    aggregator.store_model_update("b", weights(1.0))
    two = aggregator.get_aggregation_status()

    assert (one["pending_updates"], one["ready_for_aggregation"]) == (1, False)
    assert (two["pending_updates"], two["ready_for_aggregation"]) == (2, True)
    assert program.training.get(FIRST).state == "running"


def test_status_and_metrics_tell_of_the_last_aggregation(
    program: CoordinatorHarness, clock: FakeClock
) -> None:
    facts = {"samples_count": 1, "local_accuracy": 0.5, "local_loss": 1.0}
    aggregator.store_model_update("a", weights(1.0), facts)
    aggregator.store_model_update(
        "b", weights(1.0), {"samples_count": 3, "accuracy": 0.9, "loss": 2.0}
    )
    clock.advance(60)
    aggregator.aggregate_models()
    aggregator.store_model_update("a", weights(1.0))

    at = clock().isoformat()
    assert aggregator.get_aggregation_status() == {
        "pending_updates": 1,
        "last_aggregation": at,
        "current_round": 1,
        "ready_for_aggregation": False,
    }
    assert aggregator.get_aggregation_metrics() == {
        "total_rounds": 1,
        "pending_updates": 1,
        "last_aggregation_time": at,
        "model_accuracy": pytest.approx(0.8),
        "model_loss": pytest.approx(1.75),
        "participants_last_round": 2,
    }
    assert program.round(FIRST).number == 2


@pytest.mark.parametrize("least", [2, 3])
def test_too_few_updates_make_no_average(program: CoordinatorHarness, least: int) -> None:
    aggregator.store_model_update("a", weights(1.0))

    assert aggregator.aggregate_models(least) is None

    assert program.round(FIRST).state == "open"
    assert aggregator.get_aggregation_status()["pending_updates"] == 1


@pytest.mark.parametrize("least", [1, 0, -1])
def test_one_update_is_enough_where_it_is_asked_for(
    program: CoordinatorHarness, least: int
) -> None:
    nothing = aggregator.aggregate_models(least)
    aggregator.store_model_update("a", weights(1.0))

    assert nothing is None
    assert values(aggregator.aggregate_models(least)) == [1.0, 1.0, 1.0]
    assert len(program.versions(FIRST)) == 2


def test_rounds_follow_each_other(program: CoordinatorHarness) -> None:
    averages = []
    for number in range(4):
        for device in "ab":
            assert aggregator.store_model_update(device, weights(float(number)))
        averages.append(values(aggregator.aggregate_models())[0])

    assert averages == [0.0, 1.0, 2.0, 3.0]
    assert [row.version for row in program.versions(FIRST)] == [0, 1, 2, 3, 4]


def test_second_update_of_a_device_for_a_round_replaces_nothing(
    program: CoordinatorHarness,
) -> None:
    aggregator.store_model_update("a", weights(1.0))

    assert aggregator.store_model_update("a", weights(9.0)) is False

    assert values(aggregator.aggregate_models(1)) == [1.0, 1.0, 1.0]
    assert program.count(ModelUpdate) == 1


def test_large_weights_go_through_the_payload_store(large_program: CoordinatorHarness) -> None:
    for number, device in enumerate("ab"):
        values_of = np.arange(LARGE, dtype="<f4") + number
        assert aggregator.store_model_update(device, values_of.tobytes()) is True

    average = aggregator.aggregate_models()

    assert average == (np.arange(LARGE, dtype=np.float64) + 0.5).astype("<f4").tobytes()
    assert large_program.weights(FIRST) == average


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_weights_may_be_any_buffer(program: CoordinatorHarness, kind: Any) -> None:
    assert aggregator.store_model_update("a", kind(weights(1.0))) is True
    assert program.count(ModelUpdate) == 1


# Refusals


def refused(program: CoordinatorHarness, device_id: str, data: bytes, metadata: Any = None) -> None:
    before = (program.count(ModelUpdate), program.count(AuditLog))

    assert aggregator.validate_model_update(device_id, data, metadata) is False
    assert aggregator.store_model_update(device_id, data, metadata) is False

    assert (program.count(ModelUpdate), program.count(AuditLog)) == before


def test_unknown_device_is_refused(
    program: CoordinatorHarness, caplog: pytest.LogCaptureFixture
) -> None:
    refused(program, "nobody", weights(1.0))

    assert "DEVICE_NOT_FOUND" in caplog.text


@pytest.mark.parametrize("move", ["suspend", "revoke", "deactivate"])
def test_device_that_is_not_active_is_refused(program: CoordinatorHarness, move: str) -> None:
    getattr(program.devices, move)(SYSTEM, "a", "")

    refused(program, "a", weights(1.0))


@pytest.mark.parametrize("data", [b"", b"abc", b"abcde", weights(1.0, 4), weights(1.0, 2)])
def test_weights_of_another_length_are_refused(program: CoordinatorHarness, data: bytes) -> None:
    aggregator.store_model_update("b", weights(1.0))

    refused(program, "a", data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(program: CoordinatorHarness, value: float) -> None:
    aggregator.store_model_update("b", weights(1.0))

    refused(program, "a", weights(value))


@pytest.mark.parametrize(
    "metadata",
    [
        {"samples_count": 0},
        {"samples_count": -1},
        {"samples_count": 1.5},
        {"samples_count": "ten"},
        {"samples_count": True},
        {"samples_count": 2**41},
        {"loss": float("nan")},
        {"accuracy": "good"},
        {"training_time": 10**400},
    ],
)
def test_metadata_out_of_range_is_refused(
    program: CoordinatorHarness, metadata: dict[str, Any]
) -> None:
    refused(program, "a", weights(1.0), metadata)


def test_metadata_of_no_meaning_here_is_left_out(program: CoordinatorHarness) -> None:
    facts = {"samples_count": 5, "loss": None, "dataset": "ward", "local_epochs": 3}

    assert aggregator.store_model_update("a", weights(1.0), facts) is True

    (row,) = program.updates(FIRST, 1)
    assert (row.example_count, row.local_epochs, row.metrics) == (5, 3, {"epochs": 3.0})


def test_weights_over_the_bound_are_refused(make_core: MakeCore) -> None:
    core = make_core(max_payload_bytes=8)
    share(core)

    assert aggregator.store_model_update("a", weights(1.0)) is False

    assert core.count(ModelUpdate) == 0
    aggregator.close()


def test_paused_session_takes_nothing(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))
    program.training.pause(SYSTEM, FIRST)

    refused(program, "b", weights(1.0))

    assert aggregator.aggregate_models(1) is None
    assert aggregator.clear_pending_updates() is False


def test_fault_is_raised_and_not_hidden(program: CoordinatorHarness, tmp_path: Any) -> None:
    (tmp_path / "folder").mkdir()
    nowhere = ServerConfig(database_url=f"sqlite:///{tmp_path / 'folder'}")
    database = Database(make_engine(nowhere))
    program.context = replace(program.context, database=database)
    aggregator.configure(program)

    with pytest.raises(StoreUnavailableError):
        aggregator.store_model_update("a", weights(1.0))
    with pytest.raises(StoreUnavailableError):
        aggregator.get_global_model()

    database.close()


# What is validated, listed, cleared and reset


def test_valid_update_is_valid_and_not_stored(program: CoordinatorHarness) -> None:
    assert aggregator.validate_model_update("a", weights(1.0), {"samples_count": 2}) is True

    assert program.count(ModelUpdate) == 0
    assert program.count(TrainingSession) == 0


def test_second_update_of_a_device_is_not_valid(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))

    assert aggregator.validate_model_update("a", weights(2.0)) is False
    assert aggregator.validate_model_update("b", weights(2.0)) is True
    assert program.count(ModelUpdate) == 1


def test_updates_of_a_device_are_listed_newest_first(
    program: CoordinatorHarness, clock: FakeClock
) -> None:
    facts = {"samples_count": 7, "loss": 0.5, "training_time": 2.5}
    aggregator.store_model_update("a", weights(1.0), facts)
    aggregator.store_model_update("b", weights(1.0))
    aggregator.aggregate_models()
    clock.advance(60)
    aggregator.store_model_update("a", weights(2.0))

    newest, oldest = aggregator.get_model_updates_for_device("a")

    assert (newest["status"], newest["round_number"], newest["aggregated_at"]) == (
        "pending",
        2,
        None,
    )
    assert (oldest["status"], oldest["samples_count"]) == ("aggregated", 7)
    assert (oldest["local_loss"], oldest["training_time"]) == (0.5, 2.5)
    assert oldest["created_at"] == START.isoformat()
    assert aggregator.get_model_updates_for_device("a", 1) == [newest]
    assert aggregator.get_model_updates_for_device("nobody") == []
    assert program.count(ModelUpdate) == 3


@pytest.mark.parametrize("limit", [0, 1001])
def test_limit_out_of_range_is_a_mistake(program: CoordinatorHarness, limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        aggregator.get_model_updates_for_device("a", limit)
    assert program.count(ModelUpdate) == 0


def test_cleared_updates_do_not_count_and_may_be_sent_again(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(9.0))

    assert aggregator.clear_pending_updates() is True
    cleared = aggregator.get_aggregation_status()["pending_updates"]
    assert aggregator.store_model_update("a", weights(1.0)) is True

    assert cleared == 0
    assert values(aggregator.aggregate_models(1)) == [1.0, 1.0, 1.0]
    assert [row.state for row in program.updates(FIRST, 1)] == ["rejected"]


def test_reset_starts_over_with_any_length(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))
    aggregator.aggregate_models(1)

    assert aggregator.reset_aggregation_state() is True

    assert aggregator.get_global_model() is None
    assert aggregator.get_aggregation_status()["current_round"] == 0
    assert aggregator.store_model_update("a", weights(1.0, 5)) is True
    assert len(program.versions(FIRST)) == 2  # what was before stays


# Beside a coordinator that serves


def test_no_device_is_given_the_round_as_a_task(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))

    assert program.tasks.next_task("b", "").round is None
    assert program.tasks.next_task("b", FIRST).round is None


def test_worker_of_the_coordinator_leaves_the_round_open(
    program: CoordinatorHarness, clock: FakeClock
) -> None:
    aggregator.store_model_update("a", weights(1.0))
    clock.advance(30 * 86_400)

    program.settle()

    assert program.round(FIRST).state == "open"
    assert values(aggregator.aggregate_models(1)) == [1.0, 1.0, 1.0]


def test_round_past_its_deadline_is_extended(program: CoordinatorHarness, clock: FakeClock) -> None:
    aggregator.store_model_update("a", weights(1.0))
    clock.advance(91 * 86_400)

    assert aggregator.store_model_update("b", weights(3.0)) is True

    assert values(aggregator.aggregate_models()) == [2.0, 2.0, 2.0]
    assert program.round(FIRST, 1).state == "published"


def test_average_is_made_while_another_coordinator_has_the_lease(
    program: CoordinatorHarness, make_core: MakeCore
) -> None:
    aggregator.store_model_update("a", weights(1.0))
    other = make_core(name="other")
    other.settle()

    assert values(aggregator.aggregate_models(1)) == [1.0, 1.0, 1.0]
    other.settle()
    assert len(program.versions(FIRST)) == 2


def test_two_programs_share_one_session(program: CoordinatorHarness, make_core: MakeCore) -> None:
    other = make_core()
    barrier = threading.Barrier(2)

    def contribute(core: CoordinatorHarness, device: str) -> None:
        use_case = InProcess(core.context, core.executor, core.training)
        barrier.wait(WAIT_S)
        use_case.contribute(CALLER, Contribution(device, weights(1.0)))

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(contribute, program, "a"), pool.submit(contribute, other, "b")]
        for future in futures:
            future.result(WAIT_S)

    assert program.count(TrainingSession) == 1
    assert aggregator.get_aggregation_status()["pending_updates"] == 2


class _Interruption(Fuse):
    """Lets another program publish the round at one step of this one."""

    def __init__(self, at: int, publish: Callable[[], object]) -> None:
        super().__init__(at)
        self._publish = publish
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._publish()


def test_contribution_counts_wherever_another_program_publishes_the_round(
    program: CoordinatorHarness,
) -> None:
    """It is accepted into the round that is open when it is written: nothing is lost, nothing counts twice."""
    aggregator.store_model_update("a", weights(1.0))

    def publish() -> None:
        number = InProcess(program.context, program.executor, program.training).close_round(1)
        assert number is not None
        program.settle()

    for step in range(1, 30):
        interruption = _Interruption(step, publish)
        database = CrashingDatabase(program.database, interruption)
        context = replace(program.context, database=database)
        contributor = InProcess(context, program.executor, program.training)
        before = program.count(ModelUpdate)
        contributor.contribute(CALLER, Contribution("b", weights(2.0)))
        assert program.count(ModelUpdate) == before + 1
        if interruption.count < step:
            break
        if aggregator.get_aggregation_status()["pending_updates"]:
            publish()
        aggregator.store_model_update("a", weights(1.0))
    assert step > 3  # the round was published at every step of a contribution


def test_round_closed_before_a_crash_is_published_by_the_next_call(
    program: CoordinatorHarness,
) -> None:
    aggregator.store_model_update("a", weights(1.0))
    fuse_at = 0
    for step in range(1, 50):
        fuse = Fuse(step)
        shared = replace(program.context, database=CrashingDatabase(program.database, fuse))
        program.context, kept = shared, program.context
        aggregator.configure(program)
        try:
            aggregator.aggregate_models(1)
        except CrashError:
            fuse_at = step
        finally:
            program.context = kept
            aggregator.configure(program)
        if len(program.versions(FIRST)) > 1 or program.round(FIRST).state == "closed":
            break

    assert fuse_at
    assert aggregator.store_model_update("b", weights(3.0)) is True
    assert values(aggregator.get_global_model()) == [1.0, 1.0, 1.0]


def test_round_that_was_cancelled_meanwhile_makes_no_average(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))
    program.database.write(
        lambda session: training_sessions.update_round(
            session, FIRST, 1, {"state": RoundState.CANCELLED.value}
        )
    )

    assert aggregator.aggregate_models(1) is None


def test_everything_is_audited_as_the_program_s(program: CoordinatorHarness) -> None:
    aggregator.store_model_update("a", weights(1.0))

    with program.database.read() as session:
        entry = session.query(AuditLog).filter_by(event_type="update.accepted").one()
        assert (entry.actor, entry.authentication_method) == ("system", "in-process")


@given(
    updates=st.lists(
        st.tuples(
            st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=2, max_size=2),
            st.integers(1, 1000),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_average_agrees_with_numpy(
    program: CoordinatorHarness, updates: list[tuple[list[float], int]]
) -> None:
    for device, (vector, samples) in zip("abcd", updates, strict=False):
        data = np.array(vector, "<f4").tobytes()
        assert aggregator.store_model_update(device, data, {"samples_count": samples})

    average = values(aggregator.aggregate_models(1))

    wanted = np.average(
        np.array([vector for vector, _ in updates], np.float64),
        axis=0,
        weights=[samples for _, samples in updates],
    )
    assert average == pytest.approx(wanted.tolist(), rel=1e-6, abs=1e-3)
    assert program.round(FIRST).state == "open"
