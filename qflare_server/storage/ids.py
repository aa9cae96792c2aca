"""Unique, non-secret identifiers for payloads and requests."""

import os
import random
from typing import Final

from qflare.ids import RANDOM_BITS, time_ordered

_GENERATOR: Final = random.Random()  # noqa: S311 - unique, not secret
"""Not the shared generator, which embedding programs may seed; reseeded in forked processes."""
os.register_at_fork(after_in_child=_GENERATOR.seed)


def unique_name(bits: int) -> str:
    """Return a random identifier as hex digits.

    Comes from a generator that the operating system seeded, not from a system call each time: a system call releases
    the GIL, which costs time on the path of every update. Identifiers are predictable from earlier ones.

    Args:
        bits: Length in bits, a multiple of 4.
    """
    return f"{_GENERATOR.getrandbits(bits):0{bits // 4}x}"


def payload_name() -> str:
    """Return a payload id, 32 hex digits; later ids sort after earlier ones."""
    return time_ordered(_GENERATOR.getrandbits(RANDOM_BITS)).hex
