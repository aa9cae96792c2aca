"""The recorded vectors of groups of neighbors: the product accepts them, and so does the independent verifier."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from qflare.crypto.signing import PublicKey, tagged_hash
from qflare.evidence.neighbor_transcripts import (
    PART_BYTES,
    check_groups,
    joined_parts,
    transcript_parts,
)
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import verify_transcript
from qflare.v1 import security_pb2 as pb
from qflare.v1 import verification_pb2
from tests.independent import neighbors, unmasking
from tests.independent.verifier import RefusedError
from tests.support.hostile_requests import RequestMaker
from tests.vectors.protocol import generate
from tests.vectors.protocol import neighbors as recording

FOLDER = Path(generate.__file__).parent
VECTORS = json.loads((FOLDER / "neighbors.json").read_text(encoding="utf-8"))
GROUP = VECTORS["group"]
Transcript = verification_pb2.UnmaskingTranscript


def test_graphs_come_out_the_same() -> None:
    assert json.loads(json.dumps(recording.graphs())) == VECTORS["graphs"]


@pytest.mark.parametrize("vector", VECTORS["graphs"], ids=lambda vector: str(vector["size"]))
def test_a_graph_by_the_page(vector: dict[str, Any]) -> None:
    size = vector["size"]
    found = neighbors.parameters(size, vector["corrupt_fraction"], vector["dropout_fraction"])
    assert found == (vector["neighbor_count"], vector["threshold"], vector["max_dropouts"])
    digests = (tagged_hash("test vector", bytes([n % 256, n >> 8])).hex() for n in range(size))
    policy = task().masking.policy
    policy.corrupt_fraction = vector["corrupt_fraction"]
    policy.dropout_fraction = vector["dropout_fraction"]
    group = neighbors.Group(sorted(digests), policy)
    assert group.digest.hex() == vector["roster_digest"]
    near = [group.roster.index(item) for item in group.neighbors(group.roster[0])]
    assert near == vector["neighbors_of_first"]


def transcript() -> Transcript:
    return Transcript.FromString(bytes.fromhex(GROUP["transcript"]))


def task() -> pb.TaskStatement:
    return pb.TaskStatement.FromString(transcript().task.payload)


def made() -> pb.ModelStatement:
    envelope = pb.SignedEnvelope.FromString(bytes.fromhex(GROUP["version"]))
    return pb.ModelStatement.FromString(envelope.payload)


def updates() -> dict[str, bytes]:
    payloads = [bytes.fromhex(item["update"]) for item in GROUP["devices"] if item["update"]]
    return {digest_of(payload): payload for payload in payloads}


def devices() -> dict[str, tuple[str, pb.PublicKey]]:
    keys = {
        item["device_id"]: pb.PublicKey.FromString(bytes.fromhex(item["device_key"]))
        for item in GROUP["devices"]
    }
    return {key.key_id: (device_id, key) for device_id, key in keys.items()}


def find_key(device_id: str, key_id: str) -> PublicKey:
    owner, key = devices().get(key_id, ("", pb.PublicKey()))
    if owner != device_id:
        raise ValueError("no such key")
    return PublicKey.from_proto(key)


def check_by_the_product(shown: Transcript, version: pb.ModelStatement) -> list[tuple[bytes, int]]:
    key = pb.PublicKey.FromString(bytes.fromhex(GROUP["task_key"]))
    stated = [pb.UpdateStatement.FromString(payload) for payload in updates().values()]
    digests = list(updates())
    masking = verify_transcript(shown, version, [PublicKey.from_proto(key)], stated, digests)
    (checked,) = check_groups(shown.groups, version, masking, stated, digests, find_key)
    return list(checked.masks)


def check_by_the_page(shown: Transcript, version: pb.ModelStatement) -> None:
    key = pb.PublicKey.FromString(bytes.fromhex(GROUP["task_key"]))
    keys = {key.key_id: key}
    assert unmasking.check_transcript(shown, version, keys, updates(), devices()) == []


def test_the_transcript_gives_the_sum_of_the_updates() -> None:
    """Masks of the product, masks by the page, and the changes of the devices that were recorded."""
    check_by_the_page(transcript(), made())
    policy = task().masking.policy
    by_page = neighbors.check_groups(transcript().groups, made(), policy, updates(), devices())
    assert sorted(by_page) == sorted(check_by_the_product(transcript(), made()))
    layout = unmasking.Layout(policy, task().masking.max_weight)
    present = [item for item in GROUP["devices"] if item["payload"]]
    vectors = [layout.elements(bytes.fromhex(item["payload"])) for item in present]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    for seed, sign in by_page:
        mask = layout.elements(unmasking.mask(seed, len(total) * layout.bits // 8))
        total = [value - sign * part for value, part in zip(total, mask, strict=True)]
    total = [value % 2**layout.bits for value in total]
    wanted = np.zeros(len(present[0]["change"]))
    for item in present:
        change = np.array(item["change"])
        factor = min(1.0, policy.clip / float(np.linalg.norm(change)))
        wanted += change * factor * item["weight"] * layout.scale / layout.max_weight
    got = [layout.signed(value) for value in total[: len(wanted)]]
    assert np.abs(np.array(got) - wanted).max() <= len(present)
    weight, metrics = layout.totals(total[len(wanted) :])
    assert weight == sum(item["weight"] for item in present)
    means = sum(item["weight"] * item["loss"] for item in present) / weight
    assert metrics["loss"] == pytest.approx(means, abs=1e-5)


def test_shares_by_the_page_give_the_opened_seeds() -> None:
    """Each share that a device revealed comes out of its box, and as many as the threshold give the secret."""
    policy = task().masking.policy
    content = verification_pb2.NeighborTranscript.FromString(transcript().groups[0].content)
    roster = [digest_of(row.advertisement.payload) for row in content.members]
    named = dict(zip(roster, GROUP["devices"], strict=True))
    group = neighbors.Group(list(named), policy)
    for owner, item in named.items():
        if not item["boxes"]:
            continue
        boxes = [pb.NeighborBox.FromString(bytes.fromhex(box)) for box in item["boxes"]]
        seed = bytes.fromhex(item["self_seed" if item["payload"] else "mask_seed"])
        shares = {}
        for box in boxes:
            holder = named[box.recipient_digest]
            if not holder["reveal"]:
                continue
            channel = bytes.fromhex(holder["channel_seed"])
            mask, own = group.open_box(channel, owner, box.recipient_digest, box)
            share = own if item["payload"] else mask
            reveal = pb.NeighborReveal.FromString(bytes.fromhex(holder["reveal"]))
            assert share in [each.share for each in reveal.shares if each.owner_digest == owner]
            shares[box.recipient_digest] = share
        some = dict(list(shares.items())[: group.threshold])
        assert group.secret(some) == seed


def _inside(change: Callable[[verification_pb2.NeighborTranscript], object]) -> Any:
    """Return a change of a transcript, which the version then names."""

    def run(shown: Transcript, version: pb.ModelStatement) -> None:
        content = verification_pb2.NeighborTranscript.FromString(shown.groups[0].content)
        change(content)
        shown.groups[0].content = content.SerializeToString(deterministic=True)
        version.unmasking.answer_digests[0] = digest_of(shown.groups[0].content)

    return run


def _survivor(content: verification_pb2.NeighborTranscript) -> Any:
    return next(row for row in content.members if row.update_digest)


def _dropped(content: verification_pb2.NeighborTranscript) -> Any:
    return next(row for row in content.members if row.seed and not row.update_digest)


def _without_all_confirmations(content: verification_pb2.NeighborTranscript) -> None:
    for row in content.members:
        row.ClearField("confirmation")


CHANGES: list[Callable[[Transcript, pb.ModelStatement], object]] = [
    lambda shown, _: shown.ClearField("groups"),
    lambda shown, _: setattr(shown.groups[0], "group", 1),
    lambda shown, _: shown.groups.append(shown.groups[0]),
    lambda _, version: version.unmasking.ClearField("answer_digests"),
    lambda _, version: setattr(version, "round_number", 2),
    _inside(lambda content: content.members.pop()),
    _inside(lambda content: content.members.reverse()),
    _inside(lambda content: content.members.append(content.members[0])),
    _inside(lambda content: content.members[0].advertisement.ClearField("signatures")),
    _inside(lambda content: _survivor(content).ClearField("shares")),
    _inside(lambda content: _survivor(content).ClearField("update_digest")),
    _inside(lambda content: setattr(_survivor(content), "update_digest", bytes(32))),
    _inside(lambda content: setattr(_survivor(content), "seed", bytes(32))),
    _inside(lambda content: setattr(_dropped(content), "seed", bytes(32))),
    _inside(lambda content: _dropped(content).ClearField("seed")),
    _inside(_without_all_confirmations),
    _inside(lambda content: content.ClearField("boxes")),
    _inside(lambda content: content.boxes[0].ClearField("proof")),
    _inside(lambda content: setattr(content.boxes[0].box, "mask_share_digest", "0" * 64)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_transcript_is_refused_by_both(
    change: Callable[[Transcript, pb.ModelStatement], object],
) -> None:
    shown, version = transcript(), made()
    change(shown, version)
    with pytest.raises(StatementError):
        check_by_the_product(shown, version)
    with pytest.raises(RefusedError):
        check_by_the_page(shown, version)


def test_whatever_a_transcript_holds_is_taken_or_refused() -> None:
    random, refused = Random(19), 0
    for number in range(150):
        shown, version = transcript(), made()
        content = verification_pb2.NeighborTranscript.FromString(shown.groups[0].content)
        row = random.choice(content.members)
        places = (content, row, row.advertisement, row.shares, random.choice(content.boxes))
        RequestMaker(random, {}).spoil(random.choice((*places, content.boxes[0].box)))
        data = content.SerializeToString(deterministic=True)
        if number % 5 == 0:
            start = random.randrange(len(data))
            data = data[:start] + random.randbytes(3) + data[start + 2 :]
        shown.groups[0].content = data
        version.unmasking.answer_digests[0] = digest_of(data)
        try:
            check_by_the_product(shown, version)
        except StatementError:
            refused += 1
    assert refused > 90


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_parts_of_transcripts_are_joined_again(size: int) -> None:
    datas = [bytes([index]) * size for index in range(3)]
    parts = [part for index, data in enumerate(datas) for part in transcript_parts(index, data)]
    assert joined_parts(parts) == datas
    assert all(part.ByteSize() < 2 * PART_BYTES for part in parts)
    with pytest.raises(StatementError):
        joined_parts(parts[1:] if size <= PART_BYTES else parts[::-1])
