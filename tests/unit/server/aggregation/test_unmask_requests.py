"""Requests to helpers: several updates go into one part, within its bounds."""

from itertools import pairwise
from typing import Final

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_helper.exchange import MAX_MEMBERS, contents_of
from qflare_server.aggregation.unmasking import BATCH, PART_BYTES, packed

LEAST_BYTES: Final = PART_BYTES // 16
"""Of an update: more than any framing of parts and updates together."""


def member(size_bytes: int) -> messages.UnmaskMember:
    payload = bytes(size_bytes)
    return messages.UnmaskMember(statement=security_pb2.SignedEnvelope(payload=payload))


def test_updates_share_parts_within_a_bound_of_bytes() -> None:
    sizes = [1, 0, PART_BYTES // 2, PART_BYTES, 3, PART_BYTES // 3, *[LEAST_BYTES] * 40]
    members = [member(size) for size in sizes]
    parts = list(packed(members))
    assert list(contents_of(iter(parts))) == members
    found = [part.members for part in parts]
    assert all(one.ByteSize() <= PART_BYTES + 1000 for one in found if len(one.members) > 1)
    assert all(
        one.ByteSize() + another.members[0].ByteSize() > PART_BYTES
        for one, another in pairwise(found)
    )
    assert list(packed([])) == []


def test_a_batch_is_no_more_than_a_helper_accepts_in_a_part() -> None:
    assert BATCH <= MAX_MEMBERS
