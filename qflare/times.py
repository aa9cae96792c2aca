"""Times as protobuf timestamps."""

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS_OF_DAY: Final = 86_400


def timestamp_of(at: datetime) -> Timestamp:
    """Return a time, which names its zone, as a timestamp.

    `Timestamp.FromDatetime` takes three times as long, and lists are full of times.
    """
    since = at - _EPOCH
    return Timestamp(
        seconds=since.days * _SECONDS_OF_DAY + since.seconds, nanos=since.microseconds * 1000
    )
