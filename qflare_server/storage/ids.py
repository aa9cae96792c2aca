"""Names that nobody else uses, for what is no secret: payloads, requests."""

import os
import random
from typing import Final

from qflare.ids import RANDOM_BITS, time_ordered

_GENERATOR: Final = random.Random()  # noqa: S311 - unique, not secret
"""Its own: programs that embed this one seed the generator that all share, and forked ones must not go on alike."""
os.register_at_fork(after_in_child=_GENERATOR.seed)


def unique_name(bits: int) -> str:
    """Return a name of this many random bits as hex digits.

    From a generator that the system has seeded, without a call to the system for each: on the path of every update
    that call costs other threads a turn. Whoever sees names may guess others.

    Args:
        bits: A multiple of 4.
    """
    return f"{_GENERATOR.getrandbits(bits):0{bits // 4}x}"


def payload_name() -> str:
    """Return a name for a payload, 32 hex digits: later ones sort after earlier ones."""
    return time_ordered(_GENERATOR.getrandbits(RANDOM_BITS)).hex
