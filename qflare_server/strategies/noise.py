"""Gaussian noise that any slice can be asked for, and that a restart repeats.

Noise comes in blocks of `BLOCK` elements. Each block has a counter-based generator of its own (Philox 4x64-10,
Salmon et al. 2011) whose key is derived from a secret seed, the version and the purpose, and whose counter starts at
the block's number. So element i of version v always gets the same noise, whatever is asked for around it, and a crash
between computing and publishing releases the same noise a second time instead of a second sample.

The seed is as sensitive as the updates: who knows it can subtract the noise. Philox is a statistical generator,
not a cryptographic one, and samples are float64: the guarantee is the one of the real-valued mechanism, and the
attack of Mironov 2012 on the low bits is met only as far as versions are rounded to float32 or shorter. The samples are
those of numpy's ziggurat, which a future numpy may change: record its version where bytes must repeat for years.
"""

from hashlib import sha256
from typing import Final

import numpy as np

from qflare_server.strategies.types import Vector

NOISE_BLOCK: Final = 65_536
"""Elements drawn from one generator. Part of the meaning of the bytes: never change it."""

MINIMUM_SEED_BYTES: Final = 16
_DOMAIN: Final = b"qflare/strategies/noise/v1"


def noise_key(seed: bytes, version: int, purpose: str) -> bytes:
    """Derive the sixteen bytes that address one version's noise for one purpose.

    Args:
        seed: The training session's secret, at least `MINIMUM_SEED_BYTES` random bytes.
        version: The version being made.
        purpose: What the noise is for; two purposes never share a sample.

    Raises:
        ValueError: The seed is too short.
    """
    if len(seed) < MINIMUM_SEED_BYTES:
        raise ValueError(f"noise seed of {len(seed)} bytes is shorter than {MINIMUM_SEED_BYTES}")
    fields = (_DOMAIN, purpose.encode(), str(version).encode(), seed)
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in fields)
    return sha256(framed).digest()[:16]


def _block(key: bytes, number: int, count: int) -> Vector:
    """Draw the first `count` standard normal samples of one block."""
    words = np.frombuffer(key, dtype="<u8")
    counter = np.array([0, 0, number, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words, counter=counter))
    return generator.standard_normal(count)


def gaussian_slice(key: bytes, start: int, stop: int, stddev: float) -> Vector:
    """Give the noise of elements `start <= i < stop`.

    Args:
        key: From `noise_key`.
        start: First element.
        stop: One past the last element.
        stddev: Standard deviation, zero or more.

    Returns:
        Float64, shape (stop - start,).
    """
    pieces = []
    for number in range(start // NOISE_BLOCK, -(-stop // NOISE_BLOCK)):
        first = number * NOISE_BLOCK
        samples = _block(key, number, min(NOISE_BLOCK, stop - first))
        pieces.append(samples[max(0, start - first) :])
    return stddev * np.concatenate(pieces) if pieces else np.empty(0)
