"""Training sessions keep their life cycle, whoever asks for what when."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qflare.tensors import Manifest, chunks
from qflare.v1 import admin_service_pb2, training_pb2
from qflare_server.errors import (
    InvalidManifestError,
    InvalidRequestError,
    InvalidUpdateError,
    RequestIdReusedError,
    RoundNotFoundError,
    StrategyRefusedError,
    TrainingSessionNotFoundError,
    WrongStateError,
)
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import SYSTEM, Caller, Claim
from qflare_server.storage.repository.idempotent_calls import RepeatedCallError
from qflare_server.storage.tables import AuditLog, GlobalModel, Round, TrainingSession
from tests.conftest import START, FakeClock
from tests.support.use_cases import CoordinatorHarness, floats, vector, with_quorum

MISSING = "00000000-0000-4000-8000-000000000000"


def create(
    core: CoordinatorHarness,
    name: str = "test",
    request_id: str = "",
    caller: Caller = SYSTEM,
    **config: object,
) -> str:
    asked = with_quorum(training_pb2.TrainingConfig(**config))  # type: ignore[arg-type]
    claim = None
    if request_id:
        digest = hashlib.sha256(name.encode() + asked.SerializeToString()).hexdigest()
        claim = Claim("CreateTrainingSession", request_id, digest, lambda row: row.id.encode())
    try:
        return core.training.create(
            replace(caller, claim=claim),
            name=name,
            model_type="",
            architecture={"layers": "2"},
            config=asked,
        ).id
    except RepeatedCallError as repeated:
        return repeated.response.decode()


def test_created_session_waits_for_its_model(core: CoordinatorHarness) -> None:
    training_session_id = create(core)

    created = core.training.get(training_session_id)

    assert (created.state, created.current_version, created.current_round) == ("created", -1, 0)
    assert created.created_at == START
    assert created.architecture == {"layers": "2"}


def test_create_with_the_same_request_id_gives_the_same_session(core: CoordinatorHarness) -> None:
    first = create(core, request_id="request-1")

    second = create(core, request_id="request-1")

    assert second == first
    assert core.count(TrainingSession) == 1


@pytest.mark.parametrize(
    "other", [{"name": "other"}, {"total_rounds": 7}, {"selection": {"seed": 3}}], ids=str
)
def test_a_request_id_of_another_request_is_refused(
    core: CoordinatorHarness, other: dict[str, Any]
) -> None:
    create(core, request_id="request-1")

    with pytest.raises(RequestIdReusedError):
        create(core, request_id="request-1", **other)

    assert core.count(TrainingSession) == 1


def test_request_ids_of_two_callers_are_apart(core: CoordinatorHarness) -> None:
    first = create(core, request_id="request-1")

    second = create(core, request_id="request-1", caller=Caller("admin:bob"))

    assert second != first


@pytest.mark.parametrize(
    "name", ["", "x" * 201, "nul\0", "two\nlines", "two\u2028lines", "\x1b[2J", "\r"]
)
def test_create_refuses_a_name_that_cannot_be_stored(core: CoordinatorHarness, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        create(core, name=name)

    assert core.count(TrainingSession) == 0


def test_create_refuses_contradictory_settings_with_a_reason(core: CoordinatorHarness) -> None:
    with pytest.raises(StrategyRefusedError, match="quorum"):
        create(
            core,
            strategy=training_pb2.StrategyConfig(name="krum", parameters={"byzantine_count": 3}),
            rounds=training_pb2.RoundPolicy(quorum=2),
        )

    assert core.count(TrainingSession) == 0


def test_start_opens_the_first_round_on_the_initial_model(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=3, target=4))

    opened = core.round(training_session_id)

    assert (opened.number, opened.state, opened.base_version) == (1, "open", 0)
    assert (opened.quorum, opened.target) == (3, 4)
    assert (opened.deadline_at - opened.opened_at).total_seconds() == 600
    assert core.training.get(training_session_id).state == "running"


def test_initial_model_reads_back(core: CoordinatorHarness) -> None:
    training_session_id = core.create(vector(2.5))

    assert floats(core.weights(training_session_id)) == [2.5, 2.5, 2.5]


def test_large_initial_model_reads_back(large: CoordinatorHarness) -> None:
    training_session_id = large.create(vector(0.5, 700_000))

    assert floats(large.weights(training_session_id)) == [0.5] * 700_000


@pytest.mark.parametrize("state", ["started", "has a model"])
def test_second_initial_model_is_refused(core: CoordinatorHarness, state: str) -> None:
    training_session_id = core.start() if state == "started" else core.create()
    manifest = Manifest.from_arrays(vector(0))
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=training_session_id, manifest=manifest.to_proto()
    )

    with pytest.raises(WrongStateError):
        core.initial_models.upload(SYSTEM, header, enumerate(chunks(vector(1), manifest)))

    assert core.count(GlobalModel) == 1


@pytest.mark.parametrize("state", ["started", "has a model"])
def test_the_same_initial_model_again_changes_nothing(core: CoordinatorHarness, state: str) -> None:
    identity = core.start() if state == "started" else core.create()
    manifest = Manifest.from_arrays(vector(0))
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=identity, manifest=manifest.to_proto()
    )

    again = core.initial_models.upload(SYSTEM, header, enumerate(chunks(vector(0), manifest)))

    assert again.digest == core.versions(identity)[0].digest
    assert core.count(GlobalModel) == 1


def test_initial_model_that_is_not_finite_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(InvalidUpdateError):
        core.create(vector(float("nan")))

    assert core.count(GlobalModel) == 0


def test_initial_model_without_a_floating_tensor_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(InvalidManifestError):
        core.create({"n": vector(0)["w"].astype("<i8")})


def pause(core: CoordinatorHarness, training_session_id: str) -> object:
    return core.training.pause(SYSTEM, training_session_id)


def resume(core: CoordinatorHarness, training_session_id: str) -> object:
    return core.training.resume(SYSTEM, training_session_id)


def start(core: CoordinatorHarness, training_session_id: str) -> object:
    return core.training.start(SYSTEM, training_session_id)


def cancel(core: CoordinatorHarness, training_session_id: str) -> object:
    return core.training.cancel(SYSTEM, training_session_id, "no longer wanted")


Step = Callable[[CoordinatorHarness, str], object]


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ([start], "running"),
        ([start, pause], "paused"),
        ([start, pause, resume], "running"),
        ([start, cancel], "cancelled"),
        ([start, pause, cancel], "cancelled"),
        ([cancel], "cancelled"),
    ],
)
def test_life_cycle(core: CoordinatorHarness, steps: list[Step], state: str) -> None:
    training_session_id = core.create()

    for step in steps:
        step(core, training_session_id)

    assert core.training.get(training_session_id).state == state


@pytest.mark.parametrize(
    "steps",
    [[start], [start, pause], [start, pause, resume], [cancel]],
    ids=["start", "pause", "resume", "cancel"],
)
def test_a_step_that_is_done_changes_nothing_when_repeated(
    core: CoordinatorHarness, steps: list[Step]
) -> None:
    training_session_id = core.create()
    for step in steps:
        step(core, training_session_id)
    before, entries = core.training.get(training_session_id), core.count(AuditLog)

    steps[-1](core, training_session_id)

    after = core.training.get(training_session_id)
    assert (after.state, after.current_round, after.started_at, after.ended_at) == (
        before.state,
        before.current_round,
        before.started_at,
        before.ended_at,
    )
    assert core.count(AuditLog) == entries
    assert core.count(Round) == before.current_round


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ([], pause),
        ([], resume),
        ([start, pause], start),
        ([cancel], start),
        ([cancel], pause),
        ([cancel], resume),
    ],
)
def test_step_from_a_wrong_state_is_refused_and_changes_nothing(
    core: CoordinatorHarness, before: list[Step], step: Step
) -> None:
    training_session_id = core.create()
    for earlier in before:
        earlier(core, training_session_id)
    state, entries = core.training.get(training_session_id).state, core.count(AuditLog)

    with pytest.raises(WrongStateError):
        step(core, training_session_id)

    assert core.training.get(training_session_id).state == state
    assert core.count(AuditLog) == entries


def test_start_without_a_model_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(WrongStateError, match="initial model"):
        start(core, create(core))

    assert core.count(Round) == 0


@pytest.mark.parametrize("step", [start, pause, resume, cancel])
def test_step_of_an_unknown_session_is_refused(core: CoordinatorHarness, step: Step) -> None:
    with pytest.raises(TrainingSessionNotFoundError):
        step(core, MISSING)


def test_resume_gives_the_open_round_its_full_time_again(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    training_session_id = core.start()
    pause(core, training_session_id)
    clock.advance(10_000)

    resume(core, training_session_id)

    remaining = core.round(training_session_id).deadline_at - clock()
    assert remaining.total_seconds() == 600


def test_cancel_rejects_what_the_open_round_has_taken(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=3))
    core.submit("device-0", training_session_id)

    cancel(core, training_session_id)

    assert core.round(training_session_id).state == "cancelled"
    assert [row.state for row in core.updates(training_session_id, 1)] == ["rejected"]


def test_every_step_wakes_the_worker(core: CoordinatorHarness) -> None:
    training_session_id = core.create()
    core.woken.clear()

    start(core, training_session_id)

    assert core.woken.is_set()


def test_progress_counts_what_is_missing(core: CoordinatorHarness, clock: FakeClock) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=3))
    core.submit("device-0", training_session_id)
    clock.advance(100)

    progress = core.training.progress(training_session_id)

    assert (progress.pending_count, progress.missing_count) == (1, 2)
    assert progress.remaining_s == 500


def test_progress_of_an_unknown_session_is_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(TrainingSessionNotFoundError):
        core.training.progress(MISSING)


def test_updates_of_an_unknown_round_are_refused(core: CoordinatorHarness) -> None:
    with pytest.raises(RoundNotFoundError):
        core.updates(core.create(), 1)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_pages_hold_every_session_once_newest_first(
    core: CoordinatorHarness, clock: FakeClock, size: int
) -> None:
    made = []
    for number in range(7):
        made.append(create(core, f"session {number}"))
        clock.advance(number % 3)  # some at the same moment

    seen, token = [], ""
    while True:
        page = core.training.list(PageRequest(size, token))
        seen += [(row.created_at, row.id) for row in page.rows]
        token = page.next_token
        if not token:
            break

    assert {training_session_id for _, training_session_id in seen} == set(made)
    assert seen == sorted(seen, reverse=True)


def test_page_stays_where_it_is_when_sessions_are_added(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    for number in range(4):
        create(core, f"session {number}")
        clock.advance(1)
    first = core.training.list(PageRequest(2))
    create(core, "later")

    second = core.training.list(PageRequest(2, first.next_token))

    assert [row.name for row in second.rows] == ["session 1", "session 0"]


def test_list_shows_one_state(core: CoordinatorHarness) -> None:
    create(core)
    running = core.start()

    page = core.training.list(PageRequest(), "running")

    assert [row.id for row in page.rows] == [running]


def test_page_token_of_another_query_is_refused(core: CoordinatorHarness) -> None:
    for _ in range(3):
        create(core)
    token = core.training.list(PageRequest(2)).next_token

    with pytest.raises(InvalidRequestError, match="page_token"):
        core.training.list(PageRequest(2, token), "running")


def test_pages_of_updates_come_in_the_order_of_acceptance(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=training_pb2.RoundPolicy(quorum=4))
    for number in (2, 0, 3):
        core.submit(f"device-{number}", training_session_id)

    first = core.training.list_updates(training_session_id, 1, PageRequest(2))
    second = core.training.list_updates(training_session_id, 1, PageRequest(2, first.next_token))

    assert [row.device_id for row in (*first.rows, *second.rows)] == [
        "device-2",
        "device-0",
        "device-3",
    ]
    assert second.next_token == ""


def test_pages_of_rounds_and_versions_come_newest_first(core: CoordinatorHarness) -> None:
    training_session_id = core.start(total_rounds=3, rounds=training_pb2.RoundPolicy(quorum=1))
    for _ in range(3):
        core.submit("device-0", training_session_id)
        core.settle()

    rounds = core.training.list_rounds(training_session_id, PageRequest(2))
    versions = core.training.list_models(training_session_id, PageRequest(3))
    rest = core.training.list_models(training_session_id, PageRequest(3, versions.next_token))

    assert [row.number for row in rounds.rows] == [3, 2]
    assert [row.version for row in (*versions.rows, *rest.rows)] == [3, 2, 1, 0]


def test_sessions_do_not_share_configurations(core: CoordinatorHarness) -> None:
    # The parsed configuration of a session is kept by its id.
    first = core.start(total_rounds=2)
    second = core.start(total_rounds=1)

    for training_session_id in (first, second):
        core.submit("device-0", training_session_id)
        core.settle()

    assert core.training.get(first).state == "running"
    assert core.training.get(second).state == "completed"
