"""Sealed updates, which only the coordinator can decrypt.

`crypto.sealed_payloads` encrypts the payload; this module binds it to the signed statement. A sealed update keeps its
key until it is settled, so that a resumed upload sends the same bytes. If the coordinator has rotated its keys, only
that key is wrapped anew: segments and statement stay, and so do seeds of masks, which are sealed to the update's id.

It does not decide whether to seal; the signed task states that.
"""

import copy
import hashlib
from collections.abc import Iterator
from typing import Protocol, Self

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import PayloadKey, PayloadSealer, SealContext, sealed_size_bytes
from qflare.crypto.sealing import KemPublicKey
from qflare.tensors import BytesLike, Manifest
from qflare.v1 import security_pb2
from qflare_client.models.upload import hashed


class Plain(Protocol):
    """Plaintext payload of an update."""

    @property
    def manifest(self) -> Manifest:
        """Layout of the payload."""

    def pieces(self) -> Iterator[BytesLike]:
        """Return its bytes in pieces of any size."""


class SealedPayload:
    """Payload of an update, sealed for the coordinator.

    Attributes:
        manifest: Layout of the plaintext payload.
        chunk_digests: Leaf hashes of the segments.
        sealed: Header and wrapped key, as transmitted.
        size_bytes: Number of transmitted bytes.

    Args:
        payload: The plaintext payload; its arrays must not change while this is in use.
        statement: Statement of the update, without the fields that sealing adds and the signing key.
        recipient: The coordinator's session KEM key.
    """

    def __init__(
        self,
        payload: Plain,
        statement: security_pb2.UpdateStatement,
        recipient: KemPublicKey,
    ) -> None:
        self.manifest = payload.manifest
        self._payload = payload
        self._sealer = PayloadSealer(
            SealContext.from_update(statement), payload.manifest.size_bytes
        )
        self.size_bytes = sealed_size_bytes(payload.manifest.size_bytes)
        leaf_hashes = list(hashed(self.chunks_from(0)))
        self.chunk_digests = b"".join(leaf_hashes)
        key = self._sealer.key
        self.sealed = wrapped_for(key, recipient)
        statement.sealed = True
        statement.wire_digest = merkle.root(leaf_hashes).hex()
        statement.sealed_header_digest = hashlib.sha256(key.header).hexdigest()

    @property
    def key(self) -> PayloadKey:
        """The key of the segments."""
        return self._sealer.key

    def addressed_to(self, recipient: KemPublicKey) -> Self:
        """Return the same segments with their key wrapped for another key of the coordinator."""
        other = copy.copy(self)
        other.sealed = wrapped_for(self.key, recipient)
        return other

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the segments from a given one on, in order; the bytes are the same every time."""
        return self._sealer.seal(self._payload.pieces(), first)


def wrapped_for(key: PayloadKey, recipient: KemPublicKey) -> security_pb2.SealedPayloadHeader:
    """Return the header of a sealed payload with its key wrapped for one recipient."""
    return security_pb2.SealedPayloadHeader(header=key.header, wrapped_keys=[key.wrap(recipient)])
