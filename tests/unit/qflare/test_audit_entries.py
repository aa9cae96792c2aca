"""The bytes of audit entries: exact, different for different entries, and silent about people."""

import dataclasses
import hashlib
import struct
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.evidence.audit_entries import Entry, InvalidEntryError, detail_texts

ENTRY = Entry(
    audit_id=7,
    event_type="device.registered",
    actor="admin:alice",
    subject="device:1234",
    peer_address="192.0.2.7:1234",
    authentication_method="token",
    risk_level="medium",
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    salt=bytes(range(16)),
    details={"é": "two", "z": "1"},
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=50)


def by_hand() -> bytes:
    parts = [
        ENTRY.salt,
        b"admin:alice",
        b"device:1234",
        b"192.0.2.7:1234",
        b"z",
        b"1",
        "é".encode(),
        b"two",
    ]
    commitment = hashlib.sha256(b"qflare/v1/audit")
    for part in parts:
        commitment.update(struct.pack(">Q", len(part)) + part)
    head = b"QFAE\x01" + struct.pack(">QqB", 7, 1_767_323_045_678_901, 2)
    return head + b"\x00\x11device.registered\x00\x05token" + commitment.digest()


def test_the_bytes_are_those_of_the_documentation() -> None:
    assert ENTRY.to_bytes() == by_hand()


def test_the_leaf_hash_is_that_of_the_bytes() -> None:
    assert ENTRY.leaf_hash() == hashlib.sha256(b"\x00" + by_hand()).digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audit_id", 8),
        ("event_type", "device.registere"),
        ("actor", "admin:alic"),
        ("subject", "edevice:1234"),
        ("peer_address", ""),
        ("authentication_method", "none"),
        ("risk_level", "high"),
        ("created_at", ENTRY.created_at + timedelta(microseconds=1)),
        ("salt", bytes(16)),
        ("details", {"é": "two", "z": "2"}),
        ("details", {"é": "two"}),
    ],
)
def test_every_field_counts(name: str, value: Any) -> None:
    assert dataclasses.replace(ENTRY, **{name: value}).leaf_hash() != ENTRY.leaf_hash()


def test_details_count_in_any_order_the_same() -> None:
    turned = dict(reversed(list(ENTRY.details.items())))

    assert dataclasses.replace(ENTRY, details=turned).leaf_hash() == ENTRY.leaf_hash()


def test_the_zone_of_a_time_does_not_count() -> None:
    moved = ENTRY.created_at.astimezone(timezone(timedelta(hours=5)))

    assert dataclasses.replace(ENTRY, created_at=moved).leaf_hash() == ENTRY.leaf_hash()


def test_a_time_before_1970_has_bytes() -> None:
    early = dataclasses.replace(ENTRY, created_at=datetime(1969, 12, 31, tzinfo=UTC))

    assert early.to_bytes()[13:21] == struct.pack(">q", -86_400_000_000)


def test_the_bytes_name_nobody() -> None:
    data = ENTRY.to_bytes()

    for text in (ENTRY.actor, ENTRY.subject, ENTRY.peer_address):
        assert text.encode() not in data


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audit_id", -1),
        ("audit_id", 2**64),
        ("event_type", "x" * 65_536),
        ("risk_level", "none"),
        ("salt", bytes(15)),
    ],
)
def test_a_field_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidEntryError):
        dataclasses.replace(ENTRY, **{name: value}).to_bytes()


@given(first=st.tuples(TEXTS, TEXTS, TEXTS), second=st.tuples(TEXTS, TEXTS, TEXTS))
def test_fields_do_not_run_together(
    first: tuple[str, str, str], second: tuple[str, str, str]
) -> None:
    def leaf(texts: tuple[str, str, str]) -> bytes:
        actor, subject, event_type = texts
        changed = dataclasses.replace(ENTRY, actor=actor, subject=subject, event_type=event_type)
        return changed.leaf_hash()

    assert (leaf(first) == leaf(second)) == (first == second)


def test_details_that_are_no_text_become_json() -> None:
    details = {
        "text": "5",
        "number": 5,
        "real": 0.1,
        "none": None,
        "nested": {"b": [1, "ü"], "a": True},
    }

    assert detail_texts(details) == {
        "text": "5",
        "number": "5",
        "real": "0.1",
        "none": "null",
        "nested": '{"a":true,"b":[1,"\\u00fc"]}',
    }
