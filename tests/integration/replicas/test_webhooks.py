"""Webhooks of real coordinator processes: killed between commit and delivery, stopped, and two on one database."""

import json
from pathlib import Path

import pytest

from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import SYSTEM
from tests.support.jobs import prepare
from tests.support.processes import Replicas
from tests.support.webhook_receiver import SECRET, STALL, is_genuine, receiver, secret_file

pytestmark = pytest.mark.slow


def cancel_one(parts: Application) -> str:
    """Cancel a training session, which is an event; return its id."""
    session_id = prepare(parts)
    parts.use_cases.training.cancel(SYSTEM, session_id, "no more")
    return session_id


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_killed_coordinator_delivers_after_its_restart(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    log = tmp_path / "coordinator.log"
    with receiver() as hook:
        hook.answers.put(STALL)
        coordinator = replicas.start(
            log_file=log, webhook_urls=hook.url, webhook_secret_file=secret_file(tmp_path)
        )
        first_id = cancel_one(parts)
        first = hook.next()
        second_id = cancel_one(parts)
        coordinator.kill()
        coordinator.start()

        again, other = hook.next(), hook.next()
        hook.answers.put(STALL)
        cancel_one(parts)
        hook.next()
        assert coordinator.stop() == 0

    assert again.headers["webhook-id"] == first.headers["webhook-id"]
    data = [json.loads(message.body)["data"] for message in (again, other)]
    assert [item["training_session_id"] for item in data] == [first_id, second_id]
    assert all(
        is_genuine(message, float(message.headers["webhook-timestamp"]))
        for message in (first, again, other)
    )
    said = log.read_text()
    assert "webhook_timeout_s" in said
    assert SECRET.removeprefix("whsec_") not in said
    assert "path-credential" not in said


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_coordinators_deliver_each_message_once(
    parts: Application, replicas: Replicas, tmp_path: Path
) -> None:
    with receiver() as hook:
        secret = secret_file(tmp_path)
        for _ in range(2):
            replicas.start(webhook_urls=hook.url, webhook_secret_file=secret)
        wanted = [cancel_one(parts) for _ in range(4)]

        found = [json.loads(hook.next().body)["data"]["training_session_id"] for _ in wanted]

        assert found == wanted
        assert hook.received.empty()
