"""Graph of neighbors of a group: a ring in a random order, in which each device is joined to the nearest ones.

The order comes from the digest of the group's roster, which is one over the advertisements of all its devices, each
with a nonce of its device. Every device computes it for itself, so a coordinator does not choose who is whose neighbor.
"""

from collections.abc import Sequence
from functools import cached_property

from qflare.crypto import merkle
from qflare.crypto.signing import tagged_hash
from qflare.masking.graph_parameters import GraphParameters

_ORDER_TAG = "qflare/v1/neighbor-order"


class InvalidRosterError(ValueError):
    """A roster is not sorted, lists an advertisement twice, or has another size than the graph."""


def roster_digest(members: Sequence[str]) -> str:
    """Return the Merkle root over the advertisement digests of a group in ascending order, 64 hex digits."""
    return merkle.root(merkle.leaf_hash(bytes.fromhex(item)) for item in members).hex()


class NeighborGraph:
    """Harary graph over the members of a roster.

    Args:
        members: Digests of the advertisements of the group's devices, 64 hex digits each, sorted.
        parameters: For that number of devices.

    Raises:
        InvalidRosterError: The members are not sorted, not distinct, or not as many as the parameters are for.
    """

    def __init__(self, members: Sequence[str], parameters: GraphParameters) -> None:
        if list(members) != sorted(set(members)):
            raise InvalidRosterError("roster: want distinct digests in ascending order")
        if len(members) != parameters.size:
            raise InvalidRosterError(f"roster: got {len(members)}, want {parameters.size} members")
        self.members = tuple(members)
        self.parameters = parameters
        self._ring = sorted(self.members, key=self._order)
        self._places = {member: place for place, member in enumerate(self._ring)}

    @cached_property
    def roster_digest(self) -> str:
        """Merkle root over the advertisement digests, 64 hex digits."""
        return roster_digest(self.members)

    def __contains__(self, member: str) -> bool:
        return member in self._places

    def neighbors(self, member: str) -> tuple[str, ...]:
        """Return the neighbors of a member, in ascending order of their digests.

        Raises:
            KeyError: There is no such member.
        """
        place, size = self._places[member], len(self._ring)
        count = self.parameters.neighbor_count
        if count == size - 1:
            return tuple(item for item in self.members if item != member)
        steps = range(1, count // 2 + 1)
        near = [self._ring[(place + sign * step) % size] for step in steps for sign in (1, -1)]
        return tuple(sorted(near))

    def are_neighbors(self, first: str, second: str) -> bool:
        """Return whether two members are neighbors."""
        if first == second:
            return False
        distance, size = abs(self._places[first] - self._places[second]), len(self._ring)
        return (
            self.parameters.neighbor_count == size - 1
            or min(distance, size - distance) <= self.parameters.neighbor_count // 2
        )

    def point(self, member: str) -> int:
        """Return the abscissa of the shares that a member holds: its place in the roster, from 1."""
        return self._points[member]

    @cached_property
    def _points(self) -> dict[str, int]:
        return {member: point for point, member in enumerate(self.members, 1)}

    def _order(self, member: str) -> bytes:
        roster, item = bytes.fromhex(self.roster_digest), bytes.fromhex(member)
        return tagged_hash(_ORDER_TAG, roster, item)
