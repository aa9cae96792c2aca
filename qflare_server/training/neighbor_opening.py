"""Opening the sum of a group in secure aggregation with neighbors: seeds from revealed shares, and the transcript."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.evidence.neighbors import prove_boxes
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import MemberKeys, leftover_masks, open_secret
from qflare.v1 import coordinator_service_pb2, security_pb2, training_pb2, verification_pb2
from qflare_server.storage.repository import neighbors
from qflare_server.storage.repository.neighbors import StoredMember
from qflare_server.training.neighbor_stages import graph_of

Shares = coordinator_service_pb2.SharedSecrets


@dataclass(frozen=True)
class GroupContents:
    """What the members of a group have sent, by their digests.

    Attributes:
        graph: Of the group.
        members: In ascending order of their digests.
        advertisements: Signed advertisements.
        shares: Signed shares with their boxes, of those that sent them in time.
        confirmations: Signed confirmations.
        reveals: Revealed shares.
        transcript: What is kept of all this after the round; None before.
    """

    graph: NeighborGraph
    members: Sequence[StoredMember]
    advertisements: Mapping[str, security_pb2.SignedEnvelope]
    shares: Mapping[str, Shares]
    confirmations: Mapping[str, security_pb2.SignedEnvelope]
    reveals: Mapping[str, security_pb2.NeighborReveal]
    transcript: verification_pb2.NeighborTranscript | None = None

    @cached_property
    def survivors(self) -> list[str]:
        """Members whose updates are in the sum."""
        return [member.digest for member in self.members if member.update_digest]

    def device_of(self, digest: str) -> str:
        """Return the device of a member."""
        return next(member.device_id for member in self.members if member.digest == digest)


def read_contents(
    session: Session,
    training_session_id: str,
    round_number: int,
    config: training_pb2.TrainingConfig,
    group_number: int,
) -> GroupContents:
    """Read what the members of a group have sent."""
    key = training_session_id, round_number
    members = neighbors.members_of(session, *key, group=group_number)
    digests = {member.device_id: member.digest for member in members}
    stored = {
        column: {
            digests[device]: content
            for device, content in neighbors.contents(session, *key, column, digests).items()
        }
        for column in ("advertisement", "shares", "confirmation", "reveal", "transcript")
    }  # the transcript is read last: if it is not there, nothing had been deleted before
    envelope = security_pb2.SignedEnvelope.FromString
    sharers = {member.digest for member in members if member.is_sharer}
    pieces = stored["transcript"]
    return GroupContents(
        graph_of(config, members),
        members,
        {item: envelope(content) for item, content in stored["advertisement"].items()},
        {
            item: Shares.FromString(content)
            for item, content in stored["shares"].items()
            if item in sharers
        },
        {item: envelope(content) for item, content in stored["confirmation"].items()},
        {
            item: security_pb2.NeighborReveal.FromString(envelope(content).payload)
            for item, content in stored["reveal"].items()
        },
        joined_pieces(pieces[item] for item in sorted(pieces)) if pieces else None,
    )


@dataclass(frozen=True)
class OpenedGroup:
    """A group whose sum can be unmasked.

    Attributes:
        graph: Of the group.
        transcript: What its members have signed, and the seeds that were opened.
        liars: Devices that have revealed shares other than those that they got.
    """

    graph: NeighborGraph
    transcript: verification_pb2.NeighborTranscript
    liars: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "OpenedGroup(...)"

    def masks(self) -> Iterable[tuple[bytes, int]]:
        """Yield seed and sign of each mask in the sum.

        Raises:
            NeighborError: A box of a survivor does not open.
        """
        members = self.graph.members
        own: dict[str, bytes] = {}
        dropped: dict[str, bytes] = {}
        for member, row in zip(members, self.transcript.members, strict=True):
            if row.seed:
                (own if row.update_digest else dropped)[member] = row.seed
        boxes = {
            (members[item.sender], item.box.recipient_digest): item.box
            for item in self.transcript.boxes
        }
        return leftover_masks(self.graph, list(own), own, dropped, boxes)

    def serialized(self) -> bytes:
        """Return the serialized transcript."""
        return self.transcript.SerializeToString(deterministic=True)

    def pieces(self) -> dict[str, bytes]:
        """Return the part of each member, by its digest: `joined_pieces` makes the transcript of them."""
        made = {
            member: verification_pb2.NeighborTranscript(members=[row])
            for member, row in zip(self.graph.members, self.transcript.members, strict=True)
        }
        for item in self.transcript.boxes:
            made[self.graph.members[item.sender]].boxes.append(item)
        return {
            member: piece.SerializeToString(deterministic=True) for member, piece in made.items()
        }


def joined_pieces(pieces: Iterable[bytes]) -> verification_pb2.NeighborTranscript:
    """Return the transcript of a group from the parts of its members, in ascending order of their digests."""
    transcript = verification_pb2.NeighborTranscript()
    for piece in pieces:
        transcript.MergeFromString(piece)
    return transcript


def open_group(contents: GroupContents) -> OpenedGroup:
    """Open the seeds that the sum of a group needs, or return those that were opened.

    Raises:
        NotEnoughSharesError: Too few right shares of a secret are revealed.
        NeighborError: A member has shared another secret than it advertised, or a box of a survivor does not open.
    """
    if contents.transcript is not None:
        return OpenedGroup(contents.graph, contents.transcript)
    seeds: dict[str, bytes] = {}
    liars: set[str] = set()
    survivors, revealed = set(contents.survivors), _revealed(contents.reveals)
    for owner in sorted(contents.shares):
        kind = "self" if owner in survivors else "mask"
        commitments = {
            box.recipient_digest: getattr(box, f"{kind}_share_digest")
            for box in contents.shares[owner].boxes
        }
        keys = _keys(owner, contents.advertisements[owner])
        shares = revealed.get(owner, {})
        seeds[owner], found = open_secret(contents.graph, kind, keys, commitments, shares)
        liars.update(found)
    devices = tuple(contents.device_of(item) for item in sorted(liars))
    opened = OpenedGroup(contents.graph, _transcript(contents, seeds), devices)
    for _ in opened.masks():
        pass  # every box opens, or names who made it
    return opened


def _transcript(
    contents: GroupContents, seeds: Mapping[str, bytes]
) -> verification_pb2.NeighborTranscript:
    made = verification_pb2.NeighborTranscript()
    for member in contents.members:
        digest = member.digest
        made.members.add(
            advertisement=contents.advertisements[digest],
            shares=contents.shares[digest].statement if digest in contents.shares else None,
            update_digest=bytes.fromhex(member.update_digest or ""),
            confirmation=contents.confirmations.get(digest),
            seed=seeds.get(digest, b""),
        )
    places = {member.digest: place for place, member in enumerate(contents.members)}
    survivors = contents.survivors
    dropped = seeds.keys() - set(survivors)
    for sender in survivors:
        boxes = contents.shares[sender].boxes
        wanted = [
            index
            for index, box in enumerate(boxes)
            if box.recipient_digest in dropped and box.sealed_pair_seed
        ]
        for index, proof in zip(wanted, prove_boxes(boxes, wanted), strict=True):
            made.boxes.add(sender=places[sender], box=boxes[index], proof=proof)
    return made


def _revealed(
    reveals: Mapping[str, security_pb2.NeighborReveal],
) -> dict[str, dict[str, bytes]]:
    """Return the revealed shares of each owner, by holder; one pass, because a group has many thousands."""
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for holder, reveal in reveals.items():
        for item in reveal.shares:
            found[item.owner_digest][holder] = item.share
    return found


def _keys(digest: str, envelope: security_pb2.SignedEnvelope) -> MemberKeys:
    statement = security_pb2.NeighborAdvertisement.FromString(envelope.payload)
    return MemberKeys(
        digest,
        KemPublicKey.from_proto(statement.channel_key),
        KemPublicKey.from_proto(statement.mask_key),
        statement.self_seed_digest,
    )
