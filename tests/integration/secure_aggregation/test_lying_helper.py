"""A helper that lies, is slow, or is somebody else, against a real coordinator and real devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
import pytest

from qflare.crypto.signing import SigningKey
from qflare.evidence.unmasking import sign_answer
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client import Client, NotFoundError
from qflare_server.storage.repository import training_sessions
from tests.integration.secure_aggregation.conftest import (
    SecureDeployment,
    contribute,
    wait_for_round,
    wait_for_version,
)
from tests.support.lying_helper import Answers, Lie, LyingHelper

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

SecureStart = Callable[..., SecureDeployment]
Response = messages.UnmaskResponse

ZEROS: Final = np.zeros(4, np.float32)


@pytest.fixture
def open_liar() -> Iterator[Callable[[SecureDeployment], LyingHelper]]:
    """Return a function that puts a lying helper before the first one of a deployment."""
    opened: list[LyingHelper] = []

    def start(made: SecureDeployment) -> LyingHelper:
        opened.append(LyingHelper(made.helpers[0]))
        return opened[-1]

    yield start
    for liar in opened:
        liar.close()


def _answer(answers: Answers) -> security_pb2.UnmaskingAnswer:
    return security_pb2.UnmaskingAnswer.FromString(answers[0].answer.answer.payload)


def _another_key(answers: Answers) -> Answers:
    """Sign the answer with a key of one's own."""
    key, stated = SigningKey.generate(), _answer(answers)
    stated.helper_id = key.public.key_id
    signed = sign_answer(key, stated)
    first = Response(answer=messages.UnmaskAnswer(answer=signed, latest=signed))
    return [first, *answers[1:]]


def _another_signature(answers: Answers) -> Answers:
    """Sign the answer with a key of one's own, under the helper's name."""
    first = Response()
    first.CopyFrom(answers[0])
    signed = sign_answer(SigningKey.generate(), _answer(answers))
    for envelope in (first.answer.answer, first.answer.latest):
        envelope.signatures[0].signature = signed.signatures[0].signature
    return [first, *answers[1:]]


def _changed_statement(answers: Answers) -> Answers:
    first = Response()
    first.CopyFrom(answers[0])
    stated = _answer(answers)
    stated.mask_digest = "0" * 64
    first.answer.answer.payload = stated.SerializeToString(deterministic=True)
    return [first, *answers[1:]]


def _changed_sum(answers: Answers) -> Answers:
    data = answers[1].chunk
    return [answers[0], Response(chunk=bytes([data[0] ^ 1]) + data[1:]), *answers[2:]]


def _unknown_updates(_: Answers) -> Answers:
    member = messages.RefusedMember(update_id="another", reason="so")
    return [Response(refused=messages.RefusedMembers(members=[member]))]


LIES: Final[list[tuple[Lie, str]]] = [
    (_another_key, "signed"),
    (_another_signature, "sign"),
    (_changed_statement, "sign"),
    (_changed_sum, "its sum is not what it signed"),
    (lambda answers: [answers[0], Response(chunk=answers[1].chunk[:-4])], "its sum"),
    (lambda answers: [*answers, Response(chunk=b"abcd")], "its sum is too long"),
    (lambda answers: answers[:1], "its sum"),
    (lambda answers: answers[1:], "its response has no answer"),
    (lambda _: [], "its response has no answer"),
    (_unknown_updates, "its response has no answer"),
]


def _train(clients: Iterable[Client], session_id: str) -> None:
    for index, client in enumerate(clients):
        contribute(client, session_id, index)


def _reason(made: SecureDeployment, session_id: str, number: int) -> str:
    with made.deployment.coordinator.parts.database.read() as session:
        found = training_sessions.get_round(session, session_id, number)
    assert found is not None
    assert found.state == "failed"
    return found.state_reason


def test_no_lie_of_a_helper_makes_a_version(
    secure: SecureStart, open_liar: Callable[[SecureDeployment], LyingHelper]
) -> None:
    made = secure()
    session_id = made.session(quorum=2, round_count=len(LIES) + 2)
    liar = open_liar(made)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for number, (lie, reason) in enumerate(LIES, 1):
        liar.lie = lie
        _train(clients, session_id)
        wait_for_round(clients[0], session_id, number + 1)
        assert reason in _reason(made, session_id, number), number

    earlier, number = liar.answers, len(LIES) + 1
    liar.lie = lambda _: earlier
    _train(clients, session_id)
    wait_for_round(clients[0], session_id, number + 1)
    assert "round_number" in _reason(made, session_id, number)
    with pytest.raises(NotFoundError):
        clients[0].download(session_id, 1)

    liar.lie = lambda answers: answers
    _train(clients, session_id)
    assert wait_for_version(clients[0], session_id, 1).statement.round_number == number + 1


def test_a_helper_at_the_address_of_another_one_answers_nothing(secure: SecureStart) -> None:
    made = secure(helper_count=2)
    first, second = made.helpers
    text = first.bundle_file.read_text()
    first.bundle_file.write_text(text.replace(first.address, second.address))
    made.helpers = [first]
    session_id = made.session(quorum=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    _train(clients, session_id)
    wait_for_round(clients[0], session_id, 2)
    assert "helper_id" in _reason(made, session_id, 1)


def test_a_slow_helper_delays_no_other_round(secure: SecureStart) -> None:
    made = secure()
    masked = made.session(quorum=2)
    plain = made.deployment.session({"w": ZEROS}, rounds={"quorum": 2})
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    made.helpers[0].halt()
    _train(clients, masked)
    for client in clients:
        task = client.get_task(plain)
        client.submit(task, client.download_base(task), {"w": ZEROS + 1}, 10)
    assert wait_for_version(clients[0], plain, 1).statement.contributor_count == 2
    with pytest.raises(NotFoundError):
        clients[0].download(masked, 1)
    made.helpers[0].resume()
    assert wait_for_version(clients[0], masked, 1).statement.contributor_count == 2
