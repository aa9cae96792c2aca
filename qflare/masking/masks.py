"""Masks: key streams of AES-256-CTR, added to updates in a ring.

The mask of a seed is the key stream under the key HKDF-Expand(seed, "qflare/v1/mask") with a counter that begins at 0,
read as little-endian integers. Any range of it can be made alone.
"""

import os
import threading
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from qflare.crypto.symmetric import SECRET_BYTES, hkdf_expand
from qflare.tensors import Array

SEED_BYTES: Final = SECRET_BYTES
"""Length of a seed."""

SLICE_BYTES: Final = 2**18
"""Bytes of a mask that are made at once; they stay in a second-level cache."""

_LABEL: Final = b"qflare/v1/mask"
_BLOCK_BYTES: Final = 16
_ZEROS: Final = memoryview(bytes(SLICE_BYTES))
_BUFFER_BYTES: Final = SLICE_BYTES + _BLOCK_BYTES
"""Of a slice, and of the block that the cipher wants to have left behind it."""


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

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the mask.

        Args:
            offset: 0 or more.
            length: At most `SLICE_BYTES`.
        """
        return self.write_to(_BUFFERS.own, offset, length).tobytes()

    def write_to(self, buffer: Array, offset: int, length: int) -> Array:
        """Write bytes of the mask to a buffer, and return the part of it that has them.

        Args:
            buffer: Of `new_buffer`.
            offset: 0 or more.
            length: At most `SLICE_BYTES`.
        """
        written = self._stream(offset).update_into(_ZEROS[:length], buffer.data)
        return buffer[:written]

    def _stream(self, offset: int) -> CipherContext:
        """Return the key stream from an offset on."""
        block, skipped = divmod(offset, _BLOCK_BYTES)
        stream = Cipher(self._key, modes.CTR(block.to_bytes(_BLOCK_BYTES))).encryptor()
        if skipped:
            stream.update(_ZEROS[:skipped])
        return stream

    def add_to(self, values: Array, first: int) -> None:
        """Add the mask to elements of a vector, in place, modulo 2^bits.

        Args:
            values: Unsigned little-endian integers, one dimension.
            first: Index of the first one in the vector.
        """
        self._apply(np.add, values, first)

    def subtract_from(self, values: Array, first: int) -> None:
        """Subtract the mask from elements of a vector, in place, modulo 2^bits; arguments as of `add_to`."""
        self._apply(np.subtract, values, first)

    def _apply(self, operation: np.ufunc, values: Array, first: int) -> None:
        stream, buffer = self._stream(first * values.itemsize), _BUFFERS.own
        drawn, target = buffer[:SLICE_BYTES].view(values.dtype), buffer.data
        for start in range(0, len(values), len(drawn)):
            part = values[start : start + len(drawn)]
            stream.update_into(_ZEROS[: part.nbytes], target)
            operation(part, drawn[: len(part)], out=part)
