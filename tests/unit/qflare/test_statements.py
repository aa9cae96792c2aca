"""Statements: for whom and for what they were made, and nobody and nothing else."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.statements import (
    MAX_METRIC_COUNT,
    StatementError,
    StatementMismatchError,
    UpdateOccasion,
    check_entry,
    check_growth,
    check_update,
    digest_of,
    open_rotation,
    open_task,
    open_tree_head,
    open_update,
    sign_rotation,
    sign_task,
    sign_update,
)
from qflare.v1 import security_pb2

KEY, NEXT_KEY, OTHER_KEY = (SigningKey.generate() for _ in range(3))
KEM_KEY = KemKey.generate()
DIGEST = "ab" * 32
OCCASION = UpdateOccasion(
    realm="realm",
    training_session_id="session",
    round_number=3,
    task_nonce="cd" * 32,
    device_id="device",
    base_version=2,
    base_digest="ef" * 32,
)


def update(**changes: Any) -> security_pb2.UpdateStatement:
    statement = security_pb2.UpdateStatement(
        realm=OCCASION.realm,
        training_session_id=OCCASION.training_session_id,
        round_number=OCCASION.round_number,
        task_nonce=OCCASION.task_nonce,
        update_id="update",
        device_id=OCCASION.device_id,
        key_id=KEY.public.key_id,
        base_version=OCCASION.base_version,
        base_digest=OCCASION.base_digest,
        layout_digest=DIGEST,
        size_bytes=10,
        payload_digest=DIGEST,
        wire_digest=DIGEST,
        example_count=5,
        metrics={"loss": 0.5},
    )
    for name, value in changes.items():
        if name == "metrics":
            statement.metrics.update(value)
        else:
            setattr(statement, name, value)
    return statement


def test_an_update_is_opened_with_its_devices_key() -> None:
    statement = open_update(sign_update(KEY, update()), KEY.public)

    assert statement == update()
    check_update(statement, OCCASION)


def test_a_sealed_update_names_its_header() -> None:
    sealed = update(sealed=True, sealed_header_digest=DIGEST, wire_digest="00" * 32)

    assert open_update(sign_update(KEY, sealed), KEY.public) == sealed


def test_an_update_signed_by_another_key_is_refused() -> None:
    with pytest.raises(StatementError):
        open_update(sign_update(KEY, update()), OTHER_KEY.public)


def test_an_update_in_another_context_is_refused() -> None:
    for context in set(SigningContext) - {SigningContext.UPDATE}:
        with pytest.raises(StatementError):
            open_update(sign_envelope(KEY, context, update()), KEY.public)


def test_an_update_that_names_another_key_is_neither_signed_nor_opened() -> None:
    foreign = update(key_id=OTHER_KEY.public.key_id)

    with pytest.raises(StatementMismatchError):
        sign_update(KEY, foreign)
    with pytest.raises(StatementMismatchError):
        open_update(sign_envelope(KEY, SigningContext.UPDATE, foreign), KEY.public)


@pytest.mark.parametrize("field", [field.name for field in fields(OCCASION)])
def test_an_update_for_another_occasion_is_refused(field: str) -> None:
    value = getattr(OCCASION, field)
    change: dict[str, Any] = {field: value + 1 if isinstance(value, int) else "00" * 32}
    other = replace(OCCASION, **change)

    with pytest.raises(StatementMismatchError) as refused:
        check_update(update(), other)

    assert refused.value.field == field


@pytest.mark.parametrize(
    "changes",
    [
        {"realm": ""},
        {"training_session_id": ""},
        {"update_id": ""},
        {"device_id": ""},
        {"round_number": 0},
        {"base_version": -1},
        {"size_bytes": -1},
        {"example_count": 0},
        {"task_nonce": "AB" * 32},
        {"base_digest": ""},
        {"layout_digest": "xy" * 32},
        {"payload_digest": DIGEST + "00"},
        {"wire_digest": "00" * 32},
        {"sealed_header_digest": DIGEST},
        {"sealed": True},
        {"sealed": True, "sealed_header_digest": DIGEST[:-1]},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"metrics": {"": 1.0}},
        {"metrics": {"x" * 101: 1.0}},
        {"metrics": {str(n): 1.0 for n in range(MAX_METRIC_COUNT)}},
    ],
)
def test_a_malformed_update_is_neither_signed_nor_opened(changes: dict[str, Any]) -> None:
    malformed = update(**changes)

    with pytest.raises(StatementError):
        sign_update(KEY, malformed)
    with pytest.raises(StatementError):
        open_update(sign_envelope(KEY, SigningContext.UPDATE, malformed), KEY.public)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_signed_garbage_is_refused(payload: bytes) -> None:
    update_envelope = sign_envelope(KEY, SigningContext.UPDATE, payload)
    task = sign_envelope(KEY, SigningContext.TASK, payload)
    head = sign_envelope(KEY, SigningContext.TREE_HEAD, payload)
    rotation = sign_envelope(KEY, SigningContext.ROTATION, payload)

    for attempt in (
        lambda: open_update(update_envelope, KEY.public),
        lambda: open_task(task, [KEY.public], "realm"),
        lambda: open_tree_head(head, [KEY.public], "realm/audit"),
        lambda: opened_rotation(rotation),
    ):
        with pytest.raises(StatementError):
            attempt()


SIGNED = sign_update(KEY, update())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused(data: st.DataObject) -> None:
    changed = security_pb2.SignedEnvelope.FromString(SIGNED.SerializeToString())
    payload = bytearray(changed.payload)
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[bit // 8] ^= 1 << bit % 8
    changed.payload = bytes(payload)

    with pytest.raises(StatementError):
        open_update(changed, KEY.public)


def task(**changes: Any) -> security_pb2.TaskStatement:
    statement = security_pb2.TaskStatement(
        realm="realm",
        training_session_id="session",
        round_number=3,
        base_version=2,
        base_digest=DIGEST,
        task_nonce=DIGEST,
        config_digest=DIGEST,
    )
    for name, value in changes.items():
        setattr(statement, name, value)
    return statement


def test_a_task_is_opened_with_a_task_key() -> None:
    envelope = sign_task(KEY, task())

    assert open_task(envelope, [OTHER_KEY.public, KEY.public], "realm") == task()


def test_a_task_of_another_realm_key_or_context_is_refused() -> None:
    envelope = sign_task(KEY, task())

    with pytest.raises(StatementMismatchError):
        open_task(envelope, [KEY.public], "other")
    with pytest.raises(StatementError):
        open_task(envelope, [OTHER_KEY.public], "realm")
    with pytest.raises(StatementError):
        open_task(sign_envelope(KEY, SigningContext.UPDATE, task()), [KEY.public], "realm")


@pytest.mark.parametrize(
    "changes",
    [
        {"realm": ""},
        {"training_session_id": ""},
        {"round_number": 0},
        {"base_version": -1},
        {"base_digest": ""},
        {"task_nonce": "short"},
        {"config_digest": ""},
    ],
)
def test_a_malformed_task_is_not_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(StatementError):
        sign_task(KEY, task(**changes))


def rotation(**changes: Any) -> security_pb2.KeyRotation:
    statement = security_pb2.KeyRotation(
        realm="realm",
        device_id="device",
        sequence_number=3,
        previous_key_id=KEY.public.key_id,
        signature_key=NEXT_KEY.public.to_proto(),
        kem_key=KEM_KEY.public.to_proto(),
    )
    for name, value in changes.items():
        setattr(statement, name, value)
    return statement


def opened_rotation(envelope: security_pb2.SignedEnvelope, rotation_count: int = 2) -> Any:
    return open_rotation(
        envelope, KEY.public, realm="realm", device_id="device", rotation_count=rotation_count
    )


def test_a_rotation_is_signed_by_both_keys() -> None:
    opened = opened_rotation(sign_rotation(KEY, NEXT_KEY, rotation()))

    assert (opened.sequence_number, opened.signature_key) == (3, NEXT_KEY.public)
    assert opened.kem_key == KEM_KEY.public


def test_a_rotation_by_one_key_only_is_refused() -> None:
    for key in (KEY, NEXT_KEY):
        with pytest.raises(StatementError):
            opened_rotation(sign_envelope(key, SigningContext.ROTATION, rotation()))


def test_a_rotation_by_a_stranger_is_refused() -> None:
    with pytest.raises(StatementError):
        opened_rotation(sign_rotation(OTHER_KEY, NEXT_KEY, rotation()))


def test_a_rotation_to_the_same_key_is_refused() -> None:
    same = security_pb2.KeyRotation()
    same.CopyFrom(rotation())
    same.signature_key.CopyFrom(KEY.public.to_proto())

    with pytest.raises(StatementError):
        opened_rotation(sign_envelope(KEY, SigningContext.ROTATION, same))


@pytest.mark.parametrize("rotation_count", [0, 1, 3])
def test_a_replayed_rotation_is_refused(rotation_count: int) -> None:
    with pytest.raises(StatementMismatchError):
        opened_rotation(sign_rotation(KEY, NEXT_KEY, rotation()), rotation_count)


@pytest.mark.parametrize("field", ["realm", "device_id", "previous_key_id"])
def test_a_rotation_for_someone_else_is_refused(field: str) -> None:
    with pytest.raises(StatementMismatchError):
        opened_rotation(sign_rotation(KEY, NEXT_KEY, rotation(**{field: "other"})))


LEAVES = [merkle.leaf_hash(b"%d" % n) for n in range(9)]


def head(size: int, leaves: list[bytes] = LEAVES) -> security_pb2.TreeHead:
    root = merkle.root(leaves[:size]).hex()
    return security_pb2.TreeHead(origin="realm/audit", size=size, root_digest=root)


def consistency(first: int, second: int) -> security_pb2.ConsistencyProof:
    hashes = merkle.consistency_proof(merkle.nodes_of(LEAVES), first, second)
    return security_pb2.ConsistencyProof(
        first_size=first, second_size=second, node_digests=[part.hex() for part in hashes]
    )


def inclusion(index: int, size: int) -> security_pb2.InclusionProof:
    hashes = merkle.inclusion_proof(merkle.nodes_of(LEAVES), index, size)
    return security_pb2.InclusionProof(
        leaf_index=index, tree_size=size, sibling_digests=[part.hex() for part in hashes]
    )


def test_a_head_is_opened_with_a_log_key() -> None:
    envelope = sign_envelope(KEY, SigningContext.TREE_HEAD, head(9))

    assert open_tree_head(envelope, [KEY.public], "realm/audit") == head(9)
    with pytest.raises(StatementMismatchError):
        open_tree_head(envelope, [KEY.public], "other/audit")
    with pytest.raises(StatementError):
        open_tree_head(envelope, [OTHER_KEY.public], "realm/audit")


@pytest.mark.parametrize(("name", "value"), [("size", -1), ("root_digest", "short")])
def test_a_malformed_head_is_refused(name: str, value: Any) -> None:
    malformed = head(9)
    setattr(malformed, name, value)

    with pytest.raises(StatementError):
        open_tree_head(
            sign_envelope(KEY, SigningContext.TREE_HEAD, malformed), [KEY.public], "realm/audit"
        )


@pytest.mark.parametrize("first", range(10))
def test_a_grown_log_is_consistent(first: int) -> None:
    check_growth(head(first), head(9), consistency(first, 9))


def test_a_rewritten_or_shortened_log_is_found_out() -> None:
    rewritten = [merkle.leaf_hash(b"other"), *LEAVES[1:]]
    elsewhere = security_pb2.TreeHead(origin="other", size=9, root_digest=head(9).root_digest)

    for known, current, proof in [
        (head(5, rewritten), head(9), consistency(5, 9)),
        (head(5), head(9, rewritten), consistency(5, 9)),
        (head(9), head(5), consistency(5, 9)),
        (head(5), head(9), consistency(4, 9)),
        (head(5), head(9), consistency(5, 8)),
        (head(5), elsewhere, consistency(5, 9)),
    ]:
        with pytest.raises(StatementError):
            check_growth(known, current, proof)


def test_an_entry_is_shown_to_be_in_the_log() -> None:
    check_entry(head(9), LEAVES[4], inclusion(4, 9))


def changed(proof: security_pb2.InclusionProof, name: str, value: Any) -> Any:
    if name == "sibling_digests":
        proof.sibling_digests[0] = value
    else:
        setattr(proof, name, value)
    return proof


@pytest.mark.parametrize(
    "proof",
    [
        lambda: inclusion(5, 9),
        lambda: inclusion(4, 8),
        lambda: changed(inclusion(4, 9), "leaf_index", -1),
        lambda: changed(inclusion(4, 9), "sibling_digests", "zz" * 32),
        lambda: changed(inclusion(4, 9), "sibling_digests", "00" * 32),
        lambda: changed(inclusion(4, 9), "sibling_digests", ""),
    ],
)
def test_a_wrong_inclusion_proof_is_refused(
    proof: Callable[[], security_pb2.InclusionProof],
) -> None:
    with pytest.raises(StatementError):
        check_entry(head(9), LEAVES[4], proof())


def test_a_payload_is_named_by_its_sha_256() -> None:
    assert digest_of(b"") == merkle.EMPTY_ROOT.hex()
