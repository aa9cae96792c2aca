"""Graphs of neighbors: published parameters, the ring, and shares of secrets."""

import hashlib
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.masking.graph_parameters import (
    COMPLETE_UP_TO,
    GraphParameters,
    InfeasibleGroupError,
    group_parameters,
    smallest_graph,
)
from qflare.masking.neighbor_graph import InvalidRosterError, NeighborGraph
from qflare.masking.secret_sharing import PRIME, InvalidShareError, combine, split

PUBLISHED = [
    # devices, corrupt, dropping out, neighbors, threshold; semi-malicious, 40 and 20 bits, from the tests of
    # graph_parameter_finder in google-parfait/federated-compute
    (10, 0.05, 0.05, 2, 2),
    (100, 0.05, 0.05, 16, 11),
    (1_000, 0.05, 0.05, 52, 37),
    (10_000, 0.05, 0.05, 62, 44),
    (10, 0.05, 0.33, 8, 5),
    (100, 0.05, 0.33, 72, 39),
    (1_000, 0.05, 0.33, 398, 223),
    (10_000, 0.05, 0.33, 746, 420),
    (10, 0.33, 0.05, 4, 4),
    (100, 0.33, 0.05, 42, 37),
    (1_000, 0.33, 0.05, 132, 109),
    (10_000, 0.33, 0.05, 178, 146),
    (10, 0.33, 0.0, 4, 4),
    (100, 0.33, 0.0, 26, 26),
    (1_000, 0.33, 0.0, 38, 37),
    (10_000, 0.33, 0.0, 42, 41),
    (10, 0.0, 0.33, 8, 5),
    (100, 0.0, 0.33, 68, 35),
    (1_000, 0.0, 0.33, 228, 115),
    (10_000, 0.0, 0.33, 326, 164),
    (100, 0.3, 0.3, 92, 62),
    (1_000, 0.3, 0.3, 872, 584),
    (10, 0.0, 0.0, 2, 2),
    (1_000, 0.0, 0.0, 2, 2),
]


@pytest.mark.parametrize(("size", "corrupt", "dropout", "neighbors", "threshold"), PUBLISHED)
def test_the_smallest_graph_is_the_published_one(
    size: int, corrupt: float, dropout: float, neighbors: int, threshold: int
) -> None:
    found = smallest_graph(size, corrupt, dropout)
    assert found is not None
    assert (found.neighbor_count, found.threshold) == (neighbors, threshold)


@pytest.mark.parametrize(
    ("size", "corrupt", "dropout", "wanted"),
    [
        (100, 0.2, 0.1, (42, 32)),
        (1_000, 0.2, 0.1, (140, 104)),
        (10_000, 0.2, 0.1, (184, 136)),
        (1_000, 0.1, 0.3, (414, 247)),
        (10_000, 0.1, 0.3, (778, 465)),
    ],
)
def test_groups_have_the_documented_parameters(
    size: int, corrupt: float, dropout: float, wanted: tuple[int, int]
) -> None:
    found = group_parameters(size, corrupt, dropout)
    assert (found.neighbor_count, found.threshold) == wanted


@settings(max_examples=80, deadline=None)
@given(
    st.integers(3, 300), st.sampled_from([0.0, 0.05, 0.2, 0.33]), st.sampled_from([0.0, 0.1, 0.3])
)
def test_no_device_loses_both_secrets_and_no_group_falls_apart(
    size: int, corrupt: float, dropout: float
) -> None:
    try:
        found = group_parameters(size, corrupt, dropout)
    except InfeasibleGroupError:
        assert size <= COMPLETE_UP_TO or corrupt + dropout > 0.5
        return
    count, threshold = found.neighbor_count, found.threshold
    assert 2 * threshold > count >= threshold >= 2
    assert found.max_dropouts >= int(dropout * size)
    if count == size - 1:
        # Every other device may collude that is said to: two sets of t holders still share an honest one.
        assert 2 * threshold - count > int(corrupt * size)
        assert found.max_dropouts <= count - threshold


@pytest.mark.parametrize(
    "arguments",
    [(2, 0.1, 0.1), (10_001, 0.1, 0.1), (5, 0.5, 0.3), (5, -0.1, 0), (5, 0, -0.1), (10, 0.3, 0.3)],
)
def test_impossible_groups_are_refused(arguments: tuple[int, float, float]) -> None:
    with pytest.raises(InfeasibleGroupError):
        group_parameters(*arguments)


def members_of(count: int, salt: str = "") -> list[str]:
    return sorted(hashlib.sha256(f"{salt}{number}".encode()).hexdigest() for number in range(count))


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.integers(1, 20), st.text(max_size=3))
def test_every_member_has_k_neighbors_and_is_theirs(size: int, half: int, salt: str) -> None:
    count = min(2 * half, size - 1)
    graph = NeighborGraph(members_of(size, salt), GraphParameters(size, count, count // 2 + 1, 0))
    for member in graph.members:
        neighbors = graph.neighbors(member)
        assert len(set(neighbors)) == count
        assert member not in neighbors
        assert list(neighbors) == sorted(neighbors)
        for other in graph.members:
            assert graph.are_neighbors(member, other) == (other in neighbors)
            assert graph.are_neighbors(member, other) == graph.are_neighbors(other, member)


def test_each_advertisement_changes_the_order_of_the_whole_ring() -> None:
    members, parameters = members_of(40), GraphParameters(40, 4, 3, 0)
    other = sorted([*members[1:], "00" * 32])
    first, second = NeighborGraph(members, parameters), NeighborGraph(other, parameters)
    kept = members[1:]
    assert first.roster_digest != second.roster_digest
    changed = sum(first.neighbors(item) != second.neighbors(item) for item in kept)
    assert changed > len(kept) // 2


@pytest.mark.parametrize(
    "change",
    [lambda items: items[::-1], lambda items: [items[0], *items[:-1]], lambda items: items[1:]],
)
def test_a_roster_is_sorted_distinct_and_complete(change: object) -> None:
    members = members_of(5)
    with pytest.raises(InvalidRosterError):
        NeighborGraph(change(members), GraphParameters(5, 4, 3, 1))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_t_shares_give_the_secret(secret: bytes, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=20, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))
    for count in range(threshold, len(points) + 1):
        assert combine({point: shares[point] for point in chosen[:count]}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """For each share set below the threshold and each other secret there is a polynomial through both."""
    shares = split(bytes(32), 3, [1, 2, 3])
    for pair in combinations(shares, 2):
        known = {point: shares[point] for point in pair}
        assert {combine({**known, 9: value.to_bytes(33)}) for value in range(4)} != {bytes(32)}


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33), b"\xff" * 33])
def test_a_malformed_share_is_refused(share: bytes) -> None:
    shares = split(b"s" * 32, 2, [1, 2])
    with pytest.raises(InvalidShareError):
        combine({1: shares[1], 2: share})


@pytest.mark.parametrize(
    "arguments",
    [
        (b"", 1, [1]),
        (bytes(32), 0, [1]),
        (bytes(32), 2, [1]),
        (bytes(32), 1, [0]),
        (bytes(32), 2, [1, 1]),
    ],
)
def test_impossible_shares_are_refused(arguments: tuple[bytes, int, list[int]]) -> None:
    with pytest.raises(ValueError, match=r"secret|threshold|points"):
        split(*arguments)


def test_the_field_is_the_smallest_prime_above_256_bits() -> None:
    def may_be_prime(number: int) -> bool:
        return all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13))

    assert [offset for offset in range(1, 298) if may_be_prime(2**256 + offset)] == [297]
