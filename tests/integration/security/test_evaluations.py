"""What a dishonest device can do by evaluating: as little as any other, whatever it sends over the wire."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, training_pb2
from qflare_client import Client
from tests.support.inserted_keys import exchange_key, receipt_of
from tests.support.raw_device import RawDevice, reason_of

Deploy = Callable[..., Any]
GATE = training_pb2.ReleasePolicy(
    bounds=[training_pb2.MetricBound(metric="accuracy", min_value=0.9)]
)
STOP = training_pb2.EarlyStopPolicy(metric="accuracy", target=0.9)
EVALUATE = pb.TASK_KIND_EVALUATE


def session(deployment: Any, quorum: int, **config: Any) -> str:
    """Start a training session whose versions are measured, and which a high accuracy ends and releases."""
    settings = {
        "rounds": training_pb2.RoundPolicy(quorum=quorum, deadline=Duration(seconds=60)),
        "total_rounds": 9,
        "evaluation": training_pb2.EvaluationPolicy(every_rounds=1),
        "release": GATE,
        "early_stop": STOP,
        **config,
    }
    return str(deployment.session(**settings))


class Evaluator(RawDevice):
    """A device that sends any evaluation."""

    def take_part(self, session_id: str, number: int, **facts: Any) -> None:
        """Contribute to a round; with an evaluation, before or after the training."""
        task = self.wait(session_id, lambda found: found.round_number == number, trains_only=True)
        draft = self.draft(task, {"w": np.zeros(4, np.float32)})
        draft.statement.example_count = facts.get("example_count", 10)
        draft.statement.metrics["accuracy"] = facts.get("accuracy", 0.5)
        self.submit(draft)

    def wait(
        self, session_id: str, wanted: Callable[[pb.GetTaskResponse], bool], **request: Any
    ) -> pb.GetTaskResponse:
        """Poll until the answer is one that is waited for."""
        asked = pb.GetTaskRequest(training_session_id=session_id, **request)
        while True:
            answer: pb.GetTaskResponse = self.stub.GetTask(asked, metadata=self.metadata)
            if wanted(answer):
                return answer
            threading.Event().wait(answer.poll_delay.ToTimedelta().total_seconds())

    def asked(self, session_id: str) -> pb.GetTaskResponse:
        """Wait until it is asked to evaluate."""
        return self.wait(session_id, lambda found: found.kind == EVALUATE)

    def statement(self, task: pb.GetTaskResponse, **changes: Any) -> Any:
        """Return what an honest device would sign, and what is changed in it."""
        fields: dict[str, Any] = {
            "realm": self.identity.realm,
            "training_session_id": task.training_session_id,
            "version": task.base_version,
            "version_digest": task.base_digest,
            "evaluation_nonce": task.evaluation_nonce,
            "device_id": self.identity.device_id,
            "key_id": self.identity.keys.signing.public.key_id,
            "example_count": 10,
            "metrics": {"accuracy": 0.5},
            **changes,
        }
        return security_pb2.EvaluationStatement(**fields)

    def report(self, statement: Any, key: SigningKey | None = None) -> None:
        """Sign and send an evaluation, whatever its form."""
        signed = sign_envelope(
            key or self.identity.keys.signing, SigningContext.EVALUATION, statement
        )
        self.send(signed)

    def send(self, envelope: security_pb2.SignedEnvelope) -> None:
        """Send an envelope as it is."""
        request = pb.ReportEvaluationRequest(statement=envelope)
        self.stub.ReportEvaluation(request, metadata=self.metadata)


def evaluator(deployment: Any, name: str) -> Evaluator:
    client: Client = deployment.device(name)
    return Evaluator(client, deployment.devices_stub)


def refused(call: Callable[[], Any]) -> str:
    """Return the machine word with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return reason_of(caught.value)


def version(deployment: Any, session_id: str, number: int) -> Any:
    request = admin_pb2.DescribeGlobalModelRequest(training_session_id=session_id, version=number)
    return deployment.admin.DescribeGlobalModel(request, metadata=deployment.metadata).global_model


def state(deployment: Any, session_id: str) -> Any:
    request = admin_pb2.GetTrainingSessionRequest(training_session_id=session_id)
    found = deployment.admin.GetTrainingSession(request, metadata=deployment.metadata)
    return found.training_session.state


def first_version(session_id: str, devices: list[Evaluator]) -> None:
    """Let devices make version 1, and wait until the next round has opened."""
    for device in devices:
        device.take_part(session_id, 1)
    devices[0].wait(session_id, lambda found: found.round_number == 2, trains_only=True)


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


def test_a_device_that_was_not_asked_measures_nothing(deployment: Any) -> None:
    honest, liar = evaluator(deployment, "honest"), evaluator(deployment, "liar")
    session_id = session(deployment, 1)
    first_version(session_id, [honest])
    asked = honest.asked(session_id)

    unasked = pb.GetTaskResponse()
    unasked.CopyFrom(asked)  # the value that another device was given
    boast = {"accuracy": 1.0}
    borrowed = liar.statement(unasked, metrics=boast)
    guessed = liar.statement(unasked, metrics=boast, evaluation_nonce="ab" * 32)
    initial = honest.statement(asked, version=0, metrics=boast)

    assert refused(lambda: liar.report(borrowed)) == "NOT_SELECTED"
    assert refused(lambda: liar.report(guessed)) == "NOT_SELECTED"
    assert refused(lambda: honest.report(initial)) == "NOT_SELECTED"
    made = version(deployment, session_id, 1)
    assert "accuracy" not in made.metrics
    assert not made.released


def test_a_session_without_evaluation_takes_none(deployment: Any) -> None:
    device = evaluator(deployment, "a")
    plain = training_pb2.EvaluationPolicy()
    session_id = session(deployment, 1, evaluation=plain, early_stop=None)
    task = device.wait(session_id, lambda found: found.kind == pb.TASK_KIND_TRAIN)

    statement = device.statement(task, evaluation_nonce="00" * 32, metrics={"accuracy": 1.0})

    assert refused(lambda: device.report(statement)) == "NOT_SELECTED"
    assert not version(deployment, session_id, 0).metrics


SPOILED: list[tuple[dict[str, Any], str]] = [
    ({"realm": "elsewhere"}, "INVALID_REQUEST"),
    ({"device_id": "00000000-0000-4000-8000-000000000000"}, "INVALID_REQUEST"),
    ({"version_digest": "ab" * 32}, "INVALID_REQUEST"),
    ({"example_count": 0}, "INVALID_REQUEST"),
    ({"example_count": 2**40 + 1}, "INVALID_REQUEST"),
    ({"metrics": {}}, "INVALID_REQUEST"),
    ({"metrics": {"accuracy": float("nan")}}, "INVALID_REQUEST"),
    ({"metrics": {"train_loss": -1.0}}, "INVALID_REQUEST"),
    ({"metrics": {"accuracy": 0.5, "train_accuracy": 1.0}}, "INVALID_REQUEST"),
    ({"metrics": {"a\x1b[2J": 0.5}}, "INVALID_REQUEST"),
    ({"key_id": "ab" * 32}, "INVALID_SIGNATURE"),
    ({"version": 0}, "NOT_SELECTED"),
]


def test_an_evaluation_is_of_its_device_and_version(deployment: Any) -> None:
    device = evaluator(deployment, "a")
    session_id = session(deployment, 1)
    first_version(session_id, [device])
    before = dict(version(deployment, session_id, 1).metrics)
    task = device.asked(session_id)

    for changes, reason in SPOILED:
        assert refused(partial(device.report, device.statement(task, **changes))) == reason, changes

    assert dict(version(deployment, session_id, 1).metrics) == before


def test_an_evaluation_is_signed_by_its_device(deployment: Any) -> None:
    device, other = evaluator(deployment, "a"), evaluator(deployment, "b")
    session_id = session(deployment, 1)
    first_version(session_id, [device])
    statement = device.statement(device.asked(session_id))
    payload = statement.SerializeToString()
    own, foreign = device.identity.keys.signing, other.identity.keys.signing
    as_update = sign_envelope(own, SigningContext.UPDATE, payload)
    twice = sign_envelope(foreign, SigningContext.EVALUATION, payload)
    twice.signatures.extend(sign_envelope(own, SigningContext.EVALUATION, payload).signatures)

    for envelope in (
        security_pb2.SignedEnvelope(payload=payload),
        sign_envelope(foreign, SigningContext.EVALUATION, payload),
        as_update,
        twice,
    ):
        assert refused(partial(device.send, envelope)) == "INVALID_SIGNATURE"
    device.report(statement)


def test_an_evaluation_by_an_inserted_key_is_refused(deployment: Any) -> None:
    device = evaluator(deployment, "a")
    session_id = session(deployment, 1)
    first_version(session_id, [device])
    task = device.asked(session_id)
    before = dict(version(deployment, session_id, 1).metrics)
    for receipt in (None, receipt_of(deployment, device.identity.device_id)):
        key = exchange_key(deployment, device, receipt)
        statement = device.statement(task, key_id=key.public.key_id, metrics={"accuracy": 1.0})

        assert refused(partial(device.report, statement, key)) == "INVALID_SIGNATURE"

    assert dict(version(deployment, session_id, 1).metrics) == before


def test_a_device_measures_a_version_once(deployment: Any) -> None:
    device = evaluator(deployment, "a")
    session_id = session(deployment, 1)
    first_version(session_id, [device])
    task = device.asked(session_id)

    device.report(device.statement(task))
    device.report(device.statement(task))  # the same again is a repeated call
    better = device.statement(task, metrics={"accuracy": 1.0})

    assert refused(lambda: device.report(better)) == "DUPLICATE_EVALUATION"
    made = version(deployment, session_id, 1)
    assert made.metrics["accuracy"] == 0.5
    assert not made.released
    assert device.task(session_id).kind == pb.TASK_KIND_TRAIN


def test_a_recorded_evaluation_may_be_repeated_after_the_device_has_changed_its_keys(
    deployment: Any,
) -> None:
    device = evaluator(deployment, "a")
    session_id = session(deployment, 1)
    first_version(session_id, [device])
    statement = device.statement(device.asked(session_id))
    device.report(statement)

    assert device.client.rotate_keys() == 1

    device.report(statement)
    statement.metrics["accuracy"] = 1.0
    assert refused(lambda: device.report(statement)) == "INVALID_SIGNATURE"


def test_nobody_weighs_more_than_its_own_updates_said(deployment: Any) -> None:
    honest, liar = evaluator(deployment, "honest"), evaluator(deployment, "liar")
    session_id = session(deployment, 2)
    first_version(session_id, [honest, liar])

    honest.report(honest.statement(honest.asked(session_id), metrics={"accuracy": 0.5}))
    boast = liar.statement(liar.asked(session_id), example_count=2**40, metrics={"accuracy": 1.0})
    liar.report(boast)

    made = version(deployment, session_id, 1)
    assert made.metrics["accuracy"] == pytest.approx(0.75)  # both sent an update of ten examples
    assert not made.released


def test_a_setting_caps_what_a_report_weighs(deployment: Any) -> None:
    honest, liar = evaluator(deployment, "honest"), evaluator(deployment, "liar")
    policy = training_pb2.EvaluationPolicy(every_rounds=1, max_example_count=30)
    session_id = session(deployment, 2, evaluation=policy)
    first_version(session_id, [honest, liar])

    honest.report(honest.statement(honest.asked(session_id), metrics={"accuracy": 0.5}))
    boast = liar.statement(liar.asked(session_id), example_count=2**40, metrics={"accuracy": 1.0})
    liar.report(boast)

    assert version(deployment, session_id, 1).metrics["accuracy"] == pytest.approx(0.875)


def test_less_than_a_quorum_neither_releases_nor_ends(deployment: Any) -> None:
    honest, liar = evaluator(deployment, "honest"), evaluator(deployment, "liar")
    session_id = session(deployment, 2)
    first_version(session_id, [honest, liar])
    liar.report(liar.statement(liar.asked(session_id), metrics={"accuracy": 1.0}))
    # A metric that only one of two reports holds has no quorum either.
    honest.report(honest.statement(honest.asked(session_id), metrics={"loss": 0.1}))

    for device in (honest, liar):
        device.take_part(session_id, 2)
    honest.wait(session_id, lambda found: found.round_number == 3, trains_only=True)

    made = version(deployment, session_id, 1)
    assert not {"accuracy", "loss"} & made.metrics.keys()
    assert not made.released
    assert state(deployment, session_id) == training_pb2.TRAINING_SESSION_STATE_RUNNING


def test_one_liar_of_five_neither_releases_nor_ends(deployment: Any) -> None:
    devices = [evaluator(deployment, f"device-{number}") for number in range(5)]
    session_id = session(deployment, 5)
    first_version(session_id, devices)
    for device in devices[:4]:
        device.report(device.statement(device.asked(session_id)))
    liar = devices[4]
    liar.report(liar.statement(liar.asked(session_id), metrics={"accuracy": 1e9}))

    made = version(deployment, session_id, 1)
    assert made.metrics["accuracy"] == pytest.approx(0.5)
    assert not made.released


def test_what_comes_with_an_update_neither_releases_nor_ends(deployment: Any) -> None:
    device = evaluator(deployment, "a")
    session_id = session(deployment, 1)
    device.take_part(session_id, 1, accuracy=1.0)
    device.wait(session_id, lambda found: found.round_number == 2, trains_only=True)

    made = version(deployment, session_id, 1)
    assert made.metrics["train_accuracy"] == 1.0
    assert not made.released
    assert state(deployment, session_id) == training_pb2.TRAINING_SESSION_STATE_RUNNING


def test_a_gate_cannot_be_told_to_go_by_updates(deployment: Any) -> None:
    bound = training_pb2.MetricBound(metric="train_accuracy", min_value=0.9)
    config = training_pb2.TrainingConfig(
        rounds=training_pb2.RoundPolicy(quorum=1),
        release=training_pb2.ReleasePolicy(bounds=[bound]),
    )
    request = admin_pb2.CreateTrainingSessionRequest(name="test", config=config)

    create = deployment.admin.CreateTrainingSession
    assert refused(lambda: create(request, metadata=deployment.metadata)) == "INVALID_REQUEST"
