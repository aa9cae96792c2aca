"""A coordinator that lies to real devices, and asks a real helper for sums of what they sent."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import digest_of, sign_update
from qflare.evidence.unmasking import sign_helper
from qflare.v1 import coordinator_service_pb2 as calls
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare.v1.helper_service_pb2_grpc import HelperServiceStub
from qflare_client import Client, InsufficientTaskError, NotFoundError, SecureAggregation
from qflare_client.errors import QflareClientError
from qflare_server.keys.device_identities import key_evidence
from qflare_server.storage.repository import evidence
from tests.integration.secure_aggregation.conftest import (
    SecureDeployment,
    SecureStart,
    contribute,
    repeat_seed,
    trained,
    wait_for_round,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_attacks import LyingCoordinator as AskingCoordinator
from tests.support.lying_coordinator import Lie, LyingCoordinator

Member = messages.UnmaskMember
Task = security_pb2.TaskStatement
DEVICES: Final = 5


@pytest.fixture
def open_liar() -> Iterator[Callable[[SecureDeployment], LyingCoordinator]]:
    """Return a function that puts a lying coordinator before a real one."""
    opened: list[LyingCoordinator] = []

    def start(made: SecureDeployment) -> LyingCoordinator:
        coordinator = made.deployment.coordinator
        opened.append(LyingCoordinator(coordinator.address, coordinator.parts.keys.sign))
        return opened[-1]

    yield start
    for liar in opened:
        liar.close()


def _other_helper(realm: str) -> tuple[str, security_pb2.SignedEnvelope]:
    """Return id and document of a helper that the coordinator runs itself."""
    key = SigningKey.generate()
    document = security_pb2.HelperDocument(
        realm=realm,
        sequence_number=1,
        signature_key=key.public.to_proto(),
        kem_key=KemKey.generate().public.to_proto(),
    )
    return key.public.key_id, sign_helper(key, document)


def _plain(task: Task) -> None:
    task.ClearField("masking")
    task.transfer.update_encoding = training_pb2.ENCODING_NONE


def _unmasked_updates(task: Task) -> None:
    task.transfer.update_encoding = training_pb2.ENCODING_NONE


def _own_helper(task: Task) -> None:
    helper_id, document = _other_helper(task.realm)
    task.masking.policy.helpers[0] = helper_id
    task.masking.helpers[0].CopyFrom(document)


def _helper_under_its_name(task: Task) -> None:
    task.masking.helpers[0].CopyFrom(_other_helper(task.realm)[1])


def _swapped_kem_key(task: Task) -> None:
    document = security_pb2.HelperDocument.FromString(task.masking.helpers[0].payload)
    document.kem_key.CopyFrom(KemKey.generate().public.to_proto())
    task.masking.helpers[0].payload = document.SerializeToString(deterministic=True)


LIES: Final[list[tuple[Lie, type[QflareClientError]]]] = [
    (_plain, InsufficientTaskError),
    (_unmasked_updates, QflareClientError),
    (_own_helper, InsufficientTaskError),
    (_helper_under_its_name, QflareClientError),
    (_swapped_kem_key, QflareClientError),
    (lambda task: setattr(task.masking.policy, "min_cohort", 2), InsufficientTaskError),
    (lambda task: setattr(task.masking.policy, "min_cohort", 0), QflareClientError),
    (lambda task: setattr(task.masking.policy, "max_cohort", 2), QflareClientError),
    (lambda task: setattr(task.masking.policy, "mode", 0), QflareClientError),
    (lambda task: setattr(task.masking.policy, "bits", 8), QflareClientError),
    (lambda task: setattr(task.masking.policy, "clip", float("nan")), QflareClientError),
    (lambda task: setattr(task.masking, "max_weight", 0), QflareClientError),
    (
        lambda task: task.masking.policy.metrics.add(name="secret", bound=1.0),
        InsufficientTaskError,
    ),
    (lambda task: task.masking.policy.ClearField("helpers"), QflareClientError),
    (lambda task: setattr(task, "realm", "another"), QflareClientError),
]


def test_a_device_trains_for_no_task_that_tells_more(
    secure: SecureStart, open_liar: Callable[[SecureDeployment], LyingCoordinator]
) -> None:
    made = secure(min_cohort=3)
    session_id = made.session(quorum=3, policy={"min_cohort": 3})
    liar = open_liar(made)
    made.deployment.device("victim").close()
    policy = SecureAggregation(3, {made.helpers[0].helper_id}, {"loss"})
    home = made.deployment.folder / "victim"
    with Client(home=home, address=liar.address, secure_aggregation=policy) as client:
        assert client.get_task(session_id).masking is not None
        for lie, refusal in LIES:
            liar.lie = lie
            with pytest.raises(refusal):
                client.get_task(session_id)
        liar.lie, liar.signs = (lambda task: setattr(task, "round_number", 7)), False
        with pytest.raises(QflareClientError):
            client.get_task(session_id)


class Ring:
    """Real devices that sign updates for a lying coordinator, which asks the real helper for their sums."""

    def __init__(self, made: SecureDeployment, liar: LyingCoordinator, session_id: str) -> None:
        self.liar, self.session_id = liar, session_id
        for number in range(DEVICES):
            made.deployment.device(f"device-{number}").close()
        self._made = made
        self.asking = AskingCoordinator(made, session_id)
        self.task = self.asking.task

    def signed(self, number: int, lie: Lie = lambda _: None) -> Member:
        """Return the update that a device signs for a task."""
        self.liar.lie = lie
        home = self._made.deployment.folder / f"device-{number}"
        with Client(home=home, address=self.liar.address) as client:
            task = client.get_task(self.session_id)
            base = client.download_base(task)
            update = client.sign_update(
                task, base, trained(base.arrays, number), 100, {"loss": 0.5}
            )
        sent = calls.SmallUpdate.FromString(update.to_bytes())
        with self._made.deployment.coordinator.parts.database.read() as session:
            keys = evidence.keys_of(session, {update.device_id})
        return Member(
            statement=sent.header.statement, device_keys=[key_evidence(key) for key in keys]
        )

    def lying_task(self, lie: Lie) -> security_pb2.SignedEnvelope:
        """Return the task of a lie, signed."""
        task = Task.FromString(self.task.payload)
        lie(task)
        sign = self._made.deployment.coordinator.parts.keys.sign
        return sign(security_pb2.KEY_ROLE_TASK, task.SerializeToString(deterministic=True))

    def refused(self, members: list[Member]) -> list[str]:
        """Return the reasons for which a set's updates are refused."""
        answers = self.asking.ask(members)
        assert [answer.WhichOneof("part") for answer in answers] == ["refused"]
        return [member.reason for member in answers[0].refused.members]


def test_the_helper_adds_no_masks_for_a_lying_coordinator(
    secure: SecureStart,
    open_liar: Callable[[SecureDeployment], LyingCoordinator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = secure(min_cohort=3)
    session_id = made.session(quorum=5, policy={"min_cohort": 3})
    ring = Ring(made, open_liar(made), session_id)
    members = [ring.signed(number) for number in range(3)]
    ask = ring.asking

    def other_base(task: Task) -> None:
        task.config_digest = "0" * 64

    assert "task_digest" in ask.refusal([*members[:2], ring.signed(2, other_base)])

    text = ask.refusal([*members, ring.signed(0)])
    assert "device_id is twice" in text

    def narrow(task: Task) -> None:
        task.masking.policy.max_cohort = 3

    task = ring.lying_task(narrow)
    four = [ring.signed(number, narrow) for number in range(4)]
    text = ask.refusal(four, task=task, task_digest=digest_of(task.payload))
    assert "a sum would wrap" in text

    def lone(task: Task) -> None:
        task.masking.policy.min_cohort = 2

    task = ring.lying_task(lone)
    two = [ring.signed(number, lone) for number in range(2)]
    text = ask.refusal(two, task=task, task_digest=digest_of(task.payload))
    assert "2 counted updates, want at least 3" in text

    with monkeypatch.context() as patch:
        repeat_seed(patch)
        same = [ring.signed(number) for number in range(2)]
    assert "its seed was used for another update" in ring.refused([*same, members[2]])

    moved = _resigned(made, ring.signed(3), members[0])
    assert ring.refused([*members[1:], moved]) == [
        "its seed does not open, or belongs to another update"
    ]
    altered = Member.FromString(members[0].SerializeToString())
    statement = security_pb2.UpdateStatement.FromString(altered.statement.payload)
    statement.payload_digest = statement.wire_digest = "0" * 64
    altered.statement.payload = statement.SerializeToString(deterministic=True)
    assert "INVALID_ARGUMENT" in ask.refusal([altered, *members[1:]])

    first = _killed_in_mid_answer(ring, members)
    made.helpers[0].start()
    assert ask.ask(members)[0] == first
    assert "answered before" in ask.refusal([*members[1:], ring.signed(3)])


def _resigned(made: SecureDeployment, own: Member, victim: Member) -> Member:
    """Return the update of the coordinator's own device, with the sealed seed of a victim."""
    stated = security_pb2.UpdateStatement.FromString(own.statement.payload)
    taken = security_pb2.UpdateStatement.FromString(victim.statement.payload)
    stated.masking.CopyFrom(taken.masking)
    with Client(home=made.deployment.folder / "device-3") as client:
        key = client._login.identity.keys.signing
        moved = Member(device_keys=own.device_keys)
        moved.statement.CopyFrom(sign_update(key, stated))
    return moved


def _killed_in_mid_answer(ring: Ring, members: list[Member]) -> messages.UnmaskResponse:
    """Kill the helper after the first part of its answer; return that part."""
    helper, parts = ring._made.helpers[0], ring.asking.parts(members)
    with grpc.insecure_channel(helper.address) as channel:
        answers = HelperServiceStub(channel).Unmask(iter(parts), timeout=20)
        first: messages.UnmaskResponse = next(answers)
        helper.kill()
        answers.cancel()
    return first


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def test_the_coordinator_uses_no_answer_of_a_restored_helper(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=2, round_count=2)
    helper, backup = made.helpers[0], made.deployment.folder / "backup"
    helper.stop()
    _copy(helper.home, backup)
    helper.start()
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 1)
    helper.stop()
    _copy(backup, helper.home)
    helper.start()
    wait_for_round(clients[0], session_id, 2)
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_round(clients[0], session_id, 3)
    with pytest.raises(NotFoundError):
        clients[0].download(session_id, 2)


def test_a_kept_update_is_sent_with_the_bytes_that_its_seed_masks(
    secure: SecureStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secure()
    session_id = made.session(quorum=2)
    client, folder = made.deployment.device("device"), made.deployment.folder
    task = client.get_task(session_id)
    base = client.download_base(task)

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("the device dies")

    with monkeypatch.context() as patch:
        patch.setattr("qflare_client.models.sender.Upload.run", cut)
        with pytest.raises(ConnectionError):
            client.submit(task, base, trained(base.arrays, 1), 10, {"loss": 1.0})
    client.close()
    _copy(folder / "device", folder / "copy")
    digests = set()
    for name, index in (("device", 2), ("copy", 3)):
        with Client(home=folder / name) as again:
            receipt = again.submit(task, base, trained(base.arrays, index), 10, {"loss": 1.0})
            digests.add(digest_of(receipt.statement.payload))
    assert len(digests) == 1
