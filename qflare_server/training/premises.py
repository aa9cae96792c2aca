"""Optimistic transactions: repeated when what was read and signed before them has changed.

A key in a hardware module takes tens of milliseconds to sign, and a transaction that waits for it keeps everybody
else waiting. So keys sign beforehand; the transaction checks that what was signed is still what it would write, and is
undone where it is not. Then everything is prepared anew.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from qflare_server.errors import ConflictError

T = TypeVar("T")

ATTEMPTS: Final = 8


class PremisesChangedError(ConflictError):
    """What was prepared for a transaction no longer fits what is stored; nothing was written."""


def repeat(attempt: Callable[[], T]) -> T:
    """Run `attempt`, which prepares and then writes, until what it has prepared still holds when it writes.

    Raises:
        PremisesChangedError: It did not hold any of `ATTEMPTS` times.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except PremisesChangedError:
            continue
    return attempt()
