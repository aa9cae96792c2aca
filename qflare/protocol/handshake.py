"""What enrollment and login share: one error, and the coordinator's memory between two calls.

Between the two calls of a handshake the coordinator keeps nothing: what it has to remember travels
sealed through the device (`seal_state`, `open_state`), under a key that only replicas of the same
coordinator hold. A state opens for the kind of handshake it was made in and until it expires. That
a handshake ends only once is for the caller to hold, in the transaction that records its end.

Everything that is wrong with a message of a handshake is a `HandshakeError`, which is to be
answered with one text: who tries keys or tokens learns nothing from it.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.message import DecodeError

from qflare.crypto.symmetric import decrypt, encrypt, hkdf_expand

NONCE_BYTES: Final = 32
"""Length of every nonce in a handshake."""

KeyedDecapsulate = Callable[[str, bytes], bytes]
"""``decapsulate(key_id, encapsulation)`` by a key of the coordinator; ValueError if it has none such."""

_EXPIRY: Final = struct.Struct(">q")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class HandshakeError(ValueError):
    """A message of a handshake is malformed, forged, replayed out of place or expired."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever bad input raises into a `HandshakeError`.

    Args:
        what: What was read, for the message of the error.
    """
    try:
        yield
    except HandshakeError:
        raise
    except (ValueError, DecodeError) as error:
        raise HandshakeError(f"{what} is not valid") from error


def require(condition: object, problem: str) -> None:
    """Raise a `HandshakeError` that names the problem unless the condition holds."""
    if not condition:
        raise HandshakeError(problem)


def seal_state(key: bytes, kind: str, payload: bytes, expires_at: datetime) -> bytes:
    """Seal what the coordinator has to remember until the next call.

    Args:
        key: 32 random bytes, the same for all replicas.
        kind: The handshake; the state opens for no other.
        payload: What to remember.
        expires_at: Until when, exclusive; aware.
    """
    expiry = _EXPIRY.pack(_microseconds(expires_at))
    return encrypt(_kind_key(key, kind), expiry + payload, kind.encode())


def open_state(key: bytes, kind: str, sealed: bytes, now: datetime) -> bytes:
    """Open what `seal_state` sealed.

    Raises:
        HandshakeError: Another key or kind, changed, or expired.
    """
    with refusing("state of the handshake"):
        opened = decrypt(_kind_key(key, kind), sealed, kind.encode())
        (expiry,) = _EXPIRY.unpack_from(opened)
    require(_microseconds(now) < expiry, "handshake has expired")
    return opened[_EXPIRY.size :]


def _kind_key(key: bytes, kind: str) -> bytes:
    return hkdf_expand(key, b"qflare/v1/state " + kind.encode())


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
