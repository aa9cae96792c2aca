"""Hash updates that avoid contention for the interpreter lock between many threads.

hashlib releases the interpreter lock for inputs of 2,048 bytes and more. For megabytes this allows cores to hash in
parallel. For a few kilobytes, hashed in microseconds, reacquiring the lock in a busy server costs more than the hash.
"""

import hashlib
from typing import Final

LOCKED_BYTES: Final = 2047
"""Most bytes that hashlib takes without letting go of the lock (``HASHLIB_GIL_MINSIZE`` of CPython)."""

SHORT_BYTES: Final = 16_384
"""Up to here data is fed in such pieces: eight calls, four microseconds."""


def feed(digest: "hashlib._Hash", data: bytes | bytearray | memoryview) -> None:
    """Add data to a hash.

    Args:
        digest: Hash object to update.
        data: Contiguous buffer of bytes.
    """
    if not LOCKED_BYTES < len(data) <= SHORT_BYTES:
        digest.update(data)
        return
    view = memoryview(data)
    for start in range(0, len(view), LOCKED_BYTES):
        digest.update(view[start : start + LOCKED_BYTES])
