"""Steps of secure aggregation with neighbors: what a device sends in each, and what it is shown for it.

A step is recorded under the lock of the round's row, so that it counts either before a stage is decided or not at all.
A repeated step has no effect; another one in the same place is refused.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.evidence.neighbors import (
    MaskedRound,
    Member,
    check_boxes,
    open_advertisement,
    open_confirmation,
    open_reveal,
    open_shares,
)
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import masking_of
from qflare.masking.neighbor_graph import NeighborGraph
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    DuplicateUpdateError,
    InvalidRequestError,
    InvalidSignatureError,
    NotSelectedError,
    RoundNotOpenError,
    TrainingSessionNotFoundError,
)
from qflare_server.keys.device_identities import evidence_up_to
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import (
    devices,
    evidence,
    neighbors,
    training_sessions,
)
from qflare_server.storage.repository.neighbors import StoredGroup, StoredMember
from qflare_server.storage.tables import GroupStage, RoundState, TrainingSessionState
from qflare_server.training.neighbor_stages import (
    graph_of,
    has_neighbors,
    is_due,
    is_enough,
)
from qflare_server.use_cases.access.objects import STEPS
from qflare_server.use_cases.access.statements import parse_statement
from qflare_server.use_cases.devices.keys import AcceptedAlgorithms
from qflare_server.use_cases.updates.acceptance import refuse_device
from qflare_server.use_cases.updates.submission import (
    Contributor,
    contributor_key,
    require_identity,
)

Statement = (
    security_pb2.NeighborAdvertisement
    | security_pb2.NeighborShares
    | security_pb2.NeighborConfirmation
    | security_pb2.NeighborReveal
)

MAX_EVIDENCE_BYTES: Final = 3 * 2**20
"""Evidence of a device's key, receipt and rotations, that an answer to a neighbor has room for."""
_STAGES: Final = {
    "shares": GroupStage.SHARE.value,
    "confirmation": GroupStage.CONFIRM.value,
    "reveal": GroupStage.REVEAL.value,
}


def envelope_of(request: pb.SecureAggregationStepRequest) -> security_pb2.SignedEnvelope:
    """Return the signed statement of a step.

    Raises:
        InvalidRequestError: The request has no step.
    """
    step = request.WhichOneof("step")
    if step is None:
        raise InvalidRequestError("step: want one", field="step")
    return request.shares.statement if step == "shares" else getattr(request, step)


def parse_step(request: pb.SecureAggregationStepRequest) -> Statement:
    """Return the statement of a step, parsed and not verified.

    Raises:
        InvalidRequestError: It is malformed, or the request has none.
    """
    envelope = envelope_of(request)
    kind, path = STEPS[request.WhichOneof("step") or ""]
    statement: Statement = parse_statement(kind, envelope.payload, f"{path}.payload")
    return statement


class NeighborSteps:
    """Takes the steps of devices; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._algorithms = AcceptedAlgorithms(context.config)

    def take(self, contributor: Contributor, request: pb.SecureAggregationStepRequest) -> None:
        """Record a step of a device. Idempotent.

        Raises:
            InvalidRequestError: The statement is malformed, or not of the round's task, roster or stage.
            InvalidSignatureError: It is not signed with the device's current key.
            TrainingSessionNotFoundError: There is no such training session, or it has no such steps.
            RoundNotOpenError: The round does not wait for this step.
            NotSelectedError: The device is not in the round, or not active.
            DuplicateUpdateError: The device has sent another statement for this step.
        """
        statement, envelope = parse_step(request), envelope_of(request)
        self._check_device(contributor, statement, envelope)

        def work(session: Session) -> bool:
            return _Step(self._context, session, contributor, request, statement).record()

        if self._context.database.write(work):
            self._context.wake()

    def _check_device(
        self,
        contributor: Contributor,
        statement: Statement,
        envelope: security_pb2.SignedEnvelope,
    ) -> None:
        if (statement.realm, statement.device_id) != (
            self._context.config.realm,
            contributor.device_id,
        ):
            raise InvalidRequestError("statement: of another realm or device", field="step")
        if len(envelope.signatures) != 1:
            raise InvalidSignatureError(f"signatures: got {len(envelope.signatures)}, want 1")
        if contributor.key_id is None or statement.key_id != contributor.key_id:
            raise InvalidSignatureError("key_id: it is not the device's current key")
        key = contributor_key(contributor)
        self._algorithms.require(key.algorithm)
        require_identity(self._context, contributor.device_id, contributor.key_id, key)


class _Step:
    """One step, in its transaction."""

    def __init__(
        self,
        context: Context,
        session: Session,
        contributor: Contributor,
        request: pb.SecureAggregationStepRequest,
        statement: Statement,
    ) -> None:
        self._context = context
        self._session = session
        self._contributor = contributor
        self._request = request
        self._statement = statement
        self._key = statement.training_session_id, statement.round_number

    def record(self) -> bool:
        """Record the step; return whether a stage may be decided."""
        training_session, current = self._lock()
        step = self._request.WhichOneof("step") or ""
        found = neighbors.members_of(self._session, *self._key, device_id=self._device_id)
        own = found[0] if found else None
        known = neighbors.contents(self._session, *self._key, step, [self._device_id])
        content = self._content(step)
        if self._device_id in known:
            if _statement_of(step, known[self._device_id]) != _statement_of(step, content):
                raise DuplicateUpdateError("another statement of this step is recorded")
            return False
        groups = neighbors.groups_of(self._session, *self._key)
        self._check_open(training_session, current, step, own, groups)
        config = training_session.config
        if own is None:
            return self._advertise(config, current, content)
        group = next(item for item in groups if item.number == own.group_number)
        self._record_step(config, current, group, own, content)
        members = neighbors.members_of(self._session, *self._key, group=group.number)
        now = self._context.clock()
        return step == "reveal" or is_due(config, current, [group], members, now)

    def _advertise(
        self, config: training_pb2.TrainingConfig, current: Round, content: bytes
    ) -> bool:
        """Record an advertisement; return whether groups may be formed."""
        count = neighbors.count_members(self._session, *self._key)
        if count >= current.target:
            raise RoundNotOpenError("as many devices as the round wants have advertised")
        self._require_short_evidence()
        self._insert(content, _round_of(self._context.config.realm, current))
        return is_enough(config, current, count + 1, self._context.clock())

    def _require_short_evidence(self) -> None:
        """Refuse a device with so many replaced keys that its neighbors could not be shown the evidence."""
        rows = evidence.keys_of(self._session, [self._device_id])
        proof = evidence_up_to(rows, self._statement.key_id)
        size = sum(item.ByteSize() for item in proof)
        if size > MAX_EVIDENCE_BYTES:
            raise NotSelectedError(
                f"the evidence of the device's {len(proof)} keys has {size} bytes, and no more than"
                f" {MAX_EVIDENCE_BYTES} can be shown to neighbors: enroll the device anew"
            )

    def _record_step(
        self,
        config: training_pb2.TrainingConfig,
        current: Round,
        group: StoredGroup,
        own: StoredMember,
        content: bytes,
    ) -> None:
        """Check and record a later step of a member."""
        step = self._request.WhichOneof("step") or ""
        members = neighbors.members_of(self._session, *self._key, group=group.number)
        masked_round = _round_of(self._context.config.realm, current)
        with _Refusals():
            self._check_content(step, own, group, masked_round, graph_of(config, members))
        values: dict[str, Any] = {step: content}
        if step == "shares":
            values["shares_digest"] = digest_of(self._request.shares.statement.payload)
        neighbors.update_member(self._session, *self._key, self._device_id, values)

    @property
    def _device_id(self) -> str:
        return self._contributor.device_id

    def _lock(self) -> tuple[TrainingSession, Round]:
        training_session = training_sessions.lock_session(self._session, self._key[0])
        if training_session is None or not has_neighbors(training_session.config):
            raise TrainingSessionNotFoundError
        current = training_sessions.lock_round(self._session, *self._key)
        if current is None or current.task is None:
            raise RoundNotOpenError(f"round {self._key[1]} has not been opened")
        return training_session, current

    def _content(self, step: str) -> bytes:
        part = getattr(self._request, step)
        return bytes(part.SerializeToString(deterministic=True))

    def _check_open(
        self,
        training_session: TrainingSession,
        current: Round,
        step: str,
        own: StoredMember | None,
        groups: Sequence[StoredGroup],
    ) -> None:
        """Refuse a step that the round does not wait for from this device."""
        states = devices.states_of(self._session, [self._device_id])
        refusal = refuse_device(states.get(self._device_id))
        if refusal is not None:
            raise refusal
        if training_session.state != TrainingSessionState.RUNNING.value:
            raise RoundNotOpenError(f"the training session is {training_session.state}")
        if step == "advertisement":
            self._check_advertising(current, groups)
            return
        if own is None or own.group_number is None:
            raise NotSelectedError("the device is in no group of the round")
        group = next(item for item in groups if item.number == own.group_number)
        in_progress = current.state in {RoundState.OPEN.value, RoundState.CLOSED.value}
        if not in_progress or group.stage != _STAGES[step]:
            raise RoundNotOpenError(f"the group is at stage {group.stage}")
        if step != "shares" and own.update_digest is None:
            raise NotSelectedError("the device has no update in the sum")

    def _check_advertising(self, current: Round, groups: Sequence[StoredGroup]) -> None:
        if current.state != RoundState.OPEN.value or groups:
            raise RoundNotOpenError("the groups of the round are formed")
        if current.deadline_at <= self._context.clock():
            raise RoundNotOpenError(f"round {current.number} is past its deadline")
        if current.selected_count and self._device_id not in training_sessions.selected_among(
            self._session, *self._key, [self._device_id]
        ):
            raise NotSelectedError

    def _insert(self, content: bytes, masked_round: MaskedRound) -> None:
        envelope = self._request.advertisement
        with _Refusals():
            open_advertisement(envelope, contributor_key(self._contributor), masked_round)
        neighbors.insert_member(
            self._session,
            {
                "training_session_id": self._key[0],
                "round_number": self._key[1],
                "device_id": self._device_id,
                "advertisement_digest": digest_of(envelope.payload),
                "advertisement": content,
            },
        )

    def _check_content(
        self,
        step: str,
        own: StoredMember,
        group: StoredGroup,
        masked_round: MaskedRound,
        graph: NeighborGraph,
    ) -> None:
        """Check a statement of a member against its group.

        Raises:
            StatementError: It is not what the stage is about.
        """
        stored = neighbors.contents(self._session, *self._key, "advertisement", [own.device_id])
        member = _member(
            stored[own.device_id], contributor_key(self._contributor), masked_round, own
        )
        if step == "shares":
            shares = self._request.shares
            check_boxes(
                open_shares(shares.statement, member, masked_round, graph), graph, shares.boxes
            )
        elif step == "confirmation":
            confirmation = open_confirmation(
                self._request.confirmation, member, masked_round, graph
            )
            stated = confirmation.sharers_digest, confirmation.survivors_digest
            if stated != (group.sharers_digest, group.survivors_digest):
                raise StatementError("confirmation: of another set of updates")
        else:
            reveal = open_reveal(self._request.reveal, member, masked_round, graph)
            if reveal.survivors_digest != group.survivors_digest:
                raise StatementError("reveal: for another set of updates")


class _Refusals:
    """Turns what is wrong with a statement into a refusal of the request."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Turn a `StatementError` into an error of the request.

        Raises:
            InvalidSignatureError: The envelope is not signed by the device.
            InvalidRequestError: The content is wrong.
        """
        if isinstance(error, StatementError):
            if error.__cause__ is not None:
                raise InvalidSignatureError("the statement's signature does not verify") from error
            raise InvalidRequestError(f"statement: {error}", field="step") from error


def _statement_of(step: str, content: bytes) -> bytes:
    """Return what is signed in a step: a repeated call may carry another signature over the same."""
    if step == "shares":
        return pb.SharedSecrets.FromString(content).statement.payload
    return security_pb2.SignedEnvelope.FromString(content).payload


def _round_of(realm: str, current: Round) -> MaskedRound:
    task = security_pb2.SignedEnvelope.FromString(current.task or b"")
    masking = masking_of(task)
    assert masking is not None
    return MaskedRound(realm, current.training_session_id, current.number, masking.task_digest)


def _member(content: bytes, key: Any, masked_round: MaskedRound, own: StoredMember) -> Member:
    """Return a member whose advertisement was checked when it was stored.

    Raises:
        StatementError: The device has another key than the one that it advertised with.
    """
    envelope = security_pb2.SignedEnvelope.FromString(content)
    statement = security_pb2.NeighborAdvertisement.FromString(envelope.payload)
    if statement.key_id != key.key_id:
        raise StatementError("key_id: the device advertised with another key")
    member = open_advertisement(envelope, key, masked_round)
    assert member.digest == own.digest
    return member
