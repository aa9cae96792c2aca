"""Opening the sum of a group in secure aggregation with neighbors: seeds from revealed shares, and the transcript."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy.orm import Session

from qflare.crypto.sealing import KemPublicKey
from qflare.evidence.neighbors import prove_box
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
    """

    graph: NeighborGraph
    members: Sequence[StoredMember]
    advertisements: Mapping[str, security_pb2.SignedEnvelope]
    shares: Mapping[str, Shares]
    confirmations: Mapping[str, security_pb2.SignedEnvelope]
    reveals: Mapping[str, security_pb2.NeighborReveal]

    @cached_property
    def survivors(self) -> list[str]:
        """Members whose updates are in the sum."""
        return [member.digest for member in self.members if member.update_digest]

    @cached_property
    def boxes(self) -> dict[tuple[str, str], security_pb2.NeighborBox]:
        """Boxes by sender and recipient."""
        return {
            (sender, box.recipient_digest): box
            for sender, shares in self.shares.items()
            for box in shares.boxes
        }

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
    members = [
        member
        for member in neighbors.members_of(session, *key)
        if member.group_number == group_number
    ]
    digests = {member.device_id: member.digest for member in members}
    stored = {
        column: {
            digests[device]: content
            for device, content in neighbors.contents(session, *key, column, digests).items()
        }
        for column in ("advertisement", "shares", "confirmation", "reveal")
    }
    envelope = security_pb2.SignedEnvelope.FromString
    sharers = {member.digest for member in members if member.is_sharer}
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
    )


@dataclass(frozen=True)
class OpenedGroup:
    """A group whose sum can be unmasked.

    Attributes:
        contents: What its members have sent.
        seeds: Self seeds of the survivors, and mask seeds of the other sharers.
        liars: Members that have revealed shares other than those that they got.
    """

    contents: GroupContents
    seeds: Mapping[str, bytes]
    liars: tuple[str, ...]

    def __repr__(self) -> str:
        return "OpenedGroup(...)"

    def masks(self) -> Iterable[tuple[bytes, int]]:
        """Yield seed and sign of each mask in the sum.

        Raises:
            NeighborError: A box of a survivor does not open.
        """
        survivors = self.contents.survivors
        return leftover_masks(
            self.contents.graph, survivors, self.seeds, self._dropped, self.contents.boxes
        )

    @property
    def _dropped(self) -> dict[str, bytes]:
        remaining = set(self.contents.survivors)
        return {item: seed for item, seed in self.seeds.items() if item not in remaining}

    def transcript(self) -> bytes:
        """Return the serialized transcript of the group."""
        contents = self.contents
        made = verification_pb2.NeighborTranscript()
        for member in contents.members:
            digest = member.digest
            made.members.add(
                advertisement=contents.advertisements[digest],
                shares=contents.shares[digest].statement if digest in contents.shares else None,
                update_digest=bytes.fromhex(member.update_digest or ""),
                confirmation=contents.confirmations.get(digest),
                seed=self.seeds.get(digest, b""),
            )
        places = {member.digest: place for place, member in enumerate(contents.members)}
        dropped = self._dropped
        for sender in contents.survivors:
            boxes = contents.shares[sender].boxes
            for index, box in enumerate(boxes):
                if box.recipient_digest in dropped and box.sealed_pair_seed:
                    proof = prove_box(boxes, index)
                    made.boxes.add(sender=places[sender], box=box, proof=proof)
        return made.SerializeToString(deterministic=True)


def open_group(contents: GroupContents) -> OpenedGroup:
    """Open the seeds that the sum of a group needs.

    Raises:
        NotEnoughSharesError: Too few right shares of a secret are revealed.
        NeighborError: A member has shared another secret than it advertised, or a box of a survivor does not open.
    """
    seeds: dict[str, bytes] = {}
    liars: set[str] = set()
    survivors = set(contents.survivors)
    for owner in sorted(contents.shares):
        kind = "self" if owner in survivors else "mask"
        commitments = {
            box.recipient_digest: getattr(box, f"{kind}_share_digest")
            for box in contents.shares[owner].boxes
        }
        keys = _keys(owner, contents.advertisements[owner])
        revealed = _revealed(contents.reveals, owner)
        seeds[owner], found = open_secret(contents.graph, kind, keys, commitments, revealed)
        liars.update(found)
    opened = OpenedGroup(contents, seeds, tuple(sorted(liars)))
    for _ in opened.masks():
        pass  # every box opens, or names who made it
    return opened


def _revealed(reveals: Mapping[str, security_pb2.NeighborReveal], owner: str) -> dict[str, bytes]:
    return {
        holder: item.share
        for holder, reveal in reveals.items()
        for item in reveal.shares
        if item.owner_digest == owner
    }


def _keys(digest: str, envelope: security_pb2.SignedEnvelope) -> MemberKeys:
    statement = security_pb2.NeighborAdvertisement.FromString(envelope.payload)
    return MemberKeys(
        digest,
        KemPublicKey.from_proto(statement.channel_key),
        KemPublicKey.from_proto(statement.mask_key),
        statement.self_seed_digest,
    )
