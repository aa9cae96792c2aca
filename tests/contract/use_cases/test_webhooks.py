"""Webhooks to real HTTP receivers, on both databases."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.cli.main import main
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import Telemetry
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.storage.repository import audit, webhooks
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import WebhookCursor
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.webhooks.delivery import MAX_DELAY_S, Delivery
from qflare_server.use_cases.webhooks.messages import probe_message
from qflare_server.use_cases.webhooks.sender import DeliveryError, Sender
from tests.conftest import START, FakeClock
from tests.contract.aggregation.test_privacy import DELTA, NOISE, epsilon_of
from tests.contract.conftest import MakeCore
from tests.support.use_cases import (
    CoordinatorHarness,
    CrashError,
    CrashingDatabase,
    Fuse,
    vector,
)
from tests.support.webhook_receiver import (
    SECRET,
    STALL,
    TRICKLE,
    Received,
    Receiver,
    is_genuine,
    receiver,
    secret_file,
)

TIMEOUT_S = 1.0
"""For attempts that are meant to fail by it."""
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


class Outcomes(Telemetry):
    """Keeps the outcomes of attempts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def webhook_attempted(self, outcome: str) -> None:
        self.seen.append(outcome)


@pytest.fixture
def hook() -> Iterator[Receiver]:
    """Yield a receiver over plain HTTP on loopback."""
    with receiver() as server:
        yield server


@pytest.fixture
def hooked(make_core: MakeCore, tmp_path: Path, hook: Receiver) -> CoordinatorHarness:
    """Return a coordinator with a receiver and two devices."""
    core = make_core(
        webhook_urls=hook.url, webhook_secret_file=secret_file(tmp_path), webhook_timeout_s=30.0
    )
    core.add_devices(2)
    return core


def open_delivery(core: CoordinatorHarness, holder: str = "one", **settings: Any) -> Delivery:
    """Return a delivery to the receiver of a coordinator, as a process has it at its start."""
    config = replace(core.config, **settings)
    context = replace(core.context, config=config, telemetry=Outcomes())
    delivery = Delivery(context, config.webhook_receivers[0], holder)
    delivery.prepare()
    return delivery


def outcomes(delivery: Delivery) -> list[str]:
    telemetry = delivery._context.telemetry
    assert isinstance(telemetry, Outcomes)
    return telemetry.seen


def sequence(core: CoordinatorHarness) -> None:
    AuditSequencer(core.context).run_once()


def drain(delivery: Delivery) -> None:
    """Deliver until there is nothing to do at this time."""
    while delivery.run_once() == 0.0:
        pass


def record(core: CoordinatorHarness, *event_types: str) -> None:
    """Record events, and give them their places."""

    def work(session: Session) -> None:
        for event_type in event_types:
            subject = "training_session:" + "0" * 36
            audit.record(session, SYSTEM, Event(event_type, subject), core.clock())

    core.database.write(work)
    sequence(core)


def taken(hook: Receiver) -> list[Received]:
    found = []
    while not hook.received.empty():
        found.append(hook.received.get())
    return found


def ids(messages: list[Received]) -> list[str]:
    return [message.headers["webhook-id"] for message in messages]


def test_each_event_is_delivered_in_order_and_signed(
    hooked: CoordinatorHarness, hook: Receiver, clock: FakeClock
) -> None:
    delivery = open_delivery(hooked)
    privacy = training_pb2.PrivacyPolicy(
        noise_multiplier=NOISE, clip_norm=1.0, delta=DELTA, epsilon_budget=epsilon_of(2) * 1.01
    )
    session_id = hooked.start(
        vector(0.0), privacy=privacy, rounds=training_pb2.RoundPolicy(quorum=2)
    )
    for _ in range(2):
        for device in ("device-0", "device-1"):
            hooked.submit(device, session_id)
        hooked.settle()
    sequence(hooked)

    drain(delivery)

    messages = taken(hook)
    contents = [json.loads(message.body) for message in messages]
    assert [content["type"] for content in contents] == [
        "round.published",
        "round.published",
        "privacy.budget_nearly_spent",
        "training_session.ended",
    ]
    assert ids(messages) == [content["id"] for content in contents]
    assert all(is_genuine(message, clock().timestamp()) for message in messages)
    named = {"training_session_id": session_id, "training_session_name": "test"}
    assert contents[0]["data"].items() >= {**named, "round": 1, "version": 1}.items()
    assert contents[2]["data"]["epsilon_budget"] == privacy.epsilon_budget
    assert contents[3]["data"].items() >= {**named, "state": "completed"}.items()
    assert "reason" not in str(contents)


def test_a_quarantined_device_is_named(hooked: CoordinatorHarness, hook: Receiver) -> None:
    delivery = open_delivery(hooked, webhook_events="device.quarantined")
    session_id = hooked.start(
        rounds=training_pb2.RoundPolicy(quorum=2),
        safeguards=training_pb2.SafeguardPolicy(max_norm=100.0, quarantine_rejections=1),
    )
    hooked.submit("device-0", session_id)
    hooked.submit("device-1", session_id, vector(1e6))
    hooked.settle()
    sequence(hooked)

    drain(delivery)

    (message,) = taken(hook)
    content = json.loads(message.body)
    assert content["type"] == "device.quarantined"
    assert content["data"] == {
        "audit_index": content["data"]["audit_index"],
        "device_id": "device-1",
        "device_name": "device-1",
        "rejections": 1,
        "training_session_id": session_id,
        "training_session_name": "test",
    }


@ON_SQLITE
def test_a_changed_or_old_message_is_not_genuine(
    hooked: CoordinatorHarness, hook: Receiver, clock: FakeClock
) -> None:
    delivery = open_delivery(hooked)
    record(hooked, "device.quarantined")
    drain(delivery)
    (message,) = taken(hook)
    now = clock().timestamp()

    assert is_genuine(message, now)
    assert not is_genuine(replace(message, body=message.body + b" "), now)
    assert not is_genuine(message, now + 301)
    assert not is_genuine(message, now, "whsec_" + "QUJD" * 11)


@ON_SQLITE
@pytest.mark.parametrize("answer", [500, 429, 404, 302, STALL, TRICKLE])
def test_a_message_that_is_not_accepted_is_sent_again_before_later_ones(
    hooked: CoordinatorHarness, hook: Receiver, clock: FakeClock, answer: int
) -> None:
    is_silent = answer in {STALL, TRICKLE}
    hurried = open_delivery(hooked, webhook_timeout_s=TIMEOUT_S if is_silent else 30.0)
    delivery = open_delivery(hooked)
    record(hooked, "training_session.failed", "training_session.completed")
    hook.answers.put(answer)

    drain(hurried)
    early = [hook.next()]
    drain(delivery)
    assert taken(hook) == []
    clock.advance(2.0)
    drain(delivery)

    late = taken(hook)
    assert [message.path for message in early] == ["/path-credential"]
    assert ids(late)[0] == ids(early)[0] != ids(late)[1]
    assert outcomes(hurried) == ["failed"]
    assert outcomes(delivery) == ["delivered", "delivered"]
    assert late[0].headers["webhook-timestamp"] != early[0].headers["webhook-timestamp"]


def test_an_unreachable_receiver_costs_one_row_and_its_messages_are_dropped_at_the_bounds(
    hooked: CoordinatorHarness, hook: Receiver, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    hook.server_close()
    delivery = open_delivery(hooked, webhook_max_attempts=3)
    record(hooked, *["version.published"] * 4)

    for _ in range(3):
        drain(delivery)
        clock.advance(MAX_DELAY_S)
    assert outcomes(delivery).count("dropped") == 1
    clock.advance(hooked.config.webhook_max_age_s)
    drain(delivery)

    assert outcomes(delivery).count("dropped") == 4
    assert hooked.count(WebhookCursor) == 1
    assert "dropped after 3 attempts: no answer: ConnectionRefusedError" in caplog.text


def test_one_of_two_coordinators_delivers(hooked: CoordinatorHarness, hook: Receiver) -> None:
    first, second = open_delivery(hooked, "one"), open_delivery(hooked, "two")
    record(hooked, "version.published")
    hook.answers.put(STALL)
    sending = threading.Thread(target=drain, args=(first,))
    sending.start()
    hook.next()

    drain(second)
    assert taken(hook) == []
    first.sender.close()
    sending.join()
    assert outcomes(first) == outcomes(second) == []


def test_another_coordinator_continues_when_the_lease_has_ended(
    hooked: CoordinatorHarness, hook: Receiver, clock: FakeClock
) -> None:
    crashing = CrashingDatabase(hooked.database, Fuse(4))
    dead = open_delivery(hooked, "one")
    dead._context = replace(dead._context, database=crashing)
    other = open_delivery(hooked, "two")
    record(hooked, "version.published")

    with suppress(CrashError):
        drain(dead)
    drain(other)
    (first,) = taken(hook)
    clock.advance(60)
    drain(other)

    assert ids(taken(hook)) == ids([first])
    assert outcomes(other) == ["delivered"]


def test_a_new_receiver_gets_no_earlier_events_and_passes_over_others(
    hooked: CoordinatorHarness, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "SCANNED", 3)
    record(hooked, "version.published")
    delivery = open_delivery(hooked, webhook_events="training_session.ended")
    record(hooked, *["version.published"] * 8, "training_session.failed")

    drain(delivery)

    (message,) = taken(hook)
    assert json.loads(message.body)["data"]["state"] == "failed"


@ON_SQLITE
def test_the_certificate_of_a_receiver_is_verified(
    hooked: CoordinatorHarness, tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(certificates)]) == 0
    with receiver(certificates) as hook:
        distrusting = open_delivery(hooked, webhook_urls=hook.url)
        record(hooked, "version.published")
        drain(distrusting)
        assert hook.received.empty()
        assert "TLS: self-signed certificate in certificate chain" in caplog.text
        clock.advance(60)

        drain(open_delivery(hooked, webhook_urls=hook.url, webhook_ca_file=certificates / "ca.pem"))

        assert is_genuine(hook.next(), clock().timestamp())


@ON_SQLITE
def test_neither_the_secret_nor_the_path_of_a_url_is_logged(
    hooked: CoordinatorHarness, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    delivery = open_delivery(hooked)
    record(hooked, "version.published", "version.published")
    hook.answers.put(204)
    hook.answers.put(500)

    drain(delivery)

    assert outcomes(delivery) == ["delivered", "failed"]
    said = caplog.text + hooked.config.as_log() + repr(hooked.config)
    assert SECRET not in said
    assert SECRET.removeprefix("whsec_") not in said
    assert "path-credential" not in said


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HTTP_PROXY"])
def test_the_proxy_of_the_environment_is_used_but_not_for_this_machine(
    hook: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with receiver() as proxy:
        monkeypatch.setenv(name, proxy.url)
        config = ServerConfig(webhook_secret_file=secret_file(tmp_path), webhook_timeout_s=30.0)
        message = probe_message("qflare", "0", START)

        Sender(config, hook.url).send(message, START)
        with pytest.raises(DeliveryError):
            Sender(config, "https://receiver.invalid/hook").send(message, START)

        asked = [item.path for item in taken(proxy)]
    assert asked == (["receiver.invalid:443"] if name == "HTTPS_PROXY" else [])
    assert [item.path for item in taken(hook)] == ["/path-credential"]


@pytest.mark.parametrize(
    "text", ["", "guessable", SECRET.removeprefix("whsec_"), "whsec_QUJD", "whsec_?", SECRET * 2]
)
def test_a_malformed_secret_is_refused_and_not_quoted(tmp_path: Path, text: str) -> None:
    config = ServerConfig(webhook_secret_file=secret_file(tmp_path, text))

    with pytest.raises(KeyStoreError) as caught:
        Sender(config, "http://127.0.0.1:1/")

    assert not text or text not in str(caught.value)


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    config = ServerConfig(webhook_secret_file=secret_file(tmp_path, mode=0o640))

    with pytest.raises(KeyStoreError, match="open to others"):
        Sender(config, "http://127.0.0.1:1/")


@ON_SQLITE
def test_each_of_two_secrets_signs(
    hooked: CoordinatorHarness, hook: Receiver, tmp_path: Path, clock: FakeClock
) -> None:
    old = "whsec_" + "QUJD" * 11
    path = secret_file(tmp_path, f"{SECRET}\n{old}\n")
    delivery = open_delivery(hooked, webhook_secret_file=path)
    record(hooked, "version.published")

    drain(delivery)

    (message,) = taken(hook)
    assert is_genuine(message, clock().timestamp(), old)
    assert is_genuine(message, clock().timestamp(), SECRET)


@pytest.mark.parametrize(
    "settings",
    [
        {"webhook_urls": "http://example.org/hook"},
        {"webhook_urls": "https://user:word@example.org/hook"},
        {"webhook_urls": "ftp://example.org"},
        {"webhook_urls": "https://[broken"},
        {"webhook_urls": "https://example.org/a,https://example.org/a"},
        {"webhook_urls": ",".join(f"https://example.org/{number}" for number in range(9))},
        {"webhook_events": "round.published,unknown"},
        {"webhook_urls": "https://example.org/", "webhook_secret_file": None},
        {"webhook_timeout_s": 0.0},
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any]) -> None:
    wanted = {"webhook_secret_file": Path("webhook.secret"), **settings}

    with pytest.raises(ConfigError, match="QFLARE_WEBHOOK_") as caught:
        ServerConfig(**wanted).checked()

    assert "word" not in str(caught.value)


def test_the_command_sends_a_test_message(
    hook: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QFLARE_WEBHOOK_URLS", hook.url)
    monkeypatch.setenv("QFLARE_WEBHOOK_SECRET_FILE", str(secret_file(tmp_path)))
    hook.answers.put(503)

    codes = [main(["webhooks", "test"]) for _ in range(2)]

    failed, delivered = taken(hook)
    assert codes == [1, 0]
    assert json.loads(delivered.body)["type"] == "webhook.test"
    assert is_genuine(delivered, float(delivered.headers["webhook-timestamp"]))
    assert failed.headers["webhook-id"] != delivered.headers["webhook-id"]
    assert "HTTP status 503" in capsys.readouterr().out
