"""Bounds checks for times and durations in the coordinator's responses.

Responses are unsigned, except for the signed statements in them. A duration of ten years or a timestamp outside of the
calendar is therefore clamped or refused here.
"""

from datetime import UTC, datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from qflare_client.errors import InvalidStatementError

MAX_DELAY_S: Final = 3600.0
"""Longest delay that a coordinator can request, in seconds; longer ones are clamped."""

_NANOS: Final = 1e-9


def delay_s(duration: Duration) -> float:
    """Return a delay in seconds, clamped to 0 to `MAX_DELAY_S`."""
    return min(max(duration.seconds + duration.nanos * _NANOS, 0.0), MAX_DELAY_S)


def moment(timestamp: Timestamp) -> datetime:
    """Return a timestamp as an aware datetime, in UTC.

    Raises:
        InvalidStatementError: It is outside of the years 1 to 9999.
    """
    try:
        return timestamp.ToDatetime(tzinfo=UTC)
    except (OverflowError, ValueError) as error:
        raise InvalidStatementError(f"a time is out of range: {timestamp.seconds} s") from error
