"""Sealed payloads on their way in and out of the store: what is kept are segments, never what is in them.

`OpeningReceiver` takes what a device has sealed: each segment is hashed as it travels, opened, and looked at; the
segment is kept. `SealingReceiver` takes what the coordinator makes or an administrator uploads, and seals it before it
is kept. `Contents` reads what is in a payload, sealed or not, range by range.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import (
    PLAINTEXT_BYTES,
    Buffer,
    Direction,
    PayloadOpener,
    PayloadSealer,
    SealContext,
    sealed_size_bytes,
)
from qflare.crypto.sealing import UnsealError
from qflare.tensors import PieceHasher
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import DigestMismatchError, InvalidSealError
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.payloads.keys import restore_key, store_key, take_key
from qflare_server.payloads.receiver import Receiver
from qflare_server.storage.payload_records import ReceivedPayload, Seal


class OpeningReceiver(Receiver):
    """Takes the segments of one payload that a device has sealed.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        expected: What the payload has to be, `sealed` set; already checked.
        payload_id: Of an upload that is continued; empty starts a new one.
        first_chunk: Number of chunks that the store already has.
        stored_key: The payload's key at rest, of an upload that is continued; empty takes it from the device's
            header, which needs the coordinator's KEM key.

    Raises:
        InvalidSealError: The header or its key is not what it has to be, or a stored segment does not open.
        SealKeyNotAcceptedError: It is sealed to a key that is no longer accepted.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        expected: ExpectedPayload,
        *,
        payload_id: str = "",
        first_chunk: int = 0,
        stored_key: bytes = b"",
    ) -> None:
        arrival = expected.sealed
        assert arrival is not None
        self._header = arrival.message.header
        key = (
            restore_key(context, payload_id, Seal(self._header, stored_key))
            if stored_key
            else take_key(context, arrival.message, arrival.belongs_to)
        )
        self._opener = PayloadOpener(key, expected.manifest.size_bytes)
        self._content = PieceHasher()
        self._hashing: Future[None] | None = None
        super().__init__(
            context, executor, expected, payload_id=payload_id, first_chunk=first_chunk
        )
        self.stored_key = stored_key or store_key(context, self.payload_id, key)

    def _take_content(self, chunk: bytes) -> None:
        try:
            content = self._opener.open_segment(self.next_index, chunk)
        except UnsealError as error:
            raise InvalidSealError(f"chunk {self.next_index}: {error}") from error
        self._wait_for_hash()
        if (
            self.is_large
        ):  # beside the work on this chunk and the next: hashing leaves the interpreter lock
            self._hashing = self._executor.submit(self._content.feed, content)
        else:
            self._content.feed(content)
        self._check_elements(content)

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            hashing, self._hashing = self._hashing, None
            hashing.result()

    def _seal(self) -> Seal:
        self._wait_for_hash()
        leaves = self._content.finish()
        if merkle.root(leaves).hex() != self._expected.digest:
            raise DigestMismatchError("payload: what is sealed has not the digest that was stated")
        return Seal(self._header, self.stored_key, b"".join(leaves))


class SealingReceiver(Receiver):
    """Takes a payload as it is, and keeps it sealed.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        expected: What the payload has to be before it is sealed; already checked.
        belongs_to: What it belongs to.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        expected: ExpectedPayload,
        belongs_to: SealContext,
    ) -> None:
        super().__init__(context, executor, expected)
        self._kept_bytes = sealed_size_bytes(self._size_bytes)
        self.is_large = self._kept_bytes > context.config.inline_payload_bytes
        self._sealer = PayloadSealer(belongs_to, self._size_bytes)
        self._segments: list[bytes] = []  # their leaf hashes
        self._rest = bytearray()

    def add(self, index: int, chunk: bytes) -> None:
        """Check a chunk, and keep what it completes.

        Raises:
            InvalidUpdateError: It is out of order, of a wrong size, or holds NaN or infinity.
            DigestMismatchError: It is not the chunk that was stated.
        """
        self._check(index, chunk)
        self._rest += chunk
        while len(self._rest) > PLAINTEXT_BYTES:  # the last segment is known by being the rest
            with memoryview(self._rest) as view, view[:PLAINTEXT_BYTES] as content:
                self._keep_segment(content)
            del self._rest[:PLAINTEXT_BYTES]

    def _keep_segment(self, content: Buffer) -> None:
        segment = self._sealer.seal_segment(len(self._segments), content)
        self._segments.append(merkle.leaf_hash(segment))
        self._keep(segment)

    def finish(self) -> ReceivedPayload:
        """Return the whole payload, sealed, and durable if it is large.

        Raises:
            InvalidUpdateError: Chunks are missing.
            DigestMismatchError: The payload is not the one that was stated.
        """
        self._whole_digest()
        self._keep_segment(self._rest)
        key = self._sealer.key
        stored_key = store_key(self._context, self.payload_id, key)
        return ReceivedPayload(
            payload_id=self.payload_id,
            size_bytes=self._kept_bytes,
            digest=merkle.root(self._segments).hex(),
            chunk_digests=b"".join(self._segments),
            data=self._last_batch(),
            seal=Seal(key.header, stored_key, b"".join(self._leaves)),
        )


def seal_context(
    context: Context,
    config: training_pb2.TrainingConfig,
    training_session_id: str,
    version: int,
    state_name: str = "",
) -> SealContext | None:
    """Return what a payload belongs to that the coordinator makes; None where nothing is sealed.

    Args:
        context: The coordinator's parts.
        config: Of the training session.
        training_session_id: Training session.
        version: The version that it is, or is kept of.
        state_name: Name of what is kept of the version beside its weights; empty for the weights.
    """
    if not config.transfer.sealed:
        return None
    direction = Direction.STATE if state_name else Direction.MODEL
    return SealContext(
        context.config.realm, direction, training_session_id, version, update_id=state_name
    )


def receiver_of(
    context: Context,
    executor: ThreadPoolExecutor,
    expected: ExpectedPayload,
    belongs_to: SealContext | None,
) -> Receiver:
    """Return what takes in a payload that does not come sealed, and keeps it sealed if it belongs to something."""
    if belongs_to is None:
        return Receiver(context, executor, expected)
    return SealingReceiver(context, executor, expected, belongs_to)
