"""What a payload has to be, known before its first byte: from the statement about it and what its sender adds."""

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
    """How a payload arrives that a device has sealed.

    Attributes:
        message: Header, and key wrapped for the coordinator; their form is checked.
        belongs_to: What the payload has to belong to.
        wire_digest: Root over the segments, 64 hex digits.
    """

    message: security_pb2.SealedPayloadHeader
    belongs_to: SealContext
    wire_digest: str


@dataclass(frozen=True)
class ExpectedPayload:
    """What a payload has to be, known before its first byte.

    `digest` and `chunk_digests` may be empty where the sender did not state them; the latter are those of the chunks
    as they travel. `rules` are those that its encoding adds for single tensors. `sealed` is set where it is sealed.
    """

    manifest: Manifest
    digest: str = ""
    chunk_digests: bytes = b""
    rules: Mapping[str, ElementRule] | None = None
    sealed: SealedArrival | None = None

    @property
    def wire_size_bytes(self) -> int:
        """Bytes that travel."""
        size = self.manifest.size_bytes
        return size if self.sealed is None else sealed_size_bytes(size)

    @property
    def wire_chunk_count(self) -> int:
        """Chunks that travel."""
        return -(-self.wire_size_bytes // CHUNK_BYTES)

    @property
    def wire_digest(self) -> str:
        """Root over the chunks as they travel; empty where the sender did not state it."""
        return self.digest if self.sealed is None else self.sealed.wire_digest

    def check(self, max_payload_bytes: int) -> None:
        """Refuse before the first byte what can never become right.

        Raises:
            UpdateTooLargeError: The payload is over the bound.
            DigestMismatchError: The chunk digests do not belong to the digest.
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
            raise DigestMismatchError("chunk_digests: their Merkle root is not the payload digest")
