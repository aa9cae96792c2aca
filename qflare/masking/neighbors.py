"""Masks between neighbors: the secrets of a device, the boxes that it seals to its neighbors, and sums without masks.

A device u of a group has three seeds of 32 bytes. The *self seed* makes a mask of its own. From the *mask seed* follow
its mask key and the seeds of the pair masks that it makes. The *channel seed* gives the key to which its neighbors seal
shares, and is never shared. Of two neighbors, the one with the smaller advertisement digest makes the seed of their
pair mask, and adds the mask to its update; the other one subtracts it:

    y_u = x_u + PRG(self seed of u) + sum over neighbors v > u of PRG(s_uv) - sum over neighbors v < u of PRG(s_vu)

In the sum of a group the masks of two devices that are both in it cancel. The others are removed with the self seeds of
the devices in the sum, and with the mask seeds of those that sent shares but no update: whichever of the two made a
pair seed, it follows from the mask seed of either. For each device only one of the two seeds is ever opened.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", eprint 2017/281;
Bell et al. 2020, eprint 2020/704. Instead of agreed keys, pair seeds are sealed with a KEM.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from qflare.crypto.sealing import (
    SEAL_OVERHEAD_BYTES,
    KemKey,
    KemPublicKey,
    UnsealError,
    open_sealed,
    seal,
)
from qflare.crypto.signing import Provider, tagged_hash
from qflare.crypto.symmetric import hkdf_expand
from qflare.masking.masks import SEED_BYTES, Mask
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.masking.secret_sharing import (
    SHARE_BYTES,
    InvalidShareError,
    combine,
    read_share,
    split,
)
from qflare.tensors import Array
from qflare.v1 import security_pb2

SEALED_SHARES_BYTES: Final = SEAL_OVERHEAD_BYTES + 2 * SHARE_BYTES
"""Length of the sealed shares in a box, 1202."""

SEALED_PAIR_SEED_BYTES: Final = SEAL_OVERHEAD_BYTES + SEED_BYTES
"""Length of a sealed pair seed, 1168."""

_SELF_SEED_TAG: Final = "qflare/v1/neighbor-self-seed"
_SHARE_TAG: Final = "qflare/v1/neighbor-share"
_SHARES_TAG: Final = "qflare/v1/neighbor-shares"
_PAIR_TAG: Final = "qflare/v1/neighbor-pair-seed"
_MASK_KEY_LABEL: Final = b"qflare/v1/neighbor-mask-key"


class NeighborError(ValueError):
    """A member of a group does not keep the protocol.

    Attributes:
        members: Advertisement digests of those that do not.
    """

    def __init__(self, message: str, *members: str) -> None:
        super().__init__(message)
        self.members = members


class NotEnoughSharesError(ValueError):
    """Fewer shares of a secret remain than its threshold: the group cannot be unmasked."""


@dataclass(frozen=True)
class MemberKeys:
    """What a member of a group advertises.

    Attributes:
        digest: Digest of its advertisement, which names the member in its group.
        channel_key: Key for shares.
        mask_key: Key for pair seeds.
        self_seed_digest: Commitment to its self seed.
    """

    digest: str
    channel_key: KemPublicKey
    mask_key: KemPublicKey
    self_seed_digest: str


@dataclass(frozen=True)
class Shares:
    """Shares of the secrets of a member, 33 bytes each.

    Attributes:
        mask: Share of the mask seed.
        own: Share of the self seed.
    """

    mask: bytes
    own: bytes

    def __repr__(self) -> str:
        return "Shares(...)"


@dataclass(frozen=True)
class OpenedBox:
    """What a member has received from a neighbor.

    Attributes:
        shares: Its shares of the neighbor's secrets.
        pair_seed: Seed of the pair mask; None if the recipient makes it.
    """

    shares: Shares
    pair_seed: bytes | None

    def __repr__(self) -> str:
        return "OpenedBox(...)"


class MemberSecrets:
    """Secret seeds of a device for one round. Make them by `generate` or `from_bytes`."""

    __slots__ = ("__dict__", "_channel_seed", "_mask_seed", "_self_seed")

    def __init__(self, mask_seed: bytes, self_seed: bytes, channel_seed: bytes) -> None:
        self._mask_seed = mask_seed
        self._self_seed = self_seed
        self._channel_seed = channel_seed

    @classmethod
    def generate(cls, draw: Callable[[int], bytes] = os.urandom) -> Self:
        """Return new secrets.

        Args:
            draw: Returns random bytes; only a simulation replaces it.
        """
        return cls.from_bytes(draw(3 * SEED_BYTES))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: It has another length.
        """
        if len(data) != 3 * SEED_BYTES:
            raise ValueError(f"secrets have {len(data)} bytes, want {3 * SEED_BYTES}")
        return cls(data[:SEED_BYTES], data[SEED_BYTES : 2 * SEED_BYTES], data[2 * SEED_BYTES :])

    def to_bytes(self) -> bytes:
        """Serialize, unencrypted, to 96 bytes."""
        return self._mask_seed + self._self_seed + self._channel_seed

    @cached_property
    def channel_key(self) -> KemKey:
        """Key that opens shares."""
        return KemKey(Provider.CRYPTOGRAPHY, self._channel_seed)

    @cached_property
    def mask_key(self) -> KemKey:
        """Key that opens pair seeds."""
        return mask_key(self._mask_seed)

    @property
    def self_seed_digest(self) -> str:
        """Commitment to the self seed, 64 hex digits."""
        return self_seed_digest(self._self_seed)

    def make_boxes(
        self, graph: NeighborGraph, own: str, members: Mapping[str, MemberKeys]
    ) -> list[security_pb2.NeighborBox]:
        """Return boxes for all neighbors, in ascending order of their digests.

        Args:
            graph: Of the group.
            own: The device's own digest.
            members: Keys of the neighbors by digest.

        Raises:
            NeighborError: The key of a neighbor leads to no secret.
        """
        neighbors = graph.neighbors(own)
        points, threshold = [graph.point(item) for item in neighbors], graph.parameters.threshold
        mask_shares = split(self._mask_seed, threshold, points)
        self_shares = split(self._self_seed, threshold, points)
        boxes = []
        for item in neighbors:
            point = graph.point(item)
            shares = Shares(mask_shares[point], self_shares[point])
            pair_seed = self._pair_seed(graph, own, item) if own < item else None
            boxes.append(_seal_box(graph, own, members[item], shares, pair_seed))
        return boxes

    def open_box(
        self, graph: NeighborGraph, own: str, sender: str, box: security_pb2.NeighborBox
    ) -> OpenedBox:
        """Open the box of a neighbor.

        Args:
            graph: Of the group.
            own: The device's own digest.
            sender: The neighbor.
            box: Committed to by the neighbor's signature.

        Raises:
            NeighborError: It does not open, or is not what the neighbor committed to.
        """
        check_box(graph, sender, own, box)
        info = _info(_SHARES_TAG, graph, sender, own)
        pair_seed = None
        try:
            data = open_sealed(self.channel_key.decapsulate, box.sealed_shares, info)
            if sender < own:
                pair_seed = _open_pair_seed(self.mask_key, graph, sender, own, box)
        except UnsealError as error:
            raise NeighborError("the box of a neighbor does not open", sender) from error
        shares = Shares(data[:SHARE_BYTES], data[SHARE_BYTES:])
        digests = [share_digest(graph, kind, sender, own, share) for kind, share in _kinds(shares)]
        if digests != [box.mask_share_digest, box.self_share_digest]:
            raise NeighborError("the shares of a neighbor are not those committed to", sender)
        return OpenedBox(shares, pair_seed)

    def mask(
        self, values: Array, graph: NeighborGraph, own: str, sharers: Mapping[str, OpenedBox]
    ) -> None:
        """Add the device's masks to its update, in place.

        Args:
            values: The quantized update, whole.
            graph: Of the group.
            own: The device's own digest.
            sharers: Opened boxes of the neighbors that sent shares, by their digests.

        Raises:
            NotEnoughSharesError: They are fewer than the threshold: the group could not be unmasked.
        """
        if len(sharers) < graph.parameters.threshold:
            raise NotEnoughSharesError(
                f"got shares of {len(sharers)} neighbors, want {graph.parameters.threshold}"
            )
        Mask(self._self_seed).add_to(values, 0)
        for other, box in sharers.items():
            if own < other:
                Mask(self._pair_seed(graph, own, other)).add_to(values, 0)
            else:
                assert box.pair_seed is not None
                Mask(box.pair_seed).subtract_from(values, 0)

    def _pair_seed(self, graph: NeighborGraph, own: str, other: str) -> bytes:
        return made_pair_seed(self._mask_seed, graph, own, other)


def mask_key(mask_seed: bytes) -> KemKey:
    """Return the mask key of a mask seed."""
    return KemKey(Provider.CRYPTOGRAPHY, hkdf_expand(mask_seed, _MASK_KEY_LABEL))


def self_seed_digest(self_seed: bytes) -> str:
    """Return the commitment to a self seed, 64 hex digits."""
    return tagged_hash(_SELF_SEED_TAG, self_seed).hex()


def made_pair_seed(mask_seed: bytes, graph: NeighborGraph, maker: str, other: str) -> bytes:
    """Return the seed of a pair mask from the mask seed of the member that makes it, 32 bytes."""
    return hkdf_expand(mask_seed, _info(_PAIR_TAG, graph, maker, other))


def share_digest(graph: NeighborGraph, kind: str, owner: str, holder: str, share: bytes) -> str:
    """Return the commitment of an owner to the share of a holder, 64 hex digits.

    Args:
        graph: Of the group.
        kind: `mask` or `self`.
        owner: Whose secret it is.
        holder: Whose share it is.
        share: 33 bytes; that of a random secret cannot be guessed.
    """
    names = (graph.roster_digest, owner, holder)
    return tagged_hash(_SHARE_TAG, kind.encode(), *map(bytes.fromhex, names), share).hex()


def check_box(
    graph: NeighborGraph, sender: str, recipient: str, box: security_pb2.NeighborBox
) -> None:
    """Check the form of a box.

    Raises:
        NeighborError: It is for another member, or a part is missing or has another length.
    """
    pair_bytes = SEALED_PAIR_SEED_BYTES if sender < recipient else 0
    if not (
        box.recipient_digest == recipient
        and graph.are_neighbors(sender, recipient)
        and len(box.sealed_shares) == SEALED_SHARES_BYTES
        and len(box.sealed_pair_seed) == pair_bytes
    ):
        raise NeighborError("the box of a neighbor is malformed", sender)


def open_secret(
    graph: NeighborGraph,
    kind: str,
    owner: MemberKeys,
    commitments: Mapping[str, str],
    revealed: Mapping[str, bytes],
) -> tuple[bytes, tuple[str, ...]]:
    """Return the secret of a member from shares, and the holders whose shares are not those committed to.

    Args:
        graph: Of the group.
        kind: `mask` or `self`.
        owner: Whose secret it is.
        commitments: The owner's commitment to the share of each holder.
        revealed: Share by holder.

    Raises:
        NotEnoughSharesError: Too few shares are right.
        NeighborError: The shares are those that the owner committed to, and give another secret.
    """
    right, liars = {}, []
    for holder, share in revealed.items():
        if commitments.get(holder) == share_digest(graph, kind, owner.digest, holder, share):
            right[graph.point(holder)] = share
        else:
            liars.append(holder)
    threshold = graph.parameters.threshold
    if len(right) < threshold:
        raise NotEnoughSharesError(
            f"{len(right)} shares of a secret are right, want {threshold}; {len(liars)} are wrong"
        )
    try:
        for share in right.values():
            read_share(share)
        secret = combine(dict(sorted(right.items())[:threshold]))
    except InvalidShareError as error:
        raise NeighborError("the shares of a member are malformed", owner.digest) from error
    if not is_committed(kind, owner, secret):
        raise NeighborError("the shares of a member give another secret", owner.digest)
    return secret, tuple(liars)


def leftover_masks(
    graph: NeighborGraph,
    survivors: Sequence[str],
    self_seeds: Mapping[str, bytes],
    mask_seeds: Mapping[str, bytes],
    boxes: Mapping[tuple[str, str], security_pb2.NeighborBox],
) -> Iterable[tuple[bytes, int]]:
    """Yield the seed and the sign, 1 or -1, of each mask that is left in the sum of a group.

    Args:
        graph: Of the group.
        survivors: Members whose updates are in the sum.
        self_seeds: Self seed of each of them.
        mask_seeds: Mask seed of each member that sent shares, but whose update is not in the sum.
        boxes: Boxes by sender and recipient; those of survivors for the members that dropped out are read.

    Raises:
        NeighborError: The box of a survivor does not open.
    """
    for member in survivors:
        yield self_seeds[member], 1
    remaining = set(survivors)
    for dropped, seed in mask_seeds.items():
        key = mask_key(seed)
        for member in graph.neighbors(dropped):
            if member not in remaining:
                continue
            if dropped < member:
                yield made_pair_seed(seed, graph, dropped, member), -1
                continue
            try:
                box = boxes[member, dropped]
                yield _open_pair_seed(key, graph, member, dropped, box), 1
            except (KeyError, UnsealError) as error:
                raise NeighborError("the box of a member does not open", member) from error


def _seal_box(
    graph: NeighborGraph, own: str, keys: MemberKeys, shares: Shares, pair_seed: bytes | None
) -> security_pb2.NeighborBox:
    other = keys.digest
    try:
        sealed = seal(
            keys.channel_key, shares.mask + shares.own, _info(_SHARES_TAG, graph, own, other)
        )
        sealed_pair = b""
        if pair_seed is not None:
            sealed_pair = seal(keys.mask_key, pair_seed, _info(_PAIR_TAG, graph, own, other))
    except UnsealError as error:
        raise NeighborError("the key of a neighbor leads to no secret", other) from error
    mask_digest, self_digest = (
        share_digest(graph, kind, own, other, share) for kind, share in _kinds(shares)
    )
    return security_pb2.NeighborBox(
        recipient_digest=other,
        sealed_shares=sealed,
        sealed_pair_seed=sealed_pair,
        mask_share_digest=mask_digest,
        self_share_digest=self_digest,
    )


def _kinds(shares: Shares) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return ("mask", shares.mask), ("self", shares.own)


def _open_pair_seed(
    key: KemKey, graph: NeighborGraph, maker: str, other: str, box: security_pb2.NeighborBox
) -> bytes:
    return open_sealed(key.decapsulate, box.sealed_pair_seed, _info(_PAIR_TAG, graph, maker, other))


def is_committed(kind: str, owner: MemberKeys, secret: bytes) -> bool:
    """Return whether a secret is the one that a member advertised: its `self` seed, or its `mask` seed."""
    if len(secret) != SEED_BYTES:
        return False
    if kind == "self":
        return self_seed_digest(secret) == owner.self_seed_digest
    return mask_key(secret).public.data == owner.mask_key.data


def _info(tag: str, graph: NeighborGraph, sender: str, recipient: str) -> bytes:
    """Return the context of what a member seals to a neighbor; the roster binds realm, session, round and task."""
    return tagged_hash(tag, *map(bytes.fromhex, (graph.roster_digest, sender, recipient)))
