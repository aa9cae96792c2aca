"""Proof of possession of the session key: for token refreshes and, if required, for every call.

With these proofs a stolen bearer token is useless without the session's binding key, which is
never transmitted (`qflare.protocol.login`). With H from `qflare.crypto.signing.tagged_hash` and all of it under
HMAC-SHA256 with the binding key:

* refresh: H("qflare/v1/refresh", session id, SHA-256(refresh token), nonce); the grant that answers
  it is sealed under HKDF-Expand(binding key, "qflare/v1/refresh grant" || that hash),
* call: metadata ``qf-pop-bin`` = sequence number (8 bytes big-endian) || MAC over
  H("qflare/v1/pop", method, sequence number, SHA-256(access token), SHA-256(first message)).

Sequence numbers of one access token never repeat. The coordinator records each in its database, so that a call is
accepted only once across all replicas.
"""

import hashlib
import itertools
import os
import struct
import threading
from dataclasses import dataclass, field
from typing import Final

from qflare.crypto.signing import tagged_hash
from qflare.crypto.symmetric import SECRET_BYTES, check_mac, hkdf_expand, mac
from qflare.protocol.handshake import NONCE_BYTES, refusing, require
from qflare.protocol.login import open_grant, seal_grant
from qflare.v1 import security_pb2

METADATA_KEY: Final = "qf-pop-bin"
"""Metadata of a call that carries its proof."""

"""How far a sequence number may lie behind the highest that has come."""

_SEQUENCE: Final = struct.Struct(">Q")


@dataclass(frozen=True)
class Refresh:
    """One refresh, on either side.

    Attributes:
        request: What the device sends.
    """

    request: security_pb2.SessionRefresh = field(repr=False)
    _grant_key: bytes = field(repr=False)

    @classmethod
    def start(cls, binding_key: bytes, session_id: str, refresh_token: str) -> "Refresh":
        """Request the next tokens (device side)."""
        request = security_pb2.SessionRefresh(
            session_id=session_id, refresh_token=refresh_token, nonce=os.urandom(NONCE_BYTES)
        )
        digest = _refresh_digest(request)
        request.proof = mac(binding_key, digest)
        return cls(request, _grant_key(binding_key, digest))

    @classmethod
    def check(cls, binding_key: bytes, request: security_pb2.SessionRefresh) -> "Refresh":
        """Check a request (coordinator side); the caller looks up the token itself.

        Raises:
            HandshakeError: The proof is not of this session's key over this request.
        """
        require(len(request.nonce) == NONCE_BYTES, "nonce has another length")
        digest = _refresh_digest(request)
        with refusing("proof of the refresh"):
            check_mac(binding_key, digest, request.proof)
        return cls(request, _grant_key(binding_key, digest))

    def seal_grant(self, grant: security_pb2.TokenGrant) -> security_pb2.SealedTokenGrant:
        """Answer the refresh (coordinator side)."""
        return seal_grant(self._grant_key, self.request.session_id, grant)

    def open_grant(self, sealed: security_pb2.SealedTokenGrant) -> security_pb2.TokenGrant:
        """Open the answer (device side).

        Raises:
            HandshakeError: It is not the answer to this refresh.
        """
        return open_grant(self._grant_key, self.request.session_id, sealed)


class CallProver:
    """Proves possession on each call of one access token; thread-safe.

    Args:
        binding_key: Key of the session.
        access_token: The token that the calls carry.
        first_sequence: First sequence number, >= 0; above every number used with this token before.
    """

    def __init__(self, binding_key: bytes, access_token: str, first_sequence: int = 0) -> None:
        self._binding_key = binding_key
        self._access_token = access_token
        self._sequence = itertools.count(first_sequence)
        self._lock = threading.Lock()

    def prove(self, method: str, first_message: bytes) -> bytes:
        """Make the metadata value of one call, 40 bytes.

        Args:
            method: Full name of the method, ``/package.Service/Method``.
            first_message: First or only request message, as it is sent.
        """
        with self._lock:
            sequence = next(self._sequence)
        digest = _call_digest(method, sequence, self._access_token, first_message)
        return _SEQUENCE.pack(sequence) + mac(self._binding_key, digest)


def check_call(
    binding_key: bytes, access_token: str, method: str, first_message: bytes, proof: bytes
) -> int:
    """Check the proof of a call.

    Returns:
        Its sequence number, which must not have been used before.

    Raises:
        HandshakeError: It is malformed or of another key, token, method or message.
    """
    require(len(proof) == _SEQUENCE.size + SECRET_BYTES, "proof of possession has another length")
    (sequence,) = _SEQUENCE.unpack_from(proof)
    digest = _call_digest(method, sequence, access_token, first_message)
    with refusing("proof of possession"):
        check_mac(binding_key, digest, proof[_SEQUENCE.size :])
    return int(sequence)


def _refresh_digest(request: security_pb2.SessionRefresh) -> bytes:
    return tagged_hash(
        "qflare/v1/refresh",
        request.session_id.encode(),
        hashlib.sha256(request.refresh_token.encode()).digest(),
        request.nonce,
    )


def _grant_key(binding_key: bytes, digest: bytes) -> bytes:
    return hkdf_expand(binding_key, b"qflare/v1/refresh grant" + digest)


def _call_digest(method: str, sequence: int, access_token: str, first_message: bytes) -> bytes:
    return tagged_hash(
        "qflare/v1/pop",
        method.encode(),
        _SEQUENCE.pack(sequence),
        hashlib.sha256(access_token.encode()).digest(),
        hashlib.sha256(first_message).digest(),
    )
