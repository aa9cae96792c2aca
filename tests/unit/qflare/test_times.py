"""Times travel as protobuf timestamps."""

from datetime import MAXYEAR, UTC, datetime, timedelta, timezone

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from qflare.times import timestamp_of

ZONES = st.integers(-720, 840).map(lambda minutes: timezone(timedelta(minutes=minutes)))


DAYS = st.datetimes().filter(lambda at: 1 < at.year < MAXYEAR)


@given(DAYS, ZONES)
def test_a_time_of_any_zone_is_what_protobuf_makes_of_it(day: datetime, zone: timezone) -> None:
    at = day.replace(tzinfo=zone)
    wanted = Timestamp()
    wanted.FromDatetime(at)

    assert timestamp_of(at) == wanted
    assert timestamp_of(at).ToDatetime(tzinfo=UTC) == at
