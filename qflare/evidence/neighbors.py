"""Signed statements of secure aggregation with neighbors: advertisements, shares, confirmations and reveals.

All name the digest of the round's task, and with it base version, configuration and nonce of the round. The digest of
an advertisement names its device within the group; the digest of the roster is one over all advertisements, so that
statements of two rosters never mix. `sharers_digest` and `survivors_digest` are digests over lists with an entry for
each member of the roster, in its order: the digest of the statement of the member's shares or update, or nothing.

Every failure is a `StatementError`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import Message

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import PublicKey, Signer, SigningContext, tagged_hash
from qflare.evidence.statements import (
    StatementError,
    digest_of,
    open_statement,
    require_digests,
    require_equal,
)
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.neighbors import MemberKeys, NeighborError, check_box
from qflare.masking.secret_sharing import SHARE_BYTES
from qflare.v1 import security_pb2

NONCE_BYTES: Final = 32
"""Length of the nonce of an advertisement."""

_SHARERS_TAG: Final = "qflare/v1/neighbor-sharers"
_SURVIVORS_TAG: Final = "qflare/v1/neighbor-survivors"

NeighborStatement = (
    security_pb2.NeighborAdvertisement
    | security_pb2.NeighborShares
    | security_pb2.NeighborConfirmation
    | security_pb2.NeighborReveal
)
_StatementT = TypeVar(
    "_StatementT",
    security_pb2.NeighborAdvertisement,
    security_pb2.NeighborShares,
    security_pb2.NeighborConfirmation,
    security_pb2.NeighborReveal,
)


@dataclass(frozen=True)
class MaskedRound:
    """Round that statements belong to.

    Attributes:
        realm: Name of the deployment.
        training_session_id: Training session.
        number: Round.
        task_digest: Digest of the round's signed task, 64 hex digits.
    """

    realm: str
    training_session_id: str
    number: int
    task_digest: str

    def fill(self, statement: NeighborStatement, device_id: str, key_id: str) -> None:
        """Set the fields of a statement that name round, device and key."""
        statement.realm = self.realm
        statement.training_session_id = self.training_session_id
        statement.round_number = self.number
        statement.task_digest = self.task_digest
        statement.device_id = device_id
        statement.key_id = key_id

    def require(self, statement: NeighborStatement) -> None:
        """Check that a statement belongs to this round.

        Raises:
            StatementMismatchError: It belongs to another one, or to another task.
        """
        require_equal("realm", statement.realm, self.realm)
        require_equal(
            "training_session_id", statement.training_session_id, self.training_session_id
        )
        require_equal("round_number", statement.round_number, self.number)
        require_equal("task_digest", statement.task_digest, self.task_digest)


@dataclass(frozen=True)
class Member:
    """A device of a group whose advertisement was checked.

    Attributes:
        device_id: The device.
        key: Its signature key.
        keys: What it advertises.
    """

    device_id: str
    key: PublicKey
    keys: MemberKeys

    @property
    def digest(self) -> str:
        """Digest of the advertisement, 64 hex digits."""
        return self.keys.digest


def sign_neighbor_statement(
    key: Signer, statement: NeighborStatement
) -> security_pb2.SignedEnvelope:
    """Sign a statement of a device.

    Raises:
        StatementError: It is malformed.
    """
    context, check = _KINDS[type(statement)]
    check(statement)
    require_equal("key_id", statement.key_id, key.public.key_id)
    return sign_envelope(key, context, statement)


def open_advertisement(
    envelope: security_pb2.SignedEnvelope, key: PublicKey, masked_round: MaskedRound
) -> Member:
    """Check an advertisement.

    Args:
        envelope: The advertisement.
        key: Signature key of the device that it names, shown by its receipt.
        masked_round: The round that it has to belong to.

    Raises:
        StatementError: It is malformed, of another round, or not signed by the key.
    """
    kind = security_pb2.NeighborAdvertisement
    statement = _opened(envelope, key, masked_round, kind)
    try:
        channel_key = KemPublicKey.from_proto(statement.channel_key)
        mask_key = KemPublicKey.from_proto(statement.mask_key)
    except ValueError as error:
        raise StatementError(f"a KEM key of an advertisement: {error}") from error
    if channel_key.data == mask_key.data:
        raise StatementError("an advertisement has one key for shares and for pair seeds")
    keys = MemberKeys(
        digest_of(envelope.payload), channel_key, mask_key, statement.self_seed_digest
    )
    return Member(statement.device_id, key, keys)


def boxes_tree(boxes: Sequence[security_pb2.NeighborBox]) -> list[bytes]:
    """Return the leaf hashes of boxes, over which `NeighborShares.boxes_digest` is the Merkle root."""
    return [merkle.leaf_hash(box.SerializeToString(deterministic=True)) for box in boxes]


def open_shares(
    envelope: security_pb2.SignedEnvelope,
    member: Member,
    masked_round: MaskedRound,
    graph: NeighborGraph,
) -> security_pb2.NeighborShares:
    """Check the signed part of a member's shares.

    Raises:
        StatementError: It is malformed, of another round or roster, or not signed by the member.
    """
    statement = _opened(envelope, member.key, masked_round, security_pb2.NeighborShares)
    _require_member(statement, member, graph)
    return statement


def check_boxes(
    statement: security_pb2.NeighborShares,
    graph: NeighborGraph,
    boxes: Sequence[security_pb2.NeighborBox],
) -> None:
    """Check that boxes are all those that a member committed to, one for each neighbor.

    Raises:
        StatementError: They are not.
    """
    sender = statement.advertisement_digest
    neighbors = graph.neighbors(sender)
    require_equal("boxes", [box.recipient_digest for box in boxes], list(neighbors))
    for recipient, box in zip(neighbors, boxes, strict=True):
        try:
            check_box(graph, sender, recipient, box)
        except NeighborError as error:
            raise StatementError(str(error)) from error
    require_equal("boxes_digest", merkle.root(boxes_tree(boxes)).hex(), statement.boxes_digest)


def prove_box(boxes: Sequence[security_pb2.NeighborBox], index: int) -> list[bytes]:
    """Return the Merkle proof that a box is the one at an index among a member's boxes."""
    return prove_boxes(boxes, [index])[0]


def prove_boxes(
    boxes: Sequence[security_pb2.NeighborBox], indices: Sequence[int]
) -> list[list[bytes]]:
    """Return the Merkle proofs of the boxes at some indices among a member's boxes, from one tree."""
    if not indices:
        return []
    nodes = merkle.nodes_of(boxes_tree(boxes))
    return [merkle.inclusion_proof(nodes, index, len(boxes)) for index in indices]


def check_box_proof(
    statement: security_pb2.NeighborShares,
    graph: NeighborGraph,
    box: security_pb2.NeighborBox,
    proof: Sequence[bytes],
) -> None:
    """Check that a member committed to a box for one of its neighbors.

    Raises:
        StatementError: It did not.
    """
    neighbors = graph.neighbors(statement.advertisement_digest)
    if box.recipient_digest not in neighbors:
        raise StatementError("a box is for no neighbor of its sender")
    index = neighbors.index(box.recipient_digest)
    leaf, root = boxes_tree([box])[0], bytes.fromhex(statement.boxes_digest)
    try:
        merkle.verify_inclusion(leaf, index, len(neighbors), proof, root)
    except merkle.ProofError as error:
        raise StatementError("a box is not one that its sender committed to") from error


def sharers_digest(graph: NeighborGraph, shares: Mapping[str, str]) -> str:
    """Return the digest over the shares of a group, 64 hex digits.

    Args:
        graph: Of the group.
        shares: Digest of the statement of a member's shares, by member; without those that sent none.
    """
    return _list_digest(_SHARERS_TAG, graph.roster_digest, graph, shares)


def survivors_digest(graph: NeighborGraph, sharers: str, updates: Mapping[str, str]) -> str:
    """Return the digest over the updates of a group, 64 hex digits.

    Args:
        graph: Of the group.
        sharers: `sharers_digest` that the updates name.
        updates: Digest of the statement of a member's update, by member; without those that sent none.
    """
    return _list_digest(_SURVIVORS_TAG, sharers, graph, updates)


def check_survivors(
    graph: NeighborGraph, sharers: Mapping[str, str], survivors: Mapping[str, str]
) -> None:
    """Check that the sum of a set of updates can be opened, and may be.

    Args:
        graph: Of the group.
        sharers: Members that sent shares.
        survivors: Members with an update.

    Raises:
        StatementError: A survivor sent no shares, more devices dropped out than the parameters of the graph allow, or
            too few neighbors of a sharer remain.
    """
    if not survivors.keys() <= sharers.keys() <= set(graph.members):
        raise StatementError("an update is of a device that sent no shares, or is no member")
    parameters = graph.parameters
    missing = parameters.size - len(survivors)
    if missing > parameters.max_dropouts:
        raise StatementError(
            f"{missing} of {parameters.size} devices dropped out, at most {parameters.max_dropouts} may"
        )
    for member in sharers:
        remaining = sum(item in survivors for item in graph.neighbors(member))
        if remaining < parameters.threshold:
            raise StatementError(
                f"{remaining} neighbors of a device remain, want {parameters.threshold}"
            )


def open_confirmation(
    envelope: security_pb2.SignedEnvelope,
    member: Member,
    masked_round: MaskedRound,
    graph: NeighborGraph,
) -> security_pb2.NeighborConfirmation:
    """Check the confirmation of a member.

    Raises:
        StatementError: It is malformed, of another round or roster, or not signed by the member.
    """
    statement = _opened(envelope, member.key, masked_round, security_pb2.NeighborConfirmation)
    _require_member(statement, member, graph)
    return statement


def count_confirmations(
    envelopes: Iterable[tuple[security_pb2.SignedEnvelope, Member]],
    masked_round: MaskedRound,
    graph: NeighborGraph,
    own: str,
    survivors: str,
) -> int:
    """Return how many neighbors of a member have confirmed a set of updates.

    Args:
        envelopes: Confirmations, each with the member that is said to have signed it.
        masked_round: The round.
        graph: Of the group.
        own: The member.
        survivors: Digest of the set.

    Raises:
        StatementError: One is not valid, of another set, or of no neighbor.
    """
    confirmed = set()
    for envelope, member in envelopes:
        statement = open_confirmation(envelope, member, masked_round, graph)
        require_equal("survivors_digest", statement.survivors_digest, survivors)
        if not graph.are_neighbors(own, member.digest):
            raise StatementError("a confirmation is of no neighbor")
        confirmed.add(member.digest)
    return len(confirmed)


def open_reveal(
    envelope: security_pb2.SignedEnvelope,
    member: Member,
    masked_round: MaskedRound,
    graph: NeighborGraph,
) -> security_pb2.NeighborReveal:
    """Check the revealed shares of a member; whether they are right is found when a secret is opened.

    Raises:
        StatementError: It is malformed, of another round or roster, not signed by the member, or has shares of a
            device that is not its neighbor.
    """
    statement = _opened(envelope, member.key, masked_round, security_pb2.NeighborReveal)
    _require_member(statement, member, graph)
    owners = [item.owner_digest for item in statement.shares]
    if owners != sorted(set(owners)) or not set(owners) <= set(graph.neighbors(member.digest)):
        raise StatementError("revealed shares are not those of distinct neighbors, in order")
    return statement


def check_advertisement_form(statement: security_pb2.NeighborAdvertisement) -> None:
    """Raise a `StatementError` unless an advertisement is well-formed."""
    _check_head(statement)
    require_digests(statement, "self_seed_digest")
    require_equal("nonce", len(statement.nonce), NONCE_BYTES)


def check_shares_form(statement: security_pb2.NeighborShares) -> None:
    """Raise a `StatementError` unless the signed part of shares is well-formed."""
    _check_head(statement)
    require_digests(statement, "advertisement_digest", "roster_digest", "boxes_digest")


def check_confirmation_form(statement: security_pb2.NeighborConfirmation) -> None:
    """Raise a `StatementError` unless a confirmation is well-formed."""
    _check_head(statement)
    require_digests(statement, "advertisement_digest", "roster_digest")
    require_digests(statement, "sharers_digest", "survivors_digest")


def check_reveal_form(statement: security_pb2.NeighborReveal) -> None:
    """Raise a `StatementError` unless a reveal is well-formed."""
    _check_head(statement)
    require_digests(statement, "advertisement_digest", "roster_digest", "survivors_digest")
    for item in statement.shares:
        require_digests(item, "owner_digest")
        require_equal("share", len(item.share), SHARE_BYTES)


def _check_head(statement: NeighborStatement) -> None:
    require_digests(statement, "task_digest", "key_id")
    named = statement.realm and statement.training_session_id and statement.device_id
    if not named or statement.round_number < 1:
        raise StatementError("a statement of a neighbor names no device or no round")


def _opened(
    envelope: security_pb2.SignedEnvelope,
    key: PublicKey,
    masked_round: MaskedRound,
    kind: type[_StatementT],
) -> _StatementT:
    context, check = _KINDS[kind]
    statement = open_statement(envelope, context, [key], kind)
    check(statement)
    require_equal("key_id", statement.key_id, key.key_id)
    masked_round.require(statement)
    return statement


def _require_member(
    statement: security_pb2.NeighborShares
    | security_pb2.NeighborConfirmation
    | security_pb2.NeighborReveal,
    member: Member,
    graph: NeighborGraph,
) -> None:
    require_equal("device_id", statement.device_id, member.device_id)
    require_equal("advertisement_digest", statement.advertisement_digest, member.digest)
    require_equal("roster_digest", statement.roster_digest, graph.roster_digest)
    if member.digest not in graph:
        raise StatementError("a device is no member of its roster")


def _list_digest(tag: str, before: str, graph: NeighborGraph, entries: Mapping[str, str]) -> str:
    parts = (bytes.fromhex(entries.get(member, "")) for member in graph.members)
    return tagged_hash(tag, bytes.fromhex(before), *parts).hex()


_KINDS: Final[Mapping[type[Message], tuple[SigningContext, Callable[..., None]]]] = {
    security_pb2.NeighborAdvertisement: (
        SigningContext.NEIGHBOR_ADVERTISEMENT,
        check_advertisement_form,
    ),
    security_pb2.NeighborShares: (SigningContext.NEIGHBOR_SHARES, check_shares_form),
    security_pb2.NeighborConfirmation: (
        SigningContext.NEIGHBOR_CONFIRMATION,
        check_confirmation_form,
    ),
    security_pb2.NeighborReveal: (SigningContext.NEIGHBOR_REVEAL, check_reveal_form),
}
