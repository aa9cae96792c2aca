"""Mutated requests to every method: whatever a caller sends, calls are answered, and none with INTERNAL or UNKNOWN."""

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import MAX_MESSAGE_BYTES, SigningContext
from qflare.v1 import coordinator_service_pb2 as pb
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.hostile_requests import RequestMaker, caller_of, is_watch, methods
from tests.support.raw_device import RawDevice

Code = grpc.StatusCode
WEIGHTS: Final = {"w": np.zeros(4, np.float32)}
FAULTS: Final = frozenset({Code.INTERNAL, Code.UNKNOWN})
ENOUGH_FAULTS: Final = 5
"""Faults after which the fuzz ends: calls that are never answered would take it hours."""
REFUSALS: Final = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
REFUSED_PAUSE_S: Final = 0.1
PAUSE: Final = threading.Event()
MAX_ANSWERS: Final = 3
TIMEOUT_S: Final = 60.0
WATCH_S: Final = 0.2
"""A watch that is taken answers only when something happens."""
SHOWN_BYTES: Final = 100
"""Bytes of a request that a failure shows: enough to know it; its seed and number make it again."""
MANY: Final = int(os.environ.get("QFLARE_TEST_FUZZ_MESSAGES", "50000"))
"""Messages for each database."""
PARTS: Final = 5
MAX_WATCHES: Final = 4
"""Watches that run beside other messages, so that the fuzz seldom waits for one to end."""


class Sent(NamedTuple):
    """A request that was sent to a method, and what gives the answers."""

    path: str
    data: bytes
    answers: Iterator[Any]


class Fuzzer:
    """Sends mutated requests to one coordinator.

    Args:
        deployment: The coordinator.
        seed: Decides every message.
    """

    def __init__(self, deployment: Deployment, seed: int) -> None:
        self._random = Random(seed)
        self._deployment = deployment
        self._device = RawDevice(deployment.device("raw"), deployment.devices_stub)
        victims = [deployment.device(f"victim-{number}") for number in range(2)]
        self._session_id = deployment.session(WEIGHTS, rounds={"quorum": 2, "target": 2})
        sessions = [self._session_id, deployment.session(WEIGHTS, start=False), "unknown"]
        self._maker = RequestMaker(
            self._random,
            {
                "training_session_id": sessions,
                "device_id": [client._login.identity.device_id for client in victims],
                "version": [0, 1],
                "page_token": ["", "x"],
            },
        )
        self._methods = list(methods())
        # of its own, since a request may revoke what it finds in a list
        token = deployment.issue_admin(Role.ADMIN, Role.AUDITOR)
        self._metadata = {
            "AdminService": (("authorization", f"Bearer {token}"),),
            "CoordinatorService": self._device.metadata,
        }
        self.codes: Counter[grpc.StatusCode] = Counter()

    def run(self, count: int) -> list[tuple[str, bytes, str]]:
        """Send messages, each method in turn; return those without an answer, or with a fault."""
        faults = []
        for sent in self._sent(count):
            code, text = _outcome(sent.answers)
            self.codes[code] += 1
            unanswered = code is Code.DEADLINE_EXCEEDED and not is_watch(sent.path)
            if code in FAULTS or unanswered:
                faults.append((sent.path, sent.data[:SHOWN_BYTES], f"{code.name}: {text}"))
            if len(faults) >= ENOUGH_FAULTS:
                break
        return faults

    def _sent(self, count: int) -> Iterator[Sent]:
        """Send messages and yield each, watches after several later ones."""
        watches: deque[Sent] = deque()
        for number in range(count):
            path, method = self._methods[number % len(self._methods)]
            data = self._request(method)
            sent = Sent(path, data, self._send(path, method, data))
            if is_watch(path):
                watches.append(sent)
                if len(watches) <= MAX_WATCHES:
                    continue
                sent = watches.popleft()
            yield sent
        yield from watches

    def _request(self, method: MethodDescriptor) -> bytes:
        if method.name == "SubmitUpdate" and self._random.random() < 0.7:
            message: Any = self._update()
        else:
            message = self._maker.message(method.input_type)
        for _ in range(self._random.choice((0, 1, 1, 2))):
            self._maker.spoil(message)
        data: bytes = message.SerializeToString()
        return self._maker.spoil_bytes(data) if self._random.random() < 0.2 else data

    def _update(self) -> pb.SubmitUpdateRequest:
        """Return an update whose statement is signed, right but for a field."""
        draft = self._device.draft(self._task(), WEIGHTS)
        header = self._device.header(draft)
        if self._random.random() < 0.8:
            self._maker.spoil(draft.statement)
            key = self._device.identity.keys.signing
            if draft.statement.ByteSize() <= MAX_MESSAGE_BYTES:
                signed = sign_envelope(key, SigningContext.UPDATE, draft.statement)
                header.statement.CopyFrom(signed)
            else:  # nobody can sign this; the coordinator has to refuse it all the same
                header.statement.payload = draft.statement.SerializeToString()
        return pb.SubmitUpdateRequest(header=header, chunk=pb.Chunk(data=draft.payload))

    def _task(self) -> pb.GetTaskResponse:
        """Ask for a task, again while calls that the fuzz gave up hold the places of their class, or of the connection.

        gRPC's server refuses new streams of a connection while as many as it allows at once are not freed
        (REFUSED_STREAM of RFC 9113, section 8.7: not processed, may be repeated).
        """
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self._device.task(self._session_id)
            except grpc.RpcError as error:
                refused: Any = error
                if refused.code() not in REFUSALS or time.monotonic() > deadline:
                    raise AssertionError(
                        f"no task: {refused.code()}: {refused.details()}"
                    ) from error
            PAUSE.wait(REFUSED_PAUSE_S)

    def _send(self, path: str, method: MethodDescriptor, data: bytes) -> Iterator[Any]:
        """Send a message and return what gives the answers; a watch runs on beside later messages."""
        send = caller_of(self._deployment.channel, path, method)
        metadata = self._metadata.get(method.containing_service.name, ())
        request = iter([data]) if method.client_streaming else data
        if method.server_streaming:
            timeout_s = WATCH_S if is_watch(path) else TIMEOUT_S
            return _some(send(request, metadata=metadata, timeout=timeout_s))
        call = send.future(request, metadata=metadata, timeout=TIMEOUT_S)
        return (each.result() for each in (call,))


def _some(answer: Any) -> Iterator[Any]:
    """Yield some answers of a stream, and give up one that goes on."""
    for number, each in enumerate(answer, 1):
        if number >= MAX_ANSWERS:
            answer.cancel()
            return
        yield each


def _outcome(answers: Iterator[Any]) -> tuple[grpc.StatusCode, str]:
    """Return how a call ended, and what was said."""
    try:
        deque(answers, maxlen=0)
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code(), failed.details() or ""
    return Code.OK, ""


@pytest.fixture
def fuzzer(deploy: Callable[..., Deployment]) -> Callable[[int], Fuzzer]:
    deployment = deploy(max_calls_per_second=1_000_000)
    return lambda seed: Fuzzer(deployment, seed)


def test_no_mutated_request_is_a_fault_of_the_coordinator(
    fuzzer: Callable[[int], Fuzzer],
) -> None:
    some = fuzzer(1)

    assert some.run(300) == []
    assert some.codes[Code.INVALID_ARGUMENT] > 50
    assert some.codes[Code.OK] > 15


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_mutated_request_of_many_is_a_fault_of_the_coordinator(
    fuzzer: Callable[[int], Fuzzer], part: int
) -> None:
    assert fuzzer(2 + part).run(MANY // PARTS) == []
