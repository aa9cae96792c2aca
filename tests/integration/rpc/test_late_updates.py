"""Updates that come after their round has closed are refused, and counted where an administrator sees them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client import Client, RejectedError, Task, TaskKind
from qflare_server.context import utc_now
from qflare_server.storage.repository import late_updates

Deploy = Callable[..., Any]
OLD = utc_now() - timedelta(days=60)
LATER = utc_now() + timedelta(days=60)


def rounds_of(deployment: Any, session_id: str) -> list[training_pb2.Round]:
    request = admin_pb2.ListRoundsRequest(training_session_id=session_id)
    answer = deployment.admin.ListRounds(request, metadata=deployment.metadata)
    return sorted(answer.rounds, key=lambda found: found.round_number)


def submit(client: Client, task: Task, size: int) -> None:
    base = client.download_base(task)
    client.submit(task, base, {"w": np.ones(size, np.float32)}, 10, {})


@pytest.mark.parametrize("size", [4, 300_000])
def test_late_updates_are_counted_once_for_each_device(deploy: Deploy, size: int) -> None:
    """The large update is refused before its chunks are sent, the small one after."""
    deployment = deploy()
    session_id = deployment.session(
        {"w": np.zeros(size, np.float32)},
        rounds=training_pb2.RoundPolicy(device_count=3),
        transfer=training_pb2.TransferPolicy(download_encoding=training_pb2.ENCODING_NONE),
    )
    clients = [deployment.device(name) for name in "abcd"]
    tasks = [client.get_task(session_id) for client in clients]
    assert {task.kind for task in tasks} == {TaskKind.TRAIN}

    for client, task in zip(clients[:2], tasks[:2], strict=True):
        submit(client, task, size)
    for client, task in zip(clients[2:], tasks[2:], strict=True):
        for _ in range(2):
            with pytest.raises(RejectedError) as refused:
                submit(client, task, size)
            assert refused.value.reason in {"ROUND_NOT_OPEN", "STALE_BASE_VERSION"}

    first = rounds_of(deployment, session_id)[0]
    assert (first.accepted_count, first.late_count) == (2, 2)
    write = deployment.coordinator.parts.database.write
    assert write(lambda session: late_updates.delete_old(session, OLD, 1000)) == 0
    assert write(lambda session: late_updates.delete_old(session, LATER, 1)) == 1
    assert write(lambda session: late_updates.delete_old(session, LATER, 1000)) == 1
    assert rounds_of(deployment, session_id)[0].late_count == 2


def test_an_update_to_a_paused_session_is_not_late(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=training_pb2.RoundPolicy(quorum=1))
    client = deployment.device("a")
    task = client.get_task(session_id)
    request = admin_pb2.PauseTrainingSessionRequest(training_session_id=session_id)
    deployment.admin.PauseTrainingSession(request, metadata=deployment.metadata)

    with pytest.raises(RejectedError):
        submit(client, task, 4)

    assert rounds_of(deployment, session_id)[0].late_count == 0
