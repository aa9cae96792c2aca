"""The fold of a round with secure aggregation: masked updates are added up in a ring, and the sum is unmasked.

Memory beyond that of an unmasked fold is one vector of the ring. Addition in a ring has no order, so the sum is the
same whatever the order of the updates. In an asynchronous round each update counts by its staleness
(`qflare.masking.staleness`). When the round has closed, the helpers of the round's task are asked for the
sum of the masks, in a thread of their own: a helper that is slow does not delay other rounds. From the unmasked sum
comes the weighted mean of the changes, which the strategy takes as the one contribution of the round.

Integer tensors keep the values of the base version: which update has the most examples is not known.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from qflare.evidence.lineage import contributors_digest
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import Masking, masking_of
from qflare.masking.quantization import mean_change, slot_totals
from qflare.masking.staleness import mean_rounding, weigh
from qflare.tensors import CHUNK_BYTES
from qflare.tensors.manifest import TensorSpec
from qflare.tensors.vectors import VectorLayout, float_count
from qflare.v1 import security_pb2
from qflare_server.aggregation.fold import (
    AHEAD,
    BATCH,
    RoundFold,
    WrittenVersion,
)
from qflare_server.aggregation.outcome import with_refusals
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.aggregation.readers import stored_payload
from qflare_server.aggregation.totals import Totals
from qflare_server.aggregation.unmasking import (
    HelperRequests,
    MaskSum,
    RefusedUpdatesError,
    answer_digests,
    check_stored,
    opened_task,
    stated_weights,
)
from qflare_server.context import Context
from qflare_server.errors import HelperRefusedError, InvalidUpdateError
from qflare_server.payloads.reader import PayloadBytes, check_digests
from qflare_server.storage.payload_records import ReceivedPayload, content_digest_of, describe
from qflare_server.storage.repository import payloads, training_sessions, unmaskings, updates
from qflare_server.storage.repository.unmaskings import StoredUnmasking
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.storage.tables import EVIDENCE_REASON
from qflare_server.strategies import (
    Contribution,
    NotEnoughUpdatesError,
    Outcome,
    UpdateAssessment,
)
from qflare_server.training.masking import parameters_of
from qflare_server.training.reported_metrics import TRAINING
from qflare_server.training.rounds import HELPER_AWAITED

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 4
"""Most sets of updates that helpers are asked for in one round, each smaller than the one before."""

BOUND_TO_STATEMENTS: Final = 2
"""The last revision of the rules that binds the noise of a masked sum to statements."""

SUM: Final = "sum"
"""Name of the contribution that the strategy gets."""

Add = Callable[[Any, Any, Any], Any]


class MaskedRoundFold(RoundFold):
    """Aggregates one round with secure aggregation; not thread-safe.

    Args:
        context: The coordinator's parts.
        plan: The round's aggregation plan.
        asker: Returns the threads that ask helpers; None asks in the caller's thread.
        settings: As of `RoundFold`.
    """

    def __init__(
        self,
        context: Context,
        plan: RoundPlan,
        *,
        asker: Callable[[], ThreadPoolExecutor] | None = None,
        **settings: Any,
    ) -> None:
        self._parameters = parameters_of(plan.config)
        super().__init__(context, plan, **settings)
        self._asker = asker
        self._element_count = float_count(plan.manifest)
        self._pending: Future[None] | None = None
        self._stored: Sequence[StoredUnmasking] = ()
        self._payloads: tuple[ReceivedPayload, ...] = ()
        self._masking: Masking | None = None
        self._is_repeated = False
        self._weight_sum = 0
        self._means: Mapping[str, float] = {}

    def _begin(self, excluded: Mapping[str, str]) -> None:
        super()._begin(excluded)
        self._sum = np.zeros(self._held_elements(), self._parameters.dtype)
        self._digests: dict[str, str] = {}
        self._weights: dict[str, int] = {}
        self._rounds: dict[str, int] = {}
        self._bound: dict[str, str] = {}
        self._refused: dict[str, str] = {}

    def _held_elements(self) -> int:
        """Return how many elements of the sum are held in memory."""
        return float_count(self.plan.manifest) + self._parameters.slot_count

    def _recalled(self) -> None:
        """Return None: the record judges updates, and what is aggregated are sums of updates."""

    def _update_layout(self) -> VectorLayout:
        return VectorLayout(self._wire)

    @property
    def unmaskings(self) -> Sequence[StoredUnmasking]:
        """Answers of the helpers, after `write`."""
        return self._stored

    @property
    def extra_payloads(self) -> Sequence[ReceivedPayload]:
        """Sums of masks that are not stored yet."""
        return self._payloads

    def _take(self, batch: Sequence[AcceptedUpdate]) -> None:
        for update in batch:
            weight, number = self._staleness_weight(update), self._task_round(update)
            if weight is None:
                self.refusals[update.update_id] = f"{EVIDENCE_REASON}it is too stale for the sum"
                continue
            self._weights[update.update_id], self._rounds[update.update_id] = weight, number
            self._take_in(update)
            self._digests[update.update_id] = update.statement_digest
            self._bound[update.update_id] = _noise_digest(update, self.revision)

    def _take_in(self, update: AcceptedUpdate) -> None:
        """Take an update into the sum."""
        self._fold_in(update, np.add)

    def _take_out(self, update: AcceptedUpdate) -> None:
        """Take an update out of the sum again."""
        self._fold_in(update, np.subtract)

    def _staleness_weight(self, update: AcceptedUpdate) -> int | None:
        """Return how many times the elements of an update count; None for one that the table does not have."""
        weights = self._parameters.staleness_weights
        if not weights:
            return 1
        staleness = self.plan.base_version - update.base_version
        return weights[staleness] if 0 <= staleness < len(weights) else None

    def _task_round(self, update: AcceptedUpdate) -> int:
        """Return the round for whose task an update was made; 0 if its statement is damaged, which no helper takes."""
        if not self._parameters.staleness_weights:
            return self.plan.number
        try:
            return security_pb2.UpdateStatement.FromString(update.statement or b"").round_number
        except DecodeError:
            return 0

    def _fold_in(self, update: AcceptedUpdate, operation: Add) -> None:
        """Add an update to the sum, or subtract it."""
        check_digests(stored_payload(update))
        source, size_bytes = self._source(update), self._sum.nbytes
        weight = self._weights[update.update_id]
        for offset in range(0, size_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size_bytes - offset)
            self._apply(offset, source.read(offset, length), operation, weight)

    def _apply(self, offset: int, data: Any, operation: Add, weight: int = 1) -> None:
        start = offset // self._sum.itemsize
        values = np.frombuffer(data, self._sum.dtype)
        if weight > 1:
            values = values.copy()
            weigh(values, start, self._element_count, weight)
        part = self._sum[start : start + len(values)]
        operation(part, values, part)

    def _subtract(self, offset: int, data: Any) -> None:
        self._apply(offset, data, np.subtract)

    def is_ready(self) -> bool:
        """Return whether the helpers have answered or failed, which `write` tells; the first call asks them."""
        if self._asker is None:
            return True
        if self._pending is None:
            self._pending = self._asker().submit(self._ask)
            wake = self._context.wake  # a callback that held this fold would keep its sum in memory
            self._pending.add_done_callback(lambda _: wake())
        return self._pending.done()

    def _ask(self) -> None:
        """Ask the helpers in a thread of its own, with threads for the writes of a large sum."""
        with ThreadPoolExecutor(2, "mask-writer") as writers:
            self._unmask(writers)

    def _unmask(self, executor: ThreadPoolExecutor) -> None:
        """Unmask the sum with the stored answers of the round or, if there are none, by asking its helpers.

        Raises:
            NotEnoughUpdatesError: Fewer updates are left than a sum must have.
        """
        with self._context.database.read() as session:
            number, session_id = self.plan.number, self.plan.training_session_id
            current = training_sessions.get_round(session, session_id, number)
            stored = unmaskings.of_round(session, session_id, number)
        if current is None:
            raise HelperRefusedError("the round is missing")
        task = opened_task(current.task)
        self._masking = self._masking_of(task)
        if stored:
            self._use_stored(stored)
        else:
            at = current.closed_at or self._context.clock()
            self._is_repeated = current.state_reason.startswith(HELPER_AWAITED)
            self._ask_until_accepted(executor, task, self._masking, at)
        self._read_totals()

    def _masking_of(self, task: security_pb2.SignedEnvelope) -> Masking:
        try:
            masking = masking_of(task)
        except StatementError as error:
            raise HelperRefusedError(f"the signed task of the round: {error}") from error
        if masking is None or masking.parameters != self._parameters:
            raise HelperRefusedError("the signed task of the round has another masking")
        return masking

    def _ask_until_accepted(
        self,
        executor: ThreadPoolExecutor,
        task: security_pb2.SignedEnvelope,
        masking: Masking,
        at: datetime,
    ) -> None:
        for _ in range(MAX_ATTEMPTS):
            self._require_cohort()
            requests = HelperRequests(
                self._context,
                executor,
                self.plan,
                task,
                masking,
                self._digests,
                self._weights,
                self._earlier_rounds(),
                self._sum.nbytes,
                at,
                is_repeated=self._is_repeated,
            )
            try:
                answers = requests.ask_all(self._subtract)
            except RefusedUpdatesError as error:
                self._is_repeated = False
                self._leave_out(error.reasons)
            else:
                self._keep(answers)
                return
        raise HelperRefusedError("helpers refuse other updates each time")

    def _earlier_rounds(self) -> set[int]:
        """Return the earlier rounds for whose tasks updates in the sum were made."""
        return {self._rounds[update_id] for update_id in self._digests} - {self.plan.number}

    def _keep(self, answers: Sequence[MaskSum]) -> None:
        self._stored = [answer.stored(self._refused) for answer in answers]
        self._payloads = tuple(answer.payload for answer in answers)

    def _use_stored(self, stored: Sequence[StoredUnmasking]) -> None:
        """Unmask with the answers that the version was made with."""
        assert self._masking is not None
        self._leave_out(dict(stored[0].refused))
        members, plan = contributors_digest(self._digests.values()), self.plan
        answers = check_stored(
            stored,
            self._masking,
            plan.training_session_id,
            plan.number,
            members,
            stated_weights(self._masking, self._digests, self._weights),
        )
        for row, answer in zip(stored, answers, strict=True):
            with self._context.database.read() as session:
                found = payloads.get_payload(session, row.payload_id)
                payload = describe(found)
                assert found is not None
                digest = content_digest_of(found)
            source = PayloadBytes(self._context, payload, None, AHEAD)
            if (digest, source.size_bytes) != (answer.mask_digest, self._sum.nbytes):
                raise HelperRefusedError(f"the sum of helper {answer.helper_id} is another one")
            for offset in range(0, self._sum.nbytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, self._sum.nbytes - offset)
                self._subtract(offset, source.read(offset, length))
        self._stored = stored

    def _require_cohort(self) -> None:
        least, most = self.plan.config.secure_aggregation.min_cohort, self._parameters.max_cohort
        if not least <= len(self._digests) <= most:
            raise NotEnoughUpdatesError(
                f"secure aggregation needs {least} to {most} updates, got {len(self._digests)}"
            )

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """Take updates out of the sum again."""
        wanted, after = set(reasons) & set(self._digests), 0
        while wanted:
            batch = self._facts_after(after)
            if not batch:
                raise NotEnoughUpdatesError("a refused update is missing")
            after = batch[-1].acceptance_sequence
            for update in batch:
                if update.update_id in wanted:
                    self._take_out(update)
                    del self._digests[update.update_id]
                    self._refused[update.update_id] = reasons[update.update_id]
                    wanted.discard(update.update_id)

    def _facts_after(self, sequence: int) -> Sequence[AcceptedUpdate]:
        """Read updates after a sequence number, whose payloads are read one by one when they are used."""
        plan = self.plan
        with self._context.database.read() as session:
            return updates.facts_after(
                session, plan.training_session_id, plan.number, sequence, BATCH
            )

    def _read_totals(self) -> None:
        try:
            self._weight_sum, self._means = slot_totals(
                self._parameters, self._sum[self._element_count :]
            )
        except ValueError as error:
            raise InvalidUpdateError(f"the unmasked sum: {error}") from error

    def write(self, executor: ThreadPoolExecutor, at: datetime) -> WrittenVersion:
        """Write the version's payload from the unmasked sum, as `RoundFold.write`.

        Raises:
            NotEnoughUpdatesError: Too few updates are left.
            HelperUnavailableError: A helper did not answer.
            HelperRefusedError: A helper refused, or an answer does not verify.
            InvalidUpdateError: The sum is that of no updates, or leaves the range of the model.
        """
        if self._pending is None:
            self._unmask(executor)
        else:
            self._result(self._pending)

        self._aggregation.extend(self._contributions())
        return self._write(executor, at)

    def _contributions(self) -> Sequence[Contribution]:
        """Return what the strategy gets: the mean of the sum."""
        # Under privacy the strategy divides by a fixed number instead of the number of updates.
        is_private = bool(self.plan.config.privacy.noise_multiplier)
        # The aggregation must not hold this fold, which holds it.
        parameters, total = self._parameters, self._sum
        divisor = parameters.max_weight if is_private else self._weight_sum
        assert self._masking is not None
        helper_count = len(self._masking.helpers)
        rounding = mean_rounding(parameters.largest_staleness_weight, helper_count)

        def read(start: int, stop: int) -> np.ndarray[Any, Any]:
            return mean_change(parameters, total[start:stop], divisor, rounding)

        members = contributors_digest(self._bound[update_id] for update_id in self._digests)
        return [Contribution(SUM, self._weight_sum, read, digest=members)]

    def _result(self, pending: Future[None]) -> None:
        """Wait for the helpers; a failure is not kept, because its traceback would keep this fold in memory."""
        try:
            pending.result()
        except BaseException:
            self._pending = None
            raise
        finally:
            del pending

    def totals(self) -> Totals:
        """Return the sum of the weights; nothing is known of single updates."""
        return Totals(example_count=self._weight_sum)

    def metrics(self) -> dict[str, float]:
        """Return the weighted means of the masked metrics, prefixed `train_`."""
        return {TRAINING + name: mean for name, mean in sorted(self._means.items())}

    @property
    def outcome(self) -> Outcome:
        """Facts of the aggregation; every update in the sum counts alike, because weights are hidden."""
        inner = self._aggregation.outcome
        judgements = [
            UpdateAssessment(update_id, 1.0, 1.0, 1.0)
            for update_id, _ in self.taken
            if update_id in self._digests
        ]
        judged = replace(inner, judgements=tuple(judgements))
        order = [update_id for update_id, _ in self.taken]
        return with_refusals(judged, order, self.refusals | self._refused)

    def unmasking(self) -> security_pb2.ModelUnmasking:
        """Return the answers as the version's statement names them."""
        assert self._masking is not None
        return security_pb2.ModelUnmasking(
            task_digest=self._masking.task_digest, answer_digests=answer_digests(self._stored)
        )

    def _integers(self) -> Callable[[TensorSpec], Iterator[bytes]]:
        return self._integers_from(
            PayloadBytes(self._context, self.plan.base, None, AHEAD), self.plan.manifest
        )


def _noise_digest(update: AcceptedUpdate, revision: int) -> str:
    """Return the digest that stands for an update where noise is bound to those in a sum.

    No two updates of a coordinator have the same id and payload. Unlike the statement, which noise up to revision 2
    is bound to, they do not depend on how the seeds were sealed, so that the noise of a simulation repeats.
    """
    if revision <= BOUND_TO_STATEMENTS:
        return update.statement_digest
    return digest_of(f"{update.update_id}:{update.payload_digest}".encode())
