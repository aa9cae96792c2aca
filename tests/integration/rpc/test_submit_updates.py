"""Many updates in one call: each is authenticated, checked and answered on its own."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import func, select, update

from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    DuplicateUpdateError,
    InvalidRequestError,
    InvalidStatementError,
    Receipt,
    RoundNotOpenError,
    SignedUpdate,
    TaskKind,
    TrainingFunctionError,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import Device, ModelUpdate
from tests.integration.conftest import Deployment
from tests.support.queries import counted_queries
from tests.support.raw_device import Draft, RawDevice, reason_of

Deploy = Callable[..., Deployment]
WEIGHTS = {"w": np.ones(4, np.float32)}
ROUNDS = training_pb2.RoundPolicy(quorum=9, target=9, deadline=Duration(seconds=300))


def raw(deployment: Deployment, name: str, *groups: str) -> RawDevice:
    return RawDevice(deployment.device(name, groups), deployment.devices_stub)


def small(device: RawDevice, draft: Draft) -> pb.SmallUpdate:
    return pb.SmallUpdate(header=device.header(draft), payload=draft.payload)


def send(carrier: RawDevice, *updates: pb.SmallUpdate) -> list[str]:
    """Send updates; return for each the reason of its refusal, empty for a receipt."""
    request = pb.SubmitUpdatesRequest(updates=updates)
    answer = carrier.stub.SubmitUpdates(request, metadata=carrier.metadata, timeout=30)
    return [outcome.refusal.reason for outcome in answer.outcomes]


def stored(deployment: Deployment) -> int:
    with deployment.coordinator.parts.database.read() as session:
        return session.scalar(select(func.count()).select_from(ModelUpdate)) or 0


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy()


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    return deployment.session(rounds=ROUNDS)


def test_every_update_is_answered_on_its_own(deployment: Deployment, session_id: str) -> None:
    carrier, *members = (raw(deployment, f"device-{number}") for number in range(6))
    task = carrier.task(session_id)
    drafts = [member.draft(task, WEIGHTS) for member in members]
    drafts[1].payload = drafts[1].payload[:-1]
    drafts[2].statement.task_nonce = "0" * 64
    updates = [small(member, draft) for member, draft in zip(members, drafts, strict=True)]
    updates[3].header.statement.signatures[0].signature = bytes(3309)
    updates.append(pb.SmallUpdate())
    updates.append(pb.SmallUpdate(header=updates[0].header, payload=bytes(16)))
    updates.append(pb.SmallUpdate(header=updates[4].header, payload=bytes(2**20 + 1)))

    reasons = send(carrier, *updates)

    assert reasons == [
        "",
        "INVALID_UPDATE",
        "INVALID_REQUEST",
        "INVALID_SIGNATURE",
        "",
        "INVALID_REQUEST",
        "DIGEST_MISMATCH",
        "INVALID_REQUEST",
    ]
    assert stored(deployment) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda update: update.header.statement.ClearField("signatures"), "INVALID_SIGNATURE"),
        (lambda update: update.header.ClearField("statement"), "INVALID_REQUEST"),
        (lambda update: setattr(update.header.statement, "payload", b"\xff"), "INVALID_REQUEST"),
        (lambda update: setattr(update.header, "chunk_digests", bytes(32)), "DIGEST_MISMATCH"),
        (lambda update: update.header.sealed.SetInParent(), "SEALING_MISMATCH"),
        (lambda update: update.ClearField("payload"), "INVALID_UPDATE"),
    ],
)
def test_a_spoiled_update_does_not_fail_its_neighbors(
    deployment: Deployment,
    session_id: str,
    spoil: Callable[[pb.SmallUpdate], object],
    reason: str,
) -> None:
    first, second = raw(deployment, "a"), raw(deployment, "b")
    task = first.task(session_id)
    spoiled, whole = (small(each, each.draft(task, WEIGHTS)) for each in (first, second))
    spoil(spoiled)

    assert send(first, spoiled, whole, spoiled) == [reason, "", reason]


def test_a_call_has_updates_and_not_too_many(deployment: Deployment) -> None:
    carrier = raw(deployment, "a")
    for count in (0, 257):
        with pytest.raises(grpc.RpcError) as caught:
            send(carrier, *[pb.SmallUpdate()] * count)
        assert reason_of(caught.value) == "INVALID_REQUEST"

    assert send(carrier, *[pb.SmallUpdate()] * 256) == ["INVALID_REQUEST"] * 256


def test_a_device_cannot_sign_for_another_or_for_a_session_that_is_not_its_own(
    deployment: Deployment,
) -> None:
    session_id = deployment.session(rounds=ROUNDS, groups=["ward-3"])
    insider, outsider = raw(deployment, "in", "ward-3"), raw(deployment, "out", "ward-4")
    task = insider.task(session_id)
    forged = insider.draft(task, WEIGHTS)
    foreign = outsider.draft(task, WEIGHTS)
    unknown = insider.draft(task, WEIGHTS)
    unknown.statement.device_id = "nobody"

    reasons = send(
        outsider, small(outsider, forged), small(outsider, foreign), small(insider, unknown)
    )

    assert reasons == ["INVALID_SIGNATURE", "TRAINING_SESSION_NOT_FOUND", "INVALID_SIGNATURE"]
    assert send(outsider, small(insider, insider.draft(task, WEIGHTS))) == [""]


def test_states_of_the_signing_devices_count(deployment: Deployment, session_id: str) -> None:
    carrier, suspended, asleep = (raw(deployment, name) for name in "abc")
    task = carrier.task(session_id)
    updates = [small(each, each.draft(task, WEIGHTS)) for each in (suspended, asleep)]
    use_cases = deployment.coordinator.use_cases
    use_cases.devices.suspend(SYSTEM, suspended.identity.device_id, "")
    use_cases.devices.deactivate(SYSTEM, asleep.identity.device_id, "")

    assert send(carrier, *updates) == ["DEVICE_SUSPENDED", ""]
    with deployment.coordinator.parts.database.read() as session:
        state = session.scalar(select(Device.state).where(Device.id == asleep.identity.device_id))
    assert state == "active"


def test_a_repeated_call_gets_the_same_receipts_and_another_update_none(
    deployment: Deployment, session_id: str
) -> None:
    carrier, other = raw(deployment, "a"), raw(deployment, "b")
    task = carrier.task(session_id)
    update_ = small(other, other.draft(task, WEIGHTS))
    second = small(other, other.draft(task, WEIGHTS))
    request = pb.SubmitUpdatesRequest(updates=[update_, update_, second])

    answers = [
        carrier.stub.SubmitUpdates(request, metadata=carrier.metadata, timeout=30) for _ in range(2)
    ]

    assert answers[0] == answers[1]
    first, same, refused = answers[0].outcomes
    assert first == same
    assert refused.refusal.reason == "DUPLICATE_UPDATE"
    assert refused.refusal.code == grpc.StatusCode.ALREADY_EXISTS.value[0]


def test_a_large_update_is_referred_to_the_stream(deploy: Deploy) -> None:
    deployment = deploy(inline_payload_bytes=8)
    session_id = deployment.session(rounds=ROUNDS)
    device = raw(deployment, "a")

    update_ = small(device, device.draft(device.task(session_id), WEIGHTS))

    assert send(device, update_) == ["UPDATE_TOO_LARGE"]


def test_updates_count_against_their_devices_and_false_ones_against_the_caller(
    deploy: Deploy,
) -> None:
    deployment = deploy(max_calls_per_second=1)  # a burst of ten
    session_id = deployment.session(rounds=ROUNDS)
    carrier, other = raw(deployment, "a"), raw(deployment, "b")
    task = carrier.task(session_id)
    whole = small(other, other.draft(task, WEIGHTS))
    false = small(carrier, carrier.draft(task, WEIGHTS))
    false.header.statement.signatures[0].signature = bytes(3309)

    assert send(carrier, *[whole] * 12) == [""] * 10 + ["TOO_MANY_REQUESTS"] * 2
    reasons = send(carrier, *[false] * 14, whole)
    assert reasons[:10] == ["INVALID_SIGNATURE"] * 10
    assert reasons[-3:] == ["TOO_MANY_REQUESTS"] * 3


def test_updates_of_many_batches_are_accepted_in_order(deploy: Deploy) -> None:
    """More than one transaction takes."""
    deployment = deploy()
    rounds = training_pb2.RoundPolicy(quorum=200, target=200, deadline=Duration(seconds=300))
    session_id = deployment.session(rounds=rounds)
    device = raw(deployment, "a")
    whole = small(device, device.draft(device.task(session_id), WEIGHTS))

    request = pb.SubmitUpdatesRequest(updates=[whole] * 200)
    answer = device.stub.SubmitUpdates(request, metadata=device.metadata, timeout=60)

    assert {outcome.receipt.acceptance_sequence for outcome in answer.outcomes} == {1}
    assert stored(deployment) == 1


@pytest.mark.parametrize("groups", [[], ["ward-3"]])
def test_one_update_takes_as_many_queries_as_many(deploy: Deploy, groups: list[str]) -> None:
    """Of devices that the coordinator has not heard of since it was started."""
    deployment, restarted = deploy(), deploy()
    session_id = deployment.session(rounds=ROUNDS, groups=groups)
    carrier, *members = (raw(deployment, f"device-{number}", *groups) for number in range(7))
    task = carrier.task(session_id)
    updates = [small(member, member.draft(task, WEIGHTS)) for member in members]
    carrier.stub = restarted.devices_stub
    assert send(carrier, pb.SmallUpdate()) == ["INVALID_REQUEST"], "the carrier is known now"

    counts = []
    for part in ([updates[0]], updates[1:]):
        with counted_queries(restarted) as queries:
            assert send(carrier, *part) == [""] * len(part)
        counts.append(len([query for query in queries if query != "epochs"]))

    assert counts[1] <= counts[0]


def signed(client: Client, session_id: str, value: float = 2.0) -> SignedUpdate:
    while (task := client.get_task(session_id)).kind is not TaskKind.TRAIN:
        pass
    base = client.download_base(task)
    arrays = {"w": base.arrays["w"] + np.float32(value)}
    return client.sign_update(task, base, arrays, 3, {"loss": 0.5})


@pytest.mark.parametrize("sealed", [False, True])
def test_a_gateway_sends_what_devices_have_signed(deployment: Deployment, *, sealed: bool) -> None:
    session_id = deployment.session(rounds=ROUNDS, transfer={"sealed": sealed})
    gateway, *devices = (deployment.device(name) for name in "abcd")
    updates = [
        SignedUpdate.from_bytes(signed(each, session_id).to_bytes()) for each in (gateway, *devices)
    ]
    second = signed(devices[0], session_id, 5.0)

    receipts = gateway.submit_all(updates)
    again = gateway.submit_all([*updates, second])

    assert again[:-1] == receipts
    assert isinstance(again[-1], DuplicateUpdateError)
    assert [each.update_id for each in receipts if isinstance(each, Receipt)] == [
        each.update_id for each in updates
    ]
    assert stored(deployment) == 4


def test_a_refusal_is_the_error_of_a_single_update(deployment: Deployment, session_id: str) -> None:
    client, other = deployment.device("a"), deployment.device("b")
    late, missing = signed(client, session_id), signed(other, session_id)
    deployment.coordinator.use_cases.training.pause(SYSTEM, session_id)

    outcomes = client.submit_all([late, missing])

    assert [type(each) for each in outcomes] == [RoundNotOpenError] * 2
    assert client.submit_all([]) == []


def test_what_is_no_signed_update_is_refused(deployment: Deployment) -> None:
    with pytest.raises(InvalidStatementError):
        SignedUpdate.from_bytes(b"\xff")
    (outcome,) = deployment.device("a").submit_all([SignedUpdate.from_bytes(b"")])

    assert isinstance(outcome, InvalidRequestError)


def test_a_large_model_cannot_travel_with_others(deployment: Deployment) -> None:
    session_id = deployment.session({"w": np.zeros(2**17, np.float32)}, rounds=ROUNDS)

    with pytest.raises(TrainingFunctionError, match="use submit"):
        signed(deployment.device("a"), session_id)


def test_keys_that_were_rotated_meanwhile(deployment: Deployment, session_id: str) -> None:
    """An accepted update keeps its receipt; one that was not accepted has to be signed again."""
    accepted, waiting = deployment.device("a"), deployment.device("b")
    updates = [signed(accepted, session_id), signed(waiting, session_id)]
    (receipt,) = accepted.submit_all(updates[:1])
    for client in (accepted, waiting):
        client.rotate_keys()

    first, second = accepted.submit_all(updates)

    assert first == receipt
    assert isinstance(second, InvalidRequestError)


def test_unsigned_updates_are_never_relayed(deploy: Deploy) -> None:
    deployment = deploy(require_signatures=False)
    session_id = deployment.session(rounds=ROUNDS)
    device = raw(deployment, "a")
    update_ = small(device, device.draft(device.task(session_id), WEIGHTS))
    update_.header.statement.ClearField("signatures")

    assert send(device, update_) == ["INVALID_SIGNATURE"]


def test_a_row_that_was_altered_makes_no_signature_valid(
    deployment: Deployment, session_id: str
) -> None:
    carrier, victim, thief = (raw(deployment, name) for name in "abc")
    draft = victim.draft(carrier.task(session_id), WEIGHTS)
    key = thief.identity.keys.signing.public
    values = {"signature_key_id": "0" * 64}
    stolen = {"signature_key_id": key.key_id, "signature_public_key": key.data}
    with deployment.coordinator.parts.database.engine.begin() as connection:
        for device, changed in ((thief, values), (victim, stolen)):
            mine = Device.id == device.identity.device_id
            connection.execute(update(Device).where(mine).values(**changed))
    draft.statement.key_id = key.key_id

    assert send(carrier, small(thief, draft)) == ["INVALID_SIGNATURE"]
