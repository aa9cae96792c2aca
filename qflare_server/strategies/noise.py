"""Gaussian noise with random access, reproducible after a restart.

Element i of a version always gets the same noise, whatever range is requested. After a crash between computing and
publishing, the same noise is released again instead of a second sample. `BoundNoise` makes it:

* Its key is derived by HKDF from a secret seed, the version, the purpose and the updates that are aggregated, so that a
  version made again from other updates, as after a restored backup, has noise of its own.
* Its bits are the keystream of AES-256 in counter mode (the `cryptography` package).
* Each sample is the inverse of the normal distribution function (`scipy.special.ndtri`, extra `privacy`) at a uniform
  number of 64 bits: sign and 63 bits of magnitude, which keep their relative resolution in the tails.
* The noisy aggregate is rounded to float32. Sums of float64 samples reach only some of the numbers around them
  (Mironov 2012, doi:10.1145/2382196.2382264), which tells whether anything was added to a sample; rounded, each number
  stands for a great many of them. For models of float64 this alone is no proof, so private training sessions refuse
  them.

The seed is as sensitive as the updates: anyone who knows it can subtract the noise. A future scipy may compute other
last bits, which rarely survive the rounding: record its version if bytes must repeat for years.

`VersionNoise` is the noise of revision 1: the key depends on seed and version only, the generator is Philox
4x64-10 (Salmon et al. 2011) under numpy's ziggurat, which is not cryptographic. It is kept to recompute
versions of revision 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qflare.crypto.symmetric import hkdf_expand
from qflare_server.strategies.types import Vector

NOISE_BLOCK: Final = 65_536
"""Elements drawn from one generator in revision 1. Part of the meaning of the bytes: never change it."""

MINIMUM_SEED_BYTES: Final = 16
_DOMAIN: Final = b"qflare/strategies/noise/v1"
_BOUND_DOMAIN: Final = b"qflare/strategies/noise/v2"
_SAMPLES_PER_BLOCK: Final = 2
"""A block of AES is two words of 64 bits."""
_AT_ONCE: Final = 262_144
"""Samples generated at once: 2 MiB of keystream, and as much of each intermediate result."""


class Noise(Protocol):
    """The noise of one version."""

    def gaussian(self, purpose: str, start: int, stop: int, stddev: float) -> Vector:
        """Return the noise of elements `start <= i < stop`.

        Args:
            purpose: Purpose of the noise; two purposes never share a sample.
            start: First element.
            stop: One past the last element.
            stddev: Standard deviation, zero or more.

        Returns:
            Float64, shape (stop - start,).
        """

    def rounded(self, values: Vector) -> Vector:
        """Round noisy float64 values to the numbers that are released."""


class BoundNoise:
    """Noise bound to the updates that are aggregated.

    Args:
        seed: The training session's secret, at least `MINIMUM_SEED_BYTES` random bytes.
        version: The version being made.
        updates: Digests of the updates that are aggregated, in any order.

    Raises:
        ValueError: The seed is too short.
    """

    def __init__(self, seed: bytes, version: int, updates: Sequence[str]) -> None:
        _check_seed(seed)
        self._seed = seed
        fields = (str(version).encode(), *(digest.encode() for digest in sorted(updates)))
        self._occasion = sha256(_framed(fields)).digest()

    def gaussian(self, purpose: str, start: int, stop: int, stddev: float) -> Vector:
        """Return the noise of elements `start <= i < stop`; see `Noise`."""
        info = _framed((_BOUND_DOMAIN, purpose.encode(), self._occasion))
        key, samples = hkdf_expand(self._seed, info), np.empty(stop - start)
        for first in range(start, stop, _AT_ONCE):
            last = min(stop, first + _AT_ONCE)
            samples[first - start : last - start] = _normal(_words(key, first, last))
        samples *= stddev
        return samples

    def rounded(self, values: Vector) -> Vector:
        """Round to float32."""
        with np.errstate(over="ignore"):
            return values.astype(np.float32).astype(np.float64)


def _words(key: bytes, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return words `start <= i < stop` of the keystream of AES-256 in counter mode."""
    first = start // _SAMPLES_PER_BLOCK
    cipher = Cipher(algorithms.AES256(key), modes.CTR(first.to_bytes(16, "big")))
    skipped = start - first * _SAMPLES_PER_BLOCK
    stream = cipher.encryptor().update(bytes(8 * (stop - start + skipped)))
    return np.frombuffer(stream, "<u8")[skipped:]


def _normal(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Vector:
    """Turn uniform words into standard normal samples: the lowest bit is the sign, the others the magnitude."""
    from scipy.special import ndtri  # noqa: PLC0415 - only private training sessions need it

    tails = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
    samples: Vector = ndtri(tails)
    np.negative(samples, out=samples, where=(words & np.uint64(1)).astype(np.bool_))
    return samples


@dataclass(frozen=True)
class VersionNoise:
    """Noise of revision 1, which depends on seed and version only.

    Attributes:
        seed: As in `BoundNoise`.
        version: As in `BoundNoise`.
    """

    seed: bytes
    version: int

    def gaussian(self, purpose: str, start: int, stop: int, stddev: float) -> Vector:
        """Return the noise of elements `start <= i < stop`; see `Noise`."""
        return gaussian_slice(noise_key(self.seed, self.version, purpose), start, stop, stddev)

    def rounded(self, values: Vector) -> Vector:
        """Return the values unchanged."""
        return values


def _check_seed(seed: bytes) -> None:
    if len(seed) < MINIMUM_SEED_BYTES:
        raise ValueError(f"noise seed of {len(seed)} bytes is shorter than {MINIMUM_SEED_BYTES}")


def _framed(fields: Sequence[bytes]) -> bytes:
    """Join fields unambiguously: different lists give different bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in fields)


def noise_key(seed: bytes, version: int, purpose: str) -> bytes:
    """Derive the sixteen bytes that address one version's noise for one purpose in revision 1.

    Args:
        seed: The training session's secret, at least `MINIMUM_SEED_BYTES` random bytes.
        version: The version being made.
        purpose: What the noise is for; two purposes never share a sample.

    Raises:
        ValueError: The seed is too short.
    """
    _check_seed(seed)
    fields = (_DOMAIN, purpose.encode(), str(version).encode(), seed)
    return sha256(_framed(fields)).digest()[:16]


def _block(key: bytes, number: int, count: int) -> Vector:
    """Draw the first `count` standard normal samples of one block."""
    words = np.frombuffer(key, dtype="<u8")
    counter = np.array([0, 0, number, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words, counter=counter))
    return generator.standard_normal(count)


def gaussian_slice(key: bytes, start: int, stop: int, stddev: float) -> Vector:
    """Return the noise of elements `start <= i < stop` in revision 1.

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
