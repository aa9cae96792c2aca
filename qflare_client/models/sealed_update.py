"""An update that only the coordinator opens.

`crypto.sealed_payloads` seals; this joins it to the statement that is signed. A sealed update keeps its key
for as long as it is sent, so that an upload that goes on sends the same bytes.

What it does not do: decide whether to seal; a signed task says that.
"""

import hashlib
from collections.abc import Iterator
from typing import Protocol

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import PayloadKey, PayloadSealer, SealContext, sealed_size_bytes
from qflare.crypto.sealing import KemPublicKey
from qflare.tensors import Manifest
from qflare.v1 import security_pb2
from qflare_client.models.upload import hashed


class Plain(Protocol):
    """The bytes of an update before they are sealed."""

    @property
    def manifest(self) -> Manifest:
        """Their layout."""

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the chunks from one on, in order."""


class SealedPayload:
    """The bytes of an update, sealed for the coordinator.

    Attributes:
        manifest: Layout of what is in it.
        chunk_digests: Leaf hashes of the segments.
        sealed: Header and wrapped key, as they travel.
        size_bytes: Bytes that travel.

    Args:
        payload: What is in it; its arrays must not change while this is in use.
        statement: About the update, but for what sealing adds to it here and the key that signs it.
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
        self._sealer = PayloadSealer(SealContext.of_update(statement), payload.manifest.size_bytes)
        self.size_bytes = sealed_size_bytes(payload.manifest.size_bytes)
        leaf_hashes = list(hashed(self.chunks_from(0)))
        self.chunk_digests = b"".join(leaf_hashes)
        key = self._sealer.key
        self.sealed = security_pb2.SealedPayloadHeader(
            header=key.header, wrapped_keys=[key.wrap(recipient)]
        )
        statement.sealed = True
        statement.wire_digest = merkle.root(leaf_hashes).hex()
        statement.sealed_header_digest = hashlib.sha256(key.header).hexdigest()

    @property
    def key(self) -> PayloadKey:
        """The key of the segments."""
        return self._sealer.key

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the segments from one on, in order; the same bytes every time."""
        return self._sealer.seal(self._payload.chunks_from(0), first)
