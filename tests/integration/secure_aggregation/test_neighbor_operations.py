"""Rounds with neighbors in operation: what is kept and shown, pauses, other sessions, replaced registrar keys."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from qflare.evidence.verification import verify_bundle
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client import Client
from qflare_client.admin.sessions import ROUND, SESSION_FACTS
from qflare_client.tasks import TaskKind
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import replace_stolen
from qflare_server.storage.repository import neighbors, training_sessions
from qflare_server.training import neighbor_stages
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.training_sessions import neighbor_views
from qflare_server.use_cases.training_sessions.explanation import Explanations, Notice
from qflare_server.use_cases.updates import neighbor_steps
from qflare_server.verification.recomputation import recompute_version
from tests.independent.bundle import check_bundle
from tests.integration.conftest import CHEAP, Deployment
from tests.integration.secure_aggregation.conftest import WEIGHTS, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import (
    bundle_of,
    expire,
    expire_groups,
    finish,
    mean_of,
    members_of,
    session_of,
    take_step,
    train,
    until,
)
from tests.integration.secure_aggregation.test_stages import _wait_until
from tests.support.visitor import Visitor

Deploy = Callable[..., Deployment]
SENT: Final = ("advertisement", "shares", "confirmation", "reveal")


def kept(made: Deployment, session_id: str) -> dict[str, int]:
    """Return of how many members each part is stored."""
    columns = [neighbors.MEMBERS.c[name] for name in (*SENT, "transcript")]
    query = select(*columns).where(neighbors.MEMBERS.c.training_session_id == session_id)
    with made.coordinator.parts.database.read() as session:
        rows = session.execute(query).all()
    return {
        column.name: sum(row[place] is not None for row in rows)
        for place, column in enumerate(columns)
    }


def run_round(
    made: Deployment, session_id: str, clients: list[Client], absent: int = 0
) -> dict[int, Any]:
    """Let devices take part in a round, the first ones only up to their shares; return the changes."""
    changes: dict[int, Any] = {}
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    for index in range(absent, len(clients)):
        train(clients[index], session_id, index, changes)
    if absent:
        expire(made, session_id)
    finish(made, session_id, clients[absent:])
    return changes


def test_shares_and_reveals_are_deleted_after_the_round(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(6)]
    session_id = session_of(made, 6, 4)
    run_round(made, session_id, clients, absent=1)
    wait_for_version(clients[1], session_id, 1)
    _wait_until(lambda: kept(made, session_id)["advertisement"] == 0)

    assert kept(made, session_id) == dict.fromkeys(SENT, 0) | {"transcript": 6}
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert (found.recomputed, found.differences) == (True, ())
    pinned = made.coordinator.parts.keys.trust.root_key_ids()
    bundle = bundle_of(made, session_id)
    assert verify_bundle(bundle, pinned, utc_now()).contributor_count == 5
    ((made_version, _digest),) = check_bundle(bundle, sorted(pinned), 1, utc_now())[-1:]
    assert made_version.contributor_count == 5


def test_nothing_is_kept_of_a_cancelled_round(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(3)]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    assert kept(made, session_id)["shares"] == 3
    request = pb.CancelTrainingSessionRequest(training_session_id=session_id)
    made.admin.CancelTrainingSession(request, metadata=made.metadata)
    assert set(kept(made, session_id).values()) == {0}


def test_a_device_that_waits_for_its_group_gets_tasks_of_other_sessions(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(2)]
    waiting = session_of(made, 3, 3, corrupt_fraction=0.1)
    take_step(made, waiting, clients[:1], "")
    other = made.session(WEIGHTS, rounds=training_pb2.RoundPolicy(quorum=2))
    task = clients[0].get_task()
    assert (task.kind, task.training_session_id) == (TaskKind.TRAIN, other)
    assert clients[0].get_task(waiting).kind is TaskKind.WAIT


def test_a_member_polls_often_enough_for_each_step(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02, min_poll_s=200.0)
    client = made.device("device")
    assert client.get_task().poll_delay_s == 200
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    take_step(made, session_id, [client], "")
    assert client.get_task().poll_delay_s == client.get_task(session_id).poll_delay_s == 10
    assert client.get_task().poll_delay_s == 10  # remembered


@pytest.mark.parametrize("stage", ["share", "confirm", "reveal"])
def test_no_time_passes_for_a_step_while_the_session_is_paused(deploy: Deploy, stage: str) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(3)]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    changes: dict[int, Any] = {}
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients[: 1 if stage == "share" else 3], "has_shares")
    if stage != "share":
        for index, client in enumerate(clients):
            train(client, session_id, index, changes)
        take_step(made, session_id, clients[: 1 if stage == "confirm" else 3], "has_confirmed")

    def group() -> neighbors.StoredGroup:
        with made.coordinator.parts.database.read() as session:
            return neighbors.groups_of(session, session_id, 1)[0]

    _wait_until(lambda: group().stage == stage)
    pause = pb.PauseTrainingSessionRequest(training_session_id=session_id)
    made.admin.PauseTrainingSession(pause, metadata=made.metadata)
    expire_groups(made, session_id)
    assert clients[2].get_task(session_id).kind is TaskKind.WAIT
    assert group().stage == stage
    resume = pb.ResumeTrainingSessionRequest(training_session_id=session_id)
    made.admin.ResumeTrainingSession(resume, metadata=made.metadata)
    assert group().deadline_at > utc_now() + timedelta(seconds=30)

    take_step(made, session_id, clients, "has_shares")
    for index, client in enumerate(clients):
        if index not in changes:
            train(client, session_id, index, changes)
    finish(made, session_id, clients)
    model = wait_for_version(clients[0], session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5


def test_receipts_of_registrar_keys_that_left_the_keyset_count(deploy: Deploy) -> None:
    """Members that enrolled before all keys were replaced, and one that enrolled afterwards, form one group."""
    made = deploy(worker_poll_s=0.02)
    for index in range(2):
        made.device(f"device-{index}").close()
    folder = KeyFolder(made.config.data_dir / "keys", cost=CHEAP)
    replace_stolen(folder, made.coordinator.parts.database, utc_now())
    made.close()
    made = deploy(worker_poll_s=0.02)
    made.device("device-2").close()
    homes = [made.folder / f"device-{index}" for index in range(3)]
    address = made.coordinator.address
    clients = [Client(home=home, address=address, insecure=True) for home in homes]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    try:
        changes = run_round(made, session_id, clients)
        model = wait_for_version(clients[0], session_id, 1)
    finally:
        for client in clients:
            client.close()
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5


def test_no_more_devices_advertise_than_the_round_wants(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=3600.0)  # groups are not formed meanwhile
    clients = [made.device(f"device-{index}") for index in range(5)]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    for client in clients:
        until(client, session_id, lambda task: task.kind is TaskKind.WAIT)
    assert len(members_of(made, session_id)) == 3


def check_version(client: Client, session_id: str, changes: dict[int, Any]) -> None:
    model = wait_for_version(client, session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
    assert model.statement.contributor_count == len(changes)


def test_neighbors_with_many_replaced_keys_come_in_several_answers(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_views, "PAGE_BYTES", 1)
    monkeypatch.setattr(neighbor_views, "LOADED", 2)
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(4)]
    for client in (clients[0], clients[0], clients[2]):
        client.rotate_keys()
    session_id = session_of(made, 4, 4, corrupt_fraction=0.1)
    check_version(clients[0], session_id, run_round(made, session_id, clients))


def test_a_device_whose_evidence_no_answer_can_hold_does_not_advertise(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_steps, "MAX_EVIDENCE_BYTES", 20_000)
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(4)]
    for _ in range(2):
        clients[3].rotate_keys()
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    assert clients[3].get_task(session_id).kind is TaskKind.WAIT
    assert members_of(made, session_id) == []
    check_version(clients[0], session_id, run_round(made, session_id, clients[:3]))


def change_state(made: Deployment, client: Client, *, suspended: bool) -> None:
    if suspended:
        request = pb.SuspendDeviceRequest(device_id=client.device_id)
        made.admin.SuspendDevice(request, metadata=made.metadata)
    else:
        reinstated = pb.ReinstateDeviceRequest(device_id=client.device_id)
        made.admin.ReinstateDevice(reinstated, metadata=made.metadata)


def test_a_device_that_is_suspended_after_it_has_advertised_is_in_no_group(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(4)]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    take_step(made, session_id, clients[:2], "")
    change_state(made, clients[0], suspended=True)
    changes = run_round(made, session_id, clients[1:])
    check_version(clients[1], session_id, changes)
    with made.coordinator.parts.database.read() as session:
        grouped = neighbors.members_of(session, session_id, 1, group=1)
        assert neighbors.count_members(session, session_id, 1) == 3
    assert {item.device_id for item in grouped} == {each.device_id for each in clients[1:]}
    change_state(made, clients[0], suspended=False)
    assert clients[0].get_task(session_id).kind is TaskKind.DONE


@pytest.mark.parametrize("stage", ["share", "confirm", "reveal"])
def test_a_group_does_not_wait_for_a_suspended_device(deploy: Deploy, stage: str) -> None:
    """The steps have an hour, so a group that waited would not end in time."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(6)]
    session_id = session_of(made, 6, 4, step_s=3600.0)
    changes: dict[int, Any] = {}
    take_step(made, session_id, clients, "")
    _wait_until(lambda: all(item.group_number for item in members_of(made, session_id)))
    steps = {"share": "has_shares", "train": "", "confirm": "has_confirmed", "reveal": ""}
    going = clients
    for name, flag in steps.items():
        if name == stage:
            change_state(made, clients[0], suspended=True)
            going = clients[1:]
        if name == "train":
            for client in going:
                train(client, session_id, clients.index(client), changes)
        elif flag:
            take_step(made, session_id, going, flag)
        else:
            finish(made, session_id, going)
    check_version(clients[1], session_id, changes)


def test_a_group_is_not_larger_than_the_round_wants(deploy: Deploy) -> None:
    """A device that is active again after another one has taken its place may be too many."""
    made = deploy(worker_poll_s=3600.0)  # groups are not formed meanwhile
    clients = [made.device(f"device-{index}") for index in range(4)]
    session_id = session_of(made, 3, 3, corrupt_fraction=0.1)
    take_step(made, session_id, clients[:1], "")
    change_state(made, clients[0], suspended=True)
    take_step(made, session_id, clients[1:], "")
    change_state(made, clients[0], suspended=False)

    def work(session: Session) -> None:
        training_session = training_sessions.lock_session(session, session_id)
        current = training_sessions.lock_round(session, session_id, 1)
        assert training_session is not None
        assert current is not None
        neighbor_stages.advance(session, training_session, current, utc_now())

    made.coordinator.parts.database.write(work)
    members = members_of(made, session_id)
    assert len(members) == 4
    assert sum(item.group_number == 1 for item in members) == 3


def test_a_selection_smaller_than_the_target_forms_a_group_of_all(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(4)]
    session_id = session_of(made, 6, 3, selection=training_pb2.SelectionPolicy(device_count=6))
    changes = run_round(made, session_id, clients)
    assert wait_for_version(clients[0], session_id, 1).statement.contributor_count == len(changes)


def notices(made: Deployment, session_id: str, seconds: float) -> list[Notice]:
    context = made.coordinator.parts.context
    ahead = replace(context, clock=lambda: utc_now() + timedelta(seconds=seconds))
    return list(Explanations(ahead).find(session_id))


def page(made: Deployment, path: str) -> str:
    assert made.coordinator.dashboard is not None
    visitor = Visitor(made.coordinator.dashboard.url)
    visitor.log_in(made.issue_admin(Role.ADMIN))
    return visitor.get(path).text


def shown(made: Deployment, session_id: str) -> tuple[str, str]:
    """Return what the command line shows of the session's policy, and of the groups of its round."""
    request = pb.GetTrainingSessionRequest(training_session_id=session_id)
    answer = made.admin.GetTrainingSession(request, metadata=made.metadata)
    listed = made.admin.ListRounds(
        pb.ListRoundsRequest(training_session_id=session_id), metadata=made.metadata
    ).rounds
    assert [row.neighbors for row in listed] == [answer.round.neighbors]
    policy = dict(SESSION_FACTS)["secure aggregation"](answer.training_session)
    return str(policy), str(dict(ROUND)["neighbor groups"](answer.round))


def test_stages_cohorts_and_drop_outs_are_shown(deploy: Deploy) -> None:
    made = deploy(worker_poll_s=0.02, dashboard="127.0.0.1:0")
    clients = [made.device(f"device-{index}") for index in range(7)]
    session_id = session_of(made, 7, 4, deadline_s=3600.0)
    path, changes = f"/sessions/{session_id}/rounds/1", dict[int, Any]()
    take_step(made, session_id, clients[:6], "")
    policy, groups = shown(made, session_id)
    assert policy == "3 to 7 updates in a sum, 32 bits, neighbors in one group"
    assert groups == "6 devices advertised"
    assert notices(made, session_id, 0) == []
    (notice,) = notices(made, session_id, 40)
    text = "round 1 forms groups when 7 devices have advertised keys; 6 have"
    assert (notice.code, notice.text) == ("neighbors_awaited", text)

    take_step(made, session_id, clients[6:], "")
    take_step(made, session_id, clients[1:], "has_shares")
    (notice,) = notices(made, session_id, 40)
    assert notice.text == "round 1 waits for shares by 1 device: device-0"
    assert notice.device_ids == [clients[0].device_id]
    expire_groups(made, session_id)
    for index in range(1, 6):
        train(clients[index], session_id, index, changes)
    (notice,) = notices(made, session_id, 2000)
    assert notice.text == "round 1 waits for updates by 1 device: device-6"
    groups = shown(made, session_id)[1]
    assert groups == "1 training; of 7 devices 6 shared, 0 in sums"
    assert "1 waiting for updates" in page(made, path)

    expire(made, session_id)
    take_step(made, session_id, clients[1:5], "has_confirmed")
    (notice,) = notices(made, session_id, 40)
    assert notice.text == "round 1 waits for confirmations of updates by 1 device: device-5"
    assert "devices confirm the updates" in page(made, path)
    take_step(made, session_id, clients[5:6], "has_confirmed")
    take_step(made, session_id, clients[1:2], "has_revealed")
    (notice,) = notices(made, session_id, 40)
    assert notice.text.startswith("round 1 waits for shares that open sums by 4 devices: device-")
    finish(made, session_id, clients[1:6])
    wait_for_version(clients[1], session_id, 1)
    assert shown(made, session_id)[1] == "1 opened; of 7 devices 6 shared, 5 in sums"
    text = page(made, path)
    assert "7 advertised, 6 shared secrets, 5 are in sums" in text
    assert "unmasked: the sum is known" in text
