"""Masks: key streams of AES-256-CTR, added to updates in a ring.

The mask of a seed is the key stream under the key HKDF-Expand(seed, "qflare/v1/mask") with a counter that begins at 0,
read as little-endian integers. Any range of it can be made alone; a long one from its beginning may take half the time.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from qflare.crypto.symmetric import SECRET_BYTES, hkdf_expand
from qflare.tensors import Array

SEED_BYTES: Final = SECRET_BYTES
"""Length of a seed."""

SLICE_BYTES: Final = 2**18
"""Bytes of a mask that are made at once; they stay in a second-level cache."""

LONG_BYTES: Final = 2**16
"""A shorter range of a mask is not worth a second cipher."""

_LABEL: Final = b"qflare/v1/mask"
_BLOCK_BYTES: Final = 16
_ZEROS: Final = memoryview(bytes(SLICE_BYTES))
_BUFFER_BYTES: Final = SLICE_BYTES + _BLOCK_BYTES
"""Of a slice, and of the block that the cipher wants to have left behind it."""

_GCM_NONCE: Final = bytes(12)
_GCM_BEGIN: Final = 2 * _BLOCK_BYTES
_GCM_END: Final = 2**32 * _BLOCK_BYTES
"""With a nonce of zeros, AES-GCM encrypts with the blocks of these counters: 2 to 2^32 - 1 (NIST SP 800-38D, 7.1)."""

_PROBES: Final = 5


def new_seed() -> bytes:
    """Return a random seed, 32 bytes. One seed masks one update."""
    return os.urandom(SEED_BYTES)


def new_buffer() -> Array:
    """Return memory for a slice of a mask, to be used again: new memory for each costs more than its bytes."""
    return np.empty(_BUFFER_BYTES, np.uint8)


class _Buffers(threading.local):
    """A buffer for each thread."""

    def __init__(self) -> None:
        self.own = new_buffer()


_BUFFERS: Final = _Buffers()


class KeyStream:
    """The bytes of a mask in their order, from an offset on. Not thread-safe.

    AES-GCM has the key stream of AES-CTR from the third block on, and libraries have better code for it: OpenSSL 4.0
    encrypts by it twice as fast as by CTR where the processor works on four blocks at once (VAES). So a stream from the
    beginning goes over to it where that is faster. The authentication tag is never made: nothing here is a ciphertext.

    Args:
        key: Of the key stream.
        offset: Of the first byte.
        wide: Whether to go over to AES-GCM.
    """

    __slots__ = ("_key", "_position", "_until", "_update", "_wide")

    def __init__(self, key: algorithms.AES, offset: int, *, wide: bool) -> None:
        self._key = key
        self._position = self._until = offset
        self._wide = wide and not offset
        self._update: Callable[[memoryview, memoryview], int]

    def write_to(self, buffer: Array, length: int) -> Array:
        """Write the next bytes to a buffer, and return the part of it that has them.

        Args:
            buffer: Of `new_buffer`.
            length: At most `SLICE_BYTES`.
        """
        self._write(_ZEROS[:length], buffer.data)
        return buffer[:length]

    def _write(self, zeros: memoryview, target: memoryview) -> None:
        """Write as many bytes as there are zeros to memory that has room for a block more."""
        length = len(zeros)
        if 0 < length <= self._until - self._position:
            self._update(zeros, target)
            self._position += length
            return
        written = 0
        while written < length:
            if self._position == self._until:
                self._change_cipher()
            count = min(length - written, self._until - self._position)
            self._update(zeros[:count], target[written:])
            self._position += count
            written += count

    def add_to(self, values: Array) -> None:
        """Add the next bytes to a vector, in place, modulo 2^bits: unsigned little-endian integers, one dimension."""
        _apply(np.add, (self,), values)

    def subtract_from(self, values: Array) -> None:
        """Subtract the next bytes from a vector, in place, modulo 2^bits; arguments as of `add_to`."""
        _apply(np.subtract, (self,), values)

    def _change_cipher(self) -> None:
        """Begin with the cipher that makes the bytes from here on, and note where they end."""
        if self._wide and self._position == _GCM_BEGIN:
            self._update = _gcm(self._key).update_into
            self._until = _GCM_END
            return
        block, skipped = divmod(self._position, _BLOCK_BYTES)
        context = _ctr(self._key, block)
        if skipped:
            context.update(_ZEROS[:skipped])
        self._update = context.update_into
        is_first = self._wide and not self._position
        self._until = _GCM_BEGIN if is_first else sys.maxsize


def add_streams(streams: Sequence[KeyStream], values: Array) -> None:
    """Add the next bytes of several streams to a vector, in place, modulo 2^bits.

    Args:
        streams: Each adds as many bytes as the vector has.
        values: Unsigned little-endian integers, one dimension; each slice stays in cache for all streams.
    """
    _apply(np.add, streams, values)


def _apply(operation: np.ufunc, streams: Sequence[KeyStream], values: Array) -> None:
    buffer = _BUFFERS.own
    target = buffer.data
    step, drawn = SLICE_BYTES // values.itemsize, buffer[:SLICE_BYTES].view(values.dtype)
    for start in range(0, len(values), step):
        part = values[start : start + step]
        zeros, mask = _ZEROS[: part.nbytes], drawn[: len(part)]
        for stream in streams:
            stream._write(zeros, target)  # noqa: SLF001 - of the same module
            operation(part, mask, part)


class Mask:
    """Mask of a seed.

    Args:
        seed: 32 bytes.
    """

    __slots__ = ("_key",)

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"seed has {len(seed)} bytes, want {SEED_BYTES}")
        self._key = algorithms.AES(hkdf_expand(seed, _LABEL))

    def stream(self, length: int, offset: int = 0) -> KeyStream:
        """Return bytes of the mask in their order.

        Args:
            length: How many will be read, about: it decides by which cipher they are made.
            offset: Of the first one, 0 or more.
        """
        wide = not offset and length >= LONG_BYTES and is_gcm_faster()
        return KeyStream(self._key, offset, wide=wide)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the mask.

        Args:
            offset: 0 or more.
            length: At most `SLICE_BYTES`.
        """
        return self.stream(length, offset).write_to(_BUFFERS.own, length).tobytes()

    def add_to(self, values: Array, first: int) -> None:
        """Add the mask to elements of a vector, in place, modulo 2^bits.

        Args:
            values: Unsigned little-endian integers, one dimension.
            first: Index of the first one in the vector.
        """
        self.stream(values.nbytes, first * values.itemsize).add_to(values)

    def subtract_from(self, values: Array, first: int) -> None:
        """Subtract the mask from elements of a vector, in place, modulo 2^bits; arguments as of `add_to`."""
        self.stream(values.nbytes, first * values.itemsize).subtract_from(values)


@cache
def is_gcm_faster() -> bool:
    """Tell whether AES-GCM is faster here than AES-CTR, measured once: it depends on processor and library."""
    buffer, key = new_buffer(), algorithms.AES(bytes(SEED_BYTES))

    def best_of(begin: Callable[[], CipherContext]) -> float:
        times = []
        for _ in range(_PROBES):
            begun = time.perf_counter()
            begin().update_into(_ZEROS, buffer.data)
            times.append(time.perf_counter() - begun)
        return min(times)

    by_gcm = best_of(lambda: _gcm(key))
    return by_gcm < best_of(lambda: _ctr(key, 0))


def _gcm(key: algorithms.AES) -> CipherContext:
    return Cipher(key, modes.GCM(_GCM_NONCE)).encryptor()


def _ctr(key: algorithms.AES, block: int) -> CipherContext:
    return Cipher(key, modes.CTR(block.to_bytes(_BLOCK_BYTES))).encryptor()
