"""Update delivery: signs and stores finished updates, and resends them after an outage or a restart.

The order for each update: check local privacy; build the payload and its statement; record a private release; store the
update; send it. The update is kept until the coordinator accepts it or refuses it permanently. A resent update is
identical to the stored one, byte for byte.

It does not train, or ask for tasks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from qflare.evidence.statements import digest_of
from qflare.evidence.unmasking import Masking
from qflare.tensors import Array
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import (
    AuthenticationError,
    CoordinatorFaultError,
    KeyStoreError,
    PermissionDeniedError,
    ProxyRefusedError,
    RejectedError,
    SealKeyNotAcceptedError,
    TrainingFunctionError,
)
from qflare_client.keystore.identity import Identity
from qflare_client.models.download import ProgressHook
from qflare_client.models.error_feedback import ErrorFeedback
from qflare_client.models.lineage import check_base
from qflare_client.models.local_tensors import LocalTensors
from qflare_client.models.masked_update import (
    add_masks,
    quantize_update,
    seal_seeds,
)
from qflare_client.models.neighbor_rounds import NeighborRounds
from qflare_client.models.outbox import (
    DamagedUpdateError,
    KeptPayload,
    KeptSegments,
    KeptUpdate,
    Outbox,
)
from qflare_client.models.privacy_ledger import PrivacyLedger
from qflare_client.models.relay import SignedUpdate, require_small, signed_update
from qflare_client.models.sealed_update import SealedPayload
from qflare_client.models.submission import (
    Contribution,
    checked,
    is_sparse,
    make_payload_with_residual,
    make_statement,
    sign_statement,
)
from qflare_client.models.upload import OutgoingPayload, Payload, Receipt, Upload
from qflare_client.privacy import LocalPrivacy
from qflare_client.rpc.caller import Calls
from qflare_client.secure_aggregation import SecureAggregation
from qflare_client.tasks import Task
from qflare_client.trust.keyset import Trust

_log = logging.getLogger(__name__)

_MAY_PASS: Final = (AuthenticationError, PermissionDeniedError, ProxyRefusedError)
"""Refusals of the device or the connection, not of the update, which is kept."""


@dataclass(frozen=True)
class _Update:
    """An update that is ready to be sent.

    Attributes:
        statement: Its statement; `key_id` is set when it is signed.
        payload: The plaintext payload.
        sealed: The sealed payload; None if the update is not sealed.
        residual: Residual of a top-k update; None if it is not kept, or is in the key store only.
        local: The trained tensors that stay on the device; empty if there are none, or in the key store only.
    """

    statement: security_pb2.UpdateStatement
    payload: Payload | KeptPayload
    sealed: SealedPayload | KeptSegments | None
    residual: dict[str, Array] | None = field(default=None, repr=False)
    local: Mapping[str, Array] = field(default_factory=dict, repr=False)

    @property
    def session_id(self) -> str:
        return self.statement.training_session_id


class UpdateSender:
    """Sends the updates of a device. Thread-safe for different training sessions.

    Args:
        calls: Authenticated calls.
        trust: The coordinator's keyset, with the key for sealed updates.
        identity: Returns the device with the keys that the coordinator accepts.
        ledger: Privacy ledger of local privacy.
        progress: Called with the number of sent bytes.
        outbox: Keeps updates until they are settled; None keeps none.
        feedback: Error feedback for top-k updates; None discards their residuals.
        local: Tensors that stay on the device.
        policy: The device's policy for secure aggregation; None sends every kept update.
        neighbors: Masks of rounds with neighbors.
    """

    def __init__(
        self,
        calls: Calls,
        trust: Trust,
        identity: Callable[[], Identity],
        ledger: PrivacyLedger,
        progress: ProgressHook,
        outbox: Outbox | None,
        feedback: ErrorFeedback | None,
        local: LocalTensors,
        policy: SecureAggregation | None,
        neighbors: NeighborRounds,
    ) -> None:
        self._calls = calls
        self._trust = trust
        self._identity = identity
        self._ledger = ledger
        self._progress = progress
        self._outbox = outbox
        self._feedback = feedback
        self._local = local
        self._policy = policy
        self._neighbors = neighbors

    def submit(
        self,
        task: Task,
        contribution: Contribution,
        privacy: LocalPrivacy | None,
        timeout_s: float | None,
    ) -> Receipt:
        """Send the update for a task; if one is kept for the task, send that one instead.

        Args:
            task: The task, of kind TRAIN.
            contribution: Result of training from its base version.
            privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.
            timeout_s: Deadline of each attempt, in seconds; None means the calls' own.

        Raises:
            TrainingFunctionError: It cannot be sent.
            PrivacyError: Local privacy does not allow it.
            QflareClientError: The call failed; the update is kept unless the coordinator refused it.
        """
        check_base(task, contribution.base.digest)
        for outcome in self.send_kept(task, timeout_s):
            if isinstance(outcome, Receipt):
                return outcome
            raise outcome
        self._forget(task.training_session_id)
        return self._send(self._released(task, contribution, privacy), timeout_s)

    def sign(
        self, task: Task, contribution: Contribution, privacy: LocalPrivacy | None
    ) -> SignedUpdate:
        """Return the signed update for a task, to be sent by another device; it is not kept here.

        Args:
            task: The task, of kind TRAIN.
            contribution: Result of training from its base version.
            privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.

        Raises:
            TrainingFunctionError: It cannot be sent, or is too large to travel with others.
            PrivacyError: Local privacy does not allow it.
        """
        check_base(task, contribution.base.digest)
        update = self._released(task, contribution, privacy, require_small)
        envelope = sign_statement(self._identity().keys.signing, update.statement)
        if update.statement.masking.HasField("neighbors"):
            self._neighbors.record_update(update.statement, digest_of(envelope.payload))
        if self._feedback is not None and update.residual is not None:
            self._feedback.stage(update.session_id, update.statement.update_id, update.residual)
        self._local.stage(update.session_id, update.statement.update_id, update.local)
        return signed_update(envelope, update.sealed or update.payload)

    def _released(
        self,
        task: Task,
        contribution: Contribution,
        privacy: LocalPrivacy | None,
        check: Callable[[OutgoingPayload], None] = lambda _: None,
    ) -> _Update:
        """Return the update for a task, and record a private release once `check` has not refused the payload."""
        contribution = checked(contribution)
        # What numpy does not warn of ends in values that the checks refuse.
        with np.errstate(all="ignore"):
            if privacy is not None:
                contribution = self._protected(task, contribution, privacy)
            update = self._make(task, contribution)
        check(update.sealed or update.payload)
        if privacy is not None:
            self._ledger.record(task, privacy)
        return update

    def send_kept(
        self, task: Task | None, timeout_s: float | None
    ) -> list[Receipt | RejectedError]:
        """Send kept updates; return for each its receipt, or the error if the coordinator refused it permanently.

        Args:
            task: Send only the update that is kept for this task; None means all kept updates.
            timeout_s: Deadline of each attempt, in seconds; None means the calls' own.

        Raises:
            QflareClientError: A call failed; unsettled updates are still kept.
        """
        outcomes: list[Receipt | RejectedError] = []
        for kept in self._kept(task):
            if self._policy is not None and not self._policy.allows_kept(kept.statement):
                _log.warning("kept update dropped: less than this device's policy requires")
                self._forget(kept.statement.training_session_id)
                continue
            try:
                outcomes.append(self._send_again(kept, timeout_s))
            except _MAY_PASS:
                raise
            except RejectedError as error:
                outcomes.append(error)
            except DamagedUpdateError as error:
                _log.warning("kept update lost: damaged: %s", error)
        return outcomes

    def _kept(self, task: Task | None) -> Iterator[KeptUpdate]:
        if task is not None:
            kept = self._find(task)
            yield from () if kept is None else (kept,)
        elif self._outbox is not None:
            yield from self._outbox.all()

    def _find(self, task: Task) -> KeptUpdate | None:
        """Return the kept update for a task; None if there is none."""
        if self._outbox is None:
            return None
        kept = self._outbox.find(task.training_session_id)
        if kept is None:
            return None
        got = (kept.statement.round_number, kept.statement.task_nonce)
        return kept if got == (task.round_number, task.nonce) else None

    def _protected(
        self, task: Task, contribution: Contribution, privacy: LocalPrivacy
    ) -> Contribution:
        self._ledger.require(task, privacy)
        try:
            arrays = privacy.protect(contribution.arrays, contribution.base.arrays)
        except ValueError as error:
            raise TrainingFunctionError(f"trained arrays: {error}") from error
        return replace(contribution, arrays=arrays)

    def _make(self, task: Task, contribution: Contribution) -> _Update:
        if task.masking is not None:
            return self._make_masked(task, task.masking, contribution)
        feedback = self._feedback if is_sparse(task.transfer) else None
        known: Mapping[str, Array] = {}
        if feedback is not None:
            known = feedback.residual(task.training_session_id, contribution.base.manifest)
        payload, residual = make_payload_with_residual(contribution, task.transfer, known)
        identity = self._identity()
        statement = make_statement(
            task, contribution, payload, realm=identity.realm, device_id=identity.device_id
        )
        kept = residual if feedback is not None else None
        sealed = self._sealed(task, payload, statement)
        return _Update(statement, payload, sealed, kept, contribution.local)

    def _sealed(
        self, task: Task, payload: Payload, statement: security_pb2.UpdateStatement
    ) -> SealedPayload | None:
        """Seal a payload and complete its statement, if the task wants that; the statement lacks nothing else."""
        if not task.transfer.sealed:
            return None
        return SealedPayload(payload, statement, self._trust.session_key())

    def _make_masked(self, task: Task, masking: Masking, contribution: Contribution) -> _Update:
        quantized = quantize_update(
            masking,
            contribution.base.manifest,
            contribution.arrays,
            contribution.base.arrays,
            contribution.example_count,
            contribution.metrics,
        )
        identity = self._identity()
        named, seeds = None, tuple[bytes, ...]()
        if masking.neighbors is None:
            seeds = add_masks(masking, quantized)
        else:
            named = self._neighbors.mask(_answer_of(task), masking, quantized.vector)
        payload = quantized.payload()
        statement = make_statement(
            task, contribution, payload, realm=identity.realm, device_id=identity.device_id
        )
        seal_seeds(masking, seeds, statement)
        if named is not None:
            statement.masking.neighbors.CopyFrom(named)
        sealed = self._sealed(task, payload, statement)
        return _Update(statement, payload, sealed, None, contribution.local)

    def _send(self, update: _Update, timeout_s: float | None) -> Receipt:
        """Send an update for the first time."""
        with self._forgotten_if_refused(update.session_id):
            envelope, update = self._keep(update)
            receipt, update = self._upload(update, envelope, timeout_s, resumes=False)
        if self._feedback is not None and update.residual is not None:
            self._feedback.commit(update.session_id, update.residual)
        self._local.accept(update.session_id)
        self._forget(update.session_id)
        return receipt

    def _send_again(self, kept: KeptUpdate, timeout_s: float | None) -> Receipt:
        """Send a kept update, unless the coordinator has already accepted it."""
        update = _Update(kept.statement, kept.payload, kept.sealed_payload)
        envelope, receipt = kept.envelope, None
        with self._forgotten_if_refused(
            update.session_id, CoordinatorFaultError, DamagedUpdateError
        ):
            if kept.statement.key_id != self._identity().keys.signing.public.key_id:
                # The device has rotated its keys since; unless the update was accepted, it must be signed again.
                receipt = self._find_receipt(kept)
                if receipt is None:
                    envelope, update = self._keep(update)
            if receipt is None:
                receipt, update = self._upload(update, envelope, timeout_s, resumes=True)
        if self._feedback is not None:
            self._feedback.accept(update.session_id)
        self._local.accept(update.session_id)
        self._forget(update.session_id)
        return receipt

    def _upload(
        self,
        update: _Update,
        envelope: security_pb2.SignedEnvelope,
        timeout_s: float | None,
        *,
        resumes: bool,
    ) -> tuple[Receipt, _Update]:
        """Upload an update, readdressed if the coordinator has rotated its keys; return the sent update."""
        try:
            return self._upload_as_it_is(update, envelope, timeout_s, resumes=resumes), update
        except SealKeyNotAcceptedError:
            if update.sealed is None:
                raise
            self._trust.refresh()
            sealed = update.sealed.addressed_to(self._trust.session_key())
            envelope, update = self._keep(replace(update, sealed=sealed))
        return self._upload_as_it_is(update, envelope, timeout_s, resumes=False), update

    def _upload_as_it_is(
        self,
        update: _Update,
        envelope: security_pb2.SignedEnvelope,
        timeout_s: float | None,
        *,
        resumes: bool,
    ) -> Receipt:
        upload = Upload(
            self._calls,
            update.statement.update_id,
            envelope,
            update.sealed or update.payload,
            progress=self._progress,
            resumes=resumes,
        )
        return upload.run(timeout_s)

    def _keep(self, update: _Update) -> tuple[security_pb2.SignedEnvelope, _Update]:
        """Sign an update and store it; an update that cannot be stored is sent anyway.

        Returns:
            The signed statement, and the update, which reads from the new file if it was read from a file.
        """
        envelope = sign_statement(self._identity().keys.signing, update.statement)
        if update.statement.masking.HasField("neighbors"):
            self._neighbors.record_update(update.statement, digest_of(envelope.payload))
        if self._feedback is not None and update.residual is not None:
            self._feedback.stage(update.session_id, update.statement.update_id, update.residual)
        self._local.stage(update.session_id, update.statement.update_id, update.local)
        if self._outbox is None:
            return envelope, update
        try:
            self._outbox.keep(envelope, update.payload, update.sealed)
        except DamagedUpdateError:
            raise
        except KeyStoreError as error:
            _log.warning("update not stored, and lost if it cannot be sent: %s", error)
            return envelope, update
        kept = (
            self._outbox.find(update.session_id)
            if isinstance(update.payload, KeptPayload)
            else None
        )
        if kept is not None:
            update = replace(update, payload=kept.payload, sealed=kept.sealed_payload)
        return envelope, update

    def _find_receipt(self, kept: KeptUpdate) -> Receipt | None:
        request = messages.GetUploadRequest(update_id=kept.statement.update_id)
        state = self._calls.unary(self._calls.transport.stub.GetUpload, request)
        if not state.HasField("receipt"):
            return None
        return Receipt.from_proto(state.receipt, kept.envelope)

    def _forget(self, training_session_id: str) -> None:
        if self._outbox is not None:
            self._outbox.forget(training_session_id)

    @contextmanager
    def _forgotten_if_refused(
        self, training_session_id: str, *others: type[Exception]
    ) -> Iterator[None]:
        """Delete the kept update of a training session if the coordinator refuses it permanently.

        Args:
            training_session_id: Training session.
            others: Further errors after which the update is useless and would block later ones.
        """
        hopeless: tuple[type[Exception], ...] = (RejectedError, *others)
        try:
            yield
        except _MAY_PASS:
            raise
        except hopeless as error:
            _log.info("update dropped: %s", error)
            self._forget(training_session_id)
            raise


def _answer_of(task: Task) -> messages.GetTaskResponse:
    if task.answer is None:
        raise TrainingFunctionError("the task shows no group for secure aggregation with neighbors")
    return task.answer
