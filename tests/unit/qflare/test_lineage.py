"""Versions: the chain they form, what breaks it, and who is in them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.evidence.lineage import (
    ModelVersion,
    contribution_proof,
    contributors_digest,
    open_model,
    sign_model,
    verify_chain,
    verify_contribution,
)
from qflare.evidence.statements import StatementError, StatementMismatchError, digest_of
from qflare.v1 import security_pb2, training_pb2

KEY, OTHER_KEY = SigningKey.generate(), SigningKey.generate()
UPDATES = [b"update %d" % n for n in range(7)]
DIGESTS = [digest_of(payload) for payload in UPDATES]


def model(version: int, parent: str = "", **changes: Any) -> security_pb2.ModelStatement:
    initial = version == 0
    statement = security_pb2.ModelStatement(
        realm="realm",
        training_session_id="session",
        version=version,
        parent_digest=parent,
        base_version=version - 1,
        round_number=version,
        layout_digest="ab" * 32,
        size_bytes=10,
        payload_digest=f"{version:064x}",
        contributor_count=0 if initial else len(UPDATES),
        contributors_digest="" if initial else contributors_digest(DIGESTS),
        weight_sum=0 if initial else 70,
        metrics={"loss": 1.0},
    )
    for name, value in changes.items():
        setattr(statement, name, value)
    return statement


def chain(length: int, **last: Any) -> list[security_pb2.SignedEnvelope]:
    envelopes: list[security_pb2.SignedEnvelope] = []
    parent = ""
    for version in range(length):
        changes = last if version == length - 1 else {}
        envelopes.append(sign_model(KEY, model(version, parent, **changes)))
        parent = digest_of(envelopes[-1].payload)
    return envelopes


CHAIN = chain(5)


def followed(
    envelopes: list[security_pb2.SignedEnvelope],
    known: ModelVersion | None = None,
    *,
    realm: str = "realm",
    session: str = "session",
    key: SigningKey = KEY,
) -> list[ModelVersion]:
    return verify_chain(
        envelopes, [key.public], realm=realm, training_session_id=session, known=known
    )


VERSIONS = followed(CHAIN)


def test_a_whole_chain_is_followed() -> None:
    assert [version.statement.version for version in VERSIONS] == [0, 1, 2, 3, 4]
    assert VERSIONS[2].digest == VERSIONS[3].statement.parent_digest


def test_a_chain_goes_on_from_the_known_version() -> None:
    assert followed(CHAIN[3:], VERSIONS[2]) == VERSIONS[3:]


def test_the_known_version_may_come_again() -> None:
    assert followed(CHAIN[2:], VERSIONS[2]) == VERSIONS[2:]


def test_a_fresh_device_takes_the_first_on_its_signature() -> None:
    assert followed(CHAIN[3:]) == VERSIONS[3:]


def test_no_statement_leads_nowhere() -> None:
    assert followed([], VERSIONS[2]) == []


def test_a_missing_link_is_refused() -> None:
    with pytest.raises(StatementMismatchError):
        followed(CHAIN[4:], VERSIONS[2])
    with pytest.raises(StatementMismatchError):
        followed([*CHAIN[:2], *CHAIN[3:]])


def test_an_earlier_version_is_refused() -> None:
    with pytest.raises(StatementMismatchError):
        followed([CHAIN[1]], VERSIONS[2])
    with pytest.raises(StatementMismatchError):
        followed([CHAIN[3], CHAIN[3]], VERSIONS[2])


def test_a_fork_is_refused() -> None:
    fork = chain(3, weight_sum=71.0)

    with pytest.raises(StatementMismatchError):
        followed([fork[2]], VERSIONS[2])
    with pytest.raises(StatementMismatchError):
        followed([fork[2], CHAIN[3]])


def test_another_realm_or_session_is_refused() -> None:
    with pytest.raises(StatementMismatchError):
        followed(CHAIN, realm="other")
    with pytest.raises(StatementMismatchError):
        followed(CHAIN, session="other")


def test_another_key_or_context_is_refused() -> None:
    with pytest.raises(StatementError):
        followed(CHAIN, key=OTHER_KEY)
    with pytest.raises(StatementError):
        followed([sign_envelope(KEY, SigningContext.UPDATE, model(0))])


def test_a_rollback_restores_an_earlier_payload() -> None:
    restored = {"rollback_version": 1, "payload_digest": f"{1:064x}"}

    versions = followed(chain(4, contributor_count=0, contributors_digest="", **restored))

    assert versions[3].statement.payload_digest == versions[1].statement.payload_digest


@pytest.mark.parametrize(
    "difference", [{"payload_digest": "00" * 32}, {"layout_digest": "00" * 32}, {"size_bytes": 11}]
)
def test_a_rollback_to_something_else_is_refused(difference: dict[str, Any]) -> None:
    restored = {"rollback_version": 1, "payload_digest": f"{1:064x}"} | difference

    with pytest.raises(StatementMismatchError):
        followed(chain(4, **restored))


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (0, {"parent_digest": "ab" * 32}),
        (0, {"base_version": 0}),
        (0, {"rollback_version": 0}),
        (1, {"parent_digest": ""}),
        (1, {"base_version": 1}),
        (1, {"base_version": -2}),
        (1, {"rollback_version": 1}),
        (1, {"rollback_version": -1}),
        (1, {"realm": ""}),
        (1, {"training_session_id": ""}),
        (1, {"layout_digest": ""}),
        (1, {"payload_digest": "AB" * 32}),
        (1, {"size_bytes": -1}),
        (1, {"example_count": -1}),
        (1, {"contributor_count": 0}),
        (1, {"contributor_count": -1}),
        (1, {"contributors_digest": ""}),
        (1, {"weight_sum": -1.0}),
        (1, {"weight_sum": float("nan")}),
        (-1, {}),
    ],
)
def test_a_malformed_statement_is_neither_signed_nor_opened(
    version: int, changes: dict[str, Any]
) -> None:
    malformed = model(version, "ab" * 32 if version else "", **changes)

    with pytest.raises(StatementError):
        sign_model(KEY, malformed)
    with pytest.raises(StatementError):
        followed([sign_envelope(KEY, SigningContext.MODEL, malformed)])


def with_download(version: int, parent: str = "", **changes: Any) -> security_pb2.ModelStatement:
    facts = {"encoding": 2, "size_bytes": 5, "payload_digest": "cd" * 32, **changes}
    statement = model(version, parent)
    statement.download.CopyFrom(training_pb2.EncodedPayload(**facts))
    return statement


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": 0},
        {"encoding": 1},
        {"encoding": 4},
        {"encoding": 99},
        {"size_bytes": -1},
        {"payload_digest": ""},
        {"payload_digest": "CD" * 32},
    ],
)
def test_a_malformed_download_is_neither_signed_nor_opened(changes: dict[str, Any]) -> None:
    malformed = with_download(0, **changes)

    with pytest.raises(StatementError, match=r"download|digest"):
        sign_model(KEY, malformed)
    with pytest.raises(StatementError, match=r"download|digest"):
        followed([sign_envelope(KEY, SigningContext.MODEL, malformed)])


@pytest.mark.parametrize("digest", ["cd" * 32, "ce" * 32])
def test_a_rollback_restores_the_download_as_well(digest: str) -> None:
    first = sign_model(KEY, with_download(0))
    second = with_download(1, digest_of(first.payload), payload_digest=digest)
    second.rollback_version = 0
    second.payload_digest = model(0).payload_digest
    envelopes = [first, sign_model(KEY, second)]

    if digest == "cd" * 32:
        assert len(followed(envelopes)) == 2
        return
    with pytest.raises(StatementMismatchError, match="download"):
        followed(envelopes)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_signed_garbage_is_refused(payload: bytes) -> None:
    envelope = sign_envelope(KEY, SigningContext.MODEL, payload)

    with pytest.raises(StatementError):
        open_model(envelope, [KEY.public], realm="realm", training_session_id="session")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused(data: st.DataObject) -> None:
    changed = security_pb2.SignedEnvelope.FromString(CHAIN[2].SerializeToString())
    payload = bytearray(changed.payload)
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[bit // 8] ^= 1 << bit % 8
    changed.payload = bytes(payload)

    with pytest.raises(StatementError):
        followed([*CHAIN[:2], changed])


@given(st.permutations(DIGESTS))
def test_the_order_of_contributors_does_not_matter(digests: list[str]) -> None:
    assert contributors_digest(digests) == VERSIONS[1].statement.contributors_digest


def test_no_contributor_has_no_digest() -> None:
    assert contributors_digest([]) == ""


def test_a_contributor_counts_once() -> None:
    with pytest.raises(StatementError):
        contributors_digest([*DIGESTS, DIGESTS[0]])


@pytest.mark.parametrize("index", range(len(UPDATES)))
def test_every_contributor_is_shown_to_be_in(index: int) -> None:
    proof = contribution_proof(DIGESTS, DIGESTS[index])

    verify_contribution(VERSIONS[1].statement, UPDATES[index], proof)


def test_an_update_that_is_not_in_has_no_proof() -> None:
    for absent in ("00" * 32, "ff" * 32, digest_of(b"other")):
        with pytest.raises(StatementError):
            contribution_proof(DIGESTS, absent)


def test_a_proof_of_another_update_or_version_is_refused() -> None:
    proof = contribution_proof(DIGESTS, DIGESTS[0])
    fewer = contribution_proof(DIGESTS[:6], DIGESTS[0])
    statement = VERSIONS[1].statement

    for version, payload, shown in [
        (statement, b"other", proof),
        (statement, UPDATES[1], proof),
        (statement, UPDATES[0], fewer),
        (VERSIONS[0].statement, UPDATES[0], proof),
        (statement, UPDATES[0], security_pb2.InclusionProof()),
    ]:
        with pytest.raises(StatementError):
            verify_contribution(version, payload, shown)


# Sealed versions.

SEALED = {
    "sealed": True,
    "wire_digest": "cd" * 32,
    "sealed_header_digest": "ef" * 32,
    "sealed_version": 3,
}


def test_a_sealed_version_says_how_it_is_sealed() -> None:
    (version,) = followed([sign_model(KEY, model(3, "ab" * 32, **SEALED))])

    assert version.statement.sealed


@pytest.mark.parametrize(
    "changes",
    [
        {"wire_digest": ""},
        {"sealed_header_digest": ""},
        {"sealed_header_digest": "EF" * 32},
        {"sealed_version": 2},
        {"sealed_version": 4},
        {"sealed": False},
        {"rollback_version": 1},
        {"rollback_version": 1, "sealed_version": 2},
        {"rollback_version": 1, "sealed_version": -1},
    ],
)
def test_a_sealed_version_that_contradicts_itself_is_not_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(StatementError):
        sign_model(KEY, model(3, "ab" * 32, **(SEALED | changes)))


def test_a_sealed_version_names_the_version_that_it_was_sealed_for() -> None:
    statement = model(3, "ab" * 32, **SEALED)
    statement.ClearField("sealed_version")

    with pytest.raises(StatementError):
        sign_model(KEY, statement)


def test_a_rollback_may_restore_what_a_rollback_has_restored() -> None:
    changes = SEALED | {"rollback_version": 2, "sealed_version": 0}

    assert sign_model(KEY, model(3, "ab" * 32, **changes)).signatures
