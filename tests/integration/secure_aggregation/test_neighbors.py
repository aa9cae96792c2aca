"""Rounds with secure aggregation with neighbors, from real devices to the published version."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
from sqlalchemy.orm import Session

from qflare.evidence.verification import verify_bundle
from qflare.v1 import training_pb2, verification_pb2
from qflare_client import Client
from qflare_client.tasks import Task, TaskKind
from qflare_server.context import utc_now
from qflare_server.storage.repository import neighbors, training_sessions
from qflare_server.storage.repository.neighbors import StoredMember
from qflare_server.verification.recomputation import recompute_version
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    check_refused,
    trained,
    wait_for_version,
)

TIMEOUT_S: Final = 60
MODE: Final = training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS
RETAINED: Final = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL)


def session_of(
    deployment: Deployment,
    target: int,
    quorum: int,
    *,
    step_s: float = 60.0,
    deadline_s: float = 60.0,
    selection: training_pb2.SelectionPolicy | None = None,
    transfer: training_pb2.TransferPolicy = RETAINED,
    strategy: training_pb2.StrategyConfig | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    **policy: Any,
) -> str:
    settings: dict[str, Any] = {
        "mode": MODE,
        "clip": 100.0,
        "min_cohort": min(3, quorum),
        "metrics": [training_pb2.MaskedMetric(name="loss", bound=10.0)],
    }
    made = training_pb2.SecureAggregationPolicy(**(settings | policy))
    rounds = training_pb2.RoundPolicy(quorum=quorum, target=target)
    rounds.deadline.FromNanoseconds(int(deadline_s * 1e9))
    made.step_timeout.FromNanoseconds(int(step_s * 1e9))
    return deployment.session(
        WEIGHTS if arrays is None else arrays,
        total_rounds=1,
        secure_aggregation=made,
        rounds=rounds,
        selection=selection,
        strategy=strategy,
        safeguards=training_pb2.SafeguardPolicy(max_example_count=2000),
        transfer=transfer,
    )


def until(client: Client, session_id: str, done: Callable[[Task], bool], **poll: Any) -> Task:
    """Poll, which takes the steps of a round, until a task is the wanted one."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        task = client.get_task(session_id, **poll)
        if done(task):
            return task
        threading.Event().wait(0.02)
    raise AssertionError("the task did not come")


def train(
    client: Client, session_id: str, index: int, changes: dict[int, Any], shift: float = 0.0
) -> None:
    task = until(client, session_id, lambda task: task.kind is TaskKind.TRAIN)
    base = client.download_base(task)
    arrays = trained(base.arrays, index)
    arrays |= {name: (arrays[name] + shift).astype(arrays[name].dtype) for name in ("w", "b")}
    client.submit(task, base, arrays, 100 * (index + 1), {"loss": 0.5 * index})
    changes[index] = {name: arrays[name].astype(float) - base.arrays[name] for name in arrays}


def together(work: Callable[[int], None], count: int) -> None:
    """Let devices work at the same time, and raise the first error of any."""
    errors: list[BaseException] = []

    def one(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=one, args=[index]) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def mean_of(changes: dict[int, Any], name: str) -> np.ndarray:
    weights = {index: 100 * (index + 1) for index in changes}
    total = sum(weights[index] * change[name] for index, change in changes.items())
    return np.asarray(total / sum(weights.values()))


def test_the_version_is_the_weighted_mean(deploy: Callable[..., Deployment]) -> None:
    made = deploy(worker_poll_s=0.02)
    session_id = session_of(made, 5, 4)
    clients = [made.device(f"device-{index}") for index in range(5)]
    changes: dict[int, Any] = {}

    def work(index: int) -> None:
        train(clients[index], session_id, index, changes)
        until(clients[index], session_id, lambda task: task.kind is TaskKind.DONE)

    together(work, 5)
    model = wait_for_version(clients[0], session_id, 1)
    for name in ("w", "b"):
        got = model.arrays[name].astype(float) - WEIGHTS[name]
        assert np.abs(got - mean_of(changes, name)).max() < 1e-5
    assert model.statement.example_count == 1500
    assert model.statement.contributor_count == 5
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert found.recomputed
    assert found.differences == ()


def bundle_of(made: Deployment, session_id: str) -> verification_pb2.VerificationBundle:
    bundle = verification_pb2.VerificationBundle()
    for part in made.coordinator.parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    return bundle


def has_ended(made: Deployment, session_id: str) -> bool:
    """Return whether the groups of the round wait for nothing more."""
    with made.coordinator.parts.database.read() as session:
        groups = neighbors.groups_of(session, session_id, 1)
    return bool(groups) and all(group.has_ended for group in groups)


def finish(made: Deployment, session_id: str, clients: Sequence[Client], **poll: Any) -> None:
    """Poll until the sums of all groups are opened, or the groups aborted."""
    end = time.monotonic() + TIMEOUT_S
    while not has_ended(made, session_id):
        assert time.monotonic() < end, "the groups did not end"
        for client in clients:
            client.get_task(session_id, **poll)


def test_groups_are_opened_alone_and_their_transcripts_verify_offline(
    deploy: Callable[..., Deployment],
) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(10)]
    session_id = session_of(made, 10, 8, group_size=5)
    changes: dict[int, Any] = {}
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    for index in range(1, 10):
        train(clients[index], session_id, index, changes)
    expire(made, session_id)
    take_step(made, session_id, clients[1:], "has_confirmed")
    finish(made, session_id, clients[1:])
    model = wait_for_version(clients[0], session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
    assert len(model.statement.unmasking.answer_digests) == 2
    bundle, pinned = bundle_of(made, session_id), made.coordinator.parts.keys.trust.root_key_ids()
    assert verify_bundle(bundle, pinned, utc_now()).contributor_count == 9

    refused = partial(check_refused, bundle, pinned)
    refused(lambda other: other.ClearField("unmasking"))
    refused(lambda other: other.unmasking.ClearField("groups"))
    refused(lambda other: other.unmasking.ClearField("task"))
    refused(lambda other: other.unmasking.groups.reverse())
    refused(lambda other: other.unmasking.groups.append(other.unmasking.groups[0]))


def expire_groups(made: Deployment, session_id: str, stage: str = "") -> None:
    """End the time of the step that the groups wait for; with a stage, only of groups that are still at it."""
    now = utc_now()

    def work(session: Session) -> None:
        training_sessions.lock_round(session, session_id, 1)
        for group in neighbors.groups_of(session, session_id, 1):
            if stage not in ("", group.stage):
                continue
            neighbors.update_group(session, session_id, 1, group.number, {"deadline_at": now})

    made.coordinator.parts.database.write(work)
    made.coordinator.parts.context.wake()


def expire(made: Deployment, session_id: str) -> None:
    """End the time of the round."""
    values = {"deadline_at": utc_now()}
    made.coordinator.parts.database.write(
        lambda session: training_sessions.update_round(session, session_id, 1, values)
    )
    made.coordinator.parts.context.wake()


def members_of(made: Deployment, session_id: str) -> Sequence[StoredMember]:
    with made.coordinator.parts.database.read() as session:
        return neighbors.members_of(session, session_id, 1)


def has_sent(made: Deployment, session_id: str, client: Client, flag: str) -> bool:
    own = [item for item in members_of(made, session_id) if item.device_id == client.device_id]
    if flag == "has_revealed" and own and has_ended(made, session_id):
        return True  # enough others have revealed, and what they sent may be deleted
    return bool(own) and (not flag or bool(getattr(own[0], flag)))


def take_step(
    made: Deployment, session_id: str, clients: Iterable[Client], flag: str, **poll: Any
) -> None:
    """Poll until devices have sent what a step asks for; an empty flag stands for the advertisement."""
    for client in clients:
        until(client, session_id, partial(_has_sent, made, session_id, client, flag), **poll)


def _has_sent(made: Deployment, session_id: str, client: Client, flag: str, _task: Task) -> bool:
    return has_sent(made, session_id, client, flag)


@pytest.mark.parametrize("stage", ["share", "train", "confirm", "reveal"])
def test_a_device_may_drop_out_at_any_stage(deploy: Callable[..., Deployment], stage: str) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(6)]
    session_id = session_of(made, 6, 4)
    changes: dict[int, Any] = {}
    take_step(made, session_id, clients, "")

    def going(at: str) -> list[Client]:
        """Return the devices that are there; end the step when the others have done it."""
        order = ["share", "train", "confirm", "reveal"]
        return clients[1:] if order.index(at) >= order.index(stage) else clients

    take_step(made, session_id, going("share"), "has_shares")
    if stage == "share":
        expire_groups(made, session_id)
    for client in going("train"):
        train(client, session_id, clients.index(client), changes)
    if stage == "train":
        expire(made, session_id)
    take_step(made, session_id, going("confirm"), "has_confirmed")
    if stage == "confirm":
        expire_groups(made, session_id)
    take_step(made, session_id, going("reveal"), "has_revealed")
    model = wait_for_version(clients[1], session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
    assert model.statement.contributor_count == len(changes)


def test_a_device_that_has_not_confirmed_is_not_asked_to_reveal(
    deploy: Callable[..., Deployment],
) -> None:
    """It is late for one step, and comes back for the next: it has nothing to reveal, and goes on with other work."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(5)]
    session_id = session_of(made, 5, 4)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    changes: dict[int, Any] = {}
    for index, client in enumerate(clients):
        train(client, session_id, index, changes)
    take_step(made, session_id, clients[1:], "has_confirmed")
    expire_groups(made, session_id)
    take_step(made, session_id, clients[1:2], "has_revealed")
    assert clients[0].get_task(session_id).kind is TaskKind.WAIT
    assert not has_sent(made, session_id, clients[0], "has_confirmed")
    finish(made, session_id, clients)
    assert wait_for_version(clients[0], session_id, 1).statement.contributor_count == 5


def test_a_group_of_which_too_few_confirm_is_aborted_at_once(
    deploy: Callable[..., Deployment],
) -> None:
    """No device is asked to reveal what it would refuse to, for lack of confirmations of its neighbors."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(5)]
    session_id = session_of(made, 5, 3)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients[1:], "has_shares")
    expire_groups(made, session_id)
    changes: dict[int, Any] = {}
    for index in range(1, 5):
        train(clients[index], session_id, index, changes)
    take_step(made, session_id, clients[2:], "has_confirmed")
    expire_groups(made, session_id)
    finish(made, session_id, clients)
    with made.coordinator.parts.database.read() as session:
        (group,) = neighbors.groups_of(session, session_id, 1)
    assert (group.stage, group.survivors_digest is None) == ("aborted", False)
    assert group.stage_reason.startswith("3 devices confirmed; ")


def test_a_group_that_loses_too_many_is_aborted_alone(deploy: Callable[..., Deployment]) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(10)]
    session_id = session_of(made, 10, 5, group_size=5)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    groups = {item.device_id: item.group_number for item in members_of(made, session_id)}
    first = [index for index in range(10) if groups[clients[index].device_id] == 1]
    changes: dict[int, Any] = {}
    for index in range(10):
        if index not in first[:2]:
            train(clients[index], session_id, index, changes)
    expire(made, session_id)
    second = [clients[index] for index in range(10) if index not in first]
    take_step(made, session_id, second, "has_confirmed")
    finish(made, session_id, second)
    model = wait_for_version(clients[0], session_id, 1)
    kept = {index: change for index, change in changes.items() if index not in first}
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(kept, "w")).max() < 1e-5
    assert model.statement.contributor_count == 5
    with made.coordinator.parts.database.read() as session:
        ended = neighbors.groups_of(session, session_id, 1)
    assert [group.stage for group in ended] == ["aborted", "opened"]
    assert "dropped out" in ended[0].stage_reason
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert (found.recomputed, found.differences) == (True, ())


def test_coordinator_and_devices_restart_at_every_stage(
    deploy: Callable[..., Deployment],
) -> None:
    made = deploy(worker_poll_s=0.02, lease_s=1.0)
    session_id = session_of(made, 4, 4, corrupt_fraction=0.1)
    for index in range(4):
        made.device(f"device-{index}").close()
    changes: dict[int, Any] = {}
    rosters: set[str] = set()
    for step in ("", "has_shares", "train", "has_confirmed", "has_revealed"):
        for index in range(4):
            home = made.folder / f"device-{index}"
            with Client(home=home, address=made.coordinator.address, insecure=True) as client:
                if step == "train":
                    train(client, session_id, index, changes)
                else:
                    take_step(made, session_id, [client], step)
        with made.coordinator.parts.database.read() as session:
            groups = neighbors.groups_of(session, session_id, 1)
        rosters.update(group.roster_digest for group in groups)
        made.close()
        made = deploy(worker_poll_s=0.02, lease_s=1.0)
    home = made.folder / "device-0"
    with Client(home=home, address=made.coordinator.address, insecure=True) as client:
        model = wait_for_version(client, session_id, 1)
    assert len(rosters) == 1
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5


def test_two_coordinators_share_a_round(deploy: Callable[..., Deployment]) -> None:
    made = [deploy(worker_poll_s=0.02, lease_s=1.0) for _ in range(2)]
    session_id = session_of(made[0], 5, 5)
    changes: dict[int, Any] = {}
    for index in range(5):
        made[0].device(f"device-{index}").close()

    def work(index: int) -> None:
        address = made[index % 2].coordinator.address
        home = made[0].folder / f"device-{index}"
        with Client(home=home, address=address, insecure=True) as client:
            train(client, session_id, index, changes)
            until(client, session_id, lambda task: task.kind is TaskKind.DONE)

    together(work, 5)
    home = made[0].folder / "device-0"
    with Client(home=home, address=made[1].coordinator.address, insecure=True) as client:
        model = wait_for_version(client, session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
