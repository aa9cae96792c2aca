"""A coordinator that lies to a device about a query which is answered in groups: it signs whatever it likes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from qflare.v1 import coordinator_service_pb2 as calls
from qflare.v1 import security_pb2
from qflare_client import (
    InsufficientTaskError,
    InvalidRequestError,
    InvalidStatementError,
    PrivacyBudgetExceededError,
    TaskKind,
)
from qflare_client.admin.administrator import Administrator
from qflare_client.admin.queries import Protection
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.test_lying_neighbors import LyingView, open_liar
from tests.integration.secure_aggregation.test_neighbor_queries import (
    AGES,
    ASKS,
    COUNT,
    EPSILON,
    POLICY,
    PROTECTION,
    Devices,
    admin,
    answer,
    ask,
    devices,
    made,
    open_sums,
)
from tests.integration.secure_aggregation.test_neighbors import members_of, take_step, until

__all__ = ["admin", "devices", "made", "open_liar"]

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Statement = security_pb2.TaskStatement
Change = Callable[[Statement], object]
OpenLiar = Callable[[Deployment], LyingView]


def as_training(statement: Statement) -> None:
    statement.ClearField("analytics")


CHANGES: Final[list[Change]] = [
    as_training,
    lambda statement: setattr(statement.analytics, "epsilon", EPSILON / 2),
    lambda statement: setattr(statement.analytics, "epsilon", 2 * EPSILON),
    lambda statement: setattr(statement.analytics, "delta", 1e-7),
    lambda statement: setattr(statement.analytics, "min_cohort", 2),
    lambda statement: setattr(statement.masking.policy, "min_cohort", 2),
    lambda statement: setattr(statement.masking.policy, "max_cohort", 100),
    lambda statement: setattr(statement.masking.policy, "corrupt_fraction", 0.01),
    lambda statement: setattr(statement.analytics.query, "column", "word"),
    lambda statement: setattr(statement.analytics.query, "max_examples", 1),
]
"""Each makes another task of the one for which the group was formed."""

WEAKER: Final[list[Change]] = [
    lambda statement: setattr(statement.analytics, "epsilon", 2 * EPSILON),
    lambda statement: setattr(statement.analytics, "delta", 0.1),
    lambda statement: setattr(statement.masking.policy, "min_cohort", 2),
    lambda statement: setattr(statement.analytics.query, "column", "height"),
    lambda statement: setattr(statement.analytics.query, "max_examples", 1000),
    lambda statement: statement.ClearField("masking"),
]
"""Each makes a query that the policy of the device does not allow, whatever else the coordinator says of it."""


class Liar:
    """A coordinator that signs other tasks than the real one.

    Args:
        made: The real coordinator, whose task key it has.
        view: What stands between both and the device.
    """

    def __init__(self, made: Deployment, view: LyingView) -> None:
        self._made = made
        self.view = view

    def tell(self, kind: int, change: Change) -> None:
        """Show another task as soon as a kind of step is asked for."""

        def lie(answer: calls.GetTaskResponse) -> None:
            if answer.kind == kind:
                self.sign(answer, change)

        self.view.lie = lie

    def sign(self, answer: calls.GetTaskResponse, change: Change) -> None:
        statement = Statement.FromString(answer.task.payload)
        change(statement)
        payload = statement.SerializeToString(deterministic=True)
        keys = self._made.coordinator.parts.keys
        answer.task.CopyFrom(keys.sign(security_pb2.KEY_ROLE_TASK, payload))

    def be_honest(self) -> None:
        self.view.lie = lambda _: None


@pytest.fixture
def liar(made: Deployment, open_liar: OpenLiar) -> Liar:
    return Liar(made, open_liar(made))


def test_a_device_takes_no_step_for_another_task_than_it_advertised_for(
    made: Deployment, admin: Administrator, devices: Devices, liar: Liar
) -> None:
    """The cohort, epsilon or question of a query changes under way, or it is dressed up as a training round."""
    others = devices.several(3)
    devices.add("victim").close()
    victim = devices.open("victim", address=liar.view.address)
    query_id = ask(admin, COUNT, replace(PROTECTION, devices=4))

    def sent() -> list[tuple[bool, ...]]:
        return [
            (item.has_shares, item.has_confirmed, item.has_revealed)
            for item in members_of(made, query_id)
            if item.device_id == victim.device_id
        ]

    for change in WEAKER:
        liar.tell(calls.TASK_KIND_ADVERTISE, change)
        with pytest.raises((InsufficientTaskError, InvalidStatementError)):
            victim.get_task(query_id, **ASKS)
    assert not list((made.folder / "victim").glob("neighbors-*"))
    liar.tell(calls.TASK_KIND_ADVERTISE, as_training)
    with pytest.raises(InvalidRequestError):  # the real coordinator knows no such task
        victim.get_task(query_id, **ASKS)
    assert sent() == []

    def refused(kind: int) -> None:
        before = sent()
        for change in CHANGES:
            liar.tell(kind, change)
            with pytest.raises((InsufficientTaskError, InvalidStatementError)):
                until(victim, query_id, lambda _: False, **ASKS)
        liar.be_honest()
        assert sent() == before
        assert len(before) == 1

    liar.be_honest()
    clients = [victim, *others]
    take_step(made, query_id, clients, "", **ASKS)
    refused(calls.TASK_KIND_SHARE)
    take_step(made, query_id, clients, "has_shares", **ASKS)
    refused(calls.TASK_KIND_TRAIN)
    assert victim.analytics_epsilon() == 0
    for client, own in zip(clients, AGES, strict=False):
        answer(client, query_id, own)
    refused(calls.TASK_KIND_CONFIRM)
    take_step(made, query_id, clients, "has_confirmed", **ASKS)
    refused(calls.TASK_KIND_REVEAL)
    open_sums(made, query_id, clients)
    assert admin.query_result(query_id).version.participant_count == 4
    assert victim.analytics_epsilon() == EPSILON


def test_a_device_that_answers_no_queries_takes_no_step_of_one(
    made: Deployment, admin: Administrator, devices: Devices, liar: Liar
) -> None:
    """A coordinator asks it nevertheless, with a query that its policy would allow."""
    devices.add("victim").close()
    victim = devices.open("victim", address=liar.view.address)
    other = devices.add("other")
    shown: list[calls.GetTaskResponse] = []
    query_id = ask(admin, COUNT)
    task = other.get_task(query_id, takes_steps=False, **ASKS)
    assert task.answer is not None
    shown.append(task.answer)
    liar.view.lie = lambda answer: answer.CopyFrom(shown[0])
    with pytest.raises(InvalidStatementError, match="did not ask"):
        victim.get_task(query_id)
    assert not list((made.folder / "victim").glob("neighbors-*"))


def test_another_question_in_the_name_of_an_answered_round_costs_its_own_epsilon(
    admin: Administrator, devices: Devices, liar: Liar
) -> None:
    open_policy = replace(POLICY, min_cohort=2, allow_unmasked=True, budget=1.5 * EPSILON)
    devices.add("victim").close()
    victim = devices.open("victim", address=liar.view.address, analytics=open_policy)
    query_id = ask(admin, COUNT, Protection(2, EPSILON))
    shown: list[calls.GetTaskResponse] = []
    liar.view.lie = shown.append
    task = victim.get_task(query_id, **ASKS)
    victim.answer(task, AGES[0])
    assert victim.analytics_epsilon() == EPSILON

    def another(answer: calls.GetTaskResponse) -> None:
        answer.CopyFrom(shown[0])
        liar.sign(answer, lambda statement: setattr(statement.analytics.query, "column", "word"))

    liar.view.lie = another
    task = victim.get_task(query_id, **ASKS)
    assert (task.kind, task.round_number) == (TaskKind.TRAIN, 1)
    with pytest.raises(PrivacyBudgetExceededError):
        victim.answer(task, AGES[1])
    liar.view.lie = lambda answer: answer.CopyFrom(shown[0])
    victim.require_query(victim.get_task(query_id, **ASKS))
    assert victim.analytics_epsilon() == EPSILON
