"""Ids that sort by time are what RFC 9562 says of version 7."""

import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.ids import RANDOM_BITS, new_update_id, time_ordered


@given(st.integers(0, 2**RANDOM_BITS - 1))
def test_layout_is_that_of_version_7(random_bits: int) -> None:
    before = time.time_ns() // 10**6
    made = time_ordered(random_bits)
    after = time.time_ns() // 10**6

    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert before <= made.int >> 80 <= after
    assert (made.int >> 64 & 0xFFF) << 62 | made.int & (2**62 - 1) == random_bits


def test_the_example_of_the_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9562, appendix A.6."""
    monkeypatch.setattr(time, "time_ns", lambda: 0x017F22E279B0 * 10**6)

    made = time_ordered(0xCC3 << 62 | 0x18C4DC0C0C07398F)

    assert str(made) == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


def test_updates_have_ids_that_the_coordinator_takes() -> None:
    made = {new_update_id() for _ in range(100)}

    assert len(made) == 100
    assert {str(uuid.UUID(text)) for text in made} == made
