"""Secure aggregation with neighbors: sums are exact whoever drops out, and whoever lies is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qflare.evidence.neighbors import (
    MaskedRound,
    boxes_tree,
    check_box_proof,
    check_boxes,
    check_survivors,
    count_confirmations,
    open_advertisement,
    open_confirmation,
    open_reveal,
    open_shares,
    prove_box,
    sharers_digest,
    survivors_digest,
)
from qflare.evidence.statements import StatementError
from qflare.masking.graph_parameters import GraphParameters, group_parameters
from qflare.masking.neighbors import (
    MemberSecrets,
    NeighborError,
    NotEnoughSharesError,
    leftover_masks,
)
from qflare.v1 import security_pb2
from tests.support.neighbors import ROUND, Device, Group

DEVICES = [Device(number) for number in range(12)]
DTYPES = st.sampled_from(["<u2", "<u4", "<u8"])
LENGTH = 37


def group_of(size: int, parameters: GraphParameters | None = None) -> Group:
    for device in DEVICES:
        device.opened, device.shared = {}, device.secrets
    return Group.of(DEVICES[:size], parameters or group_parameters(size, 0.2, 0.1))


def values_of(members: list[str], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    high = int(np.iinfo(np.dtype(dtype)).max)
    return {
        item: random.integers(0, high, LENGTH, dtype=np.uint64, endpoint=True).astype(dtype)
        for item in members
    }


def uploaded(size: int = 6, dropped: int = 1) -> Group:
    group = group_of(size)
    members = list(group.graph.members)
    group.share(members)
    group.upload(values_of(members[dropped:], "<u4"))
    return group


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whoever_drops_out_the_sum_is_exact_or_the_group_is_aborted(data: st.DataObject) -> None:
    size, dtype = data.draw(st.integers(3, 12)), data.draw(DTYPES)
    parameters = group_parameters(size, 0.2, 0.1)
    if data.draw(st.booleans()) and size > 6:
        parameters = GraphParameters(size, 6, 4, 3)
    group = group_of(size, parameters)
    members = list(group.graph.members)
    order = data.draw(st.permutations(members))
    late, silent, mute = (data.draw(st.integers(0, 2)) for _ in range(3))
    sharers = order[late:]
    group.share(sharers)
    survivors = sharers[silent:]
    values = values_of(survivors, dtype, data.draw(st.integers(0, 2**32)))
    try:
        group.upload(values)
        total = group.unmask(group.reveals(survivors[mute:]))
    except (NotEnoughSharesError, StatementError):
        counts = [
            sum(item in survivors[mute:] for item in group.graph.neighbors(member))
            for member in sharers
        ]
        missing = size - len(survivors)
        assert min(counts) < parameters.threshold or missing > parameters.max_dropouts
        return
    wanted = sum(values.values(), np.zeros(LENGTH, dtype))
    assert np.array_equal(total, wanted)


def test_a_masked_update_and_a_partial_sum_look_random() -> None:
    group = group_of(6)
    members = list(group.graph.members)
    group.share(members)
    group.upload({item: np.zeros(4096, "<u4") for item in members})
    for part in (members[:1], members[:5]):
        total = sum((group.updates[item] for item in part), np.zeros(4096, "<u4"))
        assert 0.49 < np.unpackbits(total.view(np.uint8)).mean() < 0.51


def test_the_mask_seed_of_a_survivor_does_not_open_its_update() -> None:
    """A device said to have dropped out although its update came: its self mask still hides it."""
    group = uploaded(dropped=0)
    members = list(group.graph.members)
    victim = members[0]
    seeds = {item: bytes(32) for item in members}
    mask_seed = group.devices[victim].secrets.to_bytes()[:32]
    rest = dict(leftover_masks(group.graph, members[1:], seeds, {victim: mask_seed}, group.boxes))
    assert group.devices[victim].secrets.to_bytes()[32:64] not in rest


def test_a_corrupted_share_names_the_liar_and_the_rest_unmasks() -> None:
    group = uploaded(6, 0)
    reveals = group.reveals(group.updates)
    owner = group.graph.members[0]
    liar = group.graph.neighbors(owner)[0]
    item = next(item for item in reveals[liar].shares if item.owner_digest == owner)
    item.share = bytes(32) + bytes([item.share[-1] ^ 1])
    _secret, liars = group.secret(owner, reveals)
    assert liars == (liar,)
    for other in group.graph.neighbors(owner)[1:2]:
        next(i for i in reveals[other].shares if i.owner_digest == owner).share = b"\0" * 33
    with pytest.raises(NotEnoughSharesError, match="2 are wrong"):
        group.secret(owner, reveals)


@pytest.mark.parametrize("kind", ["mask", "self"])
def test_an_owner_that_shares_another_secret_is_named(kind: str) -> None:
    group = group_of(6)
    members = list(group.graph.members)
    owner = members[2]
    data = bytearray(group.devices[owner].secrets.to_bytes())
    data[0 if kind == "mask" else 32] ^= 1
    group.devices[owner].shared = MemberSecrets.from_bytes(bytes(data))
    group.share(members)
    survivors = [item for item in members if kind == "self" or item != owner]
    group.updates = values_of(survivors, "<u4")
    with pytest.raises(NeighborError, match="another secret") as caught:
        group.secret(owner, group.reveals(survivors))
    assert caught.value.members == (owner,)


def test_a_survivor_whose_pair_seed_does_not_open_is_named() -> None:
    group = uploaded(6, 0)
    members = list(group.graph.members)
    maker, dropped = members[0], members[5]
    del group.updates[dropped]
    box = group.boxes[maker, dropped]
    box.sealed_pair_seed = bytes(len(box.sealed_pair_seed))
    with pytest.raises(NeighborError, match="does not open") as caught:
        group.unmask(group.reveals(group.updates))
    assert caught.value.members == (maker,)


def changed_boxes() -> list[tuple[str, object]]:
    return [
        ("sealed_shares", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("sealed_shares", lambda data: data[:-1]),
        ("sealed_pair_seed", lambda data: bytes([data[0] ^ 1]) + data[1:] if data else b"x"),
        ("sealed_pair_seed", lambda data: b"" if data else bytes(1168)),
        ("mask_share_digest", lambda _: "0" * 64),
        ("self_share_digest", lambda _: "0" * 64),
        ("recipient_digest", lambda _: "0" * 64),
    ]


@pytest.mark.parametrize(("name", "change"), changed_boxes())
def test_a_changed_box_is_refused_and_its_sender_named(name: str, change: object) -> None:
    group = group_of(4)
    members = list(group.graph.members)
    sender, recipient = members[0], members[3]
    boxes = group.devices[sender].boxes(group.graph, group.members)
    box = next(item for item in boxes if item.recipient_digest == recipient)
    setattr(box, name, change(getattr(box, name)))  # type: ignore[operator]
    with pytest.raises(NeighborError) as caught:
        group.devices[recipient].secrets.open_box(group.graph, recipient, sender, box)
    assert caught.value.members == (sender,)


def test_a_box_opens_only_for_its_recipient_sender_and_roster() -> None:
    group, other = group_of(5), Group.of(DEVICES[:4], group_parameters(4, 0.2, 0.1))
    members = list(other.graph.members)
    sender, recipient, third = members[0], members[2], members[1]
    boxes = group.devices[sender].boxes(group.graph, group.members)
    box = next(item for item in boxes if item.recipient_digest == recipient)
    opener = group.devices[recipient].secrets
    assert opener.open_box(group.graph, recipient, sender, box).pair_seed is not None
    for graph, claimed in ((other.graph, sender), (group.graph, third)):
        with pytest.raises(NeighborError):
            opener.open_box(graph, recipient, claimed, box)
    box.recipient_digest = third
    with pytest.raises(NeighborError):
        group.devices[third].secrets.open_box(group.graph, third, sender, box)


def test_too_few_shares_stop_a_device_before_it_masks() -> None:
    group = group_of(6)
    members = list(group.graph.members)
    group.share(members[: group.graph.parameters.threshold])
    with pytest.raises(NotEnoughSharesError):
        group.upload(values_of(members[:1], "<u4"))


def signed_parts(
    group: Group,
) -> tuple[Device, security_pb2.NeighborShares, list[security_pb2.NeighborBox]]:
    device = group.devices[group.graph.members[0]]
    boxes = device.boxes(group.graph, group.members)
    envelope = device.shares(group.graph, boxes)
    return device, open_shares(envelope, device.member, ROUND, group.graph), boxes


def test_a_box_is_proven_to_its_recipient() -> None:
    group = group_of(6)
    device, statement, boxes = signed_parts(group)
    for index, box in enumerate(boxes):
        check_box_proof(statement, group.graph, box, prove_box(boxes, index))
    with pytest.raises(StatementError, match="committed"):
        check_box_proof(statement, group.graph, boxes[0], prove_box(boxes, 1))
    substituted = device.boxes(group.graph, group.members)[0]
    with pytest.raises(StatementError, match="committed"):
        check_box_proof(statement, group.graph, substituted, prove_box(boxes, 0))
    substituted.recipient_digest = device.digest
    with pytest.raises(StatementError, match="no neighbor"):
        check_box_proof(statement, group.graph, substituted, prove_box(boxes, 0))


def test_all_boxes_are_required_in_order() -> None:
    group = group_of(6)
    _device, statement, boxes = signed_parts(group)
    check_boxes(statement, group.graph, boxes)
    for wrong in (boxes[:-1], boxes[::-1], [*boxes, boxes[0]], boxes[:1] * len(boxes)):
        with pytest.raises(StatementError):
            check_boxes(statement, group.graph, wrong)


@pytest.mark.parametrize(
    "changed",
    [
        MaskedRound("other", "session", 1, "ab" * 32),
        MaskedRound("realm", "other", 1, "ab" * 32),
        MaskedRound("realm", "session", 2, "ab" * 32),
        MaskedRound("realm", "session", 1, "ac" * 32),
    ],
)
def test_statements_of_another_round_or_task_are_refused(changed: MaskedRound) -> None:
    device = DEVICES[0]
    with pytest.raises(StatementError):
        open_advertisement(device.advertisement, device.signing.public, changed)


def test_a_substituted_advertisement_is_refused() -> None:
    with pytest.raises(StatementError):
        open_advertisement(DEVICES[0].advertisement, DEVICES[1].signing.public, ROUND)


def test_a_statement_that_was_changed_after_signing_is_refused() -> None:
    """The coordinator can name a device's key, and it cannot sign with it."""
    group, device = uploaded(), DEVICES[1]
    boxes = device.boxes(group.graph, group.members)
    opened: list[tuple[type[Any], security_pb2.SignedEnvelope, Callable[[Any], object]]] = [
        (
            security_pb2.NeighborAdvertisement,
            device.advertisement,
            lambda item: open_advertisement(item, device.signing.public, ROUND),
        ),
        (
            security_pb2.NeighborShares,
            device.shares(group.graph, boxes),
            lambda item: open_shares(item, device.member, ROUND, group.graph),
        ),
        (
            security_pb2.NeighborConfirmation,
            confirmation(device, group, "cd" * 32),
            lambda item: open_confirmation(item, device.member, ROUND, group.graph),
        ),
        (
            security_pb2.NeighborReveal,
            device.reveal(group.graph, group.updates, "cd" * 32),
            lambda item: open_reveal(item, device.member, ROUND, group.graph),
        ),
    ]
    for kind, envelope, check in opened:
        check(envelope)
        statement, changed = kind.FromString(envelope.payload), security_pb2.SignedEnvelope()
        statement.create_time.seconds += 1
        changed.CopyFrom(envelope)
        changed.payload = statement.SerializeToString(deterministic=True)
        with pytest.raises(StatementError):
            check(changed)


def test_statements_of_another_roster_or_member_are_refused() -> None:
    group, other = group_of(5), Group.of(DEVICES[1:6], group_parameters(5, 0.2, 0.1))
    device = DEVICES[1]
    envelope = device.shares(group.graph, device.boxes(group.graph, group.members))
    with pytest.raises(StatementError, match="roster_digest"):
        open_shares(envelope, device.member, ROUND, other.graph)
    with pytest.raises(StatementError):
        open_shares(envelope, DEVICES[2].member, ROUND, group.graph)


def confirmation(device: Device, group: Group, digest: str) -> security_pb2.SignedEnvelope:
    return device.sign(
        security_pb2.NeighborConfirmation(
            advertisement_digest=device.digest,
            roster_digest=group.graph.roster_digest,
            sharers_digest="cd" * 32,
            survivors_digest=digest,
        )
    )


def test_confirmations_count_once_for_one_set_and_of_neighbors_only() -> None:
    group = group_of(8, GraphParameters(8, 4, 3, 1))
    own, digest = group.graph.members[0], "12" * 32
    neighbors = [group.devices[item] for item in group.graph.neighbors(own)]
    signed = [(confirmation(device, group, digest), device.member) for device in neighbors]
    assert count_confirmations(signed, ROUND, group.graph, own, digest) == 4
    assert count_confirmations(signed[:1] * 3, ROUND, group.graph, own, digest) == 1
    with pytest.raises(StatementError, match="survivors_digest"):
        count_confirmations(signed, ROUND, group.graph, own, "13" * 32)
    stranger = next(
        device
        for device in group.devices.values()
        if device.digest != own and device not in neighbors
    )
    with pytest.raises(StatementError, match="no neighbor"):
        count_confirmations(
            [(confirmation(stranger, group, digest), stranger.member)],
            ROUND,
            group.graph,
            own,
            digest,
        )
    with pytest.raises(StatementError):
        count_confirmations([(signed[0][0], stranger.member)], ROUND, group.graph, own, digest)


def test_a_reveal_has_shares_of_distinct_neighbors() -> None:
    group = group_of(8, GraphParameters(8, 4, 3, 1))
    own = group.devices[group.graph.members[0]]
    neighbors = group.graph.neighbors(own.digest)
    stranger = next(
        item for item in group.graph.members if item != own.digest and item not in neighbors
    )
    for owners in (neighbors[::-1], (neighbors[0], neighbors[0]), (stranger,), (own.digest,)):
        statement = security_pb2.NeighborReveal(
            advertisement_digest=own.digest,
            roster_digest=group.graph.roster_digest,
            survivors_digest="12" * 32,
        )
        for owner in owners:
            statement.shares.add(owner_digest=owner, share=bytes(33))
        with pytest.raises(StatementError, match="distinct neighbors"):
            open_reveal(own.sign(statement), own.member, ROUND, group.graph)


def test_survivors_are_refused_that_would_uncover_a_part() -> None:
    """A coordinator cannot choose survivors so that a victim has no pair mask left with another one."""
    parameters = GraphParameters(12, 4, 3, 2)
    group = group_of(12, parameters)
    members = list(group.graph.members)
    victim = members[0]
    apart = [item for item in members if not group.graph.are_neighbors(victim, item)]
    everyone = dict.fromkeys(members, "")
    check_survivors(group.graph, everyone, dict.fromkeys(members[1:], ""))
    for survivors in (apart, [victim], []):
        with pytest.raises(StatementError):
            check_survivors(group.graph, everyone, dict.fromkeys(survivors, ""))
    with pytest.raises(StatementError, match="no shares"):
        check_survivors(group.graph, dict.fromkeys(members[1:], ""), everyone)
    two = group.graph.neighbors(victim)[:2]
    rest = [item for item in members if item not in two]
    with pytest.raises(StatementError, match="neighbors of a device remain"):
        check_survivors(group.graph, everyone, dict.fromkeys(rest, ""))


def test_digests_over_lists_name_who_and_what() -> None:
    group = group_of(4)
    members = list(group.graph.members)
    entries = dict.fromkeys(members, "12" * 32)
    found = {
        sharers_digest(group.graph, entries),
        sharers_digest(group.graph, {**entries, members[1]: "13" * 32}),
        sharers_digest(group.graph, dict.fromkeys(members[1:], "12" * 32)),
        sharers_digest(group.graph, dict.fromkeys(members[:3], "12" * 32)),
        survivors_digest(group.graph, group.graph.roster_digest, entries),
        survivors_digest(group.graph, "00" * 32, entries),
    }
    assert len(found) == 6


def test_secrets_are_kept_and_never_printed() -> None:
    secrets = MemberSecrets.generate()
    again = MemberSecrets.from_bytes(secrets.to_bytes())
    assert again.mask_key.public == secrets.mask_key.public
    assert again.self_seed_digest == secrets.self_seed_digest
    assert secrets.to_bytes().hex()[:16] not in repr(secrets)
    with pytest.raises(ValueError, match="bytes"):
        MemberSecrets.from_bytes(bytes(95))


def test_leaves_of_boxes_are_their_bytes() -> None:
    first, second = security_pb2.NeighborBox(sealed_shares=b"a"), security_pb2.NeighborBox()
    assert len({*boxes_tree([first, second])}) == 2
