"""Seeds, statements, tasks and base versions that are used again or for one device alone, and numbers too large."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qflare.evidence.statements import digest_of
from qflare.masking.parameters import MaskingParameters
from qflare.v1 import security_pb2
from qflare_client import Client, SecureAggregation
from qflare_client.errors import QflareClientError
from qflare_server.storage.repository import payloads, training_sessions, updates
from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    SecureDeployment,
    SecureStart,
    contribute,
    repeat_seed,
    wait_for_round,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_lying_coordinator import Ring
from tests.support.lying_coordinator import LyingCoordinator

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Task = security_pb2.TaskStatement


@pytest.fixture
def open_liar() -> Iterator[Callable[[SecureDeployment], LyingCoordinator]]:
    """Return a function that puts a lying coordinator before a real one."""
    opened: list[LyingCoordinator] = []

    def start(made: SecureDeployment) -> LyingCoordinator:
        coordinator = made.deployment.coordinator
        opened.append(LyingCoordinator(coordinator.address, coordinator.parts.keys.sign))
        return opened[-1]

    yield start
    for liar in opened:
        liar.close()


def _second_round(task: Task) -> None:
    task.round_number, task.task_nonce = 2, "f" * 64


def test_neither_seeds_nor_statements_nor_old_tasks_count_in_a_second_round(
    secure: SecureStart,
    open_liar: Callable[[SecureDeployment], LyingCoordinator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = secure(min_cohort=3)
    session_id = made.session(quorum=5, round_count=2, policy={"min_cohort": 3})
    ring = Ring(made, open_liar(made), session_id)
    with monkeypatch.context() as patch:
        repeat_seed(patch)
        first = [ring.signed(0)]
    first += [ring.signed(number) for number in (1, 2)]
    assert ring.asking.ask(first)[0].HasField("answer")

    task = ring.lying_task(_second_round)
    again: dict[str, Any] = {
        "task": task,
        "task_digest": digest_of(task.payload),
        "round_number": 2,
    }
    assert "INVALID_ARGUMENT" in ring.asking.refusal(first, **again)

    replayed = ring.signed(0)  # trains for the task of the first round once more
    others = [ring.signed(3), ring.signed(4)]
    assert "answered before" in ring.asking.refusal([replayed, *others])

    second = [ring.signed(number, _second_round) for number in (1, 2, 3)]
    assert "INVALID_ARGUMENT" in ring.asking.refusal([replayed, *second], **again)
    with monkeypatch.context() as patch:
        repeat_seed(patch)
        reused = ring.signed(0, _second_round)
    answers = ring.asking.ask([reused, *second], **again)
    reasons = [member.reason for member in answers[0].refused.members]
    assert reasons == ["its seed was used for another update"]
    assert ring.asking.ask(second, **again)[0].HasField("answer")


def test_a_signed_task_from_before_the_policy_is_refused(
    secure: SecureStart, open_liar: Callable[[SecureDeployment], LyingCoordinator]
) -> None:
    made = secure()
    liar = open_liar(made)
    session_id = made.session(quorum=3, policy={"min_cohort": 2})
    made.deployment.device("victim").close()
    home = made.deployment.folder / "victim"
    policy = SecureAggregation(3, {made.helpers[0].helper_id}, {"loss"})
    with Client(home=home, address=liar.address) as client:
        assert client.get_task(session_id).masking is not None
    with (
        Client(home=home, address=liar.address, secure_aggregation=policy) as client,
        pytest.raises(QflareClientError, match="sums of 2 updates"),
    ):
        client.get_task(session_id)


def test_a_base_version_for_one_victim_is_refused_by_the_device(
    secure: SecureStart, open_liar: Callable[[SecureDeployment], LyingCoordinator]
) -> None:
    made = secure()
    session_id = made.session(quorum=2, round_count=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 1)
    wait_for_round(clients[0], session_id, 2)
    made.deployment.device("victim").close()
    liar = open_liar(made)

    def earlier(task: Task) -> None:
        task.base_version = 0

    def another(task: Task) -> None:
        task.base_digest = "f" * 64

    with Client(home=made.deployment.folder / "victim", address=liar.address) as victim:
        for lie in (earlier, another):
            liar.lie = lie
            with pytest.raises(QflareClientError):
                victim.download_base(victim.get_task(session_id))


def _huge_weight(parameters: MaskingParameters, *_: object) -> np.ndarray[Any, Any]:
    slots = np.zeros(parameters.slot_count, parameters.dtype)
    slots[: parameters.weight_digits] = 2**parameters.digit_bits - 1
    return slots


def test_a_weight_beyond_the_limit_makes_no_version(
    secure: SecureStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secure()
    session_id = made.session(quorum=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("qflare_client.models.masked_update.quantize_slots", _huge_weight)
        contribute(clients[0], session_id, 0)
    contribute(clients[1], session_id, 1)
    wait_for_round(clients[0], session_id, 2)
    with made.deployment.coordinator.parts.database.read() as session:
        failed = training_sessions.get_round(session, session_id, 1)
    assert failed is not None
    assert "out of range" in failed.state_reason
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    assert wait_for_version(clients[0], session_id, 1).statement.round_number == 2


def test_a_change_beyond_the_clip_counts_as_much_as_the_clip(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=2, policy={"clip": 1.0})
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        task = client.get_task(session_id)
        base = client.download_base(task)
        step = 1e30 if index == 0 else 0.0
        arrays = dict(base.arrays)
        for name in ("w", "b"):
            arrays[name] = arrays[name] + arrays[name].dtype.type(step)
        client.submit(task, base, arrays, 1_000_000, {"loss": 1e30})
    model = wait_for_version(clients[0], session_id, 1)
    names = ("w", "b")
    change = [model.arrays[name].astype(float) - WEIGHTS[name] for name in names]
    norm = sum(float(np.square(part).sum()) for part in change) ** 0.5
    assert abs(norm - 0.5) < 1e-4  # one of two updates of the largest weight, at the clip
    assert model.statement.metrics["train_loss"] == pytest.approx(10.0, abs=1e-5)


def test_a_masked_vector_that_is_altered_after_signing_is_found(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=2, arrays={"w": np.zeros(400_000, np.float32)})
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 1)
    context = made.deployment.coordinator.parts.context
    assert recompute_version(context, session_id, 1).differences == ()
    with context.database.read() as session:
        update = updates.accepted_after(session, session_id, 1, 0, 1)[0]
        stored = payloads.get_payload(session, update.payload_id)
    assert stored is not None
    store = context.store_of(stored.store)
    (chunk,) = store.read(update.payload_id, 0, 1)
    store.append(update.payload_id, 0, [bytes([chunk[0] ^ 1]) + chunk[1:]])
    found = recompute_version(context, session_id, 1)
    assert found.differences or not found.recomputed
