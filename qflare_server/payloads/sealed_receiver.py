"""Receivers of sealed payloads: only segments are stored, never their plaintext.

`OpeningReceiver` receives a payload that a device sealed: each segment is hashed, opened and its plaintext verified;
the segment is stored. `SealingReceiver` receives plaintext that the coordinator makes or an administrator uploads, and
seals it before it is stored. `payloads.reader` reads both.
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
from qflare.tensors import BytesLike, PieceHasher
from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.errors import DigestMismatchError, InvalidSealError
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.payloads.keys import restore_key, store_key, take_key
from qflare_server.payloads.receiver import Receiver
from qflare_server.storage.payload_records import ReceivedPayload, Seal
from qflare_server.storage.payload_store import PayloadStore


class OpeningReceiver(Receiver):
    """Receives the segments of one payload that a device sealed.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        expected: Layout, size and digests of the payload, with `sealed` set; already checked.
        payload_id: Id of an upload to resume; empty starts a new one.
        first_chunk: Number of chunks already in the payload store.
        stored_key: Stored content key of an upload to resume; empty unwraps the key in the device's header, which
            needs the coordinator's KEM key.
        store: Payload store of an upload to resume; None means that of new payloads.

    Raises:
        InvalidSealError: The header or its wrapped key is invalid, or a stored segment cannot be opened.
        SealKeyNotAcceptedError: The payload is sealed to a key that is no longer accepted.
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
        store: PayloadStore | None = None,
    ) -> None:
        arrival = expected.sealed
        assert arrival is not None
        self._header = arrival.message.header
        key = (
            restore_key(context, payload_id, Seal(self._header, stored_key))
            if stored_key
            else take_key(context, arrival.message, arrival.seal_context)
        )
        self._opener = PayloadOpener(key, expected.manifest.size_bytes)
        self._content = PieceHasher()
        self._hashing: Future[None] | None = None
        super().__init__(
            context,
            executor,
            expected,
            payload_id=payload_id,
            first_chunk=first_chunk,
            store=store,
        )
        self.stored_key = stored_key or store_key(context, self.payload_id, key)

    def _take_content(self, chunk: BytesLike) -> None:
        try:
            content = self._opener.open_segment(self.next_index, chunk)
        except UnsealError as error:
            raise InvalidSealError(f"chunk {self.next_index}: {error}") from error
        self._wait_for_hash()
        if self.is_large:  # in parallel: hashing releases the interpreter lock
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
            raise DigestMismatchError("payload: plaintext digest does not match the statement")
        return Seal(self._header, self.stored_key, b"".join(leaves))


class SealingReceiver(Receiver):
    """Receives plaintext, seals it, and stores the segments.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        expected: Layout, size and digests of the plaintext; already checked.
        seal_context: Context that the seal is bound to.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        expected: ExpectedPayload,
        seal_context: SealContext,
    ) -> None:
        super().__init__(context, executor, expected)
        self._kept_bytes = sealed_size_bytes(self._size_bytes)
        self.is_large = self._kept_bytes > context.config.inline_payload_bytes
        self._sealer = PayloadSealer(seal_context, self._size_bytes)
        self._segments: list[bytes] = []  # their leaf hashes
        self._rest = bytearray()

    def add(self, index: int, chunk: BytesLike) -> None:
        """Verify a chunk, and seal the segments that it completes.

        Raises:
            InvalidUpdateError: The chunk is out of order, has the wrong size, or holds NaN or infinity.
            DigestMismatchError: The chunk's digest does not match the stated one.
        """
        self._check(index, chunk)
        self._rest += chunk
        while len(self._rest) > PLAINTEXT_BYTES:  # the remainder becomes the last segment
            with memoryview(self._rest) as view, view[:PLAINTEXT_BYTES] as content:
                self._keep_segment(content)
            del self._rest[:PLAINTEXT_BYTES]

    def _keep_segment(self, content: Buffer) -> None:
        segment = self._sealer.seal_segment(len(self._segments), content)
        self._segments.append(merkle.leaf_hash(segment))
        self._keep(segment)

    def finish(self) -> ReceivedPayload:
        """Return the sealed payload; a large one is durable.

        Raises:
            InvalidUpdateError: Chunks are missing.
            DigestMismatchError: The payload's digest does not match the stated one.
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
            store=self._store_name,
        )


def version_seal_context(
    context: Context,
    config: training_pb2.TrainingConfig,
    training_session_id: str,
    version: int,
    state_name: str = "",
) -> SealContext | None:
    """Return the context that a payload made by the coordinator is sealed for; None if the session seals nothing.

    Args:
        context: The coordinator's parts.
        config: Configuration of the training session.
        training_session_id: Training session.
        version: Version of the payload; the round, for a sum of masks.
        state_name: Name of state that is stored for the coordinator itself; empty for the weights.
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
    seal_context: SealContext | None,
) -> Receiver:
    """Return a receiver of plaintext, which seals it if a context is given."""
    if seal_context is None:
        return Receiver(context, executor, expected)
    return SealingReceiver(context, executor, expected, seal_context)
