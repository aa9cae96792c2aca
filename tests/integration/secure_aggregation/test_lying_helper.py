"""A helper that lies, is slow, or is somebody else, against a real coordinator and real devices."""

import dataclasses
import gc
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import pytest

from qflare.crypto.signing import SigningKey
from qflare.evidence.unmasking import Masking, masking_of, sign_answer
from qflare.masking.parameters import MaskingParameters
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client import Client, NotFoundError
from qflare_server.aggregation import masked_fold
from qflare_server.aggregation.fold import RoundFold
from qflare_server.storage.repository import training_sessions, updates
from qflare_server.training.masking import parameters_of
from tests.integration.secure_aggregation.conftest import (
    TIMEOUT_S,
    OpenLyingHelper,
    SecureDeployment,
    SecureStart,
    contribute,
    wait_for_round,
    wait_for_version,
)
from tests.support.lying_helper import Answers, Lie

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Response = messages.UnmaskResponse

ZEROS: Final = np.zeros(4, np.float32)


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


def _older(answers: Answers, earlier: Answers) -> Response:
    """Return an answer whose latest one is an earlier one, as of a helper whose database was restored."""
    latest = earlier[0].answer.latest
    return Response(answer=messages.UnmaskAnswer(answer=answers[0].answer.answer, latest=latest))


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
    secure: SecureStart, open_lying_helper: OpenLyingHelper
) -> None:
    made = secure()
    session_id = made.session(quorum=2, round_count=len(LIES) + 3)
    liar = open_lying_helper(made)
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

    number += 1
    liar.lie = lambda answers: [_older(answers, earlier), *answers[1:]]
    _train(clients, session_id)
    wait_for_round(clients[0], session_id, number + 1)
    assert "its counter went back" in _reason(made, session_id, number)
    with pytest.raises(NotFoundError):
        clients[0].download(session_id, 1)

    liar.lie = lambda answers: answers
    _train(clients, session_id)
    assert wait_for_version(clients[0], session_id, 1).statement.round_number == number + 1


def test_the_coordinator_asks_for_no_sum_of_too_few_updates(
    secure: SecureStart, open_lying_helper: OpenLyingHelper
) -> None:
    """A helper that refuses one of two updates does not get at the sum of the other one alone."""
    made = secure()
    session_id = made.session(quorum=2)
    liar = open_lying_helper(made)
    sizes = []

    def refuse_first(answers: Answers) -> Answers:
        sizes.append(len(answers))
        with made.deployment.coordinator.parts.database.read() as session:
            update = updates.accepted_after(session, session_id, 1, 0, 1)[0]
        member = messages.RefusedMember(update_id=update.update_id, reason="so")
        return [Response(refused=messages.RefusedMembers(members=[member]))]

    liar.lie = refuse_first
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    _train(clients, session_id)
    wait_for_round(clients[0], session_id, 2)
    assert "secure aggregation needs 2 to 2 updates, got 1" in _reason(made, session_id, 1)
    assert len(sizes) == 1


def test_the_coordinator_unmasks_no_sum_that_may_have_wrapped(
    secure: SecureStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(parameters: MaskingParameters) -> MaskingParameters:
        return dataclasses.replace(parameters, max_cohort=2)

    def masking(envelope: security_pb2.SignedEnvelope) -> Masking | None:
        found = masking_of(envelope)
        return found and dataclasses.replace(found, parameters=fewer(found.parameters))

    made = secure()
    monkeypatch.setattr(masked_fold, "parameters_of", lambda config: fewer(parameters_of(config)))
    monkeypatch.setattr(masked_fold, "masking_of", masking)
    session_id = made.session(quorum=3)
    clients = [made.deployment.device(f"device-{index}") for index in range(3)]
    _train(clients, session_id)
    wait_for_round(clients[0], session_id, 2)
    assert "needs 3 to 2 updates, got 3" in _reason(made, session_id, 1)


def test_no_fold_outlives_its_round(
    secure: SecureStart, open_lying_helper: OpenLyingHelper
) -> None:
    """A fold holds a vector as large as the model, so it must end with its round, not with a garbage collection."""
    made = secure()
    liar = open_lying_helper(made)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    masked = made.session(quorum=2, round_count=6)
    plain = [
        made.deployment.session({"w": ZEROS}, rounds={"quorum": 2}, total_rounds=3, strategy=rule)
        for rule in ({"name": "fedavg"}, {"name": "median"})
    ]
    open_rounds = {masked: 6} | dict.fromkeys(plain, 3)
    gc.disable()
    try:
        for number in range(1, 6):
            liar.lie = _changed_sum if number % 2 else (lambda answers: answers)
            _train(clients, masked)
            wait_for_round(clients[0], masked, number + 1)
        for session_id in plain:
            for number in (1, 2):
                for client in clients:
                    task = client.get_task(session_id)
                    client.submit(task, client.download_base(task), {"w": ZEROS + number}, 10)
                wait_for_round(clients[0], session_id, number + 1)
        # The one that the worker used last may be in its frame until the next pass.
        end = time.monotonic() + TIMEOUT_S
        while len(_ended_folds(open_rounds)) > 1 and time.monotonic() < end:
            threading.Event().wait(0.05)
        assert len(_ended_folds(open_rounds)) <= 1
    finally:
        gc.enable()


def _ended_folds(open_rounds: Mapping[str, int]) -> list[RoundFold]:
    """Return folds in memory of rounds before the open one of their training sessions."""
    folds = [item for item in gc.get_objects() if isinstance(item, RoundFold)]
    return [
        fold
        for fold in folds
        if fold.plan.number < open_rounds.get(fold.plan.training_session_id, 0)
    ]


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


def test_a_helper_that_falls_silent_in_its_answer_is_asked_again(
    secure: SecureStart, open_lying_helper: OpenLyingHelper
) -> None:
    made = secure(helper_timeout_s=1.0)
    liar, ended, asked = open_lying_helper(made), threading.Event(), []

    def silent_once(answers: Answers) -> Iterator[Response]:
        yield answers[0]
        asked.append(len(answers))
        if len(asked) == 1:
            ended.wait(TIMEOUT_S)
        yield from answers[1:]

    liar.lie = silent_once
    session_id = made.session(quorum=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    try:
        _train(clients, session_id)
        assert wait_for_version(clients[0], session_id, 1).statement.contributor_count == 2
    finally:
        ended.set()
    assert len(asked) == 2
