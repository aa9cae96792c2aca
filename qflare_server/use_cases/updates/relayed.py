"""Submission of many small updates in one call, by a gateway or a simulator for the devices that signed them.

The caller transports the updates. Each is authenticated by the signature of its own device, which is verified before
anything else that its statement names is looked up, and passes the same checks and the same acceptance as an update
that its device uploads itself. An update that is refused does not affect the others. What has to be looked up is looked
up for all updates of the call at once: the devices, the evidence for their keys, and the training sessions that they
take part in.

Each update counts as a call of its device, each update without a valid signature as a call of the caller.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.orm import Session

from qflare.protocol.constraints import find_violations
from qflare.v1 import coordinator_service_pb2, security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    AlgorithmNotAcceptedError,
    InvalidRequestError,
    InvalidSignatureError,
    QflareError,
    RoundNotOpenError,
    StaleBaseVersionError,
    TrainingSessionNotFoundError,
    UpdateTooLargeError,
    release_frames,
)
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.repository import devices
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.devices import Signer
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import DeviceState
from qflare_server.use_cases.access.objects import ObjectAccess
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.access.rate_limits import RateLimiter
from qflare_server.use_cases.updates.submission import Contributor, Submission, parse_update
from qflare_server.use_cases.updates.upload import Uploads

Outcome = UpdateReceipt | QflareError


@dataclass(eq=False)
class _Item:
    """One update of a call, and how far it has come."""

    update: coordinator_service_pb2.SmallUpdate
    statement: security_pb2.UpdateStatement | None = None
    device: Contributor | None = None
    takes_part: bool = False
    signature: bytes = b""
    submission: Submission | None = None
    received: ReceivedPayload | None = None
    outcome: Outcome | None = None


class RelayedUpdates:
    """Accepts many small updates of any devices in one call; thread-safe.

    Args:
        context: The coordinator's components.
        uploads: Updates that devices upload themselves; both share one acceptance.
        access: Decides which training sessions the signing devices take part in.
        presence: Notes that the signing devices are alive.
    """

    def __init__(
        self, context: Context, uploads: Uploads, access: ObjectAccess, presence: Presence
    ) -> None:
        self._context = context
        self._uploads = uploads
        self._access = access
        self._presence = presence
        rate = context.config.max_calls_per_second
        self._of_devices = RateLimiter(rate, time.monotonic, what="updates of one device")
        self._unsigned = RateLimiter(rate, time.monotonic, what="updates without a valid signature")

    def submit(
        self,
        caller: Caller,
        carrier: Contributor,
        updates: Sequence[coordinator_service_pb2.SmallUpdate],
    ) -> list[Outcome]:
        """Accept updates and return the receipt or the refusal of each, in order; receipts are durable.

        Args:
            caller: For the audit log.
            carrier: The calling device.
            updates: The updates, each with its whole payload.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        items = [_Item(update) for update in updates]
        _each(items, _parse)
        signers = self._find_signers(items)
        self._prove_keys(items, signers)
        allowance = _Allowance(self._unsigned, carrier.device_id)
        _each(items, partial(self._authenticate, allowance, signers))
        self._find_participants(items)
        _each(items, self._check)
        self._note_presence(items, signers)
        _each(items, self._receive)
        self._accept(caller, items)
        self._record_late(items)
        outcomes = [_outcome(item) for item in items]
        for outcome in outcomes:
            reason = outcome.reason if isinstance(outcome, QflareError) else ""
            self._context.telemetry.update_relayed(reason)
        return outcomes

    def _find_signers(self, items: Sequence[_Item]) -> Mapping[str, Signer]:
        """Return the devices that the statements name, by id."""
        named = {item.statement.device_id for item in items if item.statement is not None}
        with self._context.database.read() as session:
            return devices.signers_of(session, named)

    def _prove_keys(self, items: Sequence[_Item], signers: Mapping[str, Signer]) -> None:
        """Look up the evidence for the keys of all updates at once; each update then finds its key's in memory."""
        named = []
        for item in items:
            if item.statement is not None and item.update.header.statement.signatures:
                signer = signers.get(item.statement.device_id)
                if signer is not None and signer.key_id == item.statement.key_id:
                    named.append((item.statement.device_id, item.statement.key_id))
        self._context.identities.problems(named)

    def _authenticate(
        self, allowance: "_Allowance", signers: Mapping[str, Signer], item: _Item
    ) -> None:
        """Verify the signature of an update, unless it was accepted under an earlier key of its device."""
        statement, header = item.statement, item.update.header
        assert statement is not None
        allowance.require()
        item.device = _contributor(statement.device_id, signers.get(statement.device_id))
        try:
            item.signature = self._uploads.headers.authenticate(item.device, header, statement)
        except (InvalidSignatureError, AlgorithmNotAcceptedError):
            item.outcome = self._uploads.accepted_before(item.device, header)
            if item.outcome is None:
                allowance.spend()
                raise

    def _find_participants(self, items: Sequence[_Item]) -> None:
        """Look up which devices take part in the training sessions, for all authentic updates at once."""
        named: dict[str, list[_Item]] = {}
        for item in items:
            if item.outcome is None and item.statement is not None:
                named.setdefault(item.statement.training_session_id, []).append(item)
        for training_session_id, members in named.items():
            signed_by = {_device_of(item).device_id for item in members}
            found = self._access.participants(training_session_id, signed_by)
            for item in members:
                item.takes_part = _device_of(item).device_id in found

    def _check(self, item: _Item) -> None:
        """Check the header of an authentic update."""
        statement, device = item.statement, _device_of(item)
        assert statement is not None
        self._of_devices.take(device.device_id)
        if not item.takes_part:
            raise TrainingSessionNotFoundError
        item.submission = self._uploads.headers.check_authenticated(
            device, item.update.header, statement, item.signature
        )

    def _note_presence(self, items: Sequence[_Item], signers: Mapping[str, Signer]) -> None:
        """Note that the devices of valid headers are alive, and make those active that were inactive."""
        at = self._context.clock()
        present = {_device_of(item).device_id for item in items if item.submission is not None}
        for device_id in present:
            self._presence.note(device_id, at)
        inactive = [
            device_id
            for device_id in sorted(present)
            if signers[device_id].state == DeviceState.INACTIVE.value
        ]
        if inactive:
            self._context.database.write(partial(_reactivate, device_ids=inactive))

    def _receive(self, item: _Item) -> None:
        """Check the payload of an update."""
        assert item.submission is not None
        size, most = (
            item.submission.expected.wire_size_bytes,
            self._context.config.inline_payload_bytes,
        )
        if size > most:
            raise UpdateTooLargeError(
                f"payload: got {size} bytes, want at most {most}: use SubmitUpdate"
            )
        payload = item.update.payload
        chunks = [(0, payload)] if payload else []
        item.received, item.outcome = self._uploads.receive_small(item.submission, chunks)

    def _accept(self, caller: Caller, items: Sequence[_Item]) -> None:
        """Write the updates that have passed every check."""
        ready = [
            (item, item.submission, item.received)
            for item in items
            if item.outcome is None and item.submission is not None and item.received is not None
        ]
        outcomes = self._uploads.acceptance.accept_all(
            [(caller, submission, received) for _, submission, received in ready]
        )
        for (item, _, received), outcome in zip(ready, outcomes, strict=True):
            item.outcome = outcome
            if isinstance(outcome, UpdateReceipt):
                self._context.telemetry.bytes_received(received.size_bytes)

    def _record_late(self, items: Sequence[_Item]) -> None:
        late = [
            item.submission
            for item in items
            if item.submission is not None
            and isinstance(item.outcome, RoundNotOpenError | StaleBaseVersionError)
        ]
        if late:
            self._uploads.record_late(late)


class _Allowance:
    """Updates without a valid signature that a caller may still send in a call; not thread-safe.

    Args:
        limiter: Counts such updates of every caller.
        caller: The calling device.
    """

    def __init__(self, limiter: RateLimiter, caller: str) -> None:
        self._limiter = limiter
        self._caller = caller
        self._exhausted: QflareError | None = None

    def require(self) -> None:
        """Refuse to verify a further signature once the allowance is spent."""
        if self._exhausted is not None:
            raise self._exhausted

    def spend(self) -> None:
        """Count an update whose signature is not valid."""
        try:
            self._limiter.take(self._caller)
        except QflareError as error:
            release_frames(error)
            self._exhausted = error


def _each(items: Sequence[_Item], step: Callable[[_Item], None]) -> None:
    """Take every update that is undecided through a step; what the step raises becomes its outcome."""
    for item in items:
        if item.outcome is None:
            try:
                step(item)
            except QflareError as error:
                release_frames(error)  # they hold the items
                item.outcome = error


def _parse(item: _Item) -> None:
    InvalidRequestError.raise_for(find_violations(item.update))
    item.statement = parse_update(item.update.header)


def _contributor(device_id: str, signer: Signer | None) -> Contributor:
    """Return the signing device; an unknown one has no key, so that its signature is not valid."""
    if signer is None:
        return Contributor(device_id, None)
    return Contributor(device_id, signer.key_id, signer.key_algorithm, signer.public_key)


def _device_of(item: _Item) -> Contributor:
    assert item.device is not None
    return item.device


def _reactivate(session: Session, device_ids: Sequence[str]) -> None:
    for device_id in device_ids:
        devices.reactivate(session, device_id)


def _outcome(item: _Item) -> Outcome:
    assert item.outcome is not None
    return item.outcome
