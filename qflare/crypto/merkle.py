"""Merkle trees over SHA-256 as in RFC 9162 section 2.1 (the trees of RFC 6962).

One tree definition serves chunk digests, contributor roots and the audit log: `root` and
`CompactTree` compute roots, `inclusion_proof` and `consistency_proof` generate proofs, and the
`verify_` functions check proofs and raise `ProofError`.

Proofs read complete subtrees through a `NodeGetter`: ``node(level, index)`` is the hash of the
leaves ``[index << level, (index + 1) << level)``. Such a subtree never changes once its leaves
exist, so a log can store each node once (`CompactTree.append` returns the nodes a leaf completes)
and answer a proof with O(log size) reads. `nodes_of` makes a getter from leaf hashes in memory.

Every hash here is 32 bytes. Leaves and inner nodes are hashed under different prefixes, so neither
can be mistaken for the other. This module stores nothing and signs nothing.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from qflare.crypto.hashing import LOCKED_BYTES, feed

HASH_BYTES = 32
"""Length of every leaf, node and root hash."""

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of the tree without leaves."""

NodeGetter = Callable[[int, int], bytes]
"""``node(level, index)``: root of the complete subtree over ``2**level`` leaves, see above."""

_LEAF_PREFIX = b"\x00"
_NODE_PREFIX = b"\x01"


class ProofError(ValueError):
    """A proof or a tree is malformed, or a proof does not verify."""


class Node(NamedTuple):
    """A complete subtree and its position.

    Attributes:
        level: Height of the subtree; it covers ``2**level`` leaves.
        place: Position among the subtrees of its level, from the left; the getter's index.
        hash: Its root, 32 bytes.
    """

    level: int
    place: int
    hash: bytes


def leaf_hash(data: bytes | bytearray | memoryview) -> bytes:
    """Hash the content of one leaf: SHA-256(0x00 || data)."""
    if len(data) < LOCKED_BYTES:
        return hashlib.sha256(b"".join((_LEAF_PREFIX, data))).digest()
    digest = hashlib.sha256(_LEAF_PREFIX)
    feed(digest, data)
    return digest.digest()


def begin_leaf() -> "hashlib._Hash":
    """Return an incremental hash for the content of one leaf; its digest equals `leaf_hash`."""
    return hashlib.sha256(_LEAF_PREFIX)


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash an inner node: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(_NODE_PREFIX + left + right).digest()


class CompactTree:
    """Append-only tree that stores one hash per set bit of its size.

    Args:
        size: Number of leaves already appended, >= 0.
        hashes: The roots of the complete subtrees of that many leaves, largest first, as `hashes`
            returned them.

    Raises:
        ProofError: The number or length of the hashes does not fit the size.
    """

    __slots__ = ("_hashes", "_size")

    def __init__(self, size: int = 0, hashes: Iterable[bytes] = ()) -> None:
        self._size = size
        self._hashes = [bytes(part) for part in hashes]
        if size < 0 or len(self._hashes) != size.bit_count():
            raise ProofError(f"a tree of {size} leaves needs one hash per bit of its size")
        _check_hashes(self._hashes)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Roots of the complete subtrees, largest first. Together with `size`, this is the complete state."""
        return tuple(self._hashes)

    def append(self, leaf: bytes) -> list[Node]:
        """Add one leaf hash at the right.

        Returns:
            The complete subtrees that the leaf finished, lowest first; the first is the leaf.

        Raises:
            ProofError: The leaf hash is not 32 bytes.
        """
        _check_hashes((leaf,))
        completed = [Node(0, self._size, leaf)]
        remaining = self._size
        while remaining & 1:
            _, place, right = completed[-1]
            joined = node_hash(self._hashes.pop(), right)
            completed.append(Node(len(completed), place >> 1, joined))
            remaining >>= 1
        self._hashes.append(completed[-1].hash)
        self._size += 1
        return completed

    def root(self) -> bytes:
        """Root of all leaves so far; `EMPTY_ROOT` for none."""
        return _fold_right(self._hashes)


def root(leaf_hashes: Iterable[bytes]) -> bytes:
    """Root of the tree over leaf hashes in order; `EMPTY_ROOT` for none.

    Raises:
        ProofError: A leaf hash is not 32 bytes.
    """
    level = list(leaf_hashes)
    _check_hashes(level)
    while len(level) > 1:  # pairs from the left; an odd one out belongs to the level above
        pairs = zip(level[::2], level[1::2], strict=False)
        joined = [node_hash(left, right) for left, right in pairs]
        level = [*joined, level[-1]] if len(level) % 2 else joined
    return bytes(level[0]) if level else EMPTY_ROOT


def nodes_of(leaf_hashes: Sequence[bytes]) -> NodeGetter:
    """Make a getter for the complete subtrees over leaf hashes in memory.

    Raises:
        ProofError: A leaf hash is not 32 bytes.
    """
    _check_hashes(leaf_hashes)
    levels = [list(leaf_hashes)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        pairs = range(0, len(below) - 1, 2)
        levels.append([node_hash(below[i], below[i + 1]) for i in pairs])
    return lambda level, index: levels[level][index]


def inclusion_proof(node: NodeGetter, index: int, size: int) -> list[bytes]:
    """Prove that leaf `index` is in the tree of the first `size` leaves.

    Returns:
        Sibling hashes from the leaf upwards, at most ``ceil(log2(size))``.

    Raises:
        ProofError: The index is not in ``[0, size)``.

    Source: RFC 9162 section 2.1.3.1.
    """
    if not 0 <= index < size:
        raise ProofError(f"leaf index is {index}, want 0 <= index < {size}")
    siblings = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            siblings.append(_range_hash(node, middle, high))
            high = middle
        else:
            siblings.append(_range_hash(node, low, middle))
            low = middle
    siblings.reverse()
    return siblings


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes
) -> None:
    """Check that `leaf` is leaf `index` of the tree of `size` leaves with `expected_root`.

    Raises:
        ProofError: The proof does not verify: wrong length, index, hash or root.

    Source: RFC 9162 section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise ProofError(f"leaf index is {index}, want 0 <= index < {size}")
    _check_hashes((leaf, *proof))
    fn, sn, computed = index, size - 1, leaf
    for sibling in proof:
        if sn == 0:
            raise ProofError("inclusion proof is too long")
        if fn & 1 or fn == sn:
            computed = node_hash(sibling, computed)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            computed = node_hash(computed, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ProofError("inclusion proof is too short")
    _check_root(computed, expected_root, "inclusion")


def consistency_proof(node: NodeGetter, first: int, second: int) -> list[bytes]:
    """Prove that the tree of `first` leaves is a prefix of the tree of `second` leaves.

    Returns:
        Hashes in the order of RFC 9162; empty when `first` is zero or equals `second`.

    Raises:
        ProofError: Not ``0 <= first <= second``.

    Source: RFC 9162 section 2.1.4.1.
    """
    if not 0 <= first <= second:
        raise ProofError(f"tree sizes are {first} and {second}, want 0 <= first <= second")
    if first in (0, second):
        return []
    hashes = []
    low, high = 0, second
    while first != high:
        middle = low + _split(high - low)
        if first <= middle:
            hashes.append(_range_hash(node, middle, high))
            high = middle
        else:
            hashes.append(_range_hash(node, low, middle))
            low = middle
    if low:
        hashes.append(_range_hash(node, low, high))
    hashes.reverse()
    return hashes


def verify_consistency(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree `first_root` of `first` leaves is a prefix of `second_root`.

    The empty tree is a prefix of every tree; its root must be `EMPTY_ROOT`.

    Raises:
        ProofError: The proof does not verify.

    Source: RFC 9162 section 2.1.4.2.
    """
    if not 0 <= first <= second:
        raise ProofError(f"tree sizes are {first} and {second}, want 0 <= first <= second")
    _check_hashes((first_root, second_root, *proof))
    if first in (0, second):
        if proof:
            raise ProofError("consistency proof is too long")
        _check_root(EMPTY_ROOT if first == 0 else second_root, first_root, "consistency")
        return
    _verify_grown(first, second, first_root, second_root, proof)


def _verify_grown(
    first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]
) -> None:
    path = list(proof) if first.bit_count() > 1 else [first_root, *proof]
    if not path:
        raise ProofError("consistency proof is too short")
    shift = ((first - 1) ^ first).bit_length() - 1  # trailing one bits of first - 1
    fn, sn = (first - 1) >> shift, (second - 1) >> shift
    old = new = path[0]
    for part in path[1:]:
        if sn == 0:
            raise ProofError("consistency proof is too long")
        if fn & 1 or fn == sn:
            old, new = node_hash(part, old), node_hash(part, new)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            new = node_hash(new, part)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ProofError("consistency proof is too short")
    _check_root(old, first_root, "consistency")
    _check_root(new, second_root, "consistency")


def _split(leaf_count: int) -> int:
    """Largest power of two below a leaf count > 1."""
    return 1 << ((leaf_count - 1).bit_length() - 1)


def _range_hash(node: NodeGetter, low: int, high: int) -> bytes:
    """Root of the leaves [low, high), where low is a multiple of the largest subtree inside."""
    parts = []
    while low < high:
        level = (high - low).bit_length() - 1
        parts.append(node(level, low >> level))
        low += 1 << level
    return _fold_right(parts)


def _fold_right(hashes: Sequence[bytes]) -> bytes:
    """Join complete subtrees of falling size into the root above them."""
    if not hashes:
        return EMPTY_ROOT
    joined = hashes[-1]
    for left in reversed(hashes[:-1]):
        joined = node_hash(left, joined)
    return joined


def _check_hashes(hashes: Iterable[bytes]) -> None:
    for part in hashes:
        if len(part) != HASH_BYTES:
            raise ProofError(f"a hash has {len(part)} bytes, want {HASH_BYTES}")


def _check_root(computed: bytes, expected: bytes, kind: str) -> None:
    if not hmac.compare_digest(computed, expected):
        raise ProofError(f"{kind} proof does not lead to the root")
