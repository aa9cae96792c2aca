"""Small updates of devices, checked and accepted together: one thread takes all that wait, and answers all of them.

Handing each update to a thread of its own, and waking that thread again once its transaction is durable, costs more
than checking it. Here a thread takes every update that has arrived meanwhile, verifies one after the other, and writes
those that pass in one transaction. An update that is refused does not affect the others.

A call is admitted by the same rules as by `interceptor.CallInterceptor`. The counters of changes are read once for all
updates that a thread has taken, after they have arrived, so that a revocation takes effect on the next call. A call
that is not admitted or malformed takes the general path, which refuses it; nothing has been counted of it then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qflare.v1 import coordinator_service_pb2 as pb
from qflare_server.context import Context
from qflare_server.errors import QflareError, release_frames
from qflare_server.serving.rpc.call import REQUEST_ID_BITS, Call
from qflare_server.serving.rpc.encoding import versions
from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.serving.rpc.interceptor import CallInterceptor
from qflare_server.serving.rpc.status import Code
from qflare_server.serving.rpc.validation import validating
from qflare_server.storage.epochs import Epochs
from qflare_server.storage.ids import unique_name
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.access.authentication import hash_secret, sole_value
from qflare_server.use_cases.access.login import AUTHORIZATION, bearer_of
from qflare_server.use_cases.updates.submission import Contributor, parse_update
from qflare_server.use_cases.updates.upload import Arrival, Taken

logger = logging.getLogger(__name__)

METHOD: Final = "/qflare.v1.CoordinatorService/SubmitUpdate"

_parse = validating(pb.SubmitUpdateRequest.FromString)


@dataclass(eq=False)
class _Small:
    """A call with a small update, and how far it has come."""

    incoming: IncomingCall
    call: Call
    arrival: Arrival
    training_session_id: str
    began_at: float
    outcome: Taken | UpdateReceipt | BaseException | None = None


class SmallUpdates:
    """Answers calls of `SubmitUpdate` whose update has arrived; thread-safe.

    Args:
        context: Dependencies of the use cases.
        use_cases: The use cases.
        boundary: The general path.
    """

    def __init__(self, context: Context, use_cases: UseCases, boundary: CallInterceptor) -> None:
        self._is_on = not context.telemetry.records_spans
        self._context = context
        self._use_cases = use_cases
        self._boundary = boundary

    def takes(self, call: IncomingCall) -> bool:
        """Return whether a call of a device, which has arrived, is to be answered here."""
        return (
            self._is_on
            and call.route.method == METHOD
            and call.messages.is_only_one
            and call.moved_bytes <= self._context.config.inline_payload_bytes
            and not self._boundary.must_see_all
        )

    def answer(self, calls: Sequence[IncomingCall]) -> Sequence[IncomingCall]:
        """Answer calls, and return those that the general path has to answer, as they were."""
        for call in calls:
            self._boundary.running.begin()
            if not call.on_end(self._boundary.running.end):  # the caller has canceled
                self._boundary.running.end()
        if self._boundary.must_see_all:  # since they were queued
            return calls
        try:
            admitted = self._admit(calls)
        except QflareError as error:
            release_frames(error)
            return calls
        except Exception:
            logger.exception("small updates were not admitted; they take the general path")
            return calls
        self._handle(admitted)
        mine = {item.incoming for item in admitted}
        return [call for call in calls if call not in mine]

    def _admit(self, calls: Sequence[IncomingCall]) -> list[_Small]:
        """Return the calls that are admitted, and count them.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        epochs = self._context.database.epochs()
        read = [item for item in (self._read(call, epochs) for call in calls) if item is not None]
        sessions: dict[str, set[str]] = {}
        for item in read:
            devices = sessions.setdefault(item.training_session_id, set())
            devices.add(item.arrival.device.device_id)
        related = {
            session_id: self._use_cases.objects.participants(session_id, devices, epochs)
            for session_id, devices in sessions.items()
        }
        self._prove_keys(read)
        return [item for item in read if self._is_counted(item, related)]

    def _read(self, incoming: IncomingCall, epochs: Epochs) -> _Small | None:
        """Authenticate a call and read its message; None if the general path is to refuse it."""
        if incoming.is_over:
            return None
        try:
            bearer = bearer_of(sole_value(incoming.metadata, AUTHORIZATION))
            data = incoming.messages.first_held
            request = None if data is None else _parse(data)
            if bearer is None or request is None or not _is_whole(request):
                return None
            who = self._use_cases.authentication.admit_hash(METHOD, hash_secret(bearer), epochs)
            if who.device_id is None:
                return None
            session_id = parse_update(request.header).training_session_id
        except QflareError as error:
            release_frames(error)
            return None
        call = Call(
            METHOD,
            unique_name(REQUEST_ID_BITS),
            find_peer=lambda: incoming.peer_address,
            kind=incoming.route.kind,
            principal=who,
        )
        device = Contributor(who.device_id, who.key_id, who.key_algorithm, who.public_key)
        data = request.chunk.data
        arrival = Arrival(call.caller, device, request.header, [data] if data else [])
        return _Small(incoming, call, arrival, session_id, time.monotonic())

    def _prove_keys(self, items: Sequence[_Small]) -> None:
        """Look up the evidence for the keys of all updates at once; each update then finds its key's in memory."""
        devices = [item.arrival.device for item in items]
        self._context.identities.problems(
            (device.device_id, device.key_id) for device in devices if device.key_id is not None
        )

    def _is_counted(self, item: _Small, related: Mapping[str, set[str]]) -> bool:
        """Count a call for the rate of its device; False if the call is to be refused, and nothing was counted."""
        if item.arrival.device.device_id not in related[item.training_session_id]:
            return False
        try:
            self._boundary.rates.take(item.call.principal.name)
        except QflareError as error:
            release_frames(error)
            return False
        telemetry, kind = self._context.telemetry, item.call.kind
        telemetry.call_started(METHOD, kind)
        telemetry.message_received(METHOD, kind)
        return True

    def _handle(self, items: Sequence[_Small]) -> None:
        """Check, write and answer admitted calls; whatever goes wrong becomes a status."""
        for item in items:
            try:
                item.outcome = self._use_cases.uploads.take(item.arrival)
            except BaseException as error:  # noqa: BLE001 - the boundary: every error becomes a status
                item.outcome = error
        taken = [(item, item.outcome) for item in items if isinstance(item.outcome, Taken)]
        try:
            answers = self._use_cases.uploads.accept_all([outcome for _, outcome in taken])
            for (item, _), answer in zip(taken, answers, strict=True):
                item.outcome = answer
        except BaseException as error:  # noqa: BLE001 - as above
            for item, _ in taken:
                item.outcome = error
        for item in items:
            try:
                self._send(item)
            except Exception:
                logger.exception("a small update was not answered; the others are")

    def _send(self, item: _Small) -> None:
        """Send the receipt or the refusal of an update."""
        outcome, item.outcome = item.outcome, None
        if isinstance(outcome, UpdateReceipt):
            item.incoming.reply(versions.receipt(outcome).SerializeToString())
            self._context.telemetry.message_sent(METHOD, item.call.kind)
            self._boundary.report(item.call, Code.OK, time.monotonic() - item.began_at)
            return
        assert isinstance(outcome, BaseException)
        refusal = self._boundary.refused(item.call, outcome, time.monotonic() - item.began_at)
        release_frames(outcome)
        item.incoming.refuse(refusal)


def _is_whole(request: pb.SubmitUpdateRequest) -> bool:
    """Return whether a request contains an update from its header to its only chunk."""
    return request.HasField("header") and request.HasField("chunk") and not request.chunk.index
