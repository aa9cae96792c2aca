"""Optimistic transactions: retried when the data that was read and signed beforehand has changed.

A hardware module takes tens of milliseconds to sign, and a transaction that waits for it blocks all other writers.
Signatures are therefore made before the transaction. The transaction checks that the signed data is still current;
otherwise it is rolled back and the attempt is repeated.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from qflare_server.errors import ConflictError

T = TypeVar("T")

ATTEMPTS: Final = 8


class PremisesChangedError(ConflictError):
    """The data prepared for a transaction is out of date; nothing was written."""


def repeat(attempt: Callable[[], T]) -> T:
    """Run `attempt`, which prepares and then writes, again while its preparation is out of date.

    Raises:
        PremisesChangedError: All of `ATTEMPTS` attempts failed.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except PremisesChangedError:
            continue
    return attempt()
