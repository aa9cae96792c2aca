"""What a device is shown of its group in secure aggregation with neighbors, for the step that waits for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto.signing import PublicKey
from qflare.evidence.neighbors import prove_box
from qflare.protocol.keysets import KeyRole
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, training_pb2
from qflare_server.keys.device_identities import evidence_up_to
from qflare_server.storage.repository import evidence, neighbors
from qflare_server.storage.repository.neighbors import StoredMember, Work
from qflare_server.storage.tables import GroupStage
from qflare_server.training.neighbor_stages import graph_of

PAGE_BYTES: Final = 2**20
"""Advertisements with their evidence in one answer; more only if there is a single one."""
LOADED: Final = 25
"""Members per query."""


def view_of(
    session: Session,
    config: training_pb2.TrainingConfig,
    work: Work,
    device_id: str,
    first_member: int = 0,
) -> pb.NeighborView | None:
    """Return what a device needs for the step that waits for it; None if it cannot take it.

    A device reveals nothing if too few of its neighbors have confirmed the set of updates; others may be enough.

    Args:
        session: Open session.
        config: Of the training session.
        work: The step.
        device_id: The device.
        first_member: Neighbors that earlier answers have shown; for the step that shows advertisements.
    """
    key = work.training_session_id, work.round_number
    members = neighbors.members_of(session, *key, group=work.group_number)
    graph = graph_of(config, members)
    own = next(item.digest for item in members if item.device_id == device_id)
    around = set(graph.neighbors(own))
    near = [item for item in members if item.digest in around]
    if work.stage == GroupStage.SHARE.value:
        near = near[max(0, first_member) :]
    if work.stage == GroupStage.REVEAL.value:
        confirmed = sum(item.has_confirmed for item in near)
        if confirmed < graph.parameters.threshold:
            return None
    show: Callable[..., pb.NeighborView] = _VIEWS[work.stage]
    return show(session, key, own, members, near)


def _show_roster(
    session: Session,
    key: tuple[str, int],
    _own: str,
    members: Sequence[StoredMember],
    near: Sequence[StoredMember],
) -> pb.NeighborView:
    shown, size = list[pb.AdvertisedMember](), 0
    for member in _advertised(session, key, near):
        size += member.ByteSize()
        if shown and size > PAGE_BYTES:
            break
        shown.append(member)
    return pb.NeighborView(
        roster=[bytes.fromhex(item.digest) for item in members],
        members=shown,
        earlier_keysets=_earlier_keysets(session, shown),
    )


def _advertised(
    session: Session, key: tuple[str, int], near: Sequence[StoredMember]
) -> Iterator[pb.AdvertisedMember]:
    """Yield the advertisements of members, each with the evidence of its key."""
    for start in range(0, len(near), LOADED):
        ids = [item.device_id for item in near[start : start + LOADED]]
        stored = neighbors.contents(session, *key, "advertisement", ids)
        rows = evidence.keys_of(session, ids)
        for device_id in ids:
            envelope = security_pb2.SignedEnvelope.FromString(stored[device_id])
            stated = security_pb2.NeighborAdvertisement.FromString(envelope.payload)
            own = [row for row in rows if row.device_id == device_id]
            proof = evidence_up_to(own, stated.key_id)
            yield pb.AdvertisedMember(advertisement=envelope, device_keys=proof)


def _earlier_keysets(
    session: Session, shown: Sequence[pb.AdvertisedMember]
) -> list[security_pb2.SignedEnvelope]:
    """Return the latest keyset with each registrar key that has signed a receipt, and that the one in force lacks."""
    wanted = {
        signature.key_id
        for member in shown
        for item in member.device_keys
        for signature in item.receipt.signatures
    }
    found = []
    documents = evidence.trust_documents(session, "keyset")
    for place, content in enumerate(reversed(documents)):
        if not wanted:
            break
        envelope = security_pb2.SignedEnvelope.FromString(content)
        keys = security_pb2.Keyset.FromString(envelope.payload).keys
        here = wanted & {
            PublicKey.from_proto(item.signature_key).key_id
            for item in keys
            if item.role == KeyRole.REGISTRAR.value
        }
        wanted -= here
        if here and place:
            found.append(envelope)
    return found[::-1]


def _show_boxes(
    session: Session,
    key: tuple[str, int],
    own: str,
    members: Sequence[StoredMember],
    near: Sequence[StoredMember],
) -> pb.NeighborView:
    ids = [item.device_id for item in near if item.is_sharer]
    stored = neighbors.contents(session, *key, "shares", ids)
    sharers = [
        bytes.fromhex(item.shares_digest or "") if item.is_sharer else b"" for item in members
    ]
    boxes = []
    for item in near:
        if not item.is_sharer:
            continue
        shares = pb.SharedSecrets.FromString(stored[item.device_id])
        index = [box.recipient_digest for box in shares.boxes].index(own)
        boxes.append(
            pb.ReceivedBox(
                shares=shares.statement,
                box=shares.boxes[index],
                proof=prove_box(shares.boxes, index),
            )
        )
    return pb.NeighborView(sharers=sharers, boxes=boxes)


def _show_survivors(
    _session: Session,
    _key: tuple[str, int],
    _own: str,
    members: Sequence[StoredMember],
    _near: Sequence[StoredMember],
) -> pb.NeighborView:
    entries = [bytes.fromhex(item.update_digest or "") for item in members]
    return pb.NeighborView(survivors=entries)


def _show_confirmations(
    session: Session,
    key: tuple[str, int],
    _own: str,
    _members: Sequence[StoredMember],
    near: Sequence[StoredMember],
) -> pb.NeighborView:
    ids = [item.device_id for item in near]
    stored = neighbors.contents(session, *key, "confirmation", ids)
    shown = [security_pb2.SignedEnvelope.FromString(stored[name]) for name in ids if name in stored]
    return pb.NeighborView(confirmations=shown)


_VIEWS: Final[Mapping[str, Callable[..., pb.NeighborView]]] = {
    GroupStage.SHARE.value: _show_roster,
    GroupStage.TRAIN.value: _show_boxes,
    GroupStage.CONFIRM.value: _show_survivors,
    GroupStage.REVEAL.value: _show_confirmations,
}
