"""Training for embedding programs: contribute, close rounds, reset.

A contribution is one float32 vector, without gRPC and without a signature: the program vouches for its devices.
`in_process.session` describes the training session.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare.ids import new_update_id
from qflare.tensors import DType, FiniteCheck, InvalidPayloadError, Manifest, TensorSpec, rechunk
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    DeviceNotFoundError,
    DeviceRevokedError,
    DeviceSuspendedError,
    DuplicateUpdateError,
    InvalidRequestError,
    InvalidUpdateError,
    RoundNotOpenError,
    StaleBaseVersionError,
)
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.payloads.receiver import Receiver
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.records import ModelUpdate, Round, TrainingSession
from qflare_server.storage.repository import (
    audit,
    devices,
    global_models,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import DeviceState, RoundState, TrainingSessionState
from qflare_server.training.premises import PremisesChangedError, repeat
from qflare_server.training.reported_metrics import MAX_EXAMPLES, check_metrics
from qflare_server.training.rounds import open_round, sign_next_task
from qflare_server.use_cases.in_process.session import ensure_begun, find_in_use, require_layout
from qflare_server.use_cases.training_sessions.administration import Training
from qflare_server.use_cases.training_sessions.progress import Progress
from qflare_server.use_cases.updates.acceptance import Acceptance
from qflare_server.use_cases.updates.submission import (
    Contributor,
    RoundFacts,
    Submission,
    read_facts,
)

TENSOR: Final = "weights"
FLOAT_BYTES: Final = 4


@dataclass(frozen=True)
class Contribution:
    """A contribution of an in-process device: weights, example count and metrics."""

    device_id: str
    data: bytes | bytearray | memoryview
    """Little-endian float32, at least one."""
    example_count: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        """Return the layout of the weights.

        Raises:
            InvalidRequestError: The example count or a metric is out of range.
            InvalidUpdateError: The length is not a positive multiple of a float32's size.
        """
        if not 1 <= self.example_count <= MAX_EXAMPLES:
            raise InvalidRequestError(
                f"example_count: got {self.example_count}, want 1 to {MAX_EXAMPLES}",
                field="example_count",
            )
        check_metrics(dict(self.metrics))
        size = memoryview(self.data).nbytes
        if not size or size % FLOAT_BYTES:
            raise InvalidUpdateError(f"weights: got {size} bytes, want a multiple of {FLOAT_BYTES}")
        return Manifest((TensorSpec(TENSOR, DType.FLOAT32, (size // FLOAT_BYTES,)),))


class InProcess:
    """Use cases of an embedding program's training session."""

    def __init__(self, context: Context, executor: ThreadPoolExecutor, use_case: Training) -> None:
        self._context = context
        self._executor = executor
        self._training = use_case
        self._acceptance = Acceptance(context)

    def progress(self) -> Progress | None:
        """Return the progress of the current training session, None before the first contribution."""
        with self._context.database.read() as session:
            training_session_id, training_session = find_in_use(session)
        return None if training_session is None else self._training.progress(training_session_id)

    def check(self, contribution: Contribution) -> None:
        """Check whether `contribute` would accept a contribution; writes nothing.

        Raises:
            QflareError: As `contribute`.
        """
        manifest = contribution.manifest()
        with self._context.database.read() as session:
            _require_active(session, contribution.device_id)
            training_session_id, training_session = find_in_use(session)
            if training_session is not None:
                require_layout(session, training_session_id, manifest)
                _find_open(session, training_session_id, contribution, self._context.clock())
        finite = FiniteCheck(manifest)
        try:
            for chunk in rechunk([contribution.data]):
                finite.feed(chunk)
        except InvalidPayloadError as error:
            raise InvalidUpdateError(str(error)) from error

    def contribute(self, caller: Caller, contribution: Contribution) -> int:
        """Store a contribution durably in the open round; return its acceptance sequence number.

        Raises:
            InvalidRequestError: Or a subclass: the weights have another length, or are not finite.
            DeviceNotFoundError: There is no such device.
            DeviceRevokedError: It is revoked.
            DeviceSuspendedError: It is not active.
            DuplicateUpdateError: It has contributed to the round already.
            RoundNotOpenError: The round is being published, or the training session is paused.
        """
        manifest = contribution.manifest()
        with self._context.database.read() as session:
            _require_active(session, contribution.device_id)
        training_session_id = ensure_begun(self._context, self._executor, caller, manifest)
        received = self._receive(contribution, manifest)
        sequence = repeat(lambda: self._accept(caller, training_session_id, contribution, received))
        self._context.wake()
        return sequence

    def close_round(self, min_count: int) -> int | None:
        """Close the open round if it has enough contributions; return the number of the round to publish.

        Returns None if there is nothing to publish. A closed round is published whatever its number of contributions.
        """

        def work(session: Session) -> int | None:
            training_session_id, _ = find_in_use(session)
            training_session = training_sessions.lock_session(session, training_session_id)
            if training_session is None:
                return None
            current = training_sessions.lock_round(
                session, training_session_id, training_session.current_round
            )
            if current is None or current.state == RoundState.CLOSED.value:
                return None if current is None else current.number
            running = training_session.state == TrainingSessionState.RUNNING.value
            if not running or current.state != RoundState.OPEN.value:
                return None
            if current.accepted_count < max(1, min_count):
                return None
            values = {"state": RoundState.CLOSED.value, "closed_at": self._context.clock()}
            training_sessions.update_round(session, training_session_id, current.number, values)
            return current.number

        return self._context.database.write(work)

    def find_round(self, number: int) -> Round | None:
        """Return a round of the current training session."""
        with self._context.database.read() as session:
            training_session_id, _ = find_in_use(session)
            return training_sessions.get_round(session, training_session_id, number)

    def discard_round(self, caller: Caller) -> int:
        """Reject the open round's contributions and open the next round; return the number of rejected contributions.

        Raises:
            RoundNotOpenError: The round is being published, or the training session is paused.
        """
        return repeat(lambda: self._discard_round(caller))

    def _discard_round(self, caller: Caller) -> int:
        with self._context.database.read() as session:
            training_session_id, known = find_in_use(session)
            if known is None:
                return 0
            base = global_models.get_model(session, training_session_id, known.current_version)
            assert base is not None
        task = sign_next_task(self._context, known, base.version, base.digest)

        def work(session: Session) -> int:
            at = self._context.clock()
            training_session = training_sessions.lock_session(session, training_session_id)
            if training_session is None:
                return 0
            current = training_sessions.lock_round(
                session, training_session_id, training_session.current_round
            )
            if current is None or not current.accepted_count:
                return 0
            _require_open(training_session, current, at)
            reason = "discarded by the program"
            values = {
                "state": RoundState.CANCELLED.value,
                "state_reason": reason,
                "closed_at": at,
                "rejected_count": current.accepted_count,
            }
            training_sessions.update_round(session, training_session_id, current.number, values)
            updates.reject_round(session, training_session_id, current.number, reason, at)
            details = {"round": current.number, "rejected": current.accepted_count}
            event = Event(
                "round.discarded", f"training_session:{training_session_id}", details=details
            )
            audit.record(session, caller, event, at)
            open_round(session, training_session, task, at)
            return current.accepted_count

        return self._context.database.write(work)

    def end(self, caller: Caller) -> None:
        """End the current training session; the next contribution creates a new one, of any vector length."""
        current = self.progress()
        if current is not None:
            self._training.cancel(caller, current.session.id, "reset by the program")

    def contributions(self, device_id: str, limit: int) -> list[ModelUpdate]:
        """Return a device's contributions to the current training session, newest first."""
        with self._context.database.read() as session:
            training_session_id, _ = find_in_use(session)
            return list(updates.list_of_device(session, training_session_id, device_id, limit))

    def _receive(self, contribution: Contribution, manifest: Manifest) -> ReceivedPayload:
        expected = ExpectedPayload(manifest)
        expected.check(self._context.config.max_payload_bytes)
        receiver = Receiver(self._context, self._executor, expected)
        if receiver.is_large:
            receiver.begin(self._context.clock())
        try:
            for index, chunk in enumerate(rechunk([contribution.data])):
                receiver.add(index, chunk)
            return receiver.finish()
        except BaseException:
            receiver.abandon()
            raise

    def _accept(
        self,
        caller: Caller,
        training_session_id: str,
        contribution: Contribution,
        received: ReceivedPayload,
    ) -> int:
        """Accept a contribution into the open round and return its acceptance sequence number."""
        with self._context.database.read() as session:
            current = _find_open(session, training_session_id, contribution, self._context.clock())
            facts = read_facts(session, training_session_id, current.number)
        submission = self._submission(contribution, facts, received)
        try:
            receipt = self._acceptance.accept(caller, submission, received)
        except StaleBaseVersionError as error:
            raise PremisesChangedError("the round was published meanwhile") from error
        return receipt.acceptance_sequence

    def _submission(
        self, contribution: Contribution, facts: RoundFacts, received: ReceivedPayload
    ) -> Submission:
        """Return a contribution as an unsigned submission, with a statement written by the coordinator."""
        statement = security_pb2.UpdateStatement(
            realm=self._context.config.realm,
            training_session_id=facts.training_session_id,
            round_number=facts.number,
            task_nonce=facts.nonce,
            update_id=new_update_id(),
            device_id=contribution.device_id,
            base_version=facts.base_version,
            base_digest=facts.base_digest,
            layout_digest=facts.manifest.layout_digest,
            size_bytes=received.size_bytes,
            payload_digest=received.digest,
            example_count=contribution.example_count,
            metrics=dict(contribution.metrics),
        )
        digest = hashlib.sha256(statement.SerializeToString(deterministic=True)).hexdigest()
        return Submission(
            statement,
            statement_bytes=None,
            statement_digest=digest,
            signature=None,
            device=Contributor(contribution.device_id, key_id=None),
            facts=facts,
            expected=ExpectedPayload(facts.manifest),
        )


def _find_open(
    session: Session, training_session_id: str, contribution: Contribution, at: datetime
) -> Round:
    """Return the open round, if the device has not contributed to it.

    Raises:
        RoundNotOpenError: No round is open.
        DuplicateUpdateError: The device has contributed already.
    """
    training_session = training_sessions.get_session(session, training_session_id)
    assert training_session is not None
    current = training_sessions.get_round(
        session, training_session_id, training_session.current_round
    )
    _require_open(training_session, current, at)
    assert current is not None
    _require_first(session, current, contribution.device_id)
    return current


def _require_active(session: Session, device_id: str) -> None:
    device = devices.get_device(session, device_id)
    if device is None:
        raise DeviceNotFoundError(f"no device {device_id[:64]!r}")
    if device.state == DeviceState.REVOKED.value:
        raise DeviceRevokedError
    if device.state != DeviceState.ACTIVE.value:
        raise DeviceSuspendedError(f"the device is {device.state}")


def _require_open(training_session: TrainingSession, current: Round | None, at: datetime) -> None:
    if training_session.state != TrainingSessionState.RUNNING.value:
        raise RoundNotOpenError(f"the training session is {training_session.state}")
    if current is None or current.state != RoundState.OPEN.value or current.deadline_at <= at:
        raise RoundNotOpenError(f"round {training_session.current_round} is not open")


def _require_first(session: Session, current: Round, device_id: str) -> None:
    known = updates.find_contribution(
        session, current.training_session_id, current.number, device_id, current.base_version
    )
    if known is not None:
        raise DuplicateUpdateError(f"the device has contributed to round {current.number}")
