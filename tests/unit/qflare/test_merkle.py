"""Merkle trees against the recursive definition of RFC 9162, and proofs that must not pass."""

import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto import merkle
from qflare.crypto.merkle import CompactTree, ProofError

sizes = st.integers(0, 70)


def leaves(count: int) -> list[bytes]:
    return [merkle.leaf_hash(b"%d" % i) for i in range(count)]


def naive_root(hashes: list[bytes]) -> bytes:
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = largest_power_below(len(hashes))
    left, right = naive_root(hashes[:k]), naive_root(hashes[k:])
    return hashlib.sha256(b"\x01" + left + right).digest()


def naive_path(m: int, hashes: list[bytes]) -> list[bytes]:
    if len(hashes) == 1:
        return []
    k = largest_power_below(len(hashes))
    if m < k:
        return [*naive_path(m, hashes[:k]), naive_root(hashes[k:])]
    return [*naive_path(m - k, hashes[k:]), naive_root(hashes[:k])]


def naive_subproof(m: int, hashes: list[bytes], *, whole: bool) -> list[bytes]:
    if m == len(hashes):
        return [] if whole else [naive_root(hashes)]
    k = largest_power_below(len(hashes))
    if m <= k:
        return [*naive_subproof(m, hashes[:k], whole=whole), naive_root(hashes[k:])]
    return [*naive_subproof(m - k, hashes[k:], whole=False), naive_root(hashes[:k])]


def largest_power_below(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


@pytest.mark.parametrize("size", [0, 2047, 2048, 4094, 4095, 16_384, 16_385, 1_000_000])
def test_leaf_of_any_size_is_hashed_as_a_whole(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    wanted = hashlib.sha256(b"\x00" + data[:size]).digest()

    assert merkle.leaf_hash(data[:size]) == wanted
    assert merkle.leaf_hash(memoryview(data)[:size]) == wanted


def test_empty_root_is_the_hash_of_nothing() -> None:
    assert merkle.root([]) == hashlib.sha256(b"").digest()


def test_known_root_of_rfc_6962_reference_leaves() -> None:
    # The eight inputs of the certificate-transparency reference tests and their published root.
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    inputs.append("606162636465666768696a6b6c6d6e6f")
    hashes = [merkle.leaf_hash(bytes.fromhex(data)) for data in inputs]

    expected = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert merkle.root(hashes).hex() == expected


@given(sizes)
def test_root_equals_the_recursive_definition(size: int) -> None:
    hashes = leaves(size)

    assert merkle.root(hashes) == naive_root(hashes)


@given(st.integers(1, 70), st.data())
def test_inclusion_proof_equals_the_definition_and_verifies(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    hashes = leaves(size)

    proof = merkle.inclusion_proof(merkle.nodes_of(hashes), index, size)

    assert proof == naive_path(index, hashes)
    merkle.verify_inclusion(hashes[index], index, size, proof, naive_root(hashes))


@given(sizes, sizes)
def test_consistency_proof_equals_the_definition_and_verifies(a: int, b: int) -> None:
    first, second = sorted((a, b))
    hashes = leaves(second)

    proof = merkle.consistency_proof(merkle.nodes_of(hashes), first, second)

    assert proof == (naive_subproof(first, hashes, whole=True) if first else [])
    old, new = naive_root(hashes[:first]), naive_root(hashes)
    merkle.verify_consistency(first, second, old, new, proof)


@given(sizes, sizes)
def test_proofs_from_stored_nodes_alone(a: int, b: int) -> None:
    first, second = sorted((a + 1, b + 1))
    hashes = leaves(second)
    tree = CompactTree()
    stored: dict[tuple[int, int], bytes] = {}
    for leaf in hashes:
        stored |= {(level, index): part for level, index, part in tree.append(leaf)}

    proof = merkle.inclusion_proof(lambda level, i: stored[level, i], first - 1, second)

    merkle.verify_inclusion(hashes[first - 1], first - 1, second, proof, tree.root())


@given(sizes, sizes)
def test_compact_tree_continues_from_its_hashes(a: int, b: int) -> None:
    hashes = leaves(a + b)
    tree = CompactTree()
    for leaf in hashes[:a]:
        tree.append(leaf)

    resumed = CompactTree(tree.size, tree.hashes)
    for leaf in hashes[a:]:
        resumed.append(leaf)

    assert (resumed.size, resumed.root()) == (a + b, naive_root(hashes))


@given(st.integers(2, 70), st.data())
def test_a_changed_inclusion_proof_is_refused(size: int, data: st.DataObject) -> None:
    hashes = leaves(size)
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(merkle.nodes_of(hashes), index, size)
    changed = data.draw(st.sampled_from([*mutations(proof)]))

    with pytest.raises(ProofError):
        merkle.verify_inclusion(hashes[index], index, size, changed, naive_root(hashes))


@given(st.integers(2, 70), st.data())
def test_inclusion_at_another_index_is_refused(size: int, data: st.DataObject) -> None:
    hashes = leaves(size)
    index, other = data.draw(st.permutations(range(size)))[:2]
    proof = merkle.inclusion_proof(merkle.nodes_of(hashes), index, size)

    with pytest.raises(ProofError):
        merkle.verify_inclusion(hashes[index], other, size, proof, naive_root(hashes))


@given(st.integers(1, 69), st.data())
def test_a_changed_consistency_proof_is_refused(first: int, data: st.DataObject) -> None:
    second = data.draw(st.integers(first + 1, 70))
    hashes = leaves(second)
    proof = merkle.consistency_proof(merkle.nodes_of(hashes), first, second)
    changed = data.draw(st.sampled_from([*mutations(proof)]))

    old, new = naive_root(hashes[:first]), naive_root(hashes)
    with pytest.raises(ProofError):
        merkle.verify_consistency(first, second, old, new, changed)


@given(st.integers(1, 69), st.data())
def test_a_rewritten_history_is_refused(first: int, data: st.DataObject) -> None:
    second = data.draw(st.integers(first, 70))
    hashes = leaves(second)
    rewritten = [merkle.leaf_hash(b"other"), *hashes[1:]]
    proof = merkle.consistency_proof(merkle.nodes_of(rewritten), first, second)

    with pytest.raises(ProofError):
        merkle.verify_consistency(
            first, second, naive_root(hashes[:first]), naive_root(rewritten), proof
        )


def mutations(proof: list[bytes]) -> list[list[bytes]]:
    flipped = [bytes([proof[0][0] ^ 1]) + proof[0][1:], *proof[1:]]
    short = [proof[0][:31], *proof[1:]]
    return [proof[:-1], proof[1:], [*proof, proof[-1]], flipped, short]


def test_a_node_does_not_pass_for_a_leaf() -> None:
    hashes = leaves(4)
    inner = merkle.node_hash(hashes[0], hashes[1])

    assert merkle.leaf_hash(hashes[0] + hashes[1]) != inner


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_an_index_outside_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(ProofError):
        merkle.inclusion_proof(merkle.nodes_of(leaves(3)), index, size)
    with pytest.raises(ProofError):
        merkle.verify_inclusion(merkle.EMPTY_ROOT, index, size, [], merkle.EMPTY_ROOT)


@pytest.mark.parametrize(("first", "second"), [(-1, 3), (3, 2)])
def test_sizes_out_of_order_are_refused(first: int, second: int) -> None:
    with pytest.raises(ProofError):
        merkle.consistency_proof(merkle.nodes_of(leaves(3)), first, second)
    with pytest.raises(ProofError):
        merkle.verify_consistency(first, second, merkle.EMPTY_ROOT, merkle.EMPTY_ROOT, [])


@pytest.mark.parametrize("first", [3, 4, 5])
def test_a_consistency_proof_without_hashes_is_too_short(first: int) -> None:
    hashes = leaves(7)

    with pytest.raises(ProofError, match="too short"):
        merkle.verify_consistency(first, 7, naive_root(hashes[:first]), naive_root(hashes), [])


def test_a_leaf_hash_of_another_length_is_refused() -> None:
    with pytest.raises(ProofError):
        CompactTree().append(b"short")


def test_only_the_empty_root_is_the_root_of_no_leaves() -> None:
    with pytest.raises(ProofError):
        merkle.verify_consistency(0, 1, leaves(1)[0], leaves(1)[0], [])


@pytest.mark.parametrize(("size", "hashes"), [(1, []), (2, leaves(2)), (-1, []), (1, [b"short"])])
def test_a_compact_tree_refuses_hashes_that_do_not_fit(size: int, hashes: list[bytes]) -> None:
    with pytest.raises(ProofError):
        CompactTree(size, hashes)


def test_a_proof_at_a_million_entries_takes_less_than_two_milliseconds() -> None:
    # Any getter serves for the time; the hashes need not belong together.
    def node(level: int, place: int) -> bytes:
        return hashlib.sha256(b"%d/%d" % (level, place)).digest()

    times_s = []
    for index in range(0, 10**6, 99_999):
        started_s = time.perf_counter()
        proof = merkle.inclusion_proof(node, index, 10**6)
        times_s.append(time.perf_counter() - started_s)
        assert len(proof) <= 20

    assert sorted(times_s)[len(times_s) // 2] < 0.002
