"""Time-ordered ids: UUIDs of version 7 (RFC 9562, section 5.7).

Random ids scatter new rows over the pages of a database index, and each touched page is written as a whole.
Time-ordered ids append to the end of the index.
"""

import secrets
import time
import uuid
from typing import Final

RANDOM_BITS: Final = 74
_VERSION: Final = 7 << 76
_VARIANT: Final = 0b10 << 62


def time_ordered(random_bits: int) -> uuid.UUID:
    """Return a new id for the current time.

    Args:
        random_bits: Distinguishes ids of the same millisecond; within [0, 2**RANDOM_BITS).
    """
    high, low = divmod(random_bits, 1 << 62)
    milliseconds = time.time_ns() // 1_000_000
    return uuid.UUID(int=milliseconds << 80 | _VERSION | high << 64 | _VARIANT | low)


def new_update_id() -> str:
    """Return an unguessable id for an update, so that no other device can claim it first."""
    return str(time_ordered(secrets.randbits(RANDOM_BITS)))
