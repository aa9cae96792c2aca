"""Shared parts of the enrollment and login handshakes: the error type and the sealed handshake state.

The coordinator is stateless between the two calls of a handshake: its state is sealed and passed
through the device (`seal_state`, `open_state`), under a key shared only by replicas of the same
coordinator. A state is valid only for its kind of handshake and until it expires. The caller ensures
that a handshake completes only once, in the transaction that records its completion.

Every invalid handshake message raises `HandshakeError`. Answer all of them with the same text, so that
an attacker who probes keys or tokens learns nothing.
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
    """Convert the exceptions that invalid input raises to `HandshakeError`.

    Args:
        what: Name of the input, for the error message.
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
    """Seal the coordinator's state until the next call.

    Args:
        key: 32 random bytes, the same for all replicas.
        kind: Kind of handshake; the state is valid for no other.
        payload: State to seal.
        expires_at: Expiry time, exclusive, timezone-aware.
    """
    expiry = _EXPIRY.pack(_microseconds(expires_at))
    return encrypt(_kind_key(key, kind), expiry + payload, kind.encode())


def open_state(key: bytes, kind: str, sealed: bytes, now: datetime) -> bytes:
    """Open a state sealed by `seal_state`.

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
