"""Expected payloads: layout, size and digests, known from the statement and the header before the first byte."""

from collections.abc import Mapping
from dataclasses import dataclass

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import SealContext, sealed_size_bytes
from qflare.tensors import CHUNK_BYTES, Manifest
from qflare.tensors.elements import ElementRule
from qflare.v1 import security_pb2
from qflare_server.errors import DigestMismatchError, UpdateTooLargeError
from qflare_server.storage.payload_records import HASH_BYTES, split_digests


@dataclass(frozen=True)
class SealedArrival:
    """Sealing of an incoming payload.

    Attributes:
        message: Header, and content key wrapped for the coordinator; well-formed.
        seal_context: Context that the seal must be bound to.
        wire_digest: Merkle root over the segments, 64 hex digits.
    """

    message: security_pb2.SealedPayloadHeader
    seal_context: SealContext
    wire_digest: str


@dataclass(frozen=True)
class ExpectedPayload:
    """Layout, size and digests that an incoming payload must have.

    `digest` and `chunk_digests` are empty if the sender did not state them; the latter are leaf hashes of the chunks on
    the wire. `rules` are checks of single tensors that the encoding adds. `sealed` is set if the payload is sealed.
    """

    manifest: Manifest
    digest: str = ""
    chunk_digests: bytes = b""
    rules: Mapping[str, ElementRule] | None = None
    sealed: SealedArrival | None = None

    @property
    def wire_size_bytes(self) -> int:
        """Size on the wire in bytes."""
        size = self.manifest.size_bytes
        return size if self.sealed is None else sealed_size_bytes(size)

    @property
    def wire_chunk_count(self) -> int:
        """Number of chunks on the wire."""
        return -(-self.wire_size_bytes // CHUNK_BYTES)

    @property
    def wire_digest(self) -> str:
        """Merkle root over the chunks on the wire; empty if the sender did not state it."""
        return self.digest if self.sealed is None else self.sealed.wire_digest

    def check(self, max_payload_bytes: int) -> None:
        """Check size and chunk digests, before the first byte arrives.

        Raises:
            UpdateTooLargeError: The payload is larger than the limit.
            DigestMismatchError: The chunk digests do not match the payload digest.
        """
        size = self.manifest.size_bytes
        if size > max_payload_bytes:
            raise UpdateTooLargeError(
                f"payload: got {size} bytes, want at most {max_payload_bytes}"
            )
        if not self.chunk_digests:
            return
        count = self.wire_chunk_count
        if len(self.chunk_digests) != count * HASH_BYTES:
            raise DigestMismatchError(
                f"chunk_digests: got {len(self.chunk_digests)} bytes, want {count * HASH_BYTES}"
            )
        if merkle.root(split_digests(self.chunk_digests)).hex() != self.wire_digest:
            raise DigestMismatchError(
                "chunk_digests: Merkle root does not match the payload digest"
            )
