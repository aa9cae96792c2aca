"""Transcripts of secure aggregation with neighbors: how the sum of each group in a version was opened, checked offline.

A transcript holds the signed advertisements, shares and confirmations of a group, and the seeds that were opened. Each
seed must give what its device had advertised, so the sum of the masks follows from the transcript alone. Together with
the masked updates, an auditor recomputes the version, and never sees a single update.

Every failure is a `StatementError`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from qflare.crypto.signing import PublicKey
from qflare.evidence.neighbors import (
    MaskedRound,
    Member,
    check_box_proof,
    check_survivors,
    open_advertisement,
    open_confirmation,
    open_shares,
    sharers_digest,
    survivors_digest,
)
from qflare.evidence.statements import StatementError, digest_of, require_equal
from qflare.evidence.unmasking import Masking
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import (
    NeighborError,
    is_committed,
    leftover_masks,
)
from qflare.v1 import security_pb2, verification_pb2

FindKey = Callable[[str, str], PublicKey]
"""Returns the key of a device by its id and the id of the key; raises `ValueError` if the device has no such key."""


PART_BYTES: Final = 2**20
"""Most bytes of a part of a transcript: bundles are sent in messages of limited size."""

Part = verification_pb2.NeighborTranscriptPart


@dataclass(frozen=True)
class CheckedGroup:
    """A group whose transcript was checked.

    Attributes:
        digest: SHA-256 of the transcript, 64 hex digits.
        updates: Digest of the statement of each update in the sum, by the digest of its device's advertisement.
        roster_digest: Of the group.
        sharers_digest: Of the group.
        masks: Seed and sign of each mask in the sum of the updates.
    """

    digest: str
    updates: Mapping[str, str]
    roster_digest: str
    sharers_digest: str
    masks: tuple[tuple[bytes, int], ...]

    def __repr__(self) -> str:
        return f"CheckedGroup({self.digest})"


def transcript_parts(group: int, data: bytes) -> list[Part]:
    """Return the parts of a serialized transcript.

    Args:
        group: Place of the group among those in the sum, from 0.
        data: Serialized `NeighborTranscript`.
    """
    starts = range(0, max(len(data), 1), PART_BYTES)
    return [Part(group=group, content=data[start : start + PART_BYTES]) for start in starts]


def joined_parts(parts: Iterable[Part]) -> list[bytes]:
    """Return the serialized transcript of each group.

    Raises:
        StatementError: The parts are not in order.
    """
    groups: list[list[bytes]] = []
    for part in parts:
        if part.group == len(groups):
            groups.append([])
        if part.group != len(groups) - 1:
            raise StatementError("transcripts: parts of groups are not in order")
        groups[-1].append(part.content)
    return [b"".join(contents) for contents in groups]


def check_group(
    data: bytes, masking: Masking, masked_round: MaskedRound, find_key: FindKey
) -> CheckedGroup:
    """Check the transcript of a group.

    Args:
        data: Serialized `NeighborTranscript`.
        masking: Of the round's verified task.
        masked_round: The round.
        find_key: Finds the proven keys of the devices.

    Raises:
        StatementError: It is malformed, a statement does not verify, or a seed is not that of its device.
    """
    try:
        transcript = verification_pb2.NeighborTranscript.FromString(data)
        return _Checks(data, transcript, masking, masked_round, find_key).run()
    except (NeighborError, DecodeError) as error:
        raise StatementError(f"transcript of a group: {error}") from error


def check_groups(
    parts: Iterable[Part],
    statement: security_pb2.ModelStatement,
    masking: Masking,
    updates: Sequence[security_pb2.UpdateStatement],
    update_digests: Sequence[str],
    find_key: FindKey,
) -> tuple[CheckedGroup, ...]:
    """Check the transcripts of all groups in a version.

    Args:
        parts: Of the transcripts.
        statement: Of the version, verified.
        masking: Of the round's verified task.
        updates: Verified statements of all updates in the version.
        update_digests: Their digests, in the same order.
        find_key: Finds the proven keys of the devices.

    Raises:
        StatementError: They are not those of the version.
    """
    masked_round = MaskedRound(
        statement.realm,
        statement.training_session_id,
        statement.round_number,
        masking.task_digest,
    )
    groups = joined_parts(parts)
    digests = [hashlib.sha256(data).hexdigest() for data in groups]
    require_equal("answer_digests", digests, list(statement.unmasking.answer_digests))
    checked = tuple(check_group(data, masking, masked_round, find_key) for data in groups)
    named = {}
    for update, digest in zip(updates, update_digests, strict=True):
        part = update.masking.neighbors
        named[digest] = (part.advertisement_digest, part.roster_digest, part.sharers_digest)
    opened = {
        digest: (member, group.roster_digest, group.sharers_digest)
        for group in checked
        for member, digest in group.updates.items()
    }
    require_equal("updates", opened, named)
    return checked


class _Checks:
    """The checks of one transcript."""

    def __init__(
        self,
        data: bytes,
        transcript: verification_pb2.NeighborTranscript,
        masking: Masking,
        masked_round: MaskedRound,
        find_key: FindKey,
    ) -> None:
        self._data = data
        self._transcript = transcript
        self._masking = masking
        self._round = masked_round
        self._find_key = find_key

    def run(self) -> CheckedGroup:
        members = self._members()
        assert self._masking.neighbors is not None
        graph = self._masking.neighbors.graph([member.digest for member in members])
        rows = dict(zip(graph.members, self._transcript.members, strict=True))
        by_digest = {member.digest: member for member in members}
        shares = self._shares(graph, rows, by_digest)
        sharers = {item: digest_of(rows[item].shares.payload) for item in shares}
        updates = {item: row.update_digest.hex() for item, row in rows.items() if row.update_digest}
        check_survivors(graph, sharers, updates)
        if len(updates) < self._masking.min_cohort:
            raise StatementError("a group has fewer updates than the task allows")
        of_sharers = sharers_digest(graph, sharers)
        self._check_confirmations(graph, rows, by_digest, of_sharers, updates)
        seeds = self._seeds(rows, by_digest, sharers, updates)
        boxes = self._boxes(graph, shares)
        own = {item: seed for item, seed in seeds.items() if item in updates}
        dropped = {item: seed for item, seed in seeds.items() if item not in updates}
        masks = tuple(leftover_masks(graph, sorted(updates), own, dropped, boxes))
        digest = hashlib.sha256(self._data).hexdigest()
        return CheckedGroup(digest, updates, graph.roster_digest, of_sharers, masks)

    def _members(self) -> list[Member]:
        members = []
        for row in self._transcript.members:
            payload = row.advertisement.payload
            stated = security_pb2.NeighborAdvertisement.FromString(payload)
            try:
                key = self._find_key(stated.device_id, stated.key_id)
            except ValueError as error:
                raise StatementError(f"key of a member: {error}") from error
            members.append(open_advertisement(row.advertisement, key, self._round))
        devices = {member.device_id for member in members}
        require_equal("devices", len(devices), len(members))
        return members

    def _shares(
        self,
        graph: NeighborGraph,
        rows: Mapping[str, verification_pb2.NeighborTranscriptMember],
        members: Mapping[str, Member],
    ) -> dict[str, security_pb2.NeighborShares]:
        return {
            item: open_shares(row.shares, members[item], self._round, graph)
            for item, row in rows.items()
            if row.HasField("shares")
        }

    def _check_confirmations(
        self,
        graph: NeighborGraph,
        rows: Mapping[str, verification_pb2.NeighborTranscriptMember],
        members: Mapping[str, Member],
        sharers: str,
        updates: Mapping[str, str],
    ) -> None:
        survivors = survivors_digest(graph, sharers, updates)
        count = 0
        for item, row in rows.items():
            if not row.HasField("confirmation"):
                continue
            statement = open_confirmation(row.confirmation, members[item], self._round, graph)
            require_equal("survivors_digest", statement.survivors_digest, survivors)
            count += item in updates
        if count < graph.parameters.threshold:
            raise StatementError("too few devices have confirmed the updates of a group")

    def _seeds(
        self,
        rows: Mapping[str, verification_pb2.NeighborTranscriptMember],
        members: Mapping[str, Member],
        sharers: Mapping[str, str],
        updates: Mapping[str, str],
    ) -> dict[str, bytes]:
        seeds = {item: row.seed for item, row in rows.items() if row.seed}
        require_equal("seeds", sorted(seeds), sorted(sharers))
        for item, seed in seeds.items():
            kind = "self" if item in updates else "mask"
            if not is_committed(kind, members[item].keys, seed):
                raise StatementError("a seed is not that of its device")
        return seeds

    def _boxes(
        self, graph: NeighborGraph, shares: Mapping[str, security_pb2.NeighborShares]
    ) -> dict[tuple[str, str], security_pb2.NeighborBox]:
        boxes = {}
        for item in self._transcript.boxes:
            if not 0 <= item.sender < len(graph.members):
                raise StatementError("a box has no sender")
            sender = graph.members[item.sender]
            if sender not in shares:
                raise StatementError("a box is of a member that sent no shares")
            check_box_proof(shares[sender], graph, item.box, item.proof)
            boxes[sender, item.box.recipient_digest] = item.box
        return boxes
