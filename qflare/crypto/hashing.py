"""Feeding hashes so that many threads that hash a few kilobytes each do not get in each other's way.

hashlib lets go of the interpreter lock for 2,048 bytes and more. For megabytes that is what lets cores work side by
side; for a few kilobytes, hashed in microseconds, taking the lock back in a busy server costs a turn of the scheduler
and more than the hash itself.
"""

import hashlib
from typing import Final

LOCKED_BYTES: Final = 2047
"""Most bytes that hashlib takes without letting go of the lock (``HASHLIB_GIL_MINSIZE`` of CPython)."""

SHORT_BYTES: Final = 16_384
"""Up to here data is fed in such pieces: eight calls, four microseconds."""


def feed(digest: "hashlib._Hash", data: bytes | memoryview) -> None:
    """Add data to a hash.

    Args:
        digest: Takes it.
        data: Contiguous, of single bytes.
    """
    if not LOCKED_BYTES < len(data) <= SHORT_BYTES:
        digest.update(data)
        return
    view = memoryview(data)
    for start in range(0, len(view), LOCKED_BYTES):
        digest.update(view[start : start + LOCKED_BYTES])
