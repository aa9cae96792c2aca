"""Groups of secure aggregation with neighbors, written from docs/protocol.md section 19 alone.

Under the rule of `tests.independent.verifier`: nothing of the product but its generated messages.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from qflare.v1 import security_pb2 as pb
from qflare.v1 import training_pb2, verification_pb2
from tests.independent.exchange import KemKey, expand
from tests.independent.verifier import (
    check_inclusion,
    leaf,
    merkle_root,
    open_envelope,
    require,
    tagged_hash,
)

PRIME = 2**256 + 297
Devices = Mapping[str, tuple[str, pb.PublicKey]]
"""Proven keys with their devices, by key id."""


def parameters(size: int, corrupt: float, dropout: float) -> tuple[int, int, int]:
    """Neighbors, threshold, and how many members may be missing."""
    found = _parameters(size, corrupt, dropout)
    require(found[0] <= 200, "too many neighbors")
    return found


def _parameters(size: int, corrupt: float, dropout: float) -> tuple[int, int, int]:
    require(3 <= size <= 10_000 and corrupt + 2 * dropout <= 0.9, "no such group")
    bad = max(1 if corrupt else 0, math.floor(Fraction(str(corrupt)) * size))
    out = math.floor(Fraction(str(dropout)) * size)
    for count in range(2, size - 1, 2) if size > 32 else ():
        if count <= bad + out and _gap(size, count, bad + out) >= Fraction(1, 2**41):
            continue
        most_bad = _most(size, bad, count, Fraction(1, 2**41 * size))
        most_out = _most(size, out, count, Fraction(1, 2**20 * size))
        threshold = max(2, 1 + (count + most_bad) // 2)
        if threshold <= count - most_out:
            return count, threshold, max(out, count - bad - 1)
    count = size - 1
    threshold = max(2, 1 + (count + bad) // 2)
    require(threshold <= count - out, "group is too small")
    return count, threshold, count - threshold


def _gap(size: int, count: int, bad: int) -> Fraction:
    ways = Fraction(math.factorial(bad), math.factorial(bad - count))
    ways *= Fraction(math.factorial(size - count), math.factorial(size))
    return ways * size * (size - count - 1) / 2


def _most(size: int, marked: int, drawn: int, probability: Fraction) -> int:
    """The smallest number such that more of the drawn are marked with less than a probability."""
    total, tail = math.comb(size, drawn), 0
    for number in range(min(marked, drawn), -1, -1):
        tail += math.comb(marked, number) * math.comb(size - marked, drawn - number)
        if Fraction(tail, total) >= probability:
            return number
    return 0


class Group:
    """Members in ascending order, who is whose neighbor, and the parameters."""

    def __init__(self, roster: Sequence[str], policy: training_pb2.SecureAggregationPolicy) -> None:
        require(list(roster) == sorted(set(roster)), "roster is out of order")
        self.roster = list(roster)
        self.digest = merkle_root([leaf(bytes.fromhex(item)) for item in roster])
        fractions = policy.corrupt_fraction, policy.dropout_fraction
        self.count, self.threshold, self.missing = parameters(len(roster), *fractions)
        self.ring = sorted(roster, key=lambda item: self.hash("qflare/v1/neighbor-order", item))

    def hash(self, tag: str, *members: str) -> bytes:
        """H over the roster and members of it."""
        return tagged_hash(tag, self.digest, *map(bytes.fromhex, members))

    def neighbors(self, member: str) -> list[str]:
        """The neighbors of a member, in ascending order."""
        size, place = len(self.ring), self.ring.index(member)
        if self.count == size - 1:
            return [item for item in self.roster if item != member]
        steps = range(1, self.count // 2 + 1)
        around = [(place + step) % size for step in steps]
        around += [(place - step) % size for step in steps]
        return sorted(self.ring[index] for index in around)

    def entries(self, tag: str, before: bytes, items: Mapping[str, str]) -> str:
        """Digest over a list with an entry or nothing for each member."""
        parts = [bytes.fromhex(items.get(member, "")) for member in self.roster]
        return tagged_hash(tag, before, *parts).hex()

    def share_digest(self, kind: str, owner: str, holder: str, share: bytes) -> str:
        """Commitment to a share."""
        names = (self.digest, bytes.fromhex(owner), bytes.fromhex(holder))
        return tagged_hash("qflare/v1/neighbor-share", kind.encode(), *names, share).hex()

    def pair_seed(self, mask_seed: bytes, first: str, second: str) -> bytes:
        """The seed of a pair mask, from the mask seed of the first member."""
        return expand(mask_seed, self.hash("qflare/v1/neighbor-pair-seed", first, second))

    def open_box(
        self, channel: bytes, sender: str, own: str, box: pb.NeighborBox
    ) -> tuple[bytes, bytes]:
        """The shares in a box, of the mask seed and of the self seed."""
        info = self.hash("qflare/v1/neighbor-shares", sender, own)
        data = KemKey(channel).open(box.sealed_shares, info)
        require(len(data) == 66, "shares have another length")
        for kind, share in (("mask", data[:33]), ("self", data[33:])):
            stated = getattr(box, f"{kind}_share_digest")
            require(self.share_digest(kind, sender, own, share) == stated, "another share")
        return data[:33], data[33:]

    def open_pair_seed(self, mask_seed: bytes, sender: str, own: str, box: pb.NeighborBox) -> bytes:
        """The seed of a pair mask in a box, with the mask seed of its recipient."""
        info = self.hash("qflare/v1/neighbor-pair-seed", sender, own)
        return mask_key(mask_seed).open(box.sealed_pair_seed, info)

    def secret(self, shares: Mapping[str, bytes]) -> bytes:
        """The secret of shares by holder."""
        points = {self.roster.index(holder) + 1: share for holder, share in shares.items()}
        require(len(points) == self.threshold, "want as many shares as the threshold")
        total = 0
        for point, share in points.items():
            weight = 1
            for other in points:
                if other != point:
                    weight = weight * other * pow(other - point, -1, PRIME) % PRIME
            total += weight * int.from_bytes(share, "big")
        return (total % PRIME).to_bytes(32, "big")


def mask_key(mask_seed: bytes) -> KemKey:
    """The mask key of a mask seed."""
    return KemKey(expand(mask_seed, b"qflare/v1/neighbor-mask-key"))


def self_seed_digest(self_seed: bytes) -> str:
    """The commitment to a self seed."""
    return tagged_hash("qflare/v1/neighbor-self-seed", self_seed).hex()


def check_groups(
    parts: Iterable[verification_pb2.NeighborTranscriptPart],
    made: pb.ModelStatement,
    policy: training_pb2.SecureAggregationPolicy,
    updates: Mapping[str, bytes],
    devices: Devices,
) -> list[tuple[bytes, int]]:
    """Check the transcripts of a version; return the seeds of the masks in the sum of its updates, with their signs."""
    contents: dict[int, bytes] = {}
    for part in parts:
        require(part.group in (len(contents) - 1, len(contents)), "parts are out of order")
        contents[part.group] = contents.get(part.group, b"") + part.content
    digests = [hashlib.sha256(data).hexdigest() for data in contents.values()]
    require(digests == list(made.unmasking.answer_digests), "version names other transcripts")
    masks, opened = list[tuple[bytes, int]](), dict[str, tuple[str, str, str]]()
    for data in contents.values():
        transcript = verification_pb2.NeighborTranscript.FromString(data)
        check = _Check(transcript, made, policy, devices)
        masks += check.masks()
        opened |= check.opened()
    named = {}
    for digest, payload in updates.items():
        stated = pb.UpdateStatement.FromString(payload).masking.neighbors
        named[digest] = (stated.advertisement_digest, stated.roster_digest, stated.sharers_digest)
    require(named == opened, "other updates are in the groups")
    return masks


class _Check:
    """One group of a version."""

    def __init__(
        self,
        transcript: verification_pb2.NeighborTranscript,
        made: pb.ModelStatement,
        policy: training_pb2.SecureAggregationPolicy,
        devices: Devices,
    ) -> None:
        self.transcript, self.made = transcript, made
        members = transcript.members
        roster = [hashlib.sha256(item.advertisement.payload).hexdigest() for item in members]
        self.group = Group(roster, policy)
        self.rows = dict(zip(roster, members, strict=True))
        self.keys: dict[str, tuple[str, pb.PublicKey]] = {}
        self.advertised: dict[str, pb.NeighborAdvertisement] = {}
        for member, row in self.rows.items():
            stated = pb.NeighborAdvertisement.FromString(row.advertisement.payload)
            owner, key = devices.get(stated.key_id, ("", pb.PublicKey()))
            require(owner and owner == stated.device_id, "nothing shows whose key it is")
            self.keys[member] = (owner, key)
            self.advertised[member] = self._open(
                pb.NeighborAdvertisement, "advertisement", row.advertisement, member
            )
            require(stated.channel_key.data != stated.mask_key.data, "keys are the same")
            require(len(stated.nonce) == 32, "nonce has another length")
        owners = {owner for owner, _ in self.keys.values()}
        require(len(owners) == len(roster), "a device is in the group twice")
        self.shares = {
            member: self._open(pb.NeighborShares, "shares", row.shares, member)
            for member, row in self.rows.items()
            if row.HasField("shares")
        }
        self.updates = {
            member: row.update_digest.hex()
            for member, row in self.rows.items()
            if row.update_digest
        }
        self._check_sizes(policy.min_cohort)
        digests = {m: hashlib.sha256(self.rows[m].shares.payload).hexdigest() for m in self.shares}
        self.sharers = self.group.entries("qflare/v1/neighbor-sharers", self.group.digest, digests)
        self._check_confirmations()
        self._check_seeds()

    def _open(self, kind: Any, name: str, envelope: pb.SignedEnvelope, member: str) -> Any:
        owner, key = self.keys[member]
        payload = open_envelope(envelope, f"qflare/v1/neighbor-{name}", {key.key_id: key})
        stated = kind.FromString(payload)
        place = (stated.realm, stated.training_session_id, stated.round_number, stated.task_digest)
        made = self.made
        wanted = (made.realm, made.training_session_id, made.round_number)
        require(place == (*wanted, made.unmasking.task_digest), "statement of another round")
        require((stated.device_id, stated.key_id) == (owner, key.key_id), "another device")
        if kind is not pb.NeighborAdvertisement:
            names = (stated.advertisement_digest, stated.roster_digest)
            require(names == (member, self.group.digest.hex()), "statement of another group")
        return stated

    def _check_sizes(self, min_cohort: int) -> None:
        require(self.updates.keys() <= self.shares.keys(), "an update of a device without shares")
        require(len(self.updates) >= min_cohort, "too few updates")
        require(len(self.rows) - len(self.updates) <= self.group.missing, "too many dropped out")
        for member in self.shares:
            left = sum(item in self.updates for item in self.group.neighbors(member))
            require(left >= self.group.threshold, "too few neighbors of a member are left")

    def _check_confirmations(self) -> None:
        survivors = self.group.entries(
            "qflare/v1/neighbor-survivors", bytes.fromhex(self.sharers), self.updates
        )
        count = 0
        for member, row in self.rows.items():
            if row.HasField("confirmation"):
                kind = pb.NeighborConfirmation
                stated = self._open(kind, "confirmation", row.confirmation, member)
                require(stated.survivors_digest == survivors, "another set was confirmed")
                count += member in self.updates
        require(count >= self.group.threshold, "too few have confirmed")

    def _check_seeds(self) -> None:
        seeds = {member for member, row in self.rows.items() if row.seed}
        require(seeds == self.shares.keys(), "seeds of other members")
        for member in seeds:
            seed, stated = self.rows[member].seed, self.advertised[member]
            if member in self.updates:
                require(self_seed_digest(seed) == stated.self_seed_digest, "another self seed")
            else:
                require(mask_key(seed).public == stated.mask_key.data, "another mask seed")

    def opened(self) -> dict[str, tuple[str, str, str]]:
        """What each update in the sum has to name, by its digest."""
        roster = self.group.digest.hex()
        return {digest: (member, roster, self.sharers) for member, digest in self.updates.items()}

    def masks(self) -> list[tuple[bytes, int]]:
        """Seed and sign of each mask in the sum of the updates."""
        boxes = {}
        for item in self.transcript.boxes:
            sender = self.group.roster[item.sender]
            neighbors = self.group.neighbors(sender)
            proof = pb.InclusionProof(
                leaf_index=neighbors.index(item.box.recipient_digest),
                tree_size=len(neighbors),
                sibling_digests=[sibling.hex() for sibling in item.proof],
            )
            start = leaf(item.box.SerializeToString(deterministic=True))
            check_inclusion(start, proof, bytes.fromhex(self.shares[sender].boxes_digest))
            boxes[sender, item.box.recipient_digest] = item.box
        found = [(self.rows[member].seed, 1) for member in self.updates]
        for member in self.shares.keys() - self.updates.keys():
            seed = self.rows[member].seed
            for other in self.group.neighbors(member):
                if other not in self.updates:
                    continue
                if member < other:
                    found.append((self.group.pair_seed(seed, member, other), -1))
                else:
                    require((other, member) in boxes, "a box is missing")
                    box = boxes[other, member]
                    found.append((self.group.open_pair_seed(seed, other, member, box), 1))
        return found
