"""Time-ordered ids: UUIDs of version 7 (RFC 9562, section 5.7).

Databases keep them in indexes. Random ids put every new row on another page, which is then written as a whole; ids
in the order of time go to the end.
"""

import secrets
import time
import uuid
from typing import Final

RANDOM_BITS: Final = 74
_VERSION: Final = 7 << 76
_VARIANT: Final = 0b10 << 62


def time_ordered(random_bits: int) -> uuid.UUID:
    """Return an id made now.

    Args:
        random_bits: What makes it unique within its millisecond, from 0 to below 2**RANDOM_BITS.
    """
    high, low = divmod(random_bits, 1 << 62)
    milliseconds = time.time_ns() // 1_000_000
    return uuid.UUID(int=milliseconds << 80 | _VERSION | high << 64 | _VARIANT | low)


def new_update_id() -> str:
    """Return an id for an update. Nobody can guess it, so nobody can take it before its device does."""
    return str(time_ordered(secrets.randbits(RANDOM_BITS)))
