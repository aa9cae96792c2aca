"""Answers of a helper that may be anything: the coordinator refuses them or asks again, and the session goes on."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

import numpy as np
import pytest

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client import Client
from qflare_client.tasks import TaskKind
from qflare_server.storage.repository import training_sessions
from tests.integration.secure_aggregation.conftest import (
    TIMEOUT_S,
    OpenLyingHelper,
    SecureStart,
    contribute,
    wait_for_version,
)
from tests.support.hostile_requests import RequestMaker
from tests.support.lying_helper import Answers

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Response = messages.UnmaskResponse
Parts = list[Response | bytes]

COUNT: Final = 60
CHUNK: Final = 2**20
MOST_BYTES: Final = 32 * CHUNK
"""Of an endless answer that may be under way when the coordinator refuses it: gRPC's window is up to 16 MiB."""
NO_NUMBERS: Final = np.full(64, np.nan, np.float32).tobytes()


class AnswerFuzzer:
    """Spoils answers, a different one for each request.

    Attributes:
        left: Answers that are still to be spoiled.
        pulled: Bytes of endless answers that were sent after the right ones.
    """

    def __init__(self) -> None:
        self.left, self.pulled = COUNT, list[int]()
        self._random = Random(3)
        self._maker = RequestMaker(self._random, {})
        self._ways: list[Callable[[Parts], object]] = [
            lambda parts: parts.__delitem__(slice(self._random.randrange(len(parts) + 1), None)),
            self._random.shuffle,
            lambda parts: parts.insert(self._place(parts), Response(chunk=NO_NUMBERS)),
            lambda parts: parts.insert(self._place(parts), Response(chunk=bytes(5 * CHUNK))),
            lambda parts: parts.insert(self._place(parts), Response()),
            lambda parts: parts.insert(self._place(parts), self._random.choice(parts or [b""])),
            lambda parts: parts.insert(self._place(parts), self._random.randbytes(40)),
            self._spoil_part,
            self._spoil_bytes,
            self._spoil_statement,
        ]

    def __call__(self, answers: Answers) -> Iterator[Response | bytes]:
        """Return another answer."""
        if self.left <= 0:
            return iter(answers)
        self.left -= 1
        if self.left % 12 == 0:
            return self._endless(answers)
        parts: Parts = [Response.FromString(part.SerializeToString()) for part in answers]
        for _ in range(self._random.choice((1, 1, 2))):
            self._random.choice(self._ways)(parts)
        return iter(parts)

    def _place(self, parts: Parts) -> int:
        return self._random.randrange(len(parts) + 1)

    def _endless(self, answers: Answers) -> Iterator[Response | bytes]:
        """Yield chunks, or empty parts, without an end."""
        place, again = len(self.pulled), Response(chunk=bytes(self._random.choice((0, CHUNK))))
        self.pulled.append(0)
        yield from answers
        while True:
            self.pulled[place] += again.ByteSize()
            yield again

    def _spoil_part(self, parts: Parts) -> None:
        for part in parts[:1]:
            if isinstance(part, Response):
                self._maker.spoil(part)

    def _spoil_bytes(self, parts: Parts) -> None:
        for index, part in enumerate(parts[:2]):
            data = part if isinstance(part, bytes) else part.SerializeToString()
            parts[index] = self._maker.spoil_bytes(data)

    def _spoil_statement(self, parts: Parts) -> None:
        for part in parts[:1]:
            if isinstance(part, Response) and part.HasField("answer"):
                envelope = self._random.choice((part.answer.answer, part.answer.latest))
                self._maker.spoil(statement := security_pb2.UnmaskingAnswer())
                envelope.payload = statement.SerializeToString(deterministic=True)


def _take_part(clients: list[Client], session_id: str) -> None:
    """Contribute wherever a round is open."""
    for index, client in enumerate(clients):
        if client.get_task(session_id).kind is TaskKind.TRAIN:
            contribute(client, session_id, index)


def test_no_answer_of_a_helper_is_a_fault_of_the_coordinator(
    secure: SecureStart,
    open_lying_helper: OpenLyingHelper,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = secure(helper_timeout_s=20.0, helper_wait_s=600.0)
    session_id = made.session(quorum=2, round_count=COUNT + 2)
    liar, fuzzer = open_lying_helper(made), AnswerFuzzer()
    liar.lie = fuzzer
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    end = time.monotonic() + 4 * TIMEOUT_S
    while fuzzer.left > 0 and time.monotonic() < end:
        _take_part(clients, session_id)
        threading.Event().wait(0.02)
    assert fuzzer.left == 0
    _take_part(clients, session_id)
    assert wait_for_version(clients[0], session_id, 1).statement.contributor_count == 2
    assert len(fuzzer.pulled) > 1
    assert max(fuzzer.pulled) <= MOST_BYTES
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in faults] == []
    with made.deployment.coordinator.parts.database.read() as session:
        found: Any = training_sessions.get_session(session, session_id)
        rounds = [
            training_sessions.get_round(session, session_id, number)
            for number in range(1, found.current_round)
        ]
    reasons = {item.state_reason for item in rounds if item is not None and item.version is None}
    assert reasons
    assert all("helper" in reason for reason in reasons), reasons
