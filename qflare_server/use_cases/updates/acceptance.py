"""Update acceptance: admits received updates in batches, one transaction each.

Updates that are ready at the same time are written by one thread in one transaction: the round is locked once, and
update, payload and audit rows are inserted together, so that a durable update costs a fraction of a commit. Acceptance
is decided under the round's lock. An update that was accepted before gets its first receipt again, whatever the state
of its round.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    ConflictError,
    DeviceRevokedError,
    DeviceSuspendedError,
    DuplicateUpdateError,
    InvalidRequestError,
    NotSelectedError,
    QflareError,
    RoundNotOpenError,
    StaleBaseVersionError,
    StoreUnavailableError,
    TooManyRequestsError,
    TrainingSessionNotFoundError,
)
from qflare_server.storage.payload_records import ReceivedPayload, insert_received
from qflare_server.storage.payload_store import PayloadFolder
from qflare_server.storage.prepared import together
from qflare_server.storage.repository import (
    audit,
    devices,
    global_models,
    membership,
    neighbors,
    round_capacity,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.neighbors import SharerFacts
from qflare_server.storage.repository.round_capacity import RoundCapacity
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import DeviceState, RoundState, TrainingSessionState, UpdateState
from qflare_server.training.evaluation import awaits_evaluation
from qflare_server.training.masking import is_masked
from qflare_server.training.neighbor_stages import has_neighbors
from qflare_server.training.reported_metrics import whole_epochs
from qflare_server.training.rhythm import is_asynchronous
from qflare_server.training.rounds import is_in_process, origin_of
from qflare_server.use_cases.updates.batching import BatchWindow
from qflare_server.use_cases.updates.submission import Submission

BATCH_LIMIT: Final = 128
BATCH_WINDOW_S: Final = 0.01
"""Longest group-commit delay."""
BUFFER_RETRY_S: Final = 0.05
HELD_RETRY_S: Final = 5.0
"""When a device resends an update that has to wait for the next buffer."""


@dataclass(eq=False)
class _Entry:
    """An update waiting for its batch, and its result."""

    caller: Caller
    submission: Submission
    received: ReceivedPayload | None
    answered: threading.Event = field(default_factory=threading.Event)
    leads: bool = False
    abandoned: bool = False
    """Nobody waits for it any more; its batch may still be written."""
    accepted: UpdateReceipt | None = None
    error: BaseException | None = None

    def result(self) -> UpdateReceipt:
        if self.abandoned:
            raise StoreUnavailableError("the database did not commit in time")
        if self.error is not None:
            raise self.error
        assert self.accepted is not None
        return self.accepted


class Acceptance:
    """Writes updates in batches; the calling threads take turns as the batch leader.

    Attributes:
        window: Counts the updates in flight; a batch waits briefly for them.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._waiting: list[_Entry] = []
        self._led = False
        self.window = BatchWindow(BATCH_WINDOW_S)

    def accept(
        self, caller: Caller, submission: Submission, received: ReceivedPayload
    ) -> UpdateReceipt:
        """Write an update durably and return its receipt.

        Raises:
            DuplicateUpdateError: The device has sent a different update, or the id is taken.
            RoundNotOpenError: The round does not accept updates.
            QflareError: Or another subclass: the update is refused.
        """
        (result,) = self.accept_all([(caller, submission, received)])
        if isinstance(result, QflareError):
            raise result
        return result

    def accept_all(
        self, items: Sequence[tuple[Caller, Submission, ReceivedPayload]]
    ) -> list[UpdateReceipt | QflareError]:
        """Write updates durably, each on its own merits; return the receipt or the refusal of each, in order."""
        entries = [_Entry(*item) for item in items]
        with self._lock:
            self._waiting.extend(entries)
            if entries and not self._led:
                self._led = entries[0].leads = True
        deadline = time.monotonic() + 4 * self._context.config.database_timeout_s
        for entry in entries:  # every one, since each may have to lead the batch that waits for it
            self._await(entry, deadline)
        return [_refusal_or_receipt(entry) for entry in entries]

    def _await(self, entry: _Entry, deadline: float) -> None:
        """Wait until an update is decided, leading its batch if its turn comes."""
        if not entry.leads and not entry.answered.wait(max(0.0, deadline - time.monotonic())):
            self._give_up(entry)
        if entry.leads:
            self._lead()

    def _give_up(self, entry: _Entry) -> None:
        """Leave the queue on a timeout, unless the thread has just become the leader."""
        with self._lock:
            if entry.leads or entry.answered.is_set():
                return
            if entry in self._waiting:
                self._waiting.remove(entry)
            entry.abandoned = True

    def preview(self, session: Session, submission: Submission) -> UpdateReceipt | None:
        """Return the receipt of an accepted update; refuse an update that would not be accepted.

        This avoids futile uploads of large payloads; the final decision is made after the upload.
        """
        statement, facts = submission.statement, submission.facts
        number = None if is_asynchronous(facts.config) else statement.round_number
        places = round_capacity.read_capacity(session, facts.training_session_id, number)
        if places is None:
            raise TrainingSessionNotFoundError
        states = devices.states_of(session, [statement.device_id])
        entry = _Entry(Caller(), submission, None)
        if _ruling(session, places, [entry], states, self._context.clock()).admit(entry):
            return None
        return entry.result()

    def _lead(self) -> None:
        """Write the waiting batch, then hand leadership to the next waiter."""
        self.window.wait()
        with self._lock:
            batch, self._waiting = self._waiting[:BATCH_LIMIT], self._waiting[BATCH_LIMIT:]
        try:
            self._write(batch)
        except BaseException as error:  # noqa: BLE001 - every waiting caller must get the error
            for entry in batch:
                entry.accepted, entry.error = None, error
        with self._lock:
            heir = self._waiting[0] if self._waiting else None
            self._led = heir is not None
            if heir is not None:
                heir.leads = True
        for entry in batch:
            entry.answered.set()
        if heir is not None:
            heir.answered.set()

    def _write(self, batch: Sequence[_Entry]) -> None:
        at = self._context.clock()
        closed = self._context.database.write(lambda session: self._decide(session, batch, at))
        if closed:
            self._context.wake()

    def _decide(self, session: Session, batch: Sequence[_Entry], at: datetime) -> bool:
        """Decide every update of a batch and write the accepted ones; return whether a round closed."""

        def key(entry: _Entry) -> tuple[str, int]:
            statement = entry.submission.statement
            return statement.training_session_id, statement.round_number

        for entry in batch:  # the transaction may be retried
            entry.accepted, entry.error = None, None
        states = devices.states_of(session, {item.submission.device.device_id for item in batch})
        ordered = sorted(batch, key=key)
        closed = [
            self._decide_round(session, number, list(entries), states, at)
            for (_, number), entries in groupby(ordered, key)
        ]
        return any(closed)

    def _decide_round(
        self,
        session: Session,
        number: int,
        entries: list[_Entry],
        states: dict[str, str],
        at: datetime,
    ) -> bool:
        facts = entries[0].submission.facts
        carries = is_asynchronous(facts.config)
        places = round_capacity.lock_capacity(
            session, facts.training_session_id, None if carries else number
        )
        if places is None:
            for entry in entries:
                entry.error = TrainingSessionNotFoundError()
            return False
        ruling = _ruling(session, places, entries, states, at)
        taken = [entry for entry in entries if self._has_every_byte(entry) and ruling.admit(entry)]
        if not taken:
            return False
        closed = ruling.count >= places.target and not awaits_evaluation(
            session, places.training_session_id, facts.config, places.base_version
        )
        with together(session):
            _insert(session, places, taken, at)
            round_capacity.record_accepted(
                session, places, ruling.count, ruling.example_count, at, closed=closed
            )
        return closed

    def _has_every_byte(self, entry: _Entry) -> bool:
        """Check under the round's lock that the file of a large payload is whole; set the error if it is not.

        The statements that insert the payload's row check chunks that are rows; a bucket has confirmed its object.
        """
        received = entry.received
        if received is None or received.store is None:
            return True
        store = self._context.store_of(received.store)
        if not isinstance(store, PayloadFolder) or store.has_every_byte(
            received.payload_id, received.size_bytes
        ):
            return True
        entry.error = ConflictError("bytes of the upload are missing; send it again")
        return False


def _refusal_or_receipt(entry: _Entry) -> UpdateReceipt | QflareError:
    try:
        return entry.result()
    except QflareError as error:
        return error


class _Admission:
    """Admission control for a batch of updates of one task, under the round's lock."""

    def __init__(
        self,
        session: Session,
        places: RoundCapacity,
        entries: Sequence[_Entry],
        states: dict[str, str],
        at: datetime,
    ) -> None:
        self._places = places
        self._states = states
        self._at = at
        self.count = places.accepted_count
        self.example_count = 0
        facts = entries[0].submission.facts
        self._max_staleness = facts.config.rounds.max_staleness
        self._is_masked = is_masked(facts.config)
        self._is_undone = facts.base_version < places.base_version and (
            global_models.find_rollback(
                session, facts.training_session_id, facts.base_version, places.base_version
            )
            is not None
        )
        device_ids = [entry.submission.device.device_id for entry in entries]
        update_ids = [entry.submission.statement.update_id for entry in entries]
        found = updates.find_known(session, places, update_ids, device_ids, facts.number)
        self._by_id = {item.update_id: item for item in found}
        self._by_device = {
            (item.device_id, item.base_version): item
            for item in found
            if item.training_session_id == places.training_session_id
            and facts.number <= item.round_number <= places.number
        }
        self._members = (
            membership.members_among(session, facts.training_session_id, device_ids)
            if facts.config.groups
            else None
        )
        self._sharers = (
            neighbors.sharers_among(session, facts.training_session_id, facts.number, device_ids)
            if has_neighbors(facts.config)
            else None
        )
        self._selected = (
            training_sessions.selected_among(
                session, facts.training_session_id, facts.number, device_ids
            )
            if facts.selected_count
            else None
        )

    def admit(self, entry: _Entry) -> bool:
        """Set an update's receipt or error; return whether it has to be written."""
        statement = entry.submission.statement
        known = self._by_id.get(statement.update_id) or self._by_device.get(
            (statement.device_id, statement.base_version)
        )
        if known is not None:
            self._answer_known(entry, known)
            return False
        entry.error = self._refusal(entry)
        if entry.error is not None:
            return False
        self.count += 1
        self.example_count += statement.example_count
        accepted = UpdateReceipt(
            statement.update_id,
            entry.submission.statement_digest,
            statement.device_id,
            self._places.training_session_id,
            self._places.number,
            statement.base_version,
            self.count,
            self._at,
        )
        entry.accepted = accepted
        self._by_id[accepted.update_id] = accepted
        self._by_device[accepted.device_id, accepted.base_version] = accepted
        return True

    def _answer_known(self, entry: _Entry, known: UpdateReceipt) -> None:
        same = (entry.submission.device.device_id, entry.submission.statement_digest)
        if (known.device_id, known.statement_digest) == same:
            entry.accepted = known
        else:
            entry.error = DuplicateUpdateError()

    def _refusal(self, entry: _Entry) -> QflareError | None:
        statement = entry.submission.statement
        if entry.submission.is_in_process != is_in_process(statement.training_session_id):
            return RoundNotOpenError("updates of devices and of programs are not mixed")
        if self._members is not None and statement.device_id not in self._members:
            return TrainingSessionNotFoundError()
        refusal = refuse_device(self._states.get(statement.device_id))
        refusal = refusal or self._refuse_round(statement.base_version)
        if refusal is not None:
            return refusal
        if self._sharers is not None:
            return _refuse_masks(self._sharers.get(statement.device_id), statement)
        if self._selected is not None and statement.device_id not in self._selected:
            return NotSelectedError()
        return None

    def _refuse_round(self, base_version: int) -> QflareError | None:
        places = self._places
        refusal = refuse_round(places, base_version, self._at, self.count)
        if refusal is None and base_version != places.base_version:
            return StaleBaseVersionError(base_version, places.base_version)
        return refusal


class _BufferedAdmission(_Admission):
    """Admission control for asynchronous sessions, where updates of older versions count in the open round.

    A device contributes once per base version, to the round of its task or to a later one. While a full buffer is
    being aggregated no round is open, and the device is told to resend, not to retrain. So it is with secure
    aggregation while another update of the device is in the buffer: a sum has as many devices as updates.
    An update trained from a rolled-back version is refused.
    """

    def _refusal(self, entry: _Entry) -> QflareError | None:
        refusal, device_id = super()._refusal(entry), entry.submission.device.device_id
        if refusal is None and self._is_masked and device_id in self._in_buffer():
            return TooManyRequestsError(
                "another update of the device is in the buffer", retry_after_s=HELD_RETRY_S
            )
        return refusal

    def _in_buffer(self) -> set[str]:
        """Return the devices with an update in the open round."""
        return {
            item.device_id
            for item in self._by_device.values()
            if item.round_number == self._places.number
        }

    def _refuse_round(self, base_version: int) -> QflareError | None:
        places = self._places
        if places.session_state != TrainingSessionState.RUNNING.value:
            return RoundNotOpenError(f"the training session is {places.session_state}")
        if places.base_version - base_version > self._max_staleness or self._is_undone:
            return StaleBaseVersionError(base_version, places.base_version)
        if refuse_round(places, base_version, self._at, self.count) is not None:
            return TooManyRequestsError(
                "the buffer is full and is being aggregated", retry_after_s=BUFFER_RETRY_S
            )
        return None


def _ruling(
    session: Session,
    places: RoundCapacity,
    entries: Sequence[_Entry],
    states: dict[str, str],
    at: datetime,
) -> _Admission:
    carries = is_asynchronous(entries[0].submission.facts.config)
    kind = _BufferedAdmission if carries else _Admission
    return kind(session, places, entries, states, at)


def refuse_device(state: str | None) -> QflareError | None:
    """Return why a device in this state may not contribute, None if it may."""
    if state is None or state == DeviceState.REVOKED.value:
        return DeviceRevokedError()
    if state != DeviceState.ACTIVE.value:
        return DeviceSuspendedError(f"the device is {state}")
    return None


def _refuse_masks(
    known: SharerFacts | None, statement: security_pb2.UpdateStatement
) -> QflareError | None:
    """Return why the sum cannot hold an update with the masks that it names, None if it can."""
    if known is None:
        return RoundNotOpenError("the device is in no group that waits for updates")
    named = statement.masking.neighbors
    if known != (named.advertisement_digest, named.roster_digest, named.sharers_digest):
        return InvalidRequestError("masking: of another group", field="header.statement")
    return None


def refuse_round(
    places: RoundCapacity, base_version: int, at: datetime, count: int
) -> QflareError | None:
    """Return why a round does not accept updates, None if it does."""
    if places.session_state != TrainingSessionState.RUNNING.value:
        return RoundNotOpenError(f"the training session is {places.session_state}")
    if places.state != RoundState.OPEN.value or count >= places.target:
        if places.current_version > base_version:
            return StaleBaseVersionError(base_version, places.current_version)
        return RoundNotOpenError(f"round {places.number} is closed")
    if places.deadline_at <= at:
        return RoundNotOpenError(f"round {places.number} is past its deadline")
    return None


def _insert(session: Session, places: RoundCapacity, taken: Sequence[_Entry], at: datetime) -> None:
    """Write accepted updates with their payloads and audit entries.

    Devices of embedding programs make no calls, so their last-seen times are recorded here.
    """
    insert_received(session, [entry.received for entry in taken if entry.received is not None], at)
    updates.insert_updates(session, [_row(entry, at) for entry in taken])
    audit.record_all(session, _events(places, taken), at)
    submissions = [entry.submission for entry in taken]
    in_process = {item.device.device_id: at for item in submissions if item.is_in_process}
    if in_process:
        devices.record_seen(session, in_process)


def _events(places: RoundCapacity, taken: Iterable[_Entry]) -> list[tuple[Caller, Event]]:
    events = []
    for entry in taken:
        assert entry.accepted is not None
        details = {
            "training_session_id": places.training_session_id,
            "round": places.number,
            "sequence": entry.accepted.acceptance_sequence,
            "statement_digest": entry.submission.statement_digest,
        }
        subject = f"update:{entry.accepted.update_id}"
        events.append((entry.caller, Event("update.accepted", subject, details=details)))
    return events


def _row(entry: _Entry, at: datetime) -> dict[str, Any]:
    submission, received, accepted = entry.submission, entry.received, entry.accepted
    assert accepted is not None
    assert received is not None
    statement = submission.statement
    metrics = dict(statement.metrics)
    return {
        "id": statement.update_id,
        "training_session_id": accepted.training_session_id,
        "round_number": accepted.round_number,
        "device_id": statement.device_id,
        "base_version": statement.base_version,
        "payload_id": received.payload_id,
        "payload_digest": received.digest,
        "size_bytes": received.size_bytes,
        "statement": submission.statement_bytes,
        "statement_digest": submission.statement_digest,
        "signature": submission.signature,
        "key_id": submission.device.key_id,
        "origin": origin_of(accepted.training_session_id).value,
        "example_count": statement.example_count,
        "loss": metrics.get("loss"),
        "accuracy": metrics.get("accuracy"),
        "local_epochs": whole_epochs(metrics),
        "training_time_s": metrics.get("training_time_s"),
        "metrics": metrics,
        "state": UpdateState.PENDING.value,
        "acceptance_sequence": accepted.acceptance_sequence,
        "accepted_at": at,
    }
