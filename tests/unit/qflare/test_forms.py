"""What is signed is what verifiers take: the signer's check and the verifier's agree, whatever the statement says."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey
from qflare.evidence.forms import FORMS, check_form
from qflare.evidence.lineage import open_model
from qflare.evidence.statements import StatementError, open_task, open_tree_head, open_update
from qflare.protocol.keysets import MAX_KEY_COUNT
from qflare.v1 import security_pb2
from qflare_server.keys.ring import ROLES, generate
from qflare_server.keys.trust_documents import draft_keyset, draft_root
from tests.support.statements import DIGEST, statement_of

KEY = SigningKey.generate(Algorithm.ML_DSA_44)
NAMES = st.text(max_size=101) | st.sampled_from(["", "x" * 100, "x" * 101])
FLOATS = st.floats() | st.just(0.5)
DIGESTS = st.sampled_from([DIGEST, DIGEST, "", "AB" * 32, "ab" * 31])
NUMBERS = st.sampled_from([-2, -1, 0, 1, 1, 2, 2**31 - 1])
METRICS = st.dictionaries(NAMES, FLOATS, max_size=3) | st.just(
    {f"name {number}": 1.0 for number in range(65)}
)
TEXTS = st.sampled_from(["realm", "realm", ""])

MODELS = st.fixed_dictionaries(
    {"realm": TEXTS, "training_session_id": TEXTS, "layout_digest": DIGESTS},
    optional={
        "version": NUMBERS,
        "parent_digest": DIGESTS,
        "base_version": NUMBERS,
        "payload_digest": DIGESTS,
        "size_bytes": NUMBERS,
        "metrics": METRICS,
        "weight_sum": FLOATS,
        "example_count": NUMBERS,
        "contributor_count": NUMBERS,
        "contributors_digest": DIGESTS,
        "rollback_version": NUMBERS,
        "sealed": st.booleans(),
        "wire_digest": DIGESTS,
        "sealed_header_digest": DIGESTS,
        "sealed_version": NUMBERS,
    },
).map(lambda fields: {"payload_digest": DIGEST, "base_version": -1, **fields})
TASKS = st.fixed_dictionaries(
    {
        "realm": TEXTS,
        "training_session_id": TEXTS,
        "round_number": NUMBERS,
        "base_version": NUMBERS,
        "base_digest": DIGESTS,
        "task_nonce": DIGESTS,
        "config_digest": DIGESTS,
    }
)
HEADS = st.fixed_dictionaries(
    {"origin": st.sampled_from(["realm", ""]), "size": NUMBERS, "root_digest": DIGESTS}
)
UPDATES = st.fixed_dictionaries(
    {
        "realm": TEXTS,
        "training_session_id": TEXTS,
        "update_id": TEXTS,
        "device_id": TEXTS,
        "round_number": NUMBERS,
        "base_version": NUMBERS,
        "example_count": NUMBERS,
        "metrics": METRICS,
        "wire_digest": DIGESTS,
        "sealed": st.booleans(),
    }
).map(
    lambda fields: {
        **dict.fromkeys(["task_nonce", "base_digest", "layout_digest", "payload_digest"], DIGEST),
        "key_id": KEY.public.key_id,
        **fields,
    }
)

Envelope = security_pb2.SignedEnvelope
Open = Callable[[Envelope, Any], object]


def _open_head(envelope: Envelope, head: Any) -> object:
    return open_tree_head(envelope, [KEY.public], head.origin)


def _open_task(envelope: Envelope, task: Any) -> object:
    return open_task(envelope, [KEY.public], task.realm)


def _open_model(envelope: Envelope, model: Any) -> object:
    session = model.training_session_id
    return open_model(envelope, [KEY.public], realm=model.realm, training_session_id=session)


def _open_update(envelope: Envelope, _: Any) -> object:
    return open_update(envelope, KEY.public)


def is_taken(context: SigningContext, statement: Any, opened: Open) -> bool:
    try:
        opened(sign_envelope(KEY, context, statement), statement)
    except StatementError:
        return False
    return True


def is_signed(context: SigningContext, statement: Any) -> bool:
    try:
        check_form(context, statement.SerializeToString(deterministic=True))
    except StatementError:
        return False
    return True


@given(MODELS)
def test_versions(fields: dict[str, Any]) -> None:
    statement = security_pb2.ModelStatement(**fields)
    context = SigningContext.MODEL
    assert is_signed(context, statement) == is_taken(context, statement, _open_model)


@given(TASKS)
def test_tasks(fields: dict[str, Any]) -> None:
    statement = security_pb2.TaskStatement(**fields)
    context = SigningContext.TASK
    assert is_signed(context, statement) == is_taken(context, statement, _open_task)


@given(HEADS)
def test_heads(fields: dict[str, Any]) -> None:
    statement = security_pb2.TreeHead(**fields)
    context = SigningContext.TREE_HEAD
    assert is_signed(context, statement) == is_taken(context, statement, _open_head)


@given(UPDATES)
def test_updates(fields: dict[str, Any]) -> None:
    statement = security_pb2.UpdateStatement(**fields)
    context = SigningContext.UPDATE
    assert is_signed(context, statement) == is_taken(context, statement, _open_update)


@given(st.binary(max_size=300), st.sampled_from(sorted(FORMS)))
def test_other_bytes_are_refused_and_stumble_over_nothing(
    payload: bytes, context: SigningContext
) -> None:
    with pytest.raises(StatementError):
        check_form(context, payload)


@pytest.mark.parametrize("context", sorted({*SigningContext} - FORMS.keys()))
def test_what_is_not_published_has_no_form(context: SigningContext) -> None:
    with pytest.raises(StatementError, match="no statement that is published"):
        check_form(context, statement_of(security_pb2.KEY_ROLE_MODEL))


@pytest.mark.parametrize("algorithm", [Algorithm.ML_DSA_65, Algorithm.ML_DSA_87])
def test_a_keyset_after_many_rotations_is_one_that_devices_take(algorithm: Algorithm) -> None:
    keys = [generate(role, algorithm).to_proto() for role in ROLES for _ in range(13)]

    keyset = draft_keyset("realm", 14, 1, keys, datetime(2026, 1, 1, tzinfo=UTC))

    check_form(SigningContext.KEYSET, keyset.SerializeToString(deterministic=True))
    assert len(keyset.keys) <= MAX_KEY_COUNT


def test_a_root_document_of_no_keys_is_refused() -> None:
    root = draft_root("realm", 1, [], 1, datetime(2026, 1, 1, tzinfo=UTC))

    with pytest.raises(StatementError, match="threshold"):
        check_form(SigningContext.ROOT, root.SerializeToString(deterministic=True))
