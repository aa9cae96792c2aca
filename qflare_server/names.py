"""Names that nobody else uses, for what is no secret: payloads, requests."""

import random


def unique_name(bits: int) -> str:
    """Return a name of this many random bits as hex digits.

    From a generator that the system has seeded, without a call to the system for each: on the path of every update
    that call costs other threads a turn. Whoever sees names may guess others.

    Args:
        bits: A multiple of 4.
    """
    return f"{random.getrandbits(bits):0{bits // 4}x}"
