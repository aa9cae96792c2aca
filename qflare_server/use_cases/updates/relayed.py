"""Submission of many small updates in one call, by a gateway or a simulator for the devices that signed them.

The caller transports the updates. Each is authenticated by the signature of its own device, which is verified before
anything else that its statement names is looked up, and passes the same checks and the same acceptance as an update
that its device uploads itself. An update that is refused does not affect the others.

Each update counts as a call of its device, each update without a valid signature as a call of the caller.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
    UpdateTooLargeError,
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
        allowance = _Allowance(self._unsigned, carrier.device_id)
        _each(items, partial(self._authenticate, allowance, signers))
        self._look_up_relations(items)
        _each(items, partial(self._check, signers))
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

    def _look_up_relations(self, items: Sequence[_Item]) -> None:
        """Look up which devices take part in the training sessions, for all authentic updates at once."""
        named: dict[str, set[str]] = {}
        for item in items:
            if item.outcome is None and item.statement is not None:
                members = named.setdefault(item.statement.training_session_id, set())
                members.add(item.statement.device_id)
        for training_session_id, device_ids in named.items():
            self._access.look_up(training_session_id, device_ids)

    def _check(self, signers: Mapping[str, Signer], item: _Item) -> None:
        """Check the header of an authentic update."""
        statement, device = item.statement, item.device
        assert statement is not None
        assert device is not None
        self._of_devices.take(device.device_id)
        self._access.require_relation(device.device_id, statement.training_session_id)
        item.submission = self._uploads.headers.check_authenticated(
            device, item.update.header, statement, item.signature
        )
        if signers[device.device_id].state == DeviceState.INACTIVE.value:
            self._context.database.write(
                lambda session: devices.reactivate(session, device.device_id)
            )
        self._presence.note(device.device_id, self._context.clock())

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
            caller, [(submission, received) for _, submission, received in ready]
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
            self._exhausted = error


def _each(items: Sequence[_Item], step: Callable[[_Item], None]) -> None:
    """Take every update that is undecided through a step; what the step raises becomes its outcome."""
    for item in items:
        if item.outcome is None:
            try:
                step(item)
            except QflareError as error:
                item.outcome = error


def _parse(item: _Item) -> None:
    InvalidRequestError.raise_for(find_violations(item.update))
    item.statement = parse_update(item.update.header)


def _contributor(device_id: str, signer: Signer | None) -> Contributor:
    """Return the signing device; an unknown one has no key, so that its signature is not valid."""
    if signer is None:
        return Contributor(device_id, None)
    return Contributor(device_id, signer.key_id, signer.key_algorithm, signer.public_key)


def _outcome(item: _Item) -> Outcome:
    assert item.outcome is not None
    return item.outcome
