"""Sealed payloads: any size and cut round-trips; any segment out of its place does not."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.sealed_payloads import (
    HEADER_BYTES,
    PLAINTEXT_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    Direction,
    PayloadKey,
    PayloadOpener,
    PayloadSealer,
    SealContext,
    opened_size_bytes,
    sealed_size_bytes,
    segment_count,
)
from qflare.crypto.sealing import KemKey, UnsealError
from qflare.v1 import security_pb2

KEY = KemKey.generate()
CONTEXT = SealContext("realm", Direction.UPDATE, "session", 3, "update", "device")
PAYLOAD = os.urandom(3 * PLAINTEXT_BYTES + 5)


def sealer_of(payload: bytes) -> PayloadSealer:
    return PayloadSealer(CONTEXT, len(payload))


def opener_for(sealer: PayloadSealer, size_bytes: int) -> PayloadOpener:
    wrapped = sealer.key.wrap(KEY.public)
    key = PayloadKey.unwrap(sealer.key.header, wrapped, CONTEXT, KEY.decapsulate)
    return PayloadOpener(key, size_bytes)


SEALER = sealer_of(PAYLOAD)
SEGMENTS = list(SEALER.seal([PAYLOAD]))
OPENER = opener_for(SEALER, len(PAYLOAD))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(
        [0, 1, PLAINTEXT_BYTES - 1, PLAINTEXT_BYTES, PLAINTEXT_BYTES + 1, len(PAYLOAD)]
    ),
    st.integers(1, 2 * PLAINTEXT_BYTES),
    st.integers(1, 2 * PLAINTEXT_BYTES),
)
def test_any_size_and_any_cut_round_trips(size: int, cut: int, sealed_cut: int) -> None:
    payload, sealer = PAYLOAD[:size], PayloadSealer(CONTEXT, size)
    cut, sealed_cut = max(cut, 4096), max(sealed_cut, 4096)

    sealed = b"".join(sealer.seal(payload[i : i + cut] for i in range(0, size, cut)))
    pieces = (sealed[i : i + sealed_cut] for i in range(0, len(sealed), sealed_cut))

    assert len(sealed) == sealed_size_bytes(size)
    assert b"".join(opener_for(sealer, size).open(pieces)) == payload


def test_sealed_segments_are_as_long_as_chunks() -> None:
    assert [len(segment) for segment in SEGMENTS] == [SEGMENT_BYTES] * 3 + [5 + TAG_BYTES]


def test_segments_open_by_index_in_any_order() -> None:
    opened = {index: OPENER.open_segment(index, SEGMENTS[index]) for index in (3, 0, 2, 1)}

    assert b"".join(opened[index] for index in range(4)) == PAYLOAD


def test_a_resumed_upload_gets_the_same_segments() -> None:
    again = SEALER.seal_segment(1, PAYLOAD[PLAINTEXT_BYTES : 2 * PLAINTEXT_BYTES])

    assert again == SEGMENTS[1]


def test_an_index_is_never_sealed_with_other_bytes() -> None:
    with pytest.raises(ValueError, match="other bytes"):
        SEALER.seal_segment(0, bytes(PLAINTEXT_BYTES))


def swapped(segments: list[bytes]) -> list[bytes]:
    return [segments[1], segments[0], *segments[2:]]


def dropped_first(segments: list[bytes]) -> list[bytes]:
    return segments[1:]


def dropped_middle(segments: list[bytes]) -> list[bytes]:
    return [segments[0], *segments[2:]]


def dropped_last(segments: list[bytes]) -> list[bytes]:
    return segments[:-1]


def doubled(segments: list[bytes]) -> list[bytes]:
    return [segments[0], *segments]


def lengthened(segments: list[bytes]) -> list[bytes]:
    return [*segments, segments[-1]]


def truncated(segments: list[bytes]) -> list[bytes]:
    return [*segments[:-1], segments[-1][:-1]]


def emptied(_segments: list[bytes]) -> list[bytes]:
    return []


@pytest.mark.parametrize(
    "attack",
    [
        swapped,
        dropped_first,
        dropped_middle,
        dropped_last,
        doubled,
        lengthened,
        truncated,
        emptied,
    ],
)
def test_rearranged_segments_are_refused(attack: Callable[[list[bytes]], list[bytes]]) -> None:
    with pytest.raises(UnsealError):
        list(OPENER.open(attack(SEGMENTS)))


def test_a_shorter_size_does_not_end_a_payload_early() -> None:
    shorter = opener_for(SEALER, 2 * PLAINTEXT_BYTES)

    with pytest.raises(UnsealError):
        list(shorter.open(SEGMENTS[:2]))


def test_a_segment_of_another_payload_is_refused() -> None:
    other = sealer_of(PAYLOAD)

    with pytest.raises(UnsealError):
        OPENER.open_segment(
            1, other.seal_segment(1, PAYLOAD[PLAINTEXT_BYTES : 2 * PLAINTEXT_BYTES])
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, (5 + TAG_BYTES) * 8 - 1))
def test_a_flipped_bit_is_refused(bit: int) -> None:
    flipped = bytearray(SEGMENTS[3])
    flipped[bit // 8] ^= 1 << bit % 8

    with pytest.raises(UnsealError):
        OPENER.open_segment(3, flipped)


@pytest.mark.parametrize("index", [-1, 4, 2**88])
def test_an_index_outside_the_payload_is_refused(index: int) -> None:
    with pytest.raises(UnsealError):
        OPENER.open_segment(index, SEGMENTS[3])


def test_pieces_that_do_not_add_up_are_not_sealed() -> None:
    for pieces in ([PAYLOAD, b"x"], [PAYLOAD[:-1]], [PAYLOAD[:PLAINTEXT_BYTES]], []):
        with pytest.raises(ValueError):
            list(PayloadSealer(CONTEXT, len(PAYLOAD)).seal(pieces))


@pytest.mark.parametrize(
    "other",
    [
        replace(CONTEXT, realm="other"),
        replace(CONTEXT, direction=Direction.MODEL),
        replace(CONTEXT, training_session_id="other"),
        replace(CONTEXT, number=4),
        replace(CONTEXT, update_id="other"),
        replace(CONTEXT, device_id="other"),
        replace(CONTEXT, update_id="updatedevice", device_id=""),
    ],
)
def test_another_context_is_refused(other: SealContext) -> None:
    wrapped = SEALER.key.wrap(KEY.public)

    with pytest.raises(UnsealError):
        PayloadKey.unwrap(SEALER.key.header, wrapped, other, KEY.decapsulate)


def test_each_recipient_unwraps_its_own_key_only() -> None:
    other = KemKey.generate()
    wrapped = SEALER.key.wrap(other.public)

    key = PayloadKey.unwrap(SEALER.key.header, wrapped, CONTEXT, other.decapsulate)

    assert b"".join(PayloadOpener(key, len(PAYLOAD)).open(SEGMENTS)) == PAYLOAD
    with pytest.raises(UnsealError):
        PayloadKey.unwrap(SEALER.key.header, wrapped, CONTEXT, KEY.decapsulate)


def test_a_recipient_wraps_the_key_for_another() -> None:
    mine = PayloadKey.unwrap(
        SEALER.key.header, SEALER.key.wrap(KEY.public), CONTEXT, KEY.decapsulate
    )
    other = KemKey.generate()

    key = PayloadKey.unwrap(mine.header, mine.wrap(other.public), CONTEXT, other.decapsulate)

    assert b"".join(PayloadOpener(key, len(PAYLOAD)).open(SEGMENTS)) == PAYLOAD


def test_a_key_wrapped_for_another_payload_is_refused() -> None:
    other = sealer_of(PAYLOAD)

    with pytest.raises(UnsealError):
        PayloadKey.unwrap(SEALER.key.header, other.key.wrap(KEY.public), CONTEXT, KEY.decapsulate)


def test_a_recipient_cannot_give_others_another_key() -> None:
    # What a dishonest sender would try: a second key under the same header.
    forged = PayloadKey(bytes(32), SEALER.key.header).wrap(KEY.public)

    with pytest.raises(UnsealError):
        PayloadKey.unwrap(SEALER.key.header, forged, CONTEXT, KEY.decapsulate)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_a_changed_header_is_refused(bit: int) -> None:
    header = bytearray(SEALER.key.header)
    header[bit // 8] ^= 1 << bit % 8
    wrapped = SEALER.key.wrap(KEY.public)

    with pytest.raises(UnsealError):
        PayloadKey.unwrap(bytes(header), wrapped, CONTEXT, KEY.decapsulate)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=100), st.binary(max_size=1300))
def test_invented_headers_and_keys_are_refused(header: bytes, sealed_key: bytes) -> None:
    wrapped = security_pb2.WrappedKey(recipient_key_id=KEY.public.key_id, sealed_key=sealed_key)

    with pytest.raises(UnsealError):
        PayloadKey.unwrap(header, wrapped, CONTEXT, KEY.decapsulate)
    with pytest.raises(UnsealError):
        PayloadKey.unwrap(SEALER.key.header, wrapped, CONTEXT, KEY.decapsulate)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UnsealError):
        PayloadOpener(SEALER.key, -1)


def test_an_empty_payload_has_one_segment() -> None:
    assert segment_count(0) == 1
    assert sealed_size_bytes(0) == TAG_BYTES
    assert sealed_size_bytes(PLAINTEXT_BYTES + 1) == PLAINTEXT_BYTES + 1 + 2 * TAG_BYTES


# What the coordinator adds: keys at rest, and going on in the middle.


@pytest.mark.parametrize("size", [0, 1, PLAINTEXT_BYTES - 1, PLAINTEXT_BYTES, PLAINTEXT_BYTES + 1])
def test_the_size_of_a_payload_follows_from_its_sealed_size(size: int) -> None:
    assert opened_size_bytes(sealed_size_bytes(size)) == size


@pytest.mark.parametrize("sealed_bytes", [0, 15, SEGMENT_BYTES + 1, SEGMENT_BYTES + 15])
def test_a_sealed_size_that_no_payload_has_is_refused(sealed_bytes: int) -> None:
    with pytest.raises(UnsealError):
        opened_size_bytes(sealed_bytes)


@pytest.mark.parametrize("first", range(5))
def test_sealing_goes_on_in_the_middle_with_the_same_bytes(first: int) -> None:
    assert list(SEALER.seal([PAYLOAD], first)) == SEGMENTS[first:]


STORAGE_KEY = bytes(range(32))


def restored(**changes: bytes) -> PayloadKey:
    stored = SEALER.key.store(STORAGE_KEY, b"payload 1")
    given = {
        "header": SEALER.key.header,
        "stored": stored,
        "storage_key": STORAGE_KEY,
        "associated": b"payload 1",
    }
    return PayloadKey.restore(**(given | changes))


def test_a_stored_key_opens_its_payload() -> None:
    opener = PayloadOpener(restored(), len(PAYLOAD))

    assert b"".join(opener.open(SEGMENTS)) == PAYLOAD


@pytest.mark.parametrize(
    "changes",
    [
        {"storage_key": bytes(32)},
        {"associated": b"payload 2"},
        {"stored": b""},
        {"stored": SEALER.key.store(STORAGE_KEY, b"payload 1")[:-1]},
        {"header": SEALER.key.header[:-1]},
        {"header": sealer_of(PAYLOAD).key.header},
        {"header": b"QFS2" + SEALER.key.header[4:]},
    ],
)
def test_a_stored_key_of_something_else_is_refused(changes: dict[str, bytes]) -> None:
    with pytest.raises(UnsealError):
        restored(**changes)
