"""Sealed payloads: segmented authenticated encryption, with the content key wrapped for each recipient.

A payload is cut so that every sealed segment is 1 MiB long (1,048,560 bytes and a tag of 16), the
last one shorter; an empty payload has one empty segment. Sealed, it is a sequence of chunks like any
payload: sent, resumed, stored and hashed by the same rules. Segment i is AES-256-GCM ciphertext and
tag under a key unique to this payload:

* nonce: i as 11 bytes big-endian, then 1 for the last segment and 0 for the others,
* associated data: SHA-256(header) for segment 0, nothing for the others.

So a segment decrypts only at its own index in its own payload, and truncation is detected
(Hoang, Reyhanitabar, Rogaway, Vizar 2015, STREAM).

Header (74 bytes): ``"QFS1"``, suite as 2 bytes (1), size of a sealed segment as 4 bytes,
SHA-256("qflare/v1/dek" || key), context digest. The commitment makes every recipient open with the
same key, which GCM alone does not promise. The key is wrapped to a recipient by
`qflare.crypto.sealing.seal` under an info that names the header and the recipient; it can be unwrapped and
wrapped to others without touching a segment.

Invariants
    No plaintext of a segment is released before its tag is checked. A sealer generates its own key
    and produces one ciphertext per index only, so a nonce is never used for two plaintexts. This
    module does not authenticate the sender: the signed statement does, and it also carries the size
    that both sides pass in here.

Measured on one EPYC core, 100 MB: sealing 4 GB/s (3 where pieces have to be split again), opening 4 GB/s.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qflare.crypto.sealing import SEAL_OVERHEAD_BYTES, Decapsulate, KemPublicKey, open_sealed, seal
from qflare.crypto.signing import tagged_hash
from qflare.crypto.symmetric import SECRET_BYTES, UnsealError, decrypt, encrypt
from qflare.v1 import security_pb2

SEGMENT_BYTES: Final = 1 << 20
"""Sealed bytes of every segment but the last."""

TAG_BYTES: Final = 16
"""What sealing adds to each segment."""

PLAINTEXT_BYTES: Final = SEGMENT_BYTES - TAG_BYTES
"""Plaintext bytes of every segment but the last."""

_SUITE: Final = 1
_MAGIC: Final = b"QFS1"
_HEADER: Final = struct.Struct(">4sHI32s32s")

HEADER_BYTES: Final = _HEADER.size
"""Length of a header."""

WRAPPED_KEY_BYTES: Final = SECRET_BYTES + SEAL_OVERHEAD_BYTES
"""Length of a payload's key, sealed to one recipient."""

Buffer = bytes | bytearray | memoryview


class Direction(StrEnum):
    """Direction of a payload transfer."""

    UPDATE = "update"
    MODEL = "model"
    STATE = "state"
    """Nowhere: what the coordinator keeps of a version for itself, such as an optimizer's vectors."""


@dataclass(frozen=True)
class SealContext:
    """Context that a sealed payload is bound to; it decrypts under no other.

    Attributes:
        realm: Name of the deployment.
        direction: An update to the coordinator or a model to devices.
        training_session_id: Training session.
        number: Round of an update, version of a model.
        update_id: Id of the update, or name of a stored part of a version; empty for a model.
        device_id: Device of an update; empty for a model.
    """

    realm: str
    direction: Direction
    training_session_id: str
    number: int
    update_id: str = ""
    device_id: str = ""

    @classmethod
    def from_update(cls, statement: security_pb2.UpdateStatement) -> Self:
        """Return the context of an update payload."""
        return cls(
            statement.realm,
            Direction.UPDATE,
            statement.training_session_id,
            statement.round_number,
            statement.update_id,
            statement.device_id,
        )

    @classmethod
    def from_model(cls, statement: security_pb2.ModelStatement) -> Self:
        """Return the context of a model payload: the version that it was sealed for."""
        return cls(
            statement.realm,
            Direction.MODEL,
            statement.training_session_id,
            statement.sealed_version,
        )

    def digest(self) -> bytes:
        """Context digest as stored in the header, 32 bytes."""
        return tagged_hash(
            "qflare/v1/seal context",
            self.realm.encode(),
            self.direction.encode(),
            self.training_session_id.encode(),
            struct.pack(">q", self.number),
            self.update_id.encode(),
            self.device_id.encode(),
        )


def segment_count(size_bytes: int) -> int:
    """Number of segments of a payload of `size_bytes` >= 0; at least 1."""
    return max(1, -(-size_bytes // PLAINTEXT_BYTES))


def sealed_size_bytes(size_bytes: int) -> int:
    """Length of all sealed segments of a payload of `size_bytes` >= 0, without the header."""
    return size_bytes + segment_count(size_bytes) * TAG_BYTES


def opened_size_bytes(sealed_bytes: int) -> int:
    """Length of the payload whose sealed segments have `sealed_bytes`; the inverse of `sealed_size_bytes`.

    Raises:
        UnsealError: No payload has sealed segments of this length.
    """
    size_bytes = sealed_bytes - max(1, -(-sealed_bytes // SEGMENT_BYTES)) * TAG_BYTES
    if size_bytes < 0 or sealed_size_bytes(size_bytes) != sealed_bytes:
        raise UnsealError(f"sealed payload has {sealed_bytes} bytes")
    return size_bytes


class PayloadKey:
    """Content key of one sealed payload, with its header.

    A `PayloadSealer` creates one; recipients obtain it by `unwrap`.
    """

    __slots__ = ("_secret", "header")

    header: bytes
    """The 74 bytes before the segments."""

    def __init__(self, secret: bytes, header: bytes) -> None:
        self._secret = secret
        self.header = header

    def wrap(self, recipient: KemPublicKey) -> security_pb2.WrappedKey:
        """Seal the key to a recipient: 1168 bytes.

        Raises:
            UnsealError: The recipient's key is not usable.
        """
        info = _wrap_info(self.header, recipient.key_id)
        sealed_key = seal(recipient, self._secret, info)
        return security_pb2.WrappedKey(recipient_key_id=recipient.key_id, sealed_key=sealed_key)

    @classmethod
    def unwrap(
        cls,
        header: bytes,
        wrapped: security_pb2.WrappedKey,
        context: SealContext,
        decapsulate: Decapsulate,
    ) -> Self:
        """Recover the key of a payload.

        Raises:
            UnsealError: The header is malformed or of another context, or the wrapped key is of
                another recipient or payload, or was changed.
        """
        check_header(header, context)
        info = _wrap_info(header, wrapped.recipient_key_id)
        return cls._committed(open_sealed(decapsulate, wrapped.sealed_key, info), header)

    def store(self, storage_key: bytes, associated: bytes) -> bytes:
        """Encrypt the key under a symmetric one, to be kept beside the payload: 60 bytes.

        Args:
            storage_key: 32 bytes.
            associated: Public context, such as the name of the payload.
        """
        return encrypt(storage_key, self._secret, associated + self.header)

    @classmethod
    def restore(cls, header: bytes, stored: bytes, storage_key: bytes, associated: bytes) -> Self:
        """Recover the key from what `store` made.

        Raises:
            UnsealError: The header is malformed, or the stored key is of another payload or storage key, or was
                changed.
        """
        _parse_header(header)
        return cls._committed(decrypt(storage_key, stored, associated + header), header)

    @classmethod
    def _committed(cls, secret: bytes, header: bytes) -> Self:
        """Return the key if it matches the commitment in the header."""
        commitment, _context_digest = _parse_header(header)
        if len(secret) != SECRET_BYTES or not hmac.compare_digest(_commit(secret), commitment):
            raise UnsealError("wrapped key is not the key of the payload")
        return cls(secret, header)

    def cipher(self) -> AESGCM:
        """The cipher of the segments."""
        return AESGCM(self._secret)


class _Segments:
    """Segment boundaries of one payload, and the nonce and associated data of each segment."""

    def __init__(self, key: PayloadKey, size_bytes: int) -> None:
        if size_bytes < 0:
            raise UnsealError(f"payload size is {size_bytes} bytes")
        self.key = key
        self.count = segment_count(size_bytes)
        self._size_bytes = size_bytes
        self._cipher = key.cipher()
        self._first_associated = hashlib.sha256(key.header).digest()

    def _length(self, index: int) -> int:
        """Plaintext bytes of a segment."""
        if not 0 <= index < self.count:
            raise UnsealError(f"segment {index} of {self.count}")
        return min(PLAINTEXT_BYTES, self._size_bytes - index * PLAINTEXT_BYTES)

    def _binding(self, index: int) -> tuple[bytes, bytes | None]:
        """Nonce and associated data of a segment."""
        last = index == self.count - 1
        nonce = index.to_bytes(11, "big") + bytes([last])
        return nonce, None if index else self._first_associated


class PayloadSealer(_Segments):
    """Seals one payload.

    A segment may be sealed again with the same bytes, for example when an upload resumes.

    Args:
        context: What the payload belongs to.
        size_bytes: Its length, >= 0.
    """

    def __init__(self, context: SealContext, size_bytes: int) -> None:
        secret = os.urandom(SECRET_BYTES)
        header = _HEADER.pack(_MAGIC, _SUITE, SEGMENT_BYTES, _commit(secret), context.digest())
        super().__init__(PayloadKey(secret, header), size_bytes)
        self._tags: dict[int, bytes] = {}

    def seal_segment(self, index: int, plaintext: Buffer) -> bytes:
        """Seal one segment. Segments may be sealed in any order.

        Raises:
            ValueError: The length is not that of the segment, or the bytes are not those already
                sealed for this index.
        """
        if len(plaintext) != self._length(index):
            raise ValueError(f"segment {index} has {len(plaintext)} bytes")
        nonce, associated = self._binding(index)
        sealed = self._cipher.encrypt(nonce, plaintext, associated)
        tag = sealed[-TAG_BYTES:]
        if self._tags.setdefault(index, tag) != tag:
            raise ValueError(f"segment {index} was sealed with other bytes")
        return sealed

    def seal(self, payload: Iterable[Buffer], first: int = 0) -> Iterator[bytes]:
        """Seal a whole payload that comes in pieces of any size; memory stays at two segments.

        Args:
            payload: The payload from its first byte on.
            first: First segment to seal, to resume an interrupted upload.

        Raises:
            ValueError: The pieces do not add up to the size.
        """
        index = -1
        for index, segment in enumerate(cut_pieces(payload, PLAINTEXT_BYTES)):
            if index >= first:
                yield self.seal_segment(index, segment)
        if index != self.count - 1:
            raise ValueError("payload is shorter than its size")


class PayloadOpener(_Segments):
    """Opens one payload.

    Args:
        key: Its key, unwrapped.
        size_bytes: Length of the plaintext, >= 0, from the signed statement.

    Raises:
        UnsealError: The size is negative.
    """

    def open_segment(self, index: int, sealed: Buffer) -> bytes:
        """Open the segment at an index. Segments may be opened in any order.

        Raises:
            UnsealError: It was changed, or belongs to another place or payload.
        """
        if len(sealed) != self._length(index) + TAG_BYTES:
            raise UnsealError(f"segment {index} has {len(sealed)} bytes")
        nonce, associated = self._binding(index)
        try:
            return self._cipher.decrypt(nonce, sealed, associated)
        except InvalidTag as error:
            raise UnsealError(f"segment {index} does not open") from error

    def open(self, sealed: Iterable[Buffer]) -> Iterator[bytes]:
        """Open a whole payload that comes in pieces of any size; memory stays at two segments.

        The output is authentic as a whole only if the iteration ends without an error.

        Raises:
            UnsealError: A segment is missing, too many, changed or out of place.
        """
        index = -1
        for index, segment in enumerate(cut_pieces(sealed, SEGMENT_BYTES)):
            yield self.open_segment(index, segment)
        if index != self.count - 1:
            raise UnsealError("sealed payload ends early")


def cut_pieces(pieces: Iterable[Buffer], size_bytes: int) -> Iterator[memoryview]:
    """Regroup pieces of any size into pieces of `size_bytes`, the last one shorter; yield one empty piece for no input.

    Matching pieces are passed through uncopied. Others share one buffer, so a piece is valid only until the next.
    """
    buffer = memoryview(bytearray(size_bytes))
    filled, emitted = 0, False
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            if not filled and len(view) >= size_bytes:
                yield view[:size_bytes]
                view, emitted = view[size_bytes:], True
                continue
            taken = min(len(view), size_bytes - filled)
            buffer[filled : filled + taken] = view[:taken]
            view, filled = view[taken:], filled + taken
            if filled == size_bytes:
                yield buffer
                filled, emitted = 0, True
    if filled or not emitted:
        yield buffer[:filled]


def _commit(secret: bytes) -> bytes:
    return hashlib.sha256(b"qflare/v1/dek" + secret).digest()


def _wrap_info(header: bytes, recipient_key_id: str) -> bytes:
    return tagged_hash("qflare/v1/seal", header, recipient_key_id.encode())


def check_header(header: bytes, context: SealContext) -> None:
    """Check the format of a header, and that it matches a context.

    Raises:
        UnsealError: The header is malformed, or of another context.
    """
    _commitment, context_digest = _parse_header(header)
    if not hmac.compare_digest(context_digest, context.digest()):
        raise UnsealError("payload was sealed for something else")


def _parse_header(header: bytes) -> tuple[bytes, bytes]:
    """Check the format of a header; return its commitment and context digest."""
    if len(header) != HEADER_BYTES:
        raise UnsealError(f"header has {len(header)} bytes, want {HEADER_BYTES}")
    magic, suite, segment_bytes, commitment, context_digest = _HEADER.unpack(header)
    if (magic, suite, segment_bytes) != (_MAGIC, _SUITE, SEGMENT_BYTES):
        raise UnsealError("header is of an unknown format or suite")
    return commitment, context_digest
