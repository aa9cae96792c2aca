"""Resumable uploads of updates.

The signature precedes the bytes, so the payload is read twice: once to hash and check it, once to send it. Each pass
holds only a few chunks in memory. Every attempt after the first asks the coordinator which chunks it has and resumes
there with a new iterator. The update id stays the same, so an update whose receipt was lost is not counted twice.

It does not decide which updates are sent (see `qflare_client.client`).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import Protocol

import numpy as np

from qflare.crypto import merkle
from qflare.processors import usable_processor_count
from qflare.tensors import (
    CHUNK_BYTES,
    Array,
    BytesLike,
    FiniteCheck,
    InvalidPayloadError,
    Manifest,
    TensorSpec,
    check_arrays,
    chunk_views,
    pieces,
)
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import QflareClientError, TrainingFunctionError
from qflare_client.models.download import ProgressHook
from qflare_client.rpc.caller import Attempts, Calls
from qflare_client.rpc.retry import Patience
from qflare_client.times import moment

LONGEST_FIRST_CHUNK_BYTES = 64 * 1024
"""Payloads up to this size are sent with their header, because a coordinator waits only a few seconds for a first
message.
"""
_THREADS = min(4, usable_processor_count())


@dataclass(frozen=True)
class Receipt:
    """Receipt of an accepted update."""

    update_id: str
    """Id of the update, a UUID."""

    training_session_id: str
    """Training session, a UUID."""

    round_number: int
    """Round in which it counts."""

    acceptance_sequence: int
    """Position in the round's order of acceptance, from 1."""

    accepted_at: datetime
    """Time of acceptance, UTC."""

    statement: security_pb2.SignedEnvelope
    """The update's signed statement, needed for contribution proofs and as evidence."""

    @classmethod
    def from_proto(
        cls, message: messages.SubmitUpdateResponse, statement: security_pb2.SignedEnvelope
    ) -> "Receipt":
        """Parse the wire form of the receipt for a statement."""
        return cls(
            update_id=message.update_id,
            training_session_id=message.training_session_id,
            round_number=message.round_number,
            acceptance_sequence=message.acceptance_sequence,
            accepted_at=moment(message.accept_time),
            statement=statement,
        )


class OutgoingPayload(Protocol):
    """The transmitted bytes of an update."""

    @property
    def manifest(self) -> Manifest:
        """Layout of the plaintext payload."""

    @property
    def size_bytes(self) -> int:
        """Number of transmitted bytes."""

    @property
    def chunk_digests(self) -> bytes:
        """Leaf hashes of the transmitted chunks, 32 bytes each."""

    @property
    def sealed(self) -> security_pb2.SealedPayloadHeader | None:
        """Header and wrapped key; None if the update is not sealed."""

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the chunks from a given one on, in order; the bytes are the same every time."""


class Payload:
    """Plaintext payload of an update, hashed and checked.

    Args:
        manifest: Layout.
        arrays: The tensors of the manifest; must not change while the payload is in use.
        base: Tensors that are subtracted, for a delta; None for the tensors themselves.

    Raises:
        TrainingFunctionError: A value is NaN or infinite, or a boolean's byte neither 0 nor 1.
    """

    def __init__(
        self,
        manifest: Manifest,
        arrays: Mapping[str, Array],
        base: Mapping[str, Array] | None = None,
    ) -> None:
        self.manifest = manifest
        self.size_bytes = manifest.size_bytes
        self.sealed: security_pb2.SealedPayloadHeader | None = None
        self._arrays = arrays
        self._base = base
        self._only_chunk: bytes | None = None
        if manifest.chunk_count == 1:
            self._only_chunk = _only(self._views())
        try:
            leaf_hashes = list(hashed(_checked(self._views(), manifest)))
        except InvalidPayloadError as error:
            raise TrainingFunctionError(str(error)) from error
        self.digest = merkle.root(leaf_hashes).hex()
        self.chunk_digests = b"".join(leaf_hashes)

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the chunks from a given one on, in order."""
        return map(bytes, islice(self._views(), first, None))

    def pieces(self) -> Iterator[BytesLike]:
        """Return the bytes of all chunks in pieces of any size; tensors that are sent as they are, are not copied."""
        if self._only_chunk is not None:
            return iter((self._only_chunk,))
        if self._base is None:
            return pieces(self._arrays, self.manifest)
        return delta_pieces(self._arrays, self._base, self.manifest)

    def _views(self) -> Iterator[bytes | memoryview]:
        return chunk_views(self.pieces()) if self._only_chunk is None else iter((self._only_chunk,))


def delta_pieces(
    arrays: Mapping[str, Array], base: Mapping[str, Array], manifest: Manifest
) -> Iterator[memoryview]:
    """Return the payload of a delta piece by piece; the delta is never in memory as a whole.

    Tensors of other than floating-point types are sent unchanged. A difference beyond the range of its type becomes
    infinite.

    Args:
        arrays: Tensors of the manifest.
        base: Tensors that are subtracted, with the same names, shapes and types.
        manifest: Layout of both.

    Raises:
        InvalidManifestError: At once, when a name, type or shape differs from the manifest.
    """
    check_arrays(arrays, manifest)
    check_arrays(base, manifest)
    return (
        piece
        for spec in manifest.tensors
        for piece in _delta_pieces(spec, arrays[spec.name], base[spec.name])
    )


def _delta_pieces(spec: TensorSpec, array: Array, base: Array) -> Iterator[memoryview]:
    flat, subtracted = np.asarray(array).reshape(-1), np.asarray(base).reshape(-1)
    count = CHUNK_BYTES // spec.dtype.itemsize
    for start in range(0, spec.element_count, count):
        piece = flat[start : start + count]
        if spec.dtype.is_float:
            with np.errstate(all="ignore"):
                piece = piece - subtracted[start : start + count]
        yield np.ascontiguousarray(piece, spec.dtype.numpy).view(np.uint8).data


def _only(payload: Iterator[bytes | memoryview]) -> bytes:
    (chunk,) = payload
    return bytes(chunk)


def _checked(
    payload: Iterable[bytes | memoryview], manifest: Manifest
) -> Iterator[bytes | memoryview]:
    """Yield chunks after checking their elements."""
    finite = FiniteCheck(manifest)
    for chunk in payload:
        finite.feed(chunk)
        yield chunk


def hashed(payload: Iterator[bytes] | Iterator[bytes | memoryview]) -> Iterator[bytes]:
    """Yield the leaf hash of each chunk, in threads: hashing is most of the work and releases the interpreter lock."""
    head = list(islice(payload, _THREADS + 1))
    if len(head) <= _THREADS:
        yield from map(merkle.leaf_hash, head)
        return
    with ThreadPoolExecutor(_THREADS, "qflare-hash") as pool:
        pending: deque[Future[bytes]] = deque()
        for chunk in chain(head, payload):
            pending.append(pool.submit(merkle.leaf_hash, chunk))
            if len(pending) > 2 * _THREADS:  # bounds the chunks in memory
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


class Upload:
    """One upload, across any number of attempts.

    Args:
        calls: Authenticated calls.
        update_id: Id in the statement.
        statement: The signed statement.
        payload: The bytes to send.
        progress: Called with the number of bytes passed to the network.
        resumes: Whether an earlier upload, by this process or another, may have sent some chunks.
    """

    def __init__(
        self,
        calls: Calls,
        update_id: str,
        statement: security_pb2.SignedEnvelope,
        payload: OutgoingPayload,
        *,
        progress: ProgressHook,
        resumes: bool = False,
    ) -> None:
        self._calls = calls
        self._update_id = update_id
        self._payload = payload
        self._progress = progress
        self._attempted = resumes
        self._stored_chunk = 0  # chunks that the coordinator has confirmed
        self._sent_chunk = 0  # chunks passed to the network so far
        self._header = messages.UpdateHeader(
            statement=statement,
            chunk_digests=payload.chunk_digests,
            sealed=payload.sealed,
        )

    def run(self, timeout_s: float | None = None) -> Receipt:
        """Upload the update and return its receipt.

        Raises:
            QflareClientError: The error of the last attempt.
        """
        receipt = self._calls.repeat(lambda attempts: self._attempt(attempts, timeout_s))
        return Receipt.from_proto(receipt, self._header.statement)

    def _attempt(
        self, attempts: Attempts, timeout_s: float | None
    ) -> messages.SubmitUpdateResponse:
        transport = self._calls.transport
        first = 0
        if self._attempted:
            request = messages.GetUploadRequest(update_id=self._update_id)
            state = self._calls.unary(transport.stub.GetUpload, request)
            if state.HasField("receipt"):
                return state.receipt
            first = state.next_chunk
        if first > self._stored_chunk:
            self._stored_chunk = first
            attempts.progressed()
        self._attempted = True
        requests = self._requests(first, attempts.patience)
        first_message = next(requests)
        metadata = attempts.metadata(first_message)
        rest = _FollowingRequests(requests)
        try:
            return transport.send(
                transport.stub.SubmitUpdate,
                chain((first_message,), rest),
                metadata=metadata,
                timeout_s=timeout_s,
            )
        except QflareClientError:
            if rest.error is not None:
                raise rest.error from None
            raise

    def _requests(self, first: int, patience: Patience) -> Iterator[messages.SubmitUpdateRequest]:
        """Yield the header, with the first chunk to send if the payload is small, then the other chunks.

        A chunk that is sent for the first time counts as progress. It may not have arrived, so each chunk counts only
        once: otherwise a proxy that accepts chunks and refuses the call would be retried forever.
        """
        header: messages.UpdateHeader | None = self._header
        total_bytes = self._payload.size_bytes
        if total_bytes > LONGEST_FIRST_CHUNK_BYTES:
            yield messages.SubmitUpdateRequest(header=header)
            header = None
        for index, data in enumerate(self._payload.chunks_from(first), first):
            request = messages.SubmitUpdateRequest(header=header)
            # In place: a chunk message handed to the constructor would be copied, at 0.6 GB/s.
            request.chunk.index = index
            request.chunk.data = data
            yield request
            header = None
            if index >= self._sent_chunk:
                self._sent_chunk = index + 1
                patience.progressed()
            self._progress("upload", min((index + 1) * CHUNK_BYTES, total_bytes), total_bytes)
        if header is not None:
            yield messages.SubmitUpdateRequest(header=header)


class _FollowingRequests:
    """Request iterator that gRPC consumes in its own thread; it stores the error raised there.

    Attributes:
        error: The error that ended the iteration; None if there was none.
    """

    def __init__(self, requests: Iterator[messages.SubmitUpdateRequest]) -> None:
        self._requests = requests
        self.error: QflareClientError | None = None

    def __iter__(self) -> Iterator[messages.SubmitUpdateRequest]:
        try:
            yield from self._requests
        except QflareClientError as error:
            self.error = error
            raise
