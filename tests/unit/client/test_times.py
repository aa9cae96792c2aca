from contextlib import suppress
from datetime import UTC, datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from qflare_client.errors import InvalidStatementError
from qflare_client.times import MAX_DELAY_S, delay_s, moment

SECONDS = st.integers(-(2**63), 2**63 - 1)
NANOS = st.integers(-(2**31), 2**31 - 1)


@given(SECONDS, NANOS)
def test_a_delay_is_at_most_an_hour(seconds: int, nanos: int) -> None:
    assert 0 <= delay_s(Duration(seconds=seconds, nanos=nanos)) <= MAX_DELAY_S


def test_a_delay_is_in_seconds() -> None:
    assert delay_s(Duration(seconds=2, nanos=500_000_000)) == 2.5


@given(SECONDS, NANOS)
def test_a_moment_is_a_datetime_or_a_typed_error(seconds: int, nanos: int) -> None:
    with suppress(InvalidStatementError):
        assert moment(Timestamp(seconds=seconds, nanos=nanos)).tzinfo is UTC


def test_a_moment_is_in_utc() -> None:
    assert moment(Timestamp(seconds=60)) == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)


def test_a_moment_after_the_calendar_is_refused() -> None:
    with pytest.raises(InvalidStatementError):
        moment(Timestamp(seconds=2**50))
