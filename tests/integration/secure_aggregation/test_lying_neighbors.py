"""A coordinator that lies to a device about its group, at every step of a round with neighbors."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

import pytest

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.statements import digest_of
from qflare.v1 import coordinator_service_pb2 as calls
from qflare.v1 import security_pb2
from qflare_client import Client, SecureAggregation
from qflare_client.errors import (
    InsufficientTaskError,
    InvalidStatementError,
    QflareClientError,
    RepeatedTaskError,
)
from qflare_client.tasks import TaskKind
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import trained, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import (
    members_of,
    session_of,
    take_step,
    train,
    until,
)
from tests.support.hostile_requests import RequestMaker
from tests.support.newer_coordinator import NewerCoordinator

Answer = calls.GetTaskResponse
Lie = Callable[[Answer], object]
DEVICES: Final = 5
SPOILED: Final = 25

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class LyingView(NewerCoordinator):
    """Forwards every call; alters what a device is shown of its group, and keeps what it was shown before.

    Args:
        address: The real coordinator.
    """

    def __init__(self, address: str) -> None:
        self.lie: Lie = lambda _: None
        self.shown: dict[int, Answer] = {}
        super().__init__(address, ())

    def _changed(self, method: Any, data: bytes) -> bytes:
        if method.name != "GetTask":
            return data
        answer = Answer.FromString(data)
        if answer.HasField("neighbors"):
            self.shown[answer.kind] = Answer.FromString(data)
        self.lie(answer)
        return answer.SerializeToString()

    def show(self, kind: int, change: Lie) -> Lie:
        """Return a lie that shows an earlier answer again, changed."""

        def lie(answer: Answer) -> None:
            answer.CopyFrom(self.shown[kind])
            change(answer)

        return lie


def drop(field: str, index: int = 0) -> Lie:
    return lambda answer: getattr(answer.neighbors, field).pop(index)


def blank(field: str, count: int) -> Lie:
    """Show fewer members that have sent something."""

    def lie(answer: Answer) -> None:
        entries = getattr(answer.neighbors, field)
        for index in range(count):
            entries[index] = b""

    return lie


def blank_at(field: str, index: int) -> Lie:
    """Show one member less that has sent something: fewer than the task promises."""

    def lie(answer: Answer) -> None:
        getattr(answer.neighbors, field)[index] = b""

    return lie


def replace(field: str) -> Lie:
    """Show other things for all members."""

    def lie(answer: Answer) -> None:
        entries = getattr(answer.neighbors, field)
        for index in range(len(entries)):
            entries[index] = bytes([index]) * 32

    return lie


def another_signer(answer: Answer) -> None:
    """Show a neighbor's advertisement with keys of the coordinator's own."""
    key = SigningKey.generate()
    shown = answer.neighbors.members[0]
    statement = security_pb2.NeighborAdvertisement.FromString(shown.advertisement.payload)
    statement.channel_key.CopyFrom(statement.mask_key)
    shown.advertisement.CopyFrom(
        sign_envelope(key, SigningContext.NEIGHBOR_ADVERTISEMENT, statement)
    )


def smaller_group(answer: Answer) -> None:
    """Leave a member out of the roster and of the neighbors: fewer than the task promises."""
    shown = answer.neighbors.members.pop(0)
    answer.neighbors.roster.remove(bytes.fromhex(digest_of(shown.advertisement.payload)))


def swapped_boxes(answer: Answer) -> None:
    first, second = answer.neighbors.boxes[:2]
    held = calls.ReceivedBox()
    held.CopyFrom(first)
    first.box.CopyFrom(second.box)
    second.box.CopyFrom(held.box)


def repeated_confirmation(answer: Answer) -> None:
    confirmations = answer.neighbors.confirmations
    for index in range(1, len(confirmations)):
        confirmations[index].CopyFrom(confirmations[0])


SHARE_LIES: Final[list[Lie]] = [
    drop("roster"),
    lambda answer: answer.neighbors.roster.reverse(),
    lambda answer: answer.neighbors.roster.append(b"\xff" * 32),
    replace("roster"),
    lambda answer: answer.neighbors.ClearField("roster"),
    drop("members"),
    smaller_group,
    another_signer,
    lambda answer: answer.neighbors.members[0].ClearField("device_keys"),
    lambda answer: answer.neighbors.members[0].CopyFrom(answer.neighbors.members[1]),
    lambda answer: answer.ClearField("neighbors"),
    lambda answer: setattr(answer.task, "payload", answer.task.payload + b"\x08\x01"),
]
TRAIN_LIES: Final[list[Lie]] = [
    drop("sharers"),
    replace("sharers"),
    blank("sharers", 5),
    blank("sharers", 2),
    drop("boxes"),
    swapped_boxes,
    lambda answer: answer.neighbors.boxes[0].ClearField("proof"),
    lambda answer: answer.neighbors.boxes[0].shares.ClearField("signatures"),
]
CONFIRM_LIES: Final[list[Lie]] = [
    drop("survivors"),
    replace("survivors"),
    blank("survivors", 5),
    blank("survivors", 2),
    *(blank_at("survivors", index) for index in range(DEVICES)),
    lambda answer: setattr(answer, "kind", calls.TASK_KIND_REVEAL),
]
REVEAL_LIES: Final[list[Lie]] = [
    lambda answer: answer.neighbors.ClearField("confirmations"),
    repeated_confirmation,
    lambda answer: answer.neighbors.confirmations[0].ClearField("signatures"),
    lambda answer: answer.neighbors.confirmations[0].CopyFrom(calls.GetTaskResponse().task),
]


@pytest.fixture
def open_liar() -> Iterator[Callable[[Deployment], LyingView]]:
    """Return a function that puts a lying coordinator before a real one."""
    opened: list[LyingView] = []

    def start(made: Deployment) -> LyingView:
        opened.append(LyingView(made.coordinator.address))
        return opened[-1]

    yield start
    for liar in opened:
        liar.close()


def refused(victim: Client, liar: LyingView, session_id: str, kind: int, lie: Lie) -> None:
    """Lie as soon as the step is asked for, and require a refusal."""
    told = False

    def when_asked(answer: Answer) -> None:
        nonlocal told
        if answer.kind == kind:
            told = True
            lie(answer)

    liar.lie = when_asked
    with pytest.raises(InvalidStatementError):
        until(victim, session_id, lambda _: False)
    assert told
    liar.lie = lambda _: None


def refused_again(victim: Client, liar: LyingView, session_id: str, kind: int, lie: Lie) -> None:
    """Show an earlier step again, changed, and require a refusal."""
    liar.lie = liar.show(kind, lie)
    with pytest.raises(InvalidStatementError):
        victim.get_task(session_id)
    liar.lie = lambda _: None


def fuzzed(
    victim: Client,
    liar: LyingView,
    session_id: str,
    kind: int,
    fields: list[str],
    only: bytes | None = None,
) -> None:
    """Spoil what a step shows, many times: the device refuses it, until something is spoiled that it does not read.

    Args:
        victim: The device.
        liar: Before it.
        session_id: Its training session.
        kind: The step.
        fields: Lists of the view, of which entries are spoiled.
        only: The entry to spoil; None spoils any.
    """
    random, refusals = Random(kind), 0
    maker = RequestMaker(random, {})

    def spoil(answer: Answer) -> None:
        entries = getattr(answer.neighbors, random.choice(fields)) if answer.kind == kind else ()
        if not entries:
            return
        index = random.randrange(len(entries)) if only is None else list(entries).index(only)
        if isinstance(entries[index], bytes):
            entries[index] = maker.spoil_bytes(entries[index])
        elif isinstance(entries[index], security_pb2.SignedEnvelope):
            part = random.choice((entries[index], entries[index].signatures[0]))
            name = "payload" if part is entries[index] else "signature"
            setattr(part, name, maker.spoil_bytes(getattr(part, name)))
        else:
            maker.spoil(entries[index])

    liar.lie = spoil
    for _ in range(SPOILED):
        try:
            victim.get_task(session_id)
        except QflareClientError:
            refusals += 1
        else:
            break
    assert refusals > 0
    liar.lie = lambda _: None


def digest_in_sum(made: Deployment, session_id: str, client: Client) -> bytes:
    """Return the digest of a device's update, as the set of updates names it."""
    members = members_of(made, session_id)
    (own,) = [item for item in members if item.device_id == client.device_id]
    return bytes.fromhex(own.update_digest or "")


def test_a_device_answers_no_lie_and_the_round_goes_on_with_the_truth(
    deploy: Callable[..., Deployment], open_liar: Callable[[Deployment], LyingView]
) -> None:
    made = deploy(worker_poll_s=0.02)
    liar = open_liar(made)
    made.device("victim").close()
    policy = SecureAggregation(4, frozenset(), {"loss"}, neighbors=True, corrupt_fraction=0.2)
    others = [made.device(f"device-{index}") for index in range(DEVICES - 1)]
    session_id = session_of(made, DEVICES, DEVICES, min_cohort=DEVICES)
    home = made.folder / "victim"
    with Client(
        home=home, address=liar.address, insecure=True, secure_aggregation=policy
    ) as victim:
        everybody = (victim, *others)
        take_step(made, session_id, everybody, "")
        for lie in SHARE_LIES:
            refused(victim, liar, session_id, calls.TASK_KIND_SHARE, lie)
        fuzzed(victim, liar, session_id, calls.TASK_KIND_SHARE, ["roster", "members"])
        take_step(made, session_id, everybody, "has_shares")
        refused_again(victim, liar, session_id, calls.TASK_KIND_SHARE, drop("roster"))

        for lie in TRAIN_LIES:
            refused(victim, liar, session_id, calls.TASK_KIND_TRAIN, lie)
        fuzzed(victim, liar, session_id, calls.TASK_KIND_TRAIN, ["sharers", "boxes"])
        changes: dict[int, Any] = {}
        for index, client in enumerate(everybody):
            train(client, session_id, index, changes)
        refused_again(victim, liar, session_id, calls.TASK_KIND_TRAIN, blank("sharers", 1))

        for lie in CONFIRM_LIES:
            refused(victim, liar, session_id, calls.TASK_KIND_CONFIRM, lie)
        own = digest_in_sum(made, session_id, victim)  # another entry may be true for all it knows
        fuzzed(victim, liar, session_id, calls.TASK_KIND_CONFIRM, ["survivors"], own)
        take_step(made, session_id, everybody, "has_confirmed")
        refused_again(victim, liar, session_id, calls.TASK_KIND_CONFIRM, blank("survivors", 1))

        for lie in REVEAL_LIES:
            refused(victim, liar, session_id, calls.TASK_KIND_REVEAL, lie)
        fuzzed(victim, liar, session_id, calls.TASK_KIND_REVEAL, ["confirmations"])
        take_step(made, session_id, everybody[:1], "has_revealed")
        refused_again(victim, liar, session_id, calls.TASK_KIND_CONFIRM, blank("survivors", 1))
        take_step(made, session_id, others[:3], "has_revealed")
        assert wait_for_version(victim, session_id, 1).statement.contributor_count == DEVICES


def test_a_device_refuses_neighbors_that_its_policy_does_not_allow(
    deploy: Callable[..., Deployment],
) -> None:
    made = deploy(worker_poll_s=0.02)
    session_id = session_of(made, 5, 4)
    made.device("device").close()
    allowed: dict[str, Any] = {
        "min_cohort": 3,
        "helper_key_ids": frozenset(),
        "metrics": {"loss"},
        "neighbors": True,
    }

    def poll(**policy: Any) -> TaskKind:
        with Client(
            home=made.folder / "device",
            insecure=True,
            secure_aggregation=SecureAggregation(**(allowed | policy)),
        ) as client:
            return client.get_task(session_id).kind

    policies: tuple[dict[str, Any], ...] = (
        {"neighbors": False, "helper_key_ids": {"0" * 64}},
        {"min_cohort": 4},
        {"corrupt_fraction": 0.3},
        {"metrics": set()},
    )
    for policy in policies:
        with pytest.raises(InsufficientTaskError):
            poll(**policy)
    assert poll() is TaskKind.WAIT


def test_two_updates_are_never_masked_alike(deploy: Callable[..., Deployment]) -> None:
    """After a crash between masking and keeping an update, the device leaves the round alone."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(5)]
    session_id = session_of(made, 5, 4)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    task = until(clients[0], session_id, lambda task: task.kind is TaskKind.TRAIN)
    base = clients[0].download_base(task)
    first = clients[0].sign_update(task, base, trained(base.arrays, 0), 10, {"loss": 1.0})
    assert first.update_id
    with pytest.raises(RepeatedTaskError):
        clients[0].sign_update(task, base, trained(base.arrays, 1), 10, {"loss": 1.0})
