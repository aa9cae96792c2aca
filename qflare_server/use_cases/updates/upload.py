"""Upload of a device's update: checked as it streams, durable before it is acknowledged.

The steps and their transactions (`docs/protocol.md` describes the device's side):

1. The header is checked (`updates.submission`): statement, round, device, signature. The payload is not read yet.
2. The payload is received, without an open transaction.
3. One short transaction takes a slot in the round and writes everything (`updates.acceptance`). Only then is the
   update acknowledged.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy.orm import Session

from qflare.tensors import BytesLike
from qflare.v1 import coordinator_service_pb2, security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    AlgorithmNotAcceptedError,
    AlreadyExistsError,
    ConflictError,
    FailedPreconditionError,
    InvalidRequestError,
    InvalidSignatureError,
    InvalidUpdateError,
    NotFoundError,
    PermissionDeniedError,
    QflareError,
    RoundNotOpenError,
    SealKeyNotAcceptedError,
    StaleBaseVersionError,
    StorageDamagedError,
    StorageFullError,
    StoreUnavailableError,
    TooManyRequestsError,
    release_frames,
)
from qflare_server.payloads.receiver import Receiver
from qflare_server.payloads.sealed_receiver import OpeningReceiver
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.repository import (
    late_updates,
    payloads,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.training.retention import discard_uploads
from qflare_server.training.rounds import is_over
from qflare_server.use_cases.access.statements import parse_statement
from qflare_server.use_cases.updates.acceptance import Acceptance
from qflare_server.use_cases.updates.submission import (
    PAYLOAD,
    Contributor,
    Submission,
    SubmissionValidator,
)

MAX_UPLOADS_OF_DEVICE: Final = 8
LATE_FOR: Final = timedelta(days=30)
"""How long after a round's deadline a late update is counted; the record of who was late is kept for longer."""
FINAL_REFUSALS: Final = (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
"""Permanent refusals: resending the same update cannot succeed."""
STORE_FAILURES: Final = (
    ConflictError,
    StorageDamagedError,
    StorageFullError,
    StoreUnavailableError,
)
"""Permanent failures to store received data: a retry would fail the same way."""


@dataclass(frozen=True)
class Arrival:
    """An update of which every byte is in memory; `caller` is for the audit log."""

    caller: Caller
    device: Contributor
    header: coordinator_service_pb2.UpdateHeader
    chunks: Sequence[bytes]


@dataclass(frozen=True)
class Taken:
    """An update that lacks nothing but its place in the round."""

    caller: Caller
    submission: Submission
    received: ReceivedPayload


class Uploads:
    """Update submission use cases.

    Attributes:
        headers: Validates update headers.
        acceptance: Accepts received updates.
    """

    def __init__(self, context: Context, executor: ThreadPoolExecutor) -> None:
        self._context = context
        self._executor = executor
        self.headers = SubmissionValidator(context)
        self.acceptance = Acceptance(context)
        self._places = threading.BoundedSemaphore(context.config.max_uploads)

    def submit(
        self,
        caller: Caller,
        device: Contributor,
        header: coordinator_service_pb2.UpdateHeader,
        chunks: Iterator[tuple[int, BytesLike]],
        *,
        has_arrived: bool = False,
    ) -> UpdateReceipt:
        """Accept an update and return its receipt.

        Args:
            caller: For the audit log.
            device: The calling device.
            header: The header as received.
            chunks: Indices and bytes, in order; consumed lazily.
            has_arrived: Whether all chunks are in memory. Such an update is ready within milliseconds, so a batch
                waits for it.

        Raises:
            InvalidRequestError: Or a subclass: the header or the payload is invalid.
            RoundNotOpenError: The round does not accept updates.
            StaleBaseVersionError: The base version is not the round's.
            DuplicateUpdateError: The device sent a different update for this round.
        """
        telemetry = self._context.telemetry
        with self.acceptance.window.announced() as received_all:
            if not has_arrived:
                received_all()
            submission = self._checked(device, header)
            if isinstance(submission, UpdateReceipt):
                return submission
            update_id = submission.statement.update_id
            with (
                self._late_counted(submission),
                telemetry.span("qflare.update", update_id=update_id, device_id=device.device_id),
            ):
                with telemetry.span("qflare.update.receive"):
                    received, known = self._receive(submission, chunks)
                received_all()
                if known is not None:
                    return known
                assert received is not None
                with telemetry.span("qflare.update.store", size_bytes=received.size_bytes):
                    accepted = self._accept(caller, submission, received)
        telemetry.bytes_received(received.size_bytes)
        return accepted

    def submit_all(self, arrivals: Sequence[Arrival]) -> list[UpdateReceipt | QflareError]:
        """Accept updates that are in memory, in their order and in one transaction.

        Each is checked as by `submit`. For programs that run many devices in this process; large payloads are written
        one after the other.

        Returns:
            The receipt or the refusal of each.
        """
        outcomes = [self._taken_or_refused(arrival) for arrival in arrivals]
        answers = iter(self.accept_all([item for item in outcomes if isinstance(item, Taken)]))
        return [next(answers) if isinstance(item, Taken) else item for item in outcomes]

    def _taken_or_refused(self, arrival: Arrival) -> Taken | UpdateReceipt | QflareError:
        try:
            return self.take(arrival)
        except QflareError as error:
            release_frames(error)  # they hold the payload
            return error

    def take(self, arrival: Arrival) -> Taken | UpdateReceipt:
        """Check an update and receive its payload; return the receipt of one that was accepted before.

        Raises:
            QflareError: As `submit`.
        """
        submission = self._checked(arrival.device, arrival.header)
        if isinstance(submission, UpdateReceipt):
            return submission
        with self._late_counted(submission):
            received, known = self._receive(submission, iter(enumerate(arrival.chunks)))
        if known is not None:
            return known
        assert received is not None
        return Taken(arrival.caller, submission, received)

    def accept_all(self, taken: Sequence[Taken]) -> list[UpdateReceipt | QflareError]:
        """Accept updates in one transaction; return the receipt or the refusal of each."""
        answers = self.acceptance.accept_all(
            [(item.caller, item.submission, item.received) for item in taken]
        )
        late = []
        for item, answer in zip(taken, answers, strict=True):
            if isinstance(answer, RoundNotOpenError | StaleBaseVersionError):
                late.append(item.submission)
            if isinstance(answer, FINAL_REFUSALS) and item.received.data is None:
                discard_uploads(self._context, [item.received.chunks])
            if isinstance(answer, UpdateReceipt):
                self._context.telemetry.bytes_received(item.received.size_bytes)
        if late:
            self.record_late(late)
        return answers

    def _checked(
        self, device: Contributor, header: coordinator_service_pb2.UpdateHeader
    ) -> Submission | UpdateReceipt:
        """Check a header; return the receipt of an update accepted under a key or algorithm that is no longer valid."""
        try:
            return self.headers.check(device, header)
        except (InvalidSignatureError, AlgorithmNotAcceptedError):
            known = self.accepted_before(device, header)
            if known is None:
                raise
            return known

    @contextmanager
    def _late_counted(self, submission: Submission) -> Iterator[None]:
        """Count the device as late if its update is refused in the block because the round has closed."""
        try:
            yield
        except (RoundNotOpenError, StaleBaseVersionError):
            self.record_late([submission])
            raise

    def record_late(self, submissions: Sequence[Submission]) -> None:
        """Count the devices of refused updates as late, where the round has closed."""

        def work(session: Session) -> None:
            for submission in submissions:
                self._record_late(session, submission)

        self._context.database.write(work)

    def _record_late(self, session: Session, submission: Submission) -> None:
        statement = submission.statement
        named = statement.training_session_id, statement.round_number
        current = training_sessions.lock_round(session, *named)
        at = self._context.clock()
        if current is not None and is_over(current, at) and at - current.deadline_at < LATE_FOR:
            late_updates.record_late(session, *named, statement.device_id, at)

    def _accept(
        self, caller: Caller, submission: Submission, received: ReceivedPayload
    ) -> UpdateReceipt:
        """Write an update; abandon the upload if it is refused permanently."""
        try:
            return self.acceptance.accept(caller, submission, received)
        except FINAL_REFUSALS:
            if received.data is None:
                discard_uploads(self._context, [received.chunks])
            raise

    def accepted_before(
        self, device: Contributor, header: coordinator_service_pb2.UpdateHeader
    ) -> UpdateReceipt | None:
        """Return the receipt of a statement accepted under a key or algorithm that is no longer valid."""
        payload = header.statement.payload
        update_id = parse_statement(security_pb2.UpdateStatement, payload, PAYLOAD).update_id
        with self._context.database.read() as session:
            known = updates.find_accepted(session, update_id)
        mine = (device.device_id, hashlib.sha256(payload).hexdigest())
        if known is None or (known.device_id, known.statement_digest) != mine:
            return None
        return known

    def find(self, device: Contributor, update_id: str) -> tuple[int, UpdateReceipt | None]:
        """Return the first chunk that is not stored, and the receipt if the update is accepted."""
        with self._context.database.read() as session:
            known = updates.find_accepted(session, update_id)
            if known is not None and known.device_id == device.device_id:
                return 0, known
            found = payloads.find_upload(session, update_id)
        if found is None or found.device_id != device.device_id:
            return 0, None
        if found.store not in self._context.store_names:
            return 0, None
        return self._context.store_of(found.store).stored_count(found.payload_id), None

    def _receive(
        self, submission: Submission, chunks: Iterator[tuple[int, BytesLike]]
    ) -> tuple[ReceivedPayload | None, UpdateReceipt | None]:
        """Receive the payload: a small one directly, a large one in an upload slot."""
        if submission.expected.wire_size_bytes <= self._context.config.inline_payload_bytes:
            return self.receive_small(submission, chunks)
        if not self._places.acquire(blocking=False):
            raise TooManyRequestsError("too many large uploads at once", retry_after_s=0.2)
        try:
            receiver_or_known = self._open(submission)
            if isinstance(receiver_or_known, UpdateReceipt):
                return None, receiver_or_known
            return self._fill_large(receiver_or_known, chunks), None
        finally:
            self._places.release()

    def receive_small(
        self, submission: Submission, chunks: Iterable[tuple[int, BytesLike]]
    ) -> tuple[ReceivedPayload | None, UpdateReceipt | None]:
        """Receive a small payload into memory; one of both results is None.

        Raises:
            InvalidUpdateError: Or a subclass: the payload is not the one that was stated.
        """
        receiver_or_known = self._open_small(submission)
        if isinstance(receiver_or_known, UpdateReceipt):
            return None, receiver_or_known
        try:
            return _fill(receiver_or_known, chunks), None
        except _EndedEarlyError as error:
            raise InvalidUpdateError(str(error)) from None

    def _open_small(self, submission: Submission) -> Receiver | UpdateReceipt:
        """Begin a small upload; an accepted one gets its receipt even if its sealing key has been deleted."""
        try:
            return self._receiver(submission)
        except SealKeyNotAcceptedError:
            with self._context.database.read() as session:
                known = self.acceptance.preview(session, submission)
            if known is None:
                raise
            return known

    def _fill_large(
        self, receiver: Receiver, chunks: Iterator[tuple[int, BytesLike]]
    ) -> ReceivedPayload:
        """Receive the chunks; an invalid upload is abandoned, so that a valid one can follow."""
        try:
            return _fill(receiver, chunks)
        except InvalidRequestError:
            discard_uploads(self._context, [receiver.chunks])
            raise
        except _EndedEarlyError as error:
            raise InvalidUpdateError(str(error)) from None

    def _open(self, submission: Submission) -> Receiver | UpdateReceipt:
        """Begin or resume a large upload; refuse one that could not be accepted."""
        try:
            with self._context.database.read() as session:
                known = self.acceptance.preview(session, submission)
        except FINAL_REFUSALS:
            found = self._unfinished(submission)
            if found is not None:
                discard_uploads(self._context, [found.chunks])
            raise
        if known is not None:
            return known
        found = self._unfinished(submission)
        if found is None:
            receiver = self._receiver(submission)
            self._remember(submission, receiver)
            return receiver
        return self._receiver(submission, found)

    def _unfinished(self, submission: Submission) -> payloads.UnfinishedUpload | None:
        """Return the interrupted upload of this update; None if there is none.

        One in a payload store that is not configured any more is abandoned: the upload begins again.
        """
        with self._context.database.read() as session:
            found = payloads.find_upload(session, submission.statement.update_id)
        mine = (submission.device.device_id, submission.statement_digest)
        if found is None or (found.device_id, found.statement_digest) != mine:
            return None
        if found.store not in self._context.store_names:
            discard_uploads(self._context, [found.chunks])
            return None
        return found

    def _receiver(
        self, submission: Submission, found: payloads.UnfinishedUpload | None = None
    ) -> Receiver:
        """Return the receiver of the payload; it resumes an interrupted upload."""
        context, executor, expected = self._context, self._executor, submission.expected
        payload_id = "" if found is None else found.payload_id
        store = context.store if found is None else context.store_of(found.store)
        first_chunk = 0 if found is None else store.stored_count(payload_id)
        if expected.sealed is None:
            return Receiver(
                context,
                executor,
                expected,
                payload_id=payload_id,
                first_chunk=first_chunk,
                store=store,
            )
        return OpeningReceiver(
            context,
            executor,
            expected,
            payload_id=payload_id,
            first_chunk=first_chunk,
            stored_key=b"" if found is None else found.sealed_key or b"",
            store=store,
        )

    def _remember(self, submission: Submission, receiver: Receiver) -> None:
        """Record the start of an upload, so that it can be resumed or swept.

        At the limit of unfinished uploads, the device's least recently active one is abandoned.
        """
        sealed_key = receiver.stored_key if isinstance(receiver, OpeningReceiver) else None
        device_id = submission.device.device_id

        def work(session: Session) -> list[payloads.ChunkSet]:
            earlier = payloads.uploads_of(session, device_id)
            abandoned = earlier[: max(0, len(earlier) - MAX_UPLOADS_OF_DEVICE + 1)]
            payloads.give_up_uploads(session, abandoned)
            payloads.begin_upload(
                session,
                payload_id=receiver.payload_id,
                store=receiver.chunks.store,
                at=self._context.clock(),
                update_id=submission.statement.update_id,
                device_id=device_id,
                statement_digest=submission.statement_digest,
                sealed_key=sealed_key,
            )
            return abandoned

        discard_uploads(self._context, self._context.database.write(work))


class _EndedEarlyError(Exception):
    """The stream ended before the payload: possibly a broken connection, so the received chunks are kept."""


def _require_complete(receiver: Receiver) -> None:
    receiver.require_intact()
    if not receiver.is_complete:
        raise _EndedEarlyError(f"chunks: got {receiver.next_index}, want more")


def _fill(receiver: Receiver, chunks: Iterable[tuple[int, BytesLike]]) -> ReceivedPayload:
    """Receive the chunks up to the end of the stream, and check that none follows the payload.

    Chunks of an upload interrupted by the device, its connection or the coordinator are kept for resumption; those of
    an invalid upload are not.
    """
    try:
        for index, chunk in chunks:
            receiver.add(index, chunk)
        _require_complete(receiver)
        return receiver.finish()
    except (InvalidRequestError, *STORE_FAILURES):
        receiver.abandon()
        raise
    except BaseException:
        receiver.keep()
        raise
