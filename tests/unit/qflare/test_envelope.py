"""Envelopes: who has to sign, and every way to be signed wrongly."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.envelope import MAX_SIGNATURE_COUNT, add_signature, open_envelope, sign_envelope
from qflare.crypto.signing import (
    MAX_MESSAGE_BYTES,
    Algorithm,
    InvalidSignatureError,
    PublicKey,
    SigningContext,
    SigningKey,
)
from qflare.v1 import security_pb2

FIRST, SECOND, THIRD = (SigningKey.generate() for _ in range(3))
HEAD = security_pb2.TreeHead(origin="realm/audit", size=3)
ENVELOPE = sign_envelope(FIRST, SigningContext.TREE_HEAD, HEAD)


def copy_of(envelope: security_pb2.SignedEnvelope) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope.FromString(envelope.SerializeToString())


def refused(
    envelope: security_pb2.SignedEnvelope,
    *keys: PublicKey,
    context: SigningContext = SigningContext.TREE_HEAD,
    threshold: int = 1,
) -> None:
    with pytest.raises(InvalidSignatureError):
        open_envelope(envelope, context, keys or [FIRST.public], threshold)


def test_the_payload_comes_back_as_it_was_signed() -> None:
    payload = open_envelope(copy_of(ENVELOPE), SigningContext.TREE_HEAD, [FIRST.public])

    assert security_pb2.TreeHead.FromString(payload) == HEAD


def test_bytes_are_signed_as_they_are() -> None:
    envelope = sign_envelope(FIRST, SigningContext.TREE_HEAD, b"any bytes")

    assert open_envelope(envelope, SigningContext.TREE_HEAD, [FIRST.public]) == b"any bytes"


def test_a_threshold_is_met_by_different_keys() -> None:
    both = add_signature(ENVELOPE, SECOND, SigningContext.TREE_HEAD)

    open_envelope(both, SigningContext.TREE_HEAD, [FIRST.public, SECOND.public], threshold=2)


def test_signatures_of_unknown_keys_do_not_count() -> None:
    both = add_signature(ENVELOPE, SECOND, SigningContext.TREE_HEAD)

    refused(both, FIRST.public, THIRD.public, threshold=2)
    refused(both, THIRD.public)


def test_one_key_does_not_count_twice() -> None:
    doubled = copy_of(ENVELOPE)
    doubled.signatures.append(doubled.signatures[0])

    refused(doubled, threshold=2)
    refused(doubled)


def test_one_wrong_signature_of_a_trusted_key_refuses_all() -> None:
    both = add_signature(ENVELOPE, SECOND, SigningContext.TREE_HEAD)
    both.signatures[1].signature = both.signatures[0].signature

    refused(both, FIRST.public, SECOND.public)


def test_no_signature_is_refused() -> None:
    refused(security_pb2.SignedEnvelope(payload=ENVELOPE.payload))


@pytest.mark.parametrize("threshold", [0, -1])
def test_a_threshold_below_one_is_refused(threshold: int) -> None:
    refused(ENVELOPE, threshold=threshold)


def test_another_context_is_refused() -> None:
    refused(ENVELOPE, context=SigningContext.MODEL)


def test_a_downgraded_algorithm_is_refused() -> None:
    strong = SigningKey.generate(Algorithm.ML_DSA_65_ED25519)
    envelope = sign_envelope(strong, SigningContext.TREE_HEAD, HEAD)
    envelope.signatures[0].algorithm = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_65
    envelope.signatures[0].signature = envelope.signatures[0].signature[:3309]

    refused(envelope, strong.public)


def test_a_signature_under_anothers_name_is_refused() -> None:
    renamed = copy_of(ENVELOPE)
    renamed.signatures[0].key_id = SECOND.public.key_id

    refused(renamed, FIRST.public, SECOND.public)


@pytest.mark.parametrize("number", [-1, 0, 1, 3, 99, 2**31 - 1])
def test_a_signature_of_another_or_an_unknown_algorithm_is_refused(number: int) -> None:
    renamed = copy_of(ENVELOPE)
    renamed.signatures[0].algorithm = security_pb2.SignatureAlgorithm.ValueType(number)

    refused(renamed)


def test_a_flipped_bit_in_what_stands_beside_the_signature_is_refused() -> None:
    """All bits of the form: a draw of bits meets mostly the signature."""
    sent = ENVELOPE.SerializeToString()
    begin = sent.index(ENVELOPE.signatures[0].signature)
    end = begin + len(ENVELOPE.signatures[0].signature)

    for place in [*range(begin), *range(end, len(sent))]:
        for bit in range(8):
            flipped = sent[:place] + bytes([sent[place] ^ 1 << bit]) + sent[place + 1 :]
            try:
                received = security_pb2.SignedEnvelope.FromString(flipped)
            except DecodeError:
                continue
            refused(received)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    sent = bytearray(ENVELOPE.SerializeToString())
    bit = data.draw(st.integers(0, len(sent) * 8 - 1))
    sent[bit // 8] ^= 1 << bit % 8

    try:
        received = security_pb2.SignedEnvelope.FromString(bytes(sent))
    except DecodeError:
        return
    refused(received)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(ENVELOPE.SerializeToString()) - 1))
def test_a_truncated_envelope_is_refused(length: int) -> None:
    try:
        received = security_pb2.SignedEnvelope.FromString(ENVELOPE.SerializeToString()[:length])
    except DecodeError:
        return
    refused(received)


def test_a_payload_over_its_limit_is_neither_signed_nor_opened() -> None:
    too_long = b"x" * (MAX_MESSAGE_BYTES + 1)
    with pytest.raises(ValueError, match="want <="):
        sign_envelope(FIRST, SigningContext.TREE_HEAD, too_long)

    forged = copy_of(ENVELOPE)
    forged.payload = too_long
    refused(forged)


def test_too_many_signatures_are_refused_before_any_is_checked() -> None:
    crowded = copy_of(ENVELOPE)
    for number in range(MAX_SIGNATURE_COUNT):
        crowded.signatures.add(key_id=f"{number:064x}")

    refused(crowded)
    with pytest.raises(ValueError, match="full"):
        add_signature(crowded, SECOND, SigningContext.TREE_HEAD)


def test_a_key_adds_its_signature_once() -> None:
    with pytest.raises(ValueError, match="already signed"):
        add_signature(ENVELOPE, FIRST, SigningContext.TREE_HEAD)
