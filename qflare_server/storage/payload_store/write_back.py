"""Early write-back: the disk writes a file while more of it arrives.

Without it, the last synchronization of a large file would wait for all of its bytes at once, and with it every commit
of a database on the same disk.
"""

import ctypes
import errno
import os
from typing import Final

_WAIT_BEFORE: Final = 1
_WRITE: Final = 2
_WAIT_AFTER: Final = 4
_EARLIER: Final = _WAIT_BEFORE | _WRITE | _WAIT_AFTER
_MISSING: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE})


def write_back(descriptor: int, start: int, end: int) -> bool:
    """Wait until the bytes of a file before `start` are written, and begin to write those up to `end`.

    It synchronizes neither the file's size nor the cache of the disk: only a later fsync makes bytes durable. An error
    of the disk is raised here or by that fsync.

    Args:
        descriptor: Of the file.
        start: Offset of the first byte to begin with; 0 or above.
        end: Offset after the last.

    Returns:
        Whether the system, and the file system, have the call.

    Raises:
        OSError: The disk has reported an error.

    Source: sync_file_range(2).
    """
    if _CALL is None:
        return False
    begins = _CALL(descriptor, start, end - start, _WRITE)
    if begins == 0 and (start == 0 or _CALL(descriptor, 0, start, _EARLIER) == 0):
        return True
    number = ctypes.get_errno()
    if number in _MISSING:
        return False
    raise OSError(number, os.strerror(number))


def _find() -> "ctypes._NamedFuncPointer | None":
    found = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_CALL: Final = _find()
