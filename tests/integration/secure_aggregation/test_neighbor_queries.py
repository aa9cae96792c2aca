"""Queries of federated analytics whose answers devices hide among each other, in groups without a helper."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.v1 import training_pb2
from qflare_client import (
    Analytics,
    Client,
    InsufficientTaskError,
    InvalidArgumentError,
    PrivacyBudgetExceededError,
    SecureAggregation,
    TaskKind,
    enroll,
    run,
)
from qflare_client.admin.administrator import Administrator
from qflare_client.admin.analytics import _as_json, _as_text
from qflare_client.admin.queries import Protection, QueryResult, Question
from qflare_server.context import utc_now
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import audit, neighbors
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.use_cases.access.roles import Role
from qflare_server.verification.recomputation import recompute_version
from tests.independent.bundle import check_bundle
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import check_refused, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import (
    bundle_of,
    expire,
    expire_groups,
    finish,
    members_of,
    take_step,
    together,
    until,
)
from tests.support.visitor import Visitor

Deploy = Callable[..., Deployment]
EPSILON: Final = 600.0
"""So much that the noise is far below a value, and results can be compared."""
KINDS: Final = frozenset({"count", "sum", "mean", "histogram", "quantiles", "labels"})
POLICY: Final = Analytics(
    {"age": KINDS, "word": KINDS}, min_cohort=3, max_epsilon=EPSILON, max_examples=20
)
PROTECTION: Final = Protection(3, EPSILON, neighbors=True, corrupt_fraction=0.1)
AGES: Final = [np.arange(20, 20 + 5 * count) % 97 for count in (1, 2, 3, 4, 3, 2)]
WORDS: Final = [["yes"] * count + ["no"] * 2 + ["what"] for count in range(1, 7)]
COUNT: Final = Question("age", "count", max_examples=20)
ASKS: Final = {"answers_queries": True}


@pytest.fixture
def made(deploy: Deploy) -> Deployment:
    return deploy(worker_poll_s=0.02)


@pytest.fixture
def admin(made: Deployment) -> Iterator[Administrator]:
    with Administrator(made.coordinator.address, made.admin_token) as opened:
        yield opened


class Devices(ExitStack):
    """Enrolled devices with policies of their own."""

    def __init__(self, made: Deployment) -> None:
        super().__init__()
        self._made = made

    def add(self, name: str, **settings: Any) -> Client:
        enroll(self._made.bundle(label=name), home=self._made.folder / name)
        return self.open(name, **settings)

    def open(self, name: str, **settings: Any) -> Client:
        address = self._made.coordinator.address
        settings = {"analytics": POLICY, "address": address, **settings}
        return self.enter_context(Client(home=self._made.folder / name, insecure=True, **settings))

    def several(self, count: int) -> list[Client]:
        return [self.add(f"device-{index}") for index in range(count)]


@pytest.fixture
def devices(made: Deployment) -> Iterator[Devices]:
    with Devices(made) as stack:
        yield stack


def ask(
    admin: Administrator, question: Question, protection: Protection = PROTECTION, name: str = "q"
) -> str:
    return admin.create_query(name, question, protection).training_session_id


def answer(client: Client, query_id: str, values: Any) -> None:
    task = until(client, query_id, lambda task: task.kind is TaskKind.TRAIN, **ASKS)
    client.answer(task, values)


def join(made: Deployment, query_id: str, clients: Sequence[Client]) -> None:
    """Let devices advertise and share."""
    take_step(made, query_id, clients, "", **ASKS)
    take_step(made, query_id, clients, "has_shares", **ASKS)


def open_sums(made: Deployment, query_id: str, clients: Sequence[Client]) -> None:
    finish(made, query_id, clients, **ASKS)
    wait_for_version(clients[0], query_id, 1)


def group_of(made: Deployment, query_id: str, client: Client) -> int | None:
    members = members_of(made, query_id)
    return next((item.group_number for item in members if item.device_id == client.device_id), None)


def ask_with_an_aborted_group(
    made: Deployment,
    admin: Administrator,
    clients: list[Client],
    question: Question,
    values: Sequence[Any],
) -> tuple[QueryResult, list[Any]]:
    """Ask in two groups of three, of which the one of the first device loses that device; return what the other has."""
    protection = replace(PROTECTION, group_size=3, devices=6)
    query_id = ask(admin, question, protection, question.kind)
    join(made, query_id, clients)
    lost = group_of(made, query_id, clients[0])
    for client, own in list(zip(clients, values, strict=True))[1:]:
        answer(client, query_id, own)
    expire(made, query_id)
    staying = [
        index for index, client in enumerate(clients) if group_of(made, query_id, client) != lost
    ]
    open_sums(made, query_id, [clients[index] for index in staying])
    assert len(staying) == 3
    return admin.query_result(query_id), [values[index] for index in staying]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_kind_of_result_is_that_of_the_groups_that_were_opened(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    """Half of the answers are in a group that was aborted: they are in no number, and the error bounds still hold."""
    clients = devices.several(6)

    def result(question: Question, values: Sequence[Any]) -> tuple[list[Any], list[Any], float]:
        found, kept = ask_with_an_aborted_group(made, admin, clients, question, values)
        assert found.version.participant_count == 3
        assert 0 < found.version.epsilon <= EPSILON
        assert found.neighbors is not None
        assert (found.neighbors.opened_group_count, found.neighbors.aborted_group_count) == (1, 1)
        return list(found.result.rows), kept, 6 * found.result.error

    bounded: dict[str, Any] = {"lower": 0.0, "upper": 100.0, "max_examples": 20}
    rows, kept, bound = result(COUNT, AGES)
    assert rows[0][0] == pytest.approx(sum(map(len, kept)), abs=bound)
    rows, kept, bound = result(Question("age", "sum", upper=100.0), AGES)
    assert rows[0][0] == pytest.approx(sum(own.mean() for own in kept), abs=bound)
    rows, kept, bound = result(Question("age", "mean", **bounded), AGES)
    whole = np.concatenate(kept)
    assert rows[0][0] == pytest.approx(len(whole), abs=bound)
    assert rows[0][1] == pytest.approx(whole.mean(), abs=100 * bound / len(whole))
    assert rows[0][2] == pytest.approx(whole.var(), abs=5000 * bound / len(whole))
    rows, kept, bound = result(Question("age", "histogram", bins=10, **bounded), AGES)
    wanted = [0, *np.histogram(np.concatenate(kept), 10, (0, 100))[0], 0]
    assert [row[2] for row in rows] == pytest.approx(wanted, abs=bound)
    asked = Question("age", "quantiles", quantiles=[0.5], bins=10, **bounded)
    rows, kept, bound = result(asked, AGES)
    assert rows[0][1] == pytest.approx(np.median(np.concatenate(kept)), abs=15)
    asked = Question("word", "labels", labels=["yes", "no"], max_examples=20)
    rows, kept, bound = result(asked, WORDS)
    said = [word for own in kept for word in own]
    assert [row[1] for row in rows] == pytest.approx([said.count("yes"), 6, 3], abs=bound)


@pytest.mark.parametrize("stage", ["share", "train", "confirm", "reveal"])
def test_a_device_may_drop_out_at_any_step(
    made: Deployment, admin: Administrator, devices: Devices, stage: str
) -> None:
    clients = devices.several(5)
    order = ["share", "train", "confirm", "reveal"]

    def going(at: str) -> list[Client]:
        return clients[1:] if order.index(at) >= order.index(stage) else clients

    query_id = ask(admin, COUNT, replace(PROTECTION, devices=5))
    take_step(made, query_id, clients, "", **ASKS)
    take_step(made, query_id, going("share"), "has_shares", **ASKS)
    if stage == "share":
        expire_groups(made, query_id)
    for client in going("train"):
        answer(client, query_id, AGES[clients.index(client)])
    if stage == "train":
        expire(made, query_id)
    take_step(made, query_id, going("confirm"), "has_confirmed", **ASKS)
    if stage == "confirm":
        expire_groups(made, query_id)
    open_sums(made, query_id, going("reveal"))
    found = admin.query_result(query_id)
    answered = going("train")
    assert found.version.participant_count == len(answered)
    wanted = sum(len(AGES[clients.index(client)]) for client in answered)
    assert found.result.rows[0][0] == pytest.approx(wanted, abs=6 * found.result.error)
    assert [client.analytics_epsilon() for client in clients] == [
        EPSILON if client in answered else 0 for client in clients
    ]


def test_a_query_is_asked_again_if_every_group_was_aborted(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    """Nothing is published of the first round; who has answered in it pays for the second one too."""
    clients = devices.several(3)
    query_id = ask(admin, COUNT)
    join(made, query_id, clients)
    answer(clients[0], query_id, AGES[0])
    expire(made, query_id)

    def work(index: int) -> None:
        again = until(
            clients[index],
            query_id,
            lambda task: task.kind is TaskKind.TRAIN and task.round_number == 2,
            **ASKS,
        )
        clients[index].answer(again, AGES[index])
        until(clients[index], query_id, lambda task: task.kind is TaskKind.DONE, **ASKS)

    together(work, 3)
    found = admin.query_result(query_id)
    wanted = sum(map(len, AGES[:3]))
    assert found.result.rows[0][0] == pytest.approx(wanted, abs=6 * found.result.error)
    assert found.version.participant_count == 3
    assert found.neighbors is not None
    assert (found.neighbors.opened_group_count, found.neighbors.aborted_group_count) == (1, 0)
    assert [row.round_number for row in admin.rounds(query_id)] == [2, 1]
    assert [client.analytics_epsilon() for client in clients] == [2 * EPSILON, EPSILON, EPSILON]


def test_a_result_is_verified_offline_recomputed_shown_and_in_the_audit_log(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    clients = devices.several(6)
    found, kept = ask_with_an_aborted_group(made, admin, clients, COUNT, AGES)
    query_id, parts = found.session.training_session_id, made.coordinator.parts
    again = recompute_version(parts.context, query_id, 1)
    assert (again.recomputed, again.differences) == (True, ())
    bundle, pinned = bundle_of(made, query_id), parts.keys.trust.root_key_ids()
    assert verify_bundle(bundle, pinned, utc_now()).contributor_count == len(kept)
    ((version, _digest),) = check_bundle(bundle, sorted(pinned), 1, utc_now())[-1:]
    assert version.contributor_count == len(kept)
    check_refused(bundle, pinned, lambda other: other.unmasking.ClearField("groups"))
    with parts.context.database.read() as session:
        entries = audit.list_entries(session, PageRequest(100), AuditFilter()).rows
    stages = [
        entry.details["stage"]
        for entry in entries
        if entry.event_type == "round.group" and query_id in entry.subject
    ]
    assert sorted(stages) == sorted(
        [*["share", "train"] * 2, "aborted", "confirm", "reveal", "opened"]
    )
    text = _as_text(found)
    assert "groups of at least 3 answers: 1 in the result, 1 aborted" in text
    assert "devices: 6 advertised, 3 in sums" in text
    assert _as_json(found)["neighbors"] == {
        "advertised": 6,
        "in_sums": 3,
        "opened_groups": 1,
        "aborted_groups": 1,
    }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_dashboard_shows_the_groups_of_a_query(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02, dashboard="127.0.0.1:0")
    address = made.coordinator.address
    with Devices(made) as devices, Administrator(address, made.admin_token) as admin:
        found, _kept = ask_with_an_aborted_group(made, admin, devices.several(6), COUNT, AGES)
    assert made.coordinator.dashboard is not None
    viewer = Visitor(made.coordinator.dashboard.url)
    viewer.log_in(made.issue_admin(Role.VIEWER))
    assert "masked, in groups" in viewer.get("/queries").text
    page = viewer.get(f"/sessions/{found.session.training_session_id}").text
    assert "Groups of at least 3 answers: 1 opened, 1 aborted." in page
    assert "Devices: 6 advertised, 6 shared secrets, 3 are in sums." in page


def train(arrays: dict[str, Any], task: Any) -> tuple[dict[str, Any], int, dict[str, float]]:
    del task
    return arrays, 1, {"loss": 0.5}


def advertised(made: Deployment, query_id: str) -> set[str]:
    return {item.device_id for item in members_of(made, query_id)}


def test_devices_that_may_not_or_cannot_answer_take_no_step_and_go_on_training(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    """None of them advertises, none keeps the query from others, and none is kept from other work."""
    willing = devices.several(3)
    masked: dict[str, Any] = {"min_cohort": 3, "helper_key_ids": frozenset(), "neighbors": True}
    refusing: dict[str, dict[str, Any]] = {
        "without a policy": {"analytics": None},
        "of a larger cohort": {"analytics": replace(POLICY, min_cohort=4)},
        "of another column": {"analytics": replace(POLICY, columns={"height": KINDS})},
        "of another kind": {"analytics": replace(POLICY, columns={"age": ["sum"]})},
        "of more noise": {"analytics": replace(POLICY, max_epsilon=1.0)},
        "of fewer values": {"analytics": replace(POLICY, max_examples=19)},
        "of a smaller budget": {"analytics": replace(POLICY, budget=EPSILON - 1)},
        "of more corrupt neighbors": {
            "secure_aggregation": SecureAggregation(**masked, corrupt_fraction=0.3)
        },
        "without a function": {},
    }
    query_id = ask(admin, COUNT)
    made.session(rounds=training_pb2.RoundPolicy(quorum=len(refusing)))

    def take_part(name: str, settings: dict[str, Any]) -> int:
        client, stop = devices.add(name.replace(" ", "-"), **settings), threading.Event()
        columns: dict[str, Any] = {
            "word" if name == "without a function" else "age": lambda _: AGES[0]
        }
        answers = None if settings.get("analytics", POLICY) is None else columns
        # A policy for secure aggregation refuses to train without it; its device is asked the query alone.
        asked = query_id if "secure_aggregation" in settings else None
        if asked is not None:
            with pytest.raises(InsufficientTaskError, match="corrupt"):
                client.get_task(asked, **ASKS)
            return 1
        summary = run(client, train, stop=stop, on_receipt=lambda _: stop.set(), analytics=answers)
        assert (summary.update_count, summary.answer_count) == (1, 0), name
        return summary.refused_query_count

    refusals = {name: take_part(name, settings) for name, settings in refusing.items()}
    assert refusals == {name: int(name != "without a policy") for name in refusing}
    assert advertised(made, query_id) == set()
    loops = [
        threading.Thread(
            target=run,
            args=(client, train),
            kwargs={"training_session_id": query_id, "analytics": {"age": lambda _: AGES[1]}},
        )
        for client in willing
    ]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    assert advertised(made, query_id) == {client.device_id for client in willing}
    assert admin.query_result(query_id).version.participant_count == 3


def test_a_member_that_no_longer_answers_queries_is_not_kept_from_other_work(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    """A program without functions for queries, after a restart: its group goes on without it."""
    clients = devices.several(5)
    query_id = ask(admin, COUNT, replace(PROTECTION, devices=5))
    take_step(made, query_id, clients, "", **ASKS)
    until(clients[0], query_id, lambda _: group_of(made, query_id, clients[0]) is not None)
    assert clients[0].get_task(query_id).kind is TaskKind.WAIT
    assert clients[0].get_task().kind is TaskKind.WAIT
    training_id = made.session(rounds=training_pb2.RoundPolicy(quorum=1))
    summary = run(clients[0], train, training_session_id=training_id)
    assert summary.update_count > 0
    shares = [item.has_shares for item in members_of(made, query_id)]
    assert shares == [False] * 5
    take_step(made, query_id, clients[1:], "has_shares", **ASKS)
    expire_groups(made, query_id)
    for client, own in zip(clients[1:], AGES, strict=False):
        answer(client, query_id, own)
    open_sums(made, query_id, clients[1:])
    assert admin.query_result(query_id).version.participant_count == 4


@pytest.mark.parametrize("step", ["has_shares", "has_confirmed"])
def test_a_policy_that_became_stricter_ends_the_part_of_a_device_at_any_step(
    made: Deployment, admin: Administrator, devices: Devices, step: str
) -> None:
    clients = devices.several(5)
    query_id = ask(admin, COUNT, replace(PROTECTION, devices=5))
    take_step(made, query_id, clients, "", **ASKS)

    def without_the_first() -> list[Client]:
        """Refuse the step that waits for the first device, and end its time."""
        clients[0].close()
        strict = devices.open("device-0", analytics=replace(POLICY, max_epsilon=1.0))
        with pytest.raises(InsufficientTaskError, match="epsilon"):
            until(strict, query_id, lambda _: False, **ASKS)
        take_step(made, query_id, clients[1:], step, **ASKS)
        sent = [
            getattr(item, step)
            for item in members_of(made, query_id)
            if item.device_id == strict.device_id
        ]
        assert sent == [False]
        expire_groups(made, query_id)
        return clients[1:]

    if step == "has_shares":
        left = without_the_first()
    else:
        left = clients
        take_step(made, query_id, clients, "has_shares", **ASKS)
    for client in left:
        answer(client, query_id, AGES[clients.index(client)])
    if step == "has_confirmed":
        left = without_the_first()
    open_sums(made, query_id, left)
    answers = 4 if step == "has_shares" else 5
    assert admin.query_result(query_id).version.participant_count == answers


def test_a_spent_budget_is_noticed_before_keys_are_advertised(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    """The budget is checked for every step, and the answer that was counted goes on to its end."""
    once = replace(POLICY, budget=EPSILON)
    clients = [*devices.several(3), devices.add("thrifty", analytics=once)]
    first = ask(admin, COUNT, replace(PROTECTION, devices=4), "first")
    second = ask(admin, COUNT, name="second")
    join(made, first, clients)
    assert clients[3].get_task(second, **ASKS).kind is TaskKind.WAIT  # nothing is spent yet
    for client, own in zip(clients, AGES, strict=False):
        answer(client, first, own)
    with pytest.raises(PrivacyBudgetExceededError):
        clients[3].get_task(ask(admin, COUNT, name="third"), **ASKS)
    open_sums(made, first, clients)
    assert admin.query_result(first).version.participant_count == 4
    assert clients[3].analytics_epsilon() == EPSILON
    take_step(made, second, clients[:2], "", **ASKS)
    until(clients[0], second, lambda _: group_of(made, second, clients[3]) is not None, **ASKS)
    with pytest.raises(PrivacyBudgetExceededError):
        until(clients[3], second, lambda _: False, **ASKS)


def test_a_task_without_an_answer_to_give_is_for_no_answer(
    made: Deployment, admin: Administrator, devices: Devices
) -> None:
    client = devices.add("device")
    task = client.get_task(ask(admin, COUNT), takes_steps=False, **ASKS)
    assert (task.kind, task.analytics is not None) == (TaskKind.WAIT, True)
    with pytest.raises(InvalidArgumentError, match="of kind WAIT"):
        client.answer(task, [1.0])
    assert client.analytics_epsilon() == 0
    assert client.take_step(task).kind is TaskKind.WAIT
    assert len(members_of(made, task.training_session_id)) == 1


def test_coordinator_and_devices_restart_at_every_step(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02, lease_s=1.0)
    with Administrator(made.coordinator.address, made.admin_token) as admin:
        query_id = ask(admin, COUNT)
    with Devices(made) as devices:
        devices.several(3)
    rosters: set[str] = set()
    for step in ("", "has_shares", "train", "has_confirmed", "has_revealed"):
        with Devices(made) as devices:
            for index in range(3):
                client = devices.open(f"device-{index}")
                if step == "train":
                    answer(client, query_id, AGES[index])
                else:
                    take_step(made, query_id, [client], step, **ASKS)
        with made.coordinator.parts.database.read() as session:
            groups = neighbors.groups_of(session, query_id, 1)
        rosters.update(group.roster_digest for group in groups)
        made.close()
        made = deploy(worker_poll_s=0.02, lease_s=1.0)
    with (
        Devices(made) as devices,
        Administrator(made.coordinator.address, made.admin_token) as admin,
    ):
        clients = [devices.open(f"device-{index}") for index in range(3)]
        open_sums(made, query_id, clients)
        found = admin.query_result(query_id)
        assert [client.analytics_epsilon() for client in clients] == [EPSILON] * 3
    assert len(rosters) == 1
    wanted = sum(map(len, AGES[:3]))
    assert found.result.rows[0][0] == pytest.approx(wanted, abs=6 * found.result.error)
