"""Groups of secure aggregation with neighbors, whose members run in one process and send each other real statements."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from qflare.crypto import merkle
from qflare.crypto.signing import Algorithm, SigningKey
from qflare.evidence.neighbors import (
    MaskedRound,
    Member,
    boxes_tree,
    check_boxes,
    check_survivors,
    open_advertisement,
    open_reveal,
    open_shares,
    sign_neighbor_statement,
    survivors_digest,
)
from qflare.masking.graph_parameters import GraphParameters
from qflare.masking.masks import Mask
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import MemberSecrets, OpenedBox, leftover_masks, open_secret
from qflare.v1 import coordinator_service_pb2, security_pb2

ROUND = MaskedRound("realm", "session", 1, "ab" * 32)

Box = security_pb2.NeighborBox


class Device:
    """A device of a group."""

    def __init__(self, number: int, masked_round: MaskedRound = ROUND) -> None:
        self.device_id = f"device-{number}"
        self.signing = SigningKey.generate(Algorithm.ML_DSA_44)
        self.secrets = MemberSecrets.generate()
        self.shared = self.secrets  # those of a liar are others than it advertises
        self.masked_round = masked_round
        statement = security_pb2.NeighborAdvertisement(
            channel_key=self.secrets.channel_key.public.to_proto(),
            mask_key=self.secrets.mask_key.public.to_proto(),
            self_seed_digest=self.secrets.self_seed_digest,
            nonce=number.to_bytes(32),
        )
        self.advertisement = self.sign(statement)
        self.member = open_advertisement(self.advertisement, self.signing.public, masked_round)
        self.opened: dict[str, OpenedBox] = {}

    @property
    def digest(self) -> str:
        return self.member.digest

    def sign(self, statement: Any) -> security_pb2.SignedEnvelope:
        self.masked_round.fill(statement, self.device_id, self.signing.public.key_id)
        return sign_neighbor_statement(self.signing, statement)

    def boxes(self, graph: NeighborGraph, members: Mapping[str, Member]) -> list[Box]:
        keys = {digest: member.keys for digest, member in members.items()}
        return self.shared.make_boxes(graph, self.digest, keys)

    def shares(self, graph: NeighborGraph, boxes: list[Box]) -> security_pb2.SignedEnvelope:
        return self.sign(
            security_pb2.NeighborShares(
                advertisement_digest=self.digest,
                roster_digest=graph.roster_digest,
                boxes_digest=merkle.root(boxes_tree(boxes)).hex(),
            )
        )

    def reveal(
        self, graph: NeighborGraph, survivors: Collection[str], digest: str
    ) -> security_pb2.SignedEnvelope:
        """Return a share of each neighbor that sent shares."""
        statement = security_pb2.NeighborReveal(
            advertisement_digest=self.digest,
            roster_digest=graph.roster_digest,
            survivors_digest=digest,
        )
        for owner, box in sorted(self.opened.items()):
            share = box.shares.own if owner in survivors else box.shares.mask
            statement.shares.add(owner_digest=owner, share=share)
        return self.sign(statement)


@dataclass
class Group:
    """A group up to its masked updates.

    Attributes:
        devices: By advertisement digest.
        graph: Of the group.
        boxes: By sender and recipient, of those that sent shares.
        sent: What these have sent.
        updates: Masked update by digest.
    """

    devices: dict[str, Device]
    graph: NeighborGraph
    boxes: dict[tuple[str, str], Box] = field(default_factory=dict)
    updates: dict[str, np.ndarray] = field(default_factory=dict)
    sharers: set[str] = field(default_factory=set)
    sent: dict[str, coordinator_service_pb2.SharedSecrets] = field(default_factory=dict)

    @classmethod
    def of(cls, devices: Iterable[Device], parameters: GraphParameters) -> "Group":
        by_digest = {device.digest: device for device in devices}
        return cls(by_digest, NeighborGraph(sorted(by_digest), parameters))

    @cached_property
    def members(self) -> dict[str, Member]:
        return {digest: device.member for digest, device in self.devices.items()}

    def share(self, sharers: Iterable[str]) -> None:
        """Let devices send shares, and all of these open what they got."""
        for sender in sorted(sharers):
            device = self.devices[sender]
            boxes = device.boxes(self.graph, self.members)
            envelope = device.shares(self.graph, boxes)
            statement = open_shares(envelope, device.member, ROUND, self.graph)
            check_boxes(statement, self.graph, boxes)
            self.sharers.add(sender)
            self.sent[sender] = coordinator_service_pb2.SharedSecrets(
                statement=envelope, boxes=boxes
            )
            self.boxes.update({(sender, box.recipient_digest): box for box in boxes})
        for (sender, recipient), box in self.boxes.items():
            if recipient in self.sharers:
                device = self.devices[recipient]
                device.opened[sender] = device.secrets.open_box(self.graph, recipient, sender, box)

    def upload(self, values: Mapping[str, np.ndarray]) -> None:
        """Mask the updates of devices."""
        for digest, value in values.items():
            device, masked = self.devices[digest], value.copy()
            device.secrets.mask(masked, self.graph, digest, device.opened)
            self.updates[digest] = masked

    def survivors_digest(self) -> str:
        return survivors_digest(self.graph, "cd" * 32, dict.fromkeys(self.updates, "ef" * 32))

    def reveals(self, answering: Iterable[str]) -> dict[str, security_pb2.NeighborReveal]:
        digest, revealed = self.survivors_digest(), {}
        for item in answering:
            device = self.devices[item]
            envelope = device.reveal(self.graph, self.updates, digest)
            revealed[item] = open_reveal(envelope, device.member, ROUND, self.graph)
        return revealed

    def secret(
        self, owner: str, reveals: Mapping[str, security_pb2.NeighborReveal]
    ) -> tuple[bytes, tuple[str, ...]]:
        """Open the self seed of a survivor, or the mask seed of another sharer."""
        kind = "self" if owner in self.updates else "mask"
        neighbors = self.graph.neighbors(owner)
        boxes = {item: self.boxes.get((owner, item)) for item in neighbors}
        commitments = {
            recipient: getattr(box, f"{kind}_share_digest")
            for recipient, box in boxes.items()
            if box
        }
        shares = {
            holder: item.share
            for holder in neighbors
            if holder in reveals
            for item in reveals[holder].shares
            if item.owner_digest == owner
        }
        return open_secret(self.graph, kind, self.members[owner].keys, commitments, shares)

    def unmask(self, reveals: Mapping[str, security_pb2.NeighborReveal]) -> np.ndarray:
        """Return the sum of the updates, without masks."""
        check_survivors(
            self.graph, dict.fromkeys(self.sharers, ""), dict.fromkeys(self.updates, "")
        )
        seeds = {owner: self.secret(owner, reveals)[0] for owner in sorted(self.sharers)}
        dropped = {owner: seed for owner, seed in seeds.items() if owner not in self.updates}
        total = sum(self.updates.values(), np.zeros_like(next(iter(self.updates.values()))))
        for seed, sign in leftover_masks(
            self.graph, sorted(self.updates), seeds, dropped, self.boxes
        ):
            if sign > 0:
                Mask(seed).subtract_from(total, 0)
            else:
                Mask(seed).add_to(total, 0)
        return total
