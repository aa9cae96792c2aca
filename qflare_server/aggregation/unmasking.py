"""Requests to helpers for secure aggregation: the sum of the masks of a round's updates.

A helper gets the signed task of the round, the signed statement of every update and the evidence of the devices' keys;
no payload. Its answer is checked against the request, and the sum against the answer, before the sum is used. Updates
whose seed a helper cannot open are left out, and the request is repeated without them.

With several helpers each of them first checks all updates without an answer: an update that only the last helper
refuses would otherwise change a set that the others have already answered.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from qflare.evidence.lineage import contributors_digest
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import Helper, Masking, check_answer, open_answer
from qflare.masking.parameters import DTYPES
from qflare.masking.staleness import weights_digest
from qflare.tensors import Manifest, TensorSpec
from qflare.times import timestamp_of
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.context import Context, Helpers
from qflare_server.errors import HelperRefusedError, HelperUnavailableError, InvalidUpdateError
from qflare_server.keys.device_identities import key_evidence
from qflare_server.payloads.sealed_receiver import version_seal_context
from qflare_server.payloads.writer import PayloadWriter
from qflare_server.storage.payload_records import ReceivedPayload
from qflare_server.storage.repository import (
    audit,
    evidence,
    training_sessions,
    unmaskings,
    updates,
)
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.repository.unmaskings import StoredUnmasking

logger = logging.getLogger(__name__)

BATCH: Final = 64
"""Updates that are read at once."""

PART_BYTES: Final = 2**18
"""Most bytes of updates in one part of a request; an update that is larger is alone. A part has to arrive within the
seconds that a helper waits for it."""

MAX_REASON: Final = 200

Request = helper_service_pb2.UnmaskRequest
Subtract = Callable[[int, bytes], None]
"""`subtract(offset, data)` subtracts bytes of a sum of masks, at an offset in bytes."""


class RefusedUpdatesError(Exception):
    """A helper cannot use the seeds of some updates.

    Attributes:
        reasons: Reasons by update id.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{len(reasons)} updates refused")
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class MaskSum:
    """Verified answer of one helper, with the written sum of the masks."""

    answer: security_pb2.UnmaskingAnswer
    envelope: security_pb2.SignedEnvelope
    payload: ReceivedPayload

    def stored(self, refused: Mapping[str, str]) -> StoredUnmasking:
        """Return the row of the answer."""
        return StoredUnmasking(
            self.answer.helper_id,
            self.answer.counter,
            self.envelope.SerializeToString(),
            self.payload.payload_id,
            refused,
        )


class HelperRequests:
    """Requests for one set of updates of a round.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        plan: Of the round.
        task: The round's signed task.
        masking: What it requires.
        digests: Statement digests by update id, of the updates in the sum.
        weights: Their staleness weights.
        earlier_rounds: Rounds before this one for whose tasks updates in the sum were made.
        size_bytes: Size of a masked update.
        at: When the round closed.
        is_repeated: Whether the same set was sent before, and a helper did not answer.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        plan: RoundPlan,
        task: security_pb2.SignedEnvelope,
        masking: Masking,
        digests: Mapping[str, str],
        weights: Mapping[str, int],
        earlier_rounds: Collection[int],
        size_bytes: int,
        at: datetime,
        *,
        is_repeated: bool = False,
    ) -> None:
        self._is_repeated = is_repeated
        self._context = context
        self._executor = executor
        self._plan = plan
        self._task = task
        self._masking = masking
        self._digests = digests
        self._weights = weights
        self._earlier_rounds = earlier_rounds
        self._size_bytes = size_bytes
        self._at = at

    def ask_all(self, subtract: Subtract) -> list[MaskSum]:
        """Ask every helper of the task.

        Args:
            subtract: Gets each sum while it arrives, before its digest is checked; after an exception everything that
                it got is worthless.

        Raises:
            RefusedUpdatesError: No helper has answered; it may be asked again without these updates.
            HelperUnavailableError: A helper does not answer; the same request may be repeated.
            HelperRefusedError: A helper refused the set, or an answer does not verify.
        """
        helpers, answers = self._masking.helpers, []
        if not self._is_repeated:
            self._record_sent()
        if len(helpers) > 1:
            for helper in helpers:
                with self._told(helper):
                    self._call(helper, is_check=True)
        for helper in helpers:
            with self._told(helper):
                answers.append(self._ask(helper, subtract))
        return answers

    def _record_sent(self) -> None:
        """Record in the audit log that the set is closed, and to which helpers it is sent."""
        members: dict[str, Any] = {
            "round": self._plan.number,
            "members": len(self._digests),
            "members_digest": contributors_digest(self._digests.values()),
        }
        sent = [members | {"helper_id": helper.helper_id} for helper in self._masking.helpers]
        self._record("round.set_closed", members)
        self._record("round.sent_to_helper", *sent)

    def _record(self, event_type: str, *entries: dict[str, Any]) -> None:
        subject, now = f"training_session:{self._plan.training_session_id}", self._context.clock()

        def work(session: Session) -> None:
            for details in entries:
                audit.record(session, SYSTEM, Event(event_type, subject, details=details), now)

        self._context.database.write(work)

    @contextmanager
    def _told(self, helper: Helper) -> Iterator[None]:
        """Count the outcome of a request, and record a refusal in the audit log."""
        details: dict[str, Any] = {"round": self._plan.number, "helper_id": helper.helper_id}
        telemetry, started = self._context.telemetry, time.monotonic()
        try:
            yield
        except RefusedUpdatesError as error:
            telemetry.helper_asked("updates_refused", time.monotonic() - started)
            self._record("round.updates_refused", details | {"updates": len(error.reasons)})
            raise
        except HelperRefusedError as error:
            telemetry.helper_asked("refused", time.monotonic() - started)
            self._record("round.helper_refused", details | {"reason": str(error)[:MAX_REASON]})
            raise
        except HelperUnavailableError:
            telemetry.helper_asked("unavailable", time.monotonic() - started)
            raise
        telemetry.helper_asked("answered", time.monotonic() - started)

    def _ask(self, helper: Helper, subtract: Subtract) -> MaskSum:
        request, parts = self._call(helper, is_check=False)
        first = next(parts, None)
        if first is None or first.WhichOneof("part") != "answer":
            raise HelperRefusedError(f"helper {helper.helper_id}: its response has no answer")
        answer = self._checked(helper, request, first.answer)
        spec = TensorSpec("mask", DTYPES[answer.bits], (answer.size_bytes * 8 // answer.bits,))
        seal_context = version_seal_context(
            self._context,
            self._plan.config,
            self._plan.training_session_id,
            self._plan.number,
            f"masks of helper {helper.helper_id}",
        )
        writer = PayloadWriter(
            self._context, self._executor, Manifest((spec,)), self._at, seal_context
        )
        offset = 0
        try:
            for part in parts:
                data = part.chunk
                if not data or offset + len(data) > answer.size_bytes:
                    raise HelperRefusedError(f"helper {helper.helper_id}: its sum is too long")
                subtract(offset, data)
                writer.feed(data)
                offset += len(data)
            payload = writer.finish()
        except InvalidUpdateError as error:
            raise HelperRefusedError(f"helper {helper.helper_id}: its sum: {error}") from error
        if payload.content_digest != answer.mask_digest:
            raise HelperRefusedError(f"helper {helper.helper_id}: its sum is not what it signed")
        self._record(
            "round.helper_answered",
            {
                "round": self._plan.number,
                "helper_id": helper.helper_id,
                "counter": answer.counter,
                "answer_digest": digest_of(first.answer.answer.payload),
                "members": answer.member_count,
            },
        )
        return MaskSum(answer, first.answer.answer, payload)

    def _call(
        self, helper: Helper, *, is_check: bool
    ) -> tuple[security_pb2.UnmaskingRequest, Iterator[helper_service_pb2.UnmaskResponse]]:
        """Call a helper; for a check, return after its response.

        Raises:
            RefusedUpdatesError: The helper cannot use some updates.
        """
        helpers = self._context.helpers
        if helpers is None:
            raise HelperUnavailableError("no helper is known here")
        request = self._request(helper)
        parts = helpers.unmask(helper.helper_id, self._parts(helpers, request, is_check=is_check))
        first = next(parts, None)
        if first is not None and first.WhichOneof("part") == "refused":
            reasons = {
                member.update_id: f"helper: {member.reason}"[:MAX_REASON]
                for member in first.refused.members
                if member.update_id in self._digests
            }
            for update_id, reason in reasons.items():
                logger.warning("update refused by a helper: %s: %s", update_id, reason)
            if reasons:
                raise RefusedUpdatesError(reasons)
            if is_check:
                return request, iter(())
        return request, _resumed(first, parts)

    def _request(self, helper: Helper) -> security_pb2.UnmaskingRequest:
        with self._context.database.read() as session:
            last_counter = unmaskings.last_counter(session, helper.helper_id)
        return security_pb2.UnmaskingRequest(
            realm=self._context.config.realm,
            training_session_id=self._plan.training_session_id,
            round_number=self._plan.number,
            helper_id=helper.helper_id,
            task_digest=self._masking.task_digest,
            members_digest=contributors_digest(self._digests.values()),
            member_count=len(self._digests),
            last_counter=last_counter,
            create_time=timestamp_of(self._context.clock()),
            weights_digest=stated_weights(self._masking, self._digests, self._weights),
        )

    def _checked(
        self,
        helper: Helper,
        request: security_pb2.UnmaskingRequest,
        response: helper_service_pb2.UnmaskAnswer,
    ) -> security_pb2.UnmaskingAnswer:
        """Return a helper's answer, verified.

        Raises:
            HelperRefusedError: It is not signed by the helper, is for another request, or its counter went back.
        """
        try:
            answer = open_answer(response.answer, helper.key)
            latest = open_answer(response.latest, helper.key)
            check_answer(answer, request, self._masking, self._size_bytes)
        except StatementError as error:
            raise HelperRefusedError(f"helper {helper.helper_id}: its answer: {error}") from error
        if latest.counter < max(answer.counter, request.last_counter):
            raise HelperRefusedError(
                f"helper {helper.helper_id}: its counter went back from {request.last_counter} to "
                f"{latest.counter}: its database was restored from a backup"
            )
        return answer

    def _parts(
        self, helpers: Helpers, request: security_pb2.UnmaskingRequest, *, is_check: bool
    ) -> Iterator[Request]:
        with self._context.database.read() as session:
            roots = [_envelope(data) for data in evidence.trust_documents(session, "root")]
            keysets = [_envelope(data) for data in evidence.trust_documents(session, "keyset")]
        header = helper_service_pb2.UnmaskHeader(
            request=helpers.sign_request(request.SerializeToString(deterministic=True)),
            task=self._task,
            keyset=security_pb2.KeysetBundle(roots=roots, keyset=keysets[-1] if keysets else None),
            earlier_keysets=keysets[:-1],
            check_only=is_check,
        )
        yield Request(header=header)
        yield from (Request(earlier_task=task) for task in self._earlier_tasks())
        for members in self._batches():
            yield from packed(members)

    def _earlier_tasks(self) -> Iterator[security_pb2.SignedEnvelope]:
        for number in sorted(self._earlier_rounds):
            with self._context.database.read() as session:
                found = training_sessions.get_round(session, self._plan.training_session_id, number)
            yield opened_task(None if found is None else found.task)

    def _batches(self) -> Iterator[list[helper_service_pb2.UnmaskMember]]:
        """Yield the updates in the batches in which they are read."""
        after, plan = 0, self._plan
        while True:
            with self._context.database.read() as session:
                batch = updates.facts_after(
                    session, plan.training_session_id, plan.number, after, BATCH
                )
                wanted = [update for update in batch if update.update_id in self._digests]
                keys = evidence.keys_of(session, {update.device_id for update in wanted})
            members = []
            for update in wanted:
                statement = security_pb2.SignedEnvelope(payload=update.statement or b"")
                statement.signatures.add().ParseFromString(update.signature or b"")
                shown = [key_evidence(key) for key in keys if key.device_id == update.device_id]
                members.append(
                    helper_service_pb2.UnmaskMember(statement=statement, device_keys=shown)
                )
            yield members
            if len(batch) < BATCH:
                return
            after = batch[-1].acceptance_sequence


def packed(members: Iterable[helper_service_pb2.UnmaskMember]) -> Iterator[Request]:
    """Yield the parts of a request with some updates: `PART_BYTES` of them in each, or one that is larger.

    Args:
        members: At most `BATCH`, so that a part has no more than a helper accepts.
    """
    part, size_bytes = Request(), 0
    for member in members:
        added = member.ByteSize()
        if part.members.members and size_bytes + added > PART_BYTES:
            yield part
            part, size_bytes = Request(), 0
        part.members.members.append(member)
        size_bytes += added
    if part.members.members:
        yield part


def opened_task(
    task: bytes | None,
) -> security_pb2.SignedEnvelope:
    """Return the signed task of a round with secure aggregation.

    Raises:
        HelperRefusedError: There is none.
    """
    try:
        envelope = security_pb2.SignedEnvelope.FromString(task or b"")
    except DecodeError as error:
        raise HelperRefusedError("the signed task of the round is damaged") from error
    if not envelope.signatures:
        raise HelperRefusedError("the signed task of the round is missing")
    return envelope


def stated_weights(masking: Masking, digests: Mapping[str, str], weights: Mapping[str, int]) -> str:
    """Return the digest of the staleness weights of the updates in a sum; empty if rounds are not asynchronous."""
    if not masking.parameters.staleness_weights:
        return ""
    return weights_digest((digest, weights[name]) for name, digest in digests.items())


def check_stored(
    stored: Sequence[StoredUnmasking],
    masking: Masking,
    training_session_id: str,
    round_number: int,
    members_digest: str,
    weights: str,
) -> list[security_pb2.UnmaskingAnswer]:
    """Verify the stored answers of a round, and return them in the order of the task's helpers.

    Raises:
        HelperRefusedError: They are not what the helpers signed for this set.
    """
    if len(stored) != len(masking.helpers):
        raise HelperRefusedError("an answer of a helper is missing")
    answers = []
    for row, helper in zip(stored, masking.helpers, strict=True):
        try:
            answer = open_answer(security_pb2.SignedEnvelope.FromString(row.answer), helper.key)
        except (StatementError, DecodeError) as error:
            raise HelperRefusedError(f"the answer of helper {helper.helper_id}: {error}") from error
        got = (
            answer.training_session_id,
            answer.round_number,
            answer.task_digest,
            answer.members_digest,
            answer.weights_digest,
        )
        place = training_session_id, round_number, masking.task_digest
        if got != (*place, members_digest, weights):
            raise HelperRefusedError(
                f"the answer of helper {helper.helper_id} is for other updates"
            )
        if answer.noise_multiplier != masking.helper_noise:
            raise HelperRefusedError(f"the answer of helper {helper.helper_id} has other noise")
        answers.append(answer)
    return answers


def answer_digests(stored: Sequence[StoredUnmasking]) -> list[str]:
    """Return the digests of signed answers, as a version's statement names them."""
    return [digest_of(_envelope(row.answer).payload) for row in stored]


def _resumed(
    first: helper_service_pb2.UnmaskResponse | None,
    parts: Iterator[helper_service_pb2.UnmaskResponse],
) -> Iterator[helper_service_pb2.UnmaskResponse]:
    if first is not None:
        yield first
        yield from parts


def _envelope(data: bytes) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope.FromString(data)
