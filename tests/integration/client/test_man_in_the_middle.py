"""A device whose every message passes through somebody else's hands."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_client import (
    Client,
    CorruptModelError,
    InvalidStatementError,
    QflareClientError,
    RetryPolicy,
    RolledBackModelError,
    TaskKind,
    UnavailableError,
    UntrustedKeysetError,
    VerificationError,
    enroll,
    run,
)
from tests.integration.client.conftest import Relay

Deploy = Callable[..., Any]
PATIENCE = RetryPolicy(total_time_s=10, initial_delay_s=0.01, max_delay_s=0.05)


class Wire:
    """A deployment with a relay before it, and one device behind it."""

    def __init__(self, deployment: Any, relay: Relay, home: Path) -> None:
        self.deployment = deployment
        self.relay = relay
        self.home = home

    def enroll(self) -> None:
        enroll(self.deployment.bundle(), home=self.home, address=self.relay.address, retry=PATIENCE)

    def client(self) -> Client:
        return Client(home=self.home, retry=PATIENCE)

    def session(self, **config: Any) -> str:
        rounds = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
        config = {"rounds": rounds, "total_rounds": 2, **config}
        return str(self.deployment.session({"w": np.zeros(400_000, np.float32)}, **config))


@pytest.fixture
def wire(deploy: Deploy, relay: Callable[[str], Relay], tmp_path: Path) -> Wire:
    deployment = deploy()
    return Wire(deployment, relay(deployment.coordinator.address), tmp_path / "device")


def lose_first(count: int = 1) -> Callable[[Any], Any]:
    """Lose the first messages after the coordinator has acted on the call."""
    left = [count]

    def lose(message: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise UnavailableError("lost")
        return message

    return lose


def changed(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Change a copy of each message."""

    def apply(message: Any) -> Any:
        other = copy.deepcopy(message)
        change(other)
        return other

    return apply


def flip(data: bytes, place: int = -1) -> bytes:
    flipped = bytearray(data)
    flipped[place] ^= 1
    return bytes(flipped)


# Enrollment.


def test_the_token_is_not_seen(wire: Wire) -> None:
    bundle = wire.deployment.bundle()
    enroll(bundle, home=wire.home, address=wire.relay.address)

    seen = b"".join(
        request.SerializeToString()
        for requests in wire.relay.requests.values()
        for request in requests
    )
    assert bundle.enrollment_token.encode() not in seen
    assert bundle.enrollment_token.rpartition(".")[2].encode() not in seen


def test_a_keyset_of_his_own_is_not_trusted(wire: Wire) -> None:
    def forge(answer: messages.GetKeysetResponse) -> None:
        key = SigningKey.generate()
        keyset = security_pb2.Keyset.FromString(answer.bundle.keyset.payload)
        keyset.keys[0].kem_key.CopyFrom(KemKey.generate().public.to_proto())
        answer.bundle.keyset.CopyFrom(sign_envelope(key, SigningContext.KEYSET, keyset))

    wire.relay.on_answer["GetKeyset"] = changed(forge)

    with pytest.raises(UntrustedKeysetError):
        wire.enroll()

    assert "BeginRegistration" not in wire.relay.requests


@pytest.mark.parametrize("method", ["GetKeyset", "BeginRegistration", "Register"])
def test_an_enrollment_survives_a_lost_answer(wire: Wire, method: str) -> None:
    wire.relay.on_answer[method] = lose_first()

    wire.enroll()

    with wire.client() as client:
        assert client.heartbeat().device_state == "active"


def test_a_forged_receipt_is_refused(wire: Wire) -> None:
    def forge(answer: messages.RegisterResponse) -> None:
        answer.receipt.signatures[0].signature = flip(answer.receipt.signatures[0].signature)

    wire.relay.on_answer["Register"] = changed(forge)

    with pytest.raises(VerificationError):
        wire.enroll()


# Login.


@pytest.mark.parametrize("field", ["encapsulation", "nonce", "confirmation"])
def test_a_changed_challenge_is_refused(wire: Wire, field: str) -> None:
    wire.enroll()

    def change(answer: messages.BeginAuthenticationResponse) -> None:
        setattr(answer.challenge, field, flip(getattr(answer.challenge, field)))

    wire.relay.on_answer["BeginAuthentication"] = changed(change)

    with wire.client() as client, pytest.raises(VerificationError):
        client.heartbeat()

    assert "Authenticate" not in wire.relay.requests


def test_a_changed_grant_is_refused(wire: Wire) -> None:
    wire.enroll()

    def change(answer: messages.AuthenticateResponse) -> None:
        answer.grant.sealed_grant = flip(answer.grant.sealed_grant)

    wire.relay.on_answer["Authenticate"] = changed(change)

    with wire.client() as client, pytest.raises(VerificationError):
        client.heartbeat()


@pytest.mark.parametrize("method", ["BeginAuthentication", "Authenticate"])
def test_a_login_survives_a_lost_answer(wire: Wire, method: str) -> None:
    wire.enroll()
    wire.relay.on_answer[method] = lose_first()

    with wire.client() as client:
        assert client.heartbeat().device_state == "active"


def test_a_refresh_whose_answer_is_lost_becomes_a_login(wire: Wire) -> None:
    wire.enroll()
    with wire.client() as client:
        client.heartbeat()
        session = client._login._session
        assert session is not None
        client._login._session = replace(session, refresh_at=0.0)
        wire.relay.on_answer["RefreshToken"] = lose_first()

        assert client.heartbeat().device_state == "active"

    assert len(wire.relay.requests["RefreshToken"]) == 1
    assert len(wire.relay.requests["Authenticate"]) == 2


def test_a_rotation_whose_answer_is_lost_is_found_out(wire: Wire) -> None:
    wire.enroll()
    wire.relay.on_answer["RotateKeys"] = lose_first()

    with wire.client() as client:
        assert client.rotate_keys() == 1
        assert client.heartbeat().device_state == "active"

    with wire.client() as client:
        assert client.heartbeat().device_state == "active"


# Tasks, versions, updates.


def test_a_task_of_his_own_is_refused(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session()

    def forge(answer: messages.GetTaskResponse) -> None:
        answer.round_number += 1

    wire.relay.on_answer["GetTask"] = changed(forge)

    with wire.client() as client, pytest.raises(InvalidStatementError):
        client.get_task(session_id)


def test_another_configuration_does_not_reach_the_training(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session()

    def forge(answer: messages.GetTaskResponse) -> None:
        answer.device_training.learning_rate = 1e6

    wire.relay.on_answer["GetTask"] = changed(forge)

    with wire.client() as client, pytest.raises(InvalidStatementError):
        client.get_task(session_id)


def forge_model(field: str) -> Callable[[messages.GetGlobalModelResponse], None]:
    def forge(answer: messages.GetGlobalModelResponse) -> None:
        header = answer.header
        if field == "chunk" and answer.chunk.index == 1:
            answer.chunk.data = flip(answer.chunk.data)
        elif field == "index" and answer.chunk.index == 1:
            answer.chunk.index = 0
        elif field == "statement" and answer.HasField("header"):
            header.statement.payload = flip(header.statement.payload)
        elif field == "chunk_digests" and answer.HasField("header"):
            header.chunk_digests = flip(header.chunk_digests)
        elif field == "manifest" and answer.HasField("header"):
            header.global_model.manifest.tensors[0].name = "other"

    return forge


@pytest.mark.parametrize("field", ["chunk", "index", "statement", "chunk_digests", "manifest"])
def test_a_changed_version_is_refused(wire: Wire, field: str) -> None:
    wire.enroll()
    session_id = wire.session()
    wire.relay.on_answer["GetGlobalModel"] = changed(forge_model(field))

    with wire.client() as client, pytest.raises((CorruptModelError, InvalidStatementError)):
        client.download(session_id)


def add_one(arrays: dict[str, Any], _: object) -> Any:
    return {name: array + np.float32(1) for name, array in arrays.items()}, 1, {}


def test_an_earlier_version_is_refused(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session()
    with wire.client() as client:
        recorded: list[Any] = []
        wire.relay.on_answer["GetGlobalModel"] = changed(recorded.append)
        client.download(session_id)
        replayed = iter(list(recorded))
        run(client, add_one, training_session_id=session_id)
        wire.relay.on_answer["GetGlobalModel"] = lambda _: next(replayed)

        with pytest.raises(RolledBackModelError):
            client.download(session_id)


def test_a_version_of_another_training_session_is_refused(wire: Wire) -> None:
    wire.enroll()
    wanted, other = wire.session(), wire.session()

    def swap(request: messages.GetGlobalModelRequest) -> None:
        request.training_session_id = other

    wire.relay.on_request["GetGlobalModel"] = changed(swap)

    with wire.client() as client, pytest.raises(InvalidStatementError):
        client.download(wanted)


def test_links_that_do_not_fit_into_a_header_are_fetched(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session(total_rounds=6)
    with wire.client() as client:
        client.download(session_id)
        run(
            wire.deployment.device("other"),
            add_one,
            training_session_id=session_id,
            patience_s=20,
        )

        def cut(answer: messages.GetGlobalModelResponse) -> None:
            if answer.HasField("header"):
                del answer.header.links[2:]

        wire.relay.on_answer["GetGlobalModel"] = changed(cut)

        assert client.download(session_id).version == 6
    assert [request.first_version for request in wire.relay.requests["GetLineage"]] == [3]


def test_a_link_that_is_left_out_is_missed(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session(total_rounds=4)
    with wire.client() as client:
        client.download(session_id)
        run(
            wire.deployment.device("other"),
            add_one,
            training_session_id=session_id,
            patience_s=20,
        )

        def cut(answer: messages.GetGlobalModelResponse) -> None:
            if answer.HasField("header"):
                del answer.header.links[:]

        wire.relay.on_answer["GetGlobalModel"] = changed(cut)

        with pytest.raises(RolledBackModelError):
            client.download(session_id)


def forge_update(field: str) -> Callable[[messages.SubmitUpdateRequest], None]:
    def forge(request: messages.SubmitUpdateRequest) -> None:
        if field == "chunk":
            request.chunk.data = flip(request.chunk.data)
        elif field == "statement" and request.HasField("header"):
            statement = security_pb2.UpdateStatement.FromString(request.header.statement.payload)
            statement.example_count = 10**6
            request.header.statement.payload = statement.SerializeToString()
        elif field == "signature" and request.HasField("header"):
            signature = request.header.statement.signatures[0]
            signature.signature = flip(signature.signature)

    return forge


@pytest.mark.parametrize("field", ["chunk", "statement", "signature"])
def test_a_changed_update_is_refused_by_the_coordinator(wire: Wire, field: str) -> None:
    wire.enroll()
    session_id = wire.session()
    wire.relay.on_request["SubmitUpdate"] = changed(forge_update(field))

    with wire.client() as client:
        task = client.get_task(session_id)
        assert task.kind is TaskKind.TRAIN
        base = client.download_base(task)

        with pytest.raises(QflareClientError):
            client.submit(task, base, base.arrays, 1)


def test_an_update_whose_receipt_is_lost_counts_once(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session()
    wire.relay.on_answer["SubmitUpdate"] = lose_first()

    with wire.client() as client:
        summary = run(client, add_one, training_session_id=session_id, patience_s=20)
        lineage = client.lineage(session_id)

    assert summary.update_count == 2
    assert [entry.statement.contributor_count for entry in lineage] == [0, 1, 1]


def test_evidence_of_another_update_is_refused(wire: Wire) -> None:
    wire.enroll()
    session_id = wire.session()
    receipts: list[Any] = []
    with wire.client() as client:
        run(
            client,
            add_one,
            training_session_id=session_id,
            patience_s=20,
            on_receipt=receipts.append,
        )

        def swap(request: messages.GetContributionProofRequest) -> None:
            request.update_id = receipts[1].update_id

        wire.relay.on_request["GetContributionProof"] = changed(swap)

        with pytest.raises(InvalidStatementError):
            client.contribution_proof(receipts[0])


def test_somebody_elses_errors_are_errors(wire: Wire) -> None:
    wire.enroll()

    def refuse(_: Any) -> Any:
        raise UnavailableError("down")

    wire.relay.on_answer["Heartbeat"] = refuse

    with (
        Client(home=wire.home, retry=RetryPolicy(total_time_s=0.1)) as client,
        pytest.raises(UnavailableError),
    ):
        client.heartbeat()
