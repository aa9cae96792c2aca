"""The client of one enrolled device: tasks, downloads, updates, evidence, key rotation.

    with Client(home=Path("device")) as client:
        task = client.get_task()
        base = client.download_base(task)
        receipt = client.submit(task, base, trained_arrays, example_count=100, metrics={"loss": 0.3})

The client handles login, token refresh, retries, resumption and verification; the constructor makes no network calls.
`qflare_client.run` repeats these three calls while there is work; `qflare_client.enroll` creates the key store.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qflare.analytics.answers import InvalidValuesError
from qflare.analytics.answers import answer as answer_of
from qflare.analytics.queries import TENSOR
from qflare.crypto.signing import Algorithm
from qflare.evidence.unmasking import Masking
from qflare.references import is_whole_id
from qflare.tensors import Array
from qflare.tensors.encodings import Encoding
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import device_pb2, security_pb2, training_pb2
from qflare_client import arguments
from qflare_client.access.login import Login
from qflare_client.access.rotation import pending_identity, rotate, settle
from qflare_client.analytics import Analytics
from qflare_client.errors import (
    FailedPreconditionError,
    InsufficientTaskError,
    InvalidArgumentError,
    InvalidStatementError,
    QflareClientError,
    RejectedError,
    TrainingFunctionError,
)
from qflare_client.keystore.identity import Identity
from qflare_client.keystore.passphrase import secret_coding
from qflare_client.keystore.store import KeyStore
from qflare_client.models.accepted_versions import AcceptedVersions
from qflare_client.models.download import GlobalModel, ProgressHook, silent
from qflare_client.models.error_feedback import ErrorFeedback
from qflare_client.models.lineage import (
    Version,
    check_base,
    check_not_older,
    check_sealing,
    fetch,
    read_contribution,
    read_lineage,
    read_statements,
)
from qflare_client.models.local_tensors import LocalTensors
from qflare_client.models.neighbor_rounds import GroupAbandonedError, NeighborRounds
from qflare_client.models.outbox import Outbox
from qflare_client.models.privacy_ledger import PrivacyLedger
from qflare_client.models.query_ledger import QueryLedger
from qflare_client.models.relay import SignedUpdate, submit_all
from qflare_client.models.sender import UpdateSender
from qflare_client.models.submission import (
    Contribution,
    acceptance_of,
    check_submission,
    checked_metrics,
    make_evaluation,
)
from qflare_client.models.upload import Receipt
from qflare_client.privacy import LocalPrivacy
from qflare_client.pulling import PulledTask, pull
from qflare_client.rpc.caller import Calls
from qflare_client.rpc.lifetime import Lifetime
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.tls import Tls, trusting
from qflare_client.rpc.transport import Transport
from qflare_client.secure_aggregation import SecureAggregation, require_noise, require_pinned
from qflare_client.tasks import STEPS, AnalyticsTask, Heartbeat, Task, TaskKind, TrainingDefaults
from qflare_client.trust.audit_head import AuditHead, read_head
from qflare_client.trust.evidence import Evidence, UpdateEvidence
from qflare_client.trust.keyset import Trust

_log = logging.getLogger(__name__)

_PQ_GROUP = "X25519MLKEM768"
_FLAGS = ("insecure", "proof_of_possession", "require_pq_tls", "error_feedback", "keep_updates")


class Client:
    """An enrolled device. Thread-safe; one per key store at a time.

    Args:
        home: The device's key store.
        address: Coordinator, host:port; None means the one with which the device enrolled.
        passphrase: Passphrase of the key store; None if it has none.
        tls: TLS settings. Certificate authorities default to those of the bootstrap bundle; if it has none either,
            those of the system.
        insecure: Use plaintext with any address, on a network that protects the connection itself.
        timeout_s: Deadline of one attempt of a call, in seconds, above 0.
        transfer_timeout_s: Deadline of one attempt of an upload or download, in seconds, above 0.
        retry: Retry policy of calls.
        progress: Called with the progress of uploads and downloads.
        defaults: The device's own training settings.
        proof_of_possession: Attach a proof of possession to every call; for coordinators behind a proxy that terminates
            TLS.
        require_pq_tls: Refuse a coordinator that does not report a post-quantum key exchange for its TLS
            connection, inside the authenticated login.
        error_feedback: Accumulate the elements that top-k updates omit, and add them to the next update.
        keep_updates: Keep finished updates in the key store, at full size, until they are accepted or refused.
        local_tensors: Patterns of the names of tensors that never leave this device, as of `fnmatch`, beside those of
            the training session; a version that holds one is not trained from.
        secure_aggregation: What tasks must require of secure aggregation; None trains for every signed task.
        analytics: Which queries of federated analytics are answered; None answers none.

    Every method raises `InvalidArgumentError` for arguments that cannot be used, such as a version below 0, before
    anything is sent.

    Raises:
        InvalidArgumentError: An argument cannot be used.
        NotEnrolledError: The key store holds no device.
        KeyStoreLockedError: Another client uses the key store.
        KeyStoreError: It cannot be read.
    """

    def __init__(
        self,
        *,
        home: Path | str,
        address: str | None = None,
        passphrase: str | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        timeout_s: float = 30.0,
        transfer_timeout_s: float = 3600.0,
        retry: RetryPolicy | None = None,
        progress: ProgressHook | None = None,
        defaults: TrainingDefaults | None = None,
        proof_of_possession: bool = False,
        require_pq_tls: bool = False,
        error_feedback: bool = True,
        keep_updates: bool = True,
        local_tensors: Sequence[str] = (),
        secure_aggregation: SecureAggregation | None = None,
        analytics: Analytics | None = None,
    ) -> None:
        flags = (insecure, proof_of_possession, require_pq_tls, error_feedback, keep_updates)
        for value, name in zip(flags, _FLAGS, strict=True):
            arguments.flag(name, value)
        arguments.check_callable("progress", progress, is_optional=True)
        own_patterns = arguments.texts("local_tensors", local_tensors)
        self._secure_aggregation = arguments.optional(
            "secure_aggregation", secure_aggregation, SecureAggregation
        )
        self._analytics = arguments.optional("analytics", analytics, Analytics)
        policy = arguments.optional("retry", retry, RetryPolicy) or RetryPolicy()
        self._progress = progress or silent
        known = arguments.optional("defaults", defaults, TrainingDefaults)
        self._defaults = known or TrainingDefaults()
        self._store = KeyStore(arguments.path("home", home), secret_coding(passphrase))
        transport: Transport | None = None
        try:
            identity = Identity.load(self._store)
            transport = Transport(
                identity.address if address is None else address,
                tls=trusting(tls, identity.certificate_authorities),
                insecure=insecure,
                timeout_s=timeout_s,
                transfer_timeout_s=transfer_timeout_s,
            )
            self._open_calls = Calls(transport, policy)
            self._trust = Trust.load(self._store, self._open_calls)
            self._versions = AcceptedVersions(self._store)
            self._ledger = PrivacyLedger(self._store)
            self._queries = QueryLedger(self._store)
            outbox = Outbox(self._store) if keep_updates else None
            self._login = Login(
                self._open_calls,
                self._trust,
                identity,
                pending=pending_identity(self._store, identity),
                settle=lambda settled: settle(self._store, settled),
                prove_possession=proof_of_possession,
                required_tls_group=_PQ_GROUP if require_pq_tls else None,
            )
        except BaseException:
            if transport is not None:
                transport.close()
            self._store.close()
            raise
        self._calls = self._open_calls.authenticated(self._login)
        self._stub = transport.stub
        is_accepted = acceptance_of(self._calls)
        self._feedback = ErrorFeedback(self._store, is_accepted) if error_feedback else None
        self._local = LocalTensors(self._store, own_patterns, is_accepted)
        self._neighbors = NeighborRounds(
            self._store, self._calls, self._trust, lambda: self._login.identity
        )
        self._sender = UpdateSender(
            self._calls,
            self._trust,
            lambda: self._login.identity,
            self._ledger,
            self._progress,
            outbox,
            self._feedback,
            self._local,
            self._secure_aggregation,
            self._neighbors,
        )
        self._rotation_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all calls and release the key store. Idempotent."""
        self._open_calls.close()
        self._store.close()

    @property
    def lifetime(self) -> Lifetime:
        """Deadline and cancellation of this client's calls; `qflare_client.run` cancels its calls through it."""
        return self._calls.lifetime

    @property
    def device_id(self) -> str:
        """Id of the device, a UUID."""
        return self._login.identity.device_id

    @property
    def answers_queries(self) -> bool:
        """Whether this device has a policy for queries of federated analytics."""
        return self._analytics is not None

    @property
    def realm(self) -> str:
        """Name of the deployment."""
        return self._login.identity.realm

    def get_task(
        self,
        training_session_id: str | None = None,
        *,
        trains_only: bool = False,
        answers_queries: bool = False,
        takes_steps: bool = True,
        timeout_s: float | None = None,
    ) -> Task:
        """Fetch the next task, and take the step of a round with neighbors that it asks for.

        Args:
            training_session_id: Training session to work for; None means any.
            trains_only: Request no evaluation tasks.
            answers_queries: Request tasks with a query of federated analytics too; those of kind TRAIN are for
                `answer`.
            takes_steps: False leaves steps to `take_step`, which every task must then be passed to.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            VerificationError: The task is not signed by the coordinator, or contradicts the response that contains it.
            InsufficientTaskError: It asks for less than the device's policy for secure aggregation, or for a step of a
                query that a policy does not allow.
            PrivacyBudgetExceededError: It asks for a step of a query that would exceed the budget of the device's
                policy.
            QflareClientError: The call failed.
        """
        request = arguments.message(
            messages.GetTaskRequest,
            training_session_id=arguments.session_id(training_session_id, ""),
            trains_only=arguments.flag("trains_only", trains_only),
            answers_queries=arguments.flag("answers_queries", answers_queries),
        )
        arguments.flag("takes_steps", takes_steps)
        answer = self._calls.unary(self._stub.GetTask, request, timeout_s=timeout_s)
        statement, masking = security_pb2.TaskStatement(), None
        if answer.kind == messages.TASK_KIND_TRAIN or answer.kind in STEPS:
            statement = self._trust.open_task(answer)
            masking = self._trust.masking_of(answer)
        if answer.kind == messages.TASK_KIND_DONE and training_session_id:
            self._neighbors.forget(training_session_id)
            if self._feedback:
                self._feedback.forget(training_session_id)
        task = Task.from_proto(answer, statement, self._defaults, masking)
        if task.analytics is None:
            self._require_secure(task)
        elif not answers_queries:
            raise InvalidStatementError("the task is a query, which this device did not ask for")
        return self.take_step(task) if takes_steps else task

    def take_step(self, task: Task) -> Task:
        """Take the step of a round with neighbors that a task asks for, or prepare for training; no effect otherwise.

        Args:
            task: From `get_task(takes_steps=False)`.

        Returns:
            What is left to do: the task, or one of kind WAIT if this device cannot go on in its group.

        Raises:
            VerificationError: What the coordinator shows of the group does not verify.
            InsufficientTaskError: The task is a query that a policy of this device does not allow; nothing was sent
                for it.
            PrivacyBudgetExceededError: It is a query that would exceed the budget of the device's policy; nothing was
                sent for it.
            QflareClientError: The call failed; the step may be repeated.
        """
        answer = arguments.instance("task", task, Task).answer
        if answer is None:
            return task
        if task.analytics is not None:
            self.require_query(task)
        return self._with_neighbors(task, answer, task.masking)

    def _with_neighbors(
        self, task: Task, answer: messages.GetTaskResponse, masking: Masking | None
    ) -> Task:
        if masking is None or masking.neighbors is None:
            raise InvalidStatementError("the task has no secure aggregation with neighbors")
        try:
            if answer.kind in STEPS:
                self._neighbors.take_step(answer, masking)
            else:
                self._neighbors.prepare(answer, masking)
        except (GroupAbandonedError, FailedPreconditionError) as error:
            _log.warning("round %d: this device cannot go on: %s", task.round_number, error)
            return replace(task, kind=TaskKind.WAIT)
        return task

    def _require_secure(self, task: Task) -> None:
        """Refuse a training task that asks for less than the device's policy for secure aggregation."""
        if task.kind is not TaskKind.TRAIN and task.masking is None:
            return
        require_pinned(task.masking, self._login.identity.helper_key_ids)
        if self._secure_aggregation is not None:
            self._secure_aggregation.require(task)
        require_noise(task.masking)

    def tasks(
        self,
        training_session_id: str | None = None,
        *,
        stop: threading.Event | None = None,
        patience_s: float = 900.0,
    ) -> Iterator[PulledTask]:
        """Return an iterator over training tasks: it waits for each, and ends with the training session.

        Each task has the `arrays` to train from, the settings `config`, and `submit`; a task that is left without a
        submission is not given again. `qflare_client.run` is the same with a callback.

        Args:
            training_session_id: Training session; None means any, and then only `stop` ends the iterator.
            stop: Ends the iterator: pauses and retries immediately, calls in flight after 5 s.
            patience_s: How long the coordinator may be unreachable before its error is raised, in seconds.

        Raises:
            InvalidArgumentError: An argument cannot be used.
            QflareClientError: While iterating: the coordinator refused this device, could not be reached for
                `patience_s`, or sent something that does not verify.
        """
        return pull(self, training_session_id, stop, patience_s)

    def download(
        self,
        training_session_id: str,
        version: int | None = None,
        *,
        released: bool = False,
        encoding: Encoding = Encoding.FULL_PRECISION,
        timeout_s: float | None = None,
    ) -> GlobalModel:
        """Download and verify a version.

        Args:
            training_session_id: Training session.
            version: Version; None means the latest.
            released: Without a version: the latest released one.
            encoding: Encoding of the floating-point tensors: full precision, or the training session's download
                encoding.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            RolledBackModelError: It is older than the last accepted one and was not requested by number, or has another
                history.
            CorruptModelError: Its bytes do not match its statement.
            UntrustedKeysetError: Its signer is not trusted.
            QflareClientError: The call failed.
        """
        encoding = arguments.instance("encoding", encoding, Encoding)
        request = arguments.message(
            messages.GetGlobalModelRequest,
            training_session_id=arguments.session_id(training_session_id),
            version=arguments.version("version", version),
            released=arguments.flag("released", released) and version is None,
            encoding=training_pb2.Encoding.ValueType(encoding),
        )
        return fetch(
            self._calls,
            self._trust,
            self._versions,
            request,
            self._progress,
            kem_key=lambda: self._login.identity.keys.kem,
            timeout_s=timeout_s,
        )

    def download_base(self, task: Task, *, timeout_s: float | None = None) -> GlobalModel:
        """Download the version that a task names, in the task's encoding.

        Raises:
            RolledBackModelError: It is not the version that the signed task names, or a training task names one older
                than the last accepted.
            QflareClientError: As `download`.
        """
        arguments.instance("task", task, Task)
        if task.kind is TaskKind.TRAIN:
            check_not_older(self._versions.last(task.training_session_id), task)
        model = self.download(
            task.training_session_id,
            task.base_version,
            encoding=task.download_encoding,
            timeout_s=timeout_s,
        )
        check_base(task, model.digest)
        check_sealing(task, model.statement)
        self._local.require_absent(model.manifest)
        return model

    def local_tensors(self, training_session_id: str) -> dict[str, Array]:
        """Return the tensors of a training session that stay on this device, as they were trained last.

        Those of the last accepted update, kept after the training session ends. Empty before the first one.

        Args:
            training_session_id: Training session.

        Raises:
            QflareClientError: It is unknown whether the last update was accepted, and the coordinator is unreachable.
        """
        return self._local.read(arguments.session_id(training_session_id))

    def submit(
        self,
        task: Task,
        base: GlobalModel,
        arrays: Mapping[str, Array],
        example_count: int,
        metrics: Mapping[str, float] | None = None,
        *,
        privacy: LocalPrivacy | None = None,
        timeout_s: float | None = None,
    ) -> Receipt:
        """Sign and upload an update; it is stored durably when the call returns.

        The update is kept on the device until the coordinator accepts it or refuses it permanently. If an earlier call
        left an unsent update for the same task, that update is sent and the arguments are ignored.

        Args:
            task: The task, of kind TRAIN.
            base: The version that the task names.
            arrays: The trained tensors: names and shapes of the base version's. Numbers are rounded to its floating
                types and converted to its integer types, where they are in range; do not modify them before the call
                returns. Local tensors stay on the device, and take effect when the update is accepted.
            example_count: Number of local examples, 1 to 2^40.
            metrics: Metrics by name, finite.
            privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            TrainingFunctionError: Arrays, example count or metrics cannot be sent.
            PrivacyError: Local privacy does not allow an update for this task.
            InsufficientTaskError: The task asks for less than the device's policy for secure aggregation.
            RoundNotOpenError: The round no longer accepts updates.
            StaleBaseVersionError: The round has another base version.
            DuplicateUpdateError: The round already has a different update of this device.
            QflareClientError: The call failed.
        """
        check_submission(task, base, privacy, timeout_s)
        contribution = self._contribution(task, base, arrays, example_count, metrics)
        return self._sender.submit(task, contribution, privacy, timeout_s)

    def require_query(self, task: Task) -> AnalyticsTask:
        """Return the query of a task, if this device's policies allow an answer.

        Raises:
            InvalidArgumentError: The task has no query.
            InsufficientTaskError: A policy does not allow it, or there is none for queries.
            PrivacyBudgetExceededError: The answer would exceed the budget of the device's policy.
        """
        asked = arguments.instance("task", task, Task).analytics
        if asked is None:
            raise InvalidArgumentError("task: it has no query of federated analytics")
        if self._analytics is None:
            raise InsufficientTaskError(
                "this device has no policy for queries: see Client(analytics=...)"
            )
        self._analytics.require(task)
        self._require_secure(task)
        self._queries.require(task, self._analytics.budget)
        return asked

    def answer(
        self, task: Task, values: Iterable[Any], *, timeout_s: float | None = None
    ) -> Receipt:
        """Answer a query of federated analytics with the values of its column.

        The vector that leaves this device is computed here; it is masked if the task requires it. Its epsilon counts
        toward the budget of the device's policy.

        Args:
            task: A task with a query, of kind TRAIN, from `get_task(answers_queries=True)`.
            values: Numbers of any shape, of which NaN counts as missing; for a query of labels, one label for each.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            TrainingFunctionError: The values are no numbers.
            InsufficientTaskError: A policy of this device does not allow the query.
            PrivacyBudgetExceededError: It would exceed the budget of the device's policy.
            RoundNotOpenError: The query accepts no more answers.
            QflareClientError: The call failed.
        """
        query = self.require_query(task).query
        if task.kind is not TaskKind.TRAIN:
            raise InvalidArgumentError(
                f"task: got one of kind {task.kind.name}, want TRAIN: the query does not wait for an answer of this "
                "device now"
            )
        if timeout_s is not None:
            arguments.positive("timeout_s", timeout_s)
        assert self._analytics is not None
        try:
            vector = answer_of(query, values)
        except InvalidValuesError as error:
            raise TrainingFunctionError(f"column {query.column!r}: {error}") from error
        base = self.download_base(task, timeout_s=timeout_s)
        if base.manifest.layout_digest != query.manifest().layout_digest:
            raise InvalidStatementError("the query has another layout of answers")
        self._queries.record(task, self._analytics.budget)
        arrays = {TENSOR: base.arrays[TENSOR] + vector}
        return self._sender.submit(task, Contribution(base, arrays, 1, {}), None, timeout_s)

    def analytics_epsilon(self) -> float:
        """Return the sum of the epsilons of all queries that this device has answered."""
        return self._queries.spent

    def _contribution(
        self, task: Task, base: GlobalModel, arrays: Any, example_count: int, metrics: Any
    ) -> Contribution:
        self._require_secure(task)
        if task.analytics is not None:
            raise InvalidArgumentError("task: it is a query, for Client.answer")
        local: Mapping[str, Array] = {}
        if isinstance(arrays, Mapping):
            arrays, local = self._local.split(task, arrays)
        given = {} if metrics is None else metrics
        return Contribution(base, arrays, example_count, given, local)

    def send_kept(
        self, task: Task | None = None, *, timeout_s: float | None = None
    ) -> list[Receipt | RejectedError]:
        """Send finished updates that are still unsent after an outage or a restart.

        Args:
            task: Send only the update that is kept for this task; None means all kept updates.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Returns:
            For each update its receipt, or the reason for its refusal, such as a closed round. It is no longer kept in
            either case.

        Raises:
            QflareClientError: A call failed; unsettled updates are still kept.
        """
        arguments.optional("task", task, Task)
        return self._sender.send_kept(task, timeout_s)

    def sign_update(
        self,
        task: Task,
        base: GlobalModel,
        arrays: Mapping[str, Array],
        example_count: int,
        metrics: Mapping[str, float] | None = None,
        *,
        privacy: LocalPrivacy | None = None,
    ) -> SignedUpdate:
        """Sign a small update that another device sends with many others: a gateway or a simulator.

        The update is not kept on this device: keep the result until it is settled. A private release counts at once.

        Args:
            task: The task, of kind TRAIN.
            base: The version that the task names.
            arrays: The trained tensors, as for `submit`.
            example_count: Number of local examples, 1 to 2^40.
            metrics: Metrics by name, finite.
            privacy: Clips the delta and adds noise before it leaves the device; None sends it unchanged.

        Raises:
            TrainingFunctionError: Arrays, example count or metrics cannot be sent, or the payload exceeds 256 KiB.
            QflareClientError: As `submit`.
        """
        check_submission(task, base, privacy, None)
        contribution = self._contribution(task, base, arrays, example_count, metrics)
        return self._sender.sign(task, contribution, privacy)

    def submit_all(
        self, updates: Sequence[SignedUpdate], *, timeout_s: float | None = None
    ) -> list[Receipt | QflareClientError]:
        """Send signed updates of any devices, up to 256 in a call; each is accepted or refused on its own.

        Args:
            updates: What `sign_update` of these devices returned.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Returns:
            For each update, in order, its receipt, once it is durable, or the error that `submit` would have raised.
            Send an update again if the error is an `UnavailableError`.

        Raises:
            QflareClientError: A call failed; repeat all of them: accepted updates get the same receipts.
        """
        arguments.instances("updates", updates, SignedUpdate)
        return submit_all(self._calls, updates, timeout_s)

    def require_release(self, task: Task, privacy: LocalPrivacy) -> None:
        """Check, before training, that local privacy allows an update for a task.

        Raises:
            RepeatedTaskError: An update was already released for its round or for a later one.
            PrivacyBudgetExceededError: The update would exceed `privacy.max_epsilon`.
        """
        arguments.instance("task", task, Task)
        self._ledger.require(task, arguments.instance("privacy", privacy, LocalPrivacy))

    def privacy_epsilon(self, delta: float = 1e-5) -> float:
        """Return the epsilon spent by the private updates of this device so far, over all training sessions.

        Args:
            delta: The delta for which epsilon is computed, within (0, 1).

        Returns:
            Epsilon; infinite if one of the updates had no noise.

        Raises:
            InvalidArgumentError: `delta` is out of range.
        """
        delta = arguments.number("delta", delta)
        if not 0.0 < delta < 1.0:
            raise InvalidArgumentError(f"delta: got {delta}, want within (0, 1)")
        return self._ledger.epsilon(delta)

    def report_evaluation(
        self,
        task: Task,
        example_count: int,
        metrics: Mapping[str, float],
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Sign and report the evaluation of a version on held-out data; once per version.

        Args:
            task: The task, of kind EVALUATE.
            example_count: Number of evaluated examples, 1 to 2^40.
            metrics: Metrics by name, such as accuracy and loss; finite. Names that begin with `train_` are reserved.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            TrainingFunctionError: Example count or metrics cannot be sent.
            InsufficientTaskError: The device's policy for secure aggregation lets no metric leave.
            NotSelectedError: This device was not selected to evaluate the version.
            DuplicateUpdateError: It has already reported a different evaluation of the version.
            QflareClientError: The call failed.
        """
        arguments.instance("task", task, Task)
        if self._secure_aggregation is not None:
            example_count, metrics = 1, self._secure_aggregation.disclosed(checked_metrics(metrics))
        request = make_evaluation(self._login.identity, task, example_count, metrics)
        self._calls.unary(self._stub.ReportEvaluation, request, timeout_s=timeout_s)

    def report_failure(
        self, task: Task, kind: str, text: str = "", *, timeout_s: float | None = None
    ) -> None:
        """Report that this device failed in its work on a task, so that administrators see why a round waits.

        Args:
            task: The task, of kind TRAIN or EVALUATE.
            kind: Kind of failure, such as the class of an exception: 1 to 64 printable characters.
            text: A short text for the administrator, at most 200 printable characters; no data.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            InvalidRequestError: Kind or text is too long.
            QflareClientError: The call failed.
        """
        arguments.instance("task", task, Task)
        request = arguments.message(
            messages.ReportFailureRequest,
            training_session_id=task.training_session_id,
            round_number=task.round_number,
            kind=kind,
            text=text,
        )
        self._calls.unary(self._stub.ReportFailure, request, timeout_s=timeout_s)

    def heartbeat(
        self,
        profile: device_pb2.DeviceProfile | None = None,
        *,
        device_type: str | None = None,
        capabilities: Mapping[str, float] | None = None,
        hardware_info: Mapping[str, str] | None = None,
        network_info: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Heartbeat:
        """Send a heartbeat, with the device's profile if it has changed.

        Args:
            profile: The whole profile as a message; or its parts:
            device_type: Kind of device, such as phone; at most 100 characters.
            capabilities: Numbers used for device selection, such as ram_mib.
            hardware_info: Hardware, such as gpu, as text.
            network_info: Network, such as link, as text.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            QflareClientError: The call failed.
        """
        parts = (device_type, capabilities, hardware_info, network_info)
        if profile is None and any(part is not None for part in parts):
            profile = arguments.message(
                device_pb2.DeviceProfile,
                device_type="" if device_type is None else device_type,
                capabilities=capabilities,
                hardware_info=hardware_info,
                network_info=network_info,
            )
        request = arguments.message(messages.HeartbeatRequest, profile=profile)
        answer = self._calls.unary(self._stub.Heartbeat, request, timeout_s=timeout_s)
        self._trust.at_least(answer.keyset_version)
        return Heartbeat.from_proto(answer)

    def find_session(self, reference: str, *, timeout_s: float | None = None) -> str:
        """Return the id of the training session that a reference means to this device.

        Args:
            reference: Id, beginning of an id (4 characters or more), or name, of a training session in which the
                device may take part. A whole id is not looked up.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            NotFoundError: There is no such training session.
            InvalidRequestError: There are several; the message lists them.
            QflareClientError: The call failed.
        """
        if is_whole_id(arguments.text("reference", reference)):
            return reference
        request = arguments.message(messages.FindTrainingSessionRequest, reference=reference)
        answer = self._calls.unary(self._stub.FindTrainingSession, request, timeout_s=timeout_s)
        return answer.training_session_id

    def lineage(
        self,
        training_session_id: str,
        first_version: int = 0,
        last_version: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[Version]:
        """Return the statements of consecutive versions, verified and chained.

        Args:
            training_session_id: Training session.
            first_version: First version.
            last_version: Last version; None means the latest. At most 1,000 are returned.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            VerificationError: A statement is not signed, or does not name the one before it.
            QflareClientError: The call failed.
        """
        return read_lineage(
            self._calls,
            self._trust,
            arguments.session_id(training_session_id),
            arguments.whole("first_version", first_version, 0, arguments.MAX_VERSION),
            arguments.version("last_version", last_version),
            timeout_s,
        )

    def contribution_proof(
        self, receipt: Receipt, *, timeout_s: float | None = None
    ) -> UpdateEvidence:
        """Fetch and check the proof that an update of this device is in a version.

        Args:
            receipt: What `submit` returned.
            timeout_s: Deadline of each attempt, in seconds; None means the client's.

        Raises:
            VerificationError: The proof does not lead from the update to the signed version.
            NotFoundError: The update is in no version.
            QflareClientError: The call failed.
        """
        arguments.instance("receipt", receipt, Receipt)
        return read_contribution(self._calls, self._trust, self._login.identity, receipt, timeout_s)

    def evidence(self, training_session_id: str, receipts: Sequence[Receipt] = ()) -> Evidence:
        """Collect evidence with which an auditor can verify a training session's versions offline.

        Args:
            training_session_id: Training session; all its versions are covered.
            receipts: Receipts of this device's updates to include with proofs.

        Raises:
            QflareClientError: A call failed, or its answer does not verify.
        """
        arguments.session_id(training_session_id)
        arguments.instances("receipts", receipts, Receipt)
        statements = read_statements(self._calls, self._trust, training_session_id)
        updates = [self.contribution_proof(receipt) for receipt in receipts]
        return Evidence(self.realm, training_session_id, self._trust.bundle, statements, updates)

    def audit_head(self, *, timeout_s: float | None = None) -> AuditHead:
        """Fetch the head of the coordinator's audit log, and check that the log is append-only.

        Raises:
            RewrittenLogError: It does not extend the log that this device has seen before.
            QflareClientError: The call failed, or the head is not signed.
        """
        return read_head(self._calls, self._trust, self._store, timeout_s)

    def rotate_keys(self, algorithm: Algorithm | None = None) -> int:
        """Replace the device's keys with new ones; return the number of rotations so far.

        Args:
            algorithm: Algorithm of the new signature key; None means the current one.

        A crash at any point leaves a usable key store: the next login determines which keys are in force.

        Raises:
            AlgorithmNotAcceptedError: The coordinator does not accept the algorithm of devices.
            QflareClientError: The call failed; the current keys stay in use.
        """
        arguments.optional("algorithm", algorithm, Algorithm)
        with self._rotation_lock:
            return rotate(self._calls, self._store, self._login, algorithm).key_rotation_count
