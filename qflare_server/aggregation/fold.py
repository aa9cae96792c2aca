"""The fold of a round: aggregates accepted updates as they arrive and writes the version.

Memory holds the strategy's total, where that is not large, and a few bytes of facts per update; payloads are read in
slices of the vector, which several threads share. After a crash everything is read and folded again, in the same
order, to the same bytes.

Every chunk that is read from the payload store is hashed again and compared with its digest. An update with missing or
altered chunks is refused as one is whose row is not what was signed, and the aggregation begins again without it; but
first the round rests, and they are read once more (`Aggregator`).

Integer and boolean tensors are not averaged: they are copied from the contributor with the largest example count,
the earliest of equals. Contributors are the updates that have a share in the version: those that a safeguard refused
or that the rule left out count for nothing, neither in these tensors nor in example counts or metrics.

Where a version would not fit the element types of its model, the updates of which alone no version could be made are
refused, and the others are aggregated without them.

Where devices get versions in a smaller form, full weights become deltas against that form, slice by slice: against
what the device had. The deltas are added to the version in full precision, so that changes smaller than the smaller
form can show are not lost but add up from round to round.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import numpy as np

from qflare.crypto.sealed_payloads import SealContext
from qflare.tensors import CHUNK_BYTES, Manifest, NonFiniteError
from qflare.tensors.download_encodings import download_manifest
from qflare.tensors.encodings import Encoding
from qflare.tensors.manifest import DType, TensorSpec
from qflare.tensors.vectors import (
    VectorLayout,
    VectorRange,
    VectorReader,
    float_count,
    integer_ranges,
    write_payload,
)
from qflare.v1 import security_pb2, training_pb2
from qflare_server.aggregation.outcome import with_refusals
from qflare_server.aggregation.pass_inputs import PassUpdate
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.aggregation.readers import (
    OpenReaders,
    by_thread,
    difference,
    held_slice,
    kept_chunks,
    stored_payload,
    vector_manifest,
)
from qflare_server.aggregation.row_integrity import RowIntegrity
from qflare_server.aggregation.totals import Totals
from qflare_server.context import Context
from qflare_server.errors import (
    DamagedPayloadError,
    GlobalModelNotFoundError,
    InvalidUpdateError,
)
from qflare_server.payloads.reader import PayloadBytes, check_chunks, check_digests
from qflare_server.payloads.sealed_receiver import version_seal_context
from qflare_server.payloads.writer import PayloadWriter, VersionWriter
from qflare_server.storage.payload_records import (
    Download,
    ReceivedPayload,
    StoredPayload,
    chunks_of,
    describe,
)
from qflare_server.storage.repository import global_models, payloads, updates
from qflare_server.storage.repository.payloads import ChunkSet
from qflare_server.storage.repository.unmaskings import StoredUnmasking
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.storage.tables import EVIDENCE_REASON
from qflare_server.strategies import (
    REVISION,
    Accumulator,
    Contribution,
    NotEnoughUpdatesError,
    Outcome,
    OutcomeEncoder,
    PassName,
    PassRunner,
    Prior,
    Reader,
    SpareTotal,
    UpdateAssessment,
    begin,
    by_update,
    first_excess,
    whole,
)
from qflare_server.strategies.accumulator import is_held
from qflare_server.strategies.blocks import SLICE
from qflare_server.training.config import download_encoding
from qflare_server.training.masking import update_manifest
from qflare_server.training.objective import objective_of
from qflare_server.training.reported_metrics import TRAINING
from qflare_server.training.rhythm import is_asynchronous
from qflare_server.training.strategy import stored_strategy

logger = logging.getLogger(__name__)

AHEAD: Final = 8
"""Chunks read at once of a payload that is read from end to end."""
SLICE_AHEAD: Final = 1
"""Chunks read at once where slices are read: at least so many, and just so many of a hundred updates side by side."""
THREADED_ELEMENTS: Final = 2**20
"""Models with more elements are folded by several threads."""
BATCH: Final = 64
"""Most updates that are read at once."""
BATCH_BYTES: Final = 4 * 2**20
"""Most bytes of their payloads that are read at once with their rows."""


@dataclass(frozen=True)
class WrittenVersion:
    """Payloads written by a finished aggregation: the version, strategy state by name, the download form."""

    payload: ReceivedPayload
    vectors: Mapping[str, ReceivedPayload]
    download: Download | None


@dataclass(frozen=True)
class Division:
    """How the passes over the updates of a large round are divided among coordinators.

    Attributes:
        runner: Returns what divides the passes of a fold; None where slices are computed.
        resident_bytes: Largest total that is summed up in memory as updates arrive, and thus by one coordinator.
        slice_elements: Elements that a thread folds at once; None means `blocks.SLICE`.
    """

    runner: "Callable[[RoundFold], PassRunner] | None"
    resident_bytes: int
    slice_elements: int | None = None


def fact_of(update: AcceptedUpdate) -> AcceptedUpdate:
    """Return what is kept of an update in memory: without its bytes, and without the evidence, which was checked."""
    return replace(update, data=None, statement=None, signature=None)


class RoundFold:
    """Aggregates one round; not thread-safe.

    Args:
        context: The coordinator's parts.
        plan: The round's aggregation plan.
        noise_seed: The training session's secret, needed with differential privacy.
        thread_count: Threads that share the arithmetic of a large model.
        recorded: Judgements of an earlier run by update id (`aggregation.outcome`), to recompute the version from.
        revision: Number of the rules to aggregate by; to recompute a version, those that it was made by.
        refuses_damaged: Whether updates with missing or altered chunks are refused; otherwise the error is raised.
        division: How passes are divided among coordinators; None means that they are not.
        spare: Keeps the total in memory for the next round of the training session; None means that nothing does.
    """

    def __init__(
        self,
        context: Context,
        plan: RoundPlan,
        *,
        noise_seed: bytes | None = None,
        thread_count: int = 1,
        recorded: Mapping[str, UpdateAssessment] | None = None,
        revision: int = REVISION,
        refuses_damaged: bool = True,
        division: Division | None = None,
        spare: SpareTotal | None = None,
    ) -> None:
        self.plan = plan
        self.last_sequence = 0
        self.taken: list[tuple[str, str]] = []  # id and statement digest of every update, in order
        self.refusals: dict[str, str] = {}  # by id: updates whose rows are not what was signed
        self._read_chunks: list[ChunkSet] = []  # of the updates whose bytes are in a payload store
        self.revision = revision
        self._evidence = RowIntegrity(
            context,
            plan.training_session_id,
            plan.number,
            carries=is_asynchronous(plan.config),
            recorded=recorded,
        )
        self._refuses_damaged = refuses_damaged
        self._context = context
        self._noise_seed = noise_seed
        self._division = division
        self._spare = spare
        self._is_large = self._reads_slices()
        self._thread_count = thread_count if self._is_large else 1
        self._opened = OpenReaders()
        self._recorded = recorded
        self._sent: dict[int, Reader] = {}
        for stored in (plan.base, *plan.vectors.values()):
            check_digests(stored)
        self._download = download_encoding(plan.config)
        self._strategy = stored_strategy(plan.config)
        self._wire = update_manifest(plan.config, plan.manifest)
        self._ahead = self._chunks_ahead()
        self._layout = self._update_layout()
        self._begin({})

    def _chunks_ahead(self) -> int:
        """Return how many chunks of an update are read at once; no more than a slice has where it is read in slices."""
        if not self._strategy.folds:
            return SLICE_AHEAD
        if not self._is_large:
            return AHEAD
        elements = (self._division and self._division.slice_elements) or SLICE
        slice_bytes = self._wire.size_bytes * elements // max(1, float_count(self.plan.manifest))
        return max(SLICE_AHEAD, min(self._context.store.read_chunks, slice_bytes // CHUNK_BYTES))

    def _reads_slices(self) -> bool:
        """Return whether several threads read the updates, slice by slice."""
        count, division = float_count(self.plan.manifest), self._division
        is_deferred = division is not None and not is_held(count, division.resident_bytes)
        return count > THREADED_ELEMENTS or is_deferred

    def _update_layout(self) -> VectorLayout:
        """Return where the elements of the model are in an update."""
        encoding = Encoding.from_number(self.plan.config.transfer.update_encoding)
        return VectorLayout(self.plan.manifest, encoding, self._wire)

    def is_ready(self) -> bool:
        """Return whether the version can be written once all updates are taken; True unless others are asked."""
        return True

    @property
    def unmaskings(self) -> Sequence[StoredUnmasking]:
        """Answers of helpers for secure aggregation; empty without it."""
        return ()

    def unmasking(self) -> security_pb2.ModelUnmasking | None:
        """Return the answers of helpers as the version's statement names them; None without secure aggregation."""
        return None

    @property
    def extra_payloads(self) -> Sequence[ReceivedPayload]:
        """Payloads to store with the version besides its own and its strategy's."""
        return ()

    def _begin(self, excluded: Mapping[str, str]) -> None:
        """Begin the aggregation, with the reasons of updates that are refused beforehand."""
        self._totals = Totals()
        self._waiting: list[AcceptedUpdate] = []
        self._encoder = OutcomeEncoder()
        self.sources: dict[str, PassUpdate] = {}
        division = self._division
        self._aggregation = begin(
            self._strategy,
            float_count(self.plan.manifest),
            self._model_reader(self.plan.base),
            self._prior(),
            noise_seed=self._noise_seed,
            thread_count=self._thread_count,
            recorded=self._recalled(),
            excluded=excluded,
            revision=self.revision,
            resident_bytes=None if division is None else division.resident_bytes,
            slice_elements=None if division is None else division.slice_elements,
            runner=None if division is None or division.runner is None else division.runner(self),
            spare=self._spare,
        )

    def _recalled(self) -> Mapping[str, UpdateAssessment] | None:
        """Return the recorded judgements of what is aggregated; None evaluates it again."""
        return self._recorded

    def end(self) -> None:
        """Give up what was summed and read; only facts and outcome can be used afterwards.

        Devices train from the new version now: the bytes of the base version, unless updates to it may still come, need
        not stay in a cache of their store, nor those of the updates.
        """
        if isinstance(self._aggregation, Accumulator):
            self._aggregation.release_total(self.plan.training_session_id)
        base = None if is_asynchronous(self.plan.config) else self.plan.base.chunks
        self._forget([*self._read_chunks, *([] if base is None else [base])])

    def _forget(self, payloads_read: Sequence[ChunkSet]) -> None:
        """Let the store drop payloads from its cache; they stay where they are, and can be read again."""
        for chunks in payloads_read:
            if chunks.store == self._context.store.name:
                self._context.store.forget(chunks.payload_id)

    def _forget_summed(self, payloads_read: Sequence[ChunkSet]) -> None:
        """Let the store drop updates whose sum is in memory, so that the next payloads get the memory of its cache.

        Freed later, that memory would go back to the host of a virtual machine before a version is written.
        """
        if isinstance(self._aggregation, Accumulator) and self._aggregation.is_resident:
            self._forget(payloads_read)

    def _model_reader(self, stored: StoredPayload, manifest: Manifest | None = None) -> Reader:
        return self._reader(stored, VectorLayout(manifest or self.plan.manifest))

    def _reader(self, stored: StoredPayload, layout: VectorLayout) -> Reader:
        kept = kept_chunks(stored.chunk_count) if self._is_large else 0
        source = PayloadBytes(self._context, stored, None, AHEAD, kept)
        return by_thread(lambda: VectorReader(layout, source.read).read)

    def _prior(self) -> Prior:
        count = float_count(self.plan.manifest)
        return Prior(
            scalars=dict(self.plan.strategy_state.get("scalars", {})),
            vectors={
                name: self._model_reader(stored, vector_manifest(name, count))
                for name, stored in self.plan.vectors.items()
            },
            version=self.plan.base_version + 1,
        )

    def take(self, batch: Sequence[AcceptedUpdate]) -> None:
        """Take accepted updates in, in the order of their acceptance."""
        refused = self._evidence.refusals(batch)
        self.refusals |= refused
        self.taken += [(update.update_id, update.statement_digest) for update in batch]
        stored = [chunks_of(update.chunks_id, update.store) for update in batch]
        read = [chunks for chunks in stored if chunks is not None]
        self._read_chunks += read
        if batch:
            self.last_sequence = batch[-1].acceptance_sequence
        try:
            self._take([update for update in batch if update.update_id not in refused])
        except DamagedPayloadError as error:
            self._leave_out_damaged(error)
        self._forget_summed(read)

    def _leave_out_damaged(self, error: DamagedPayloadError) -> None:
        """Refuse the updates whose stored bytes are damaged, and begin again without them.

        Raises:
            DamagedPayloadError: No update is to blame, or none is to be refused yet.
        """
        while True:
            found = self._damaged() if self._refuses_damaged else {}
            if not found:
                raise error
            self.refusals |= found
            self._begin({})
            try:
                for batch in self._taken_again():
                    self._take(batch)
            except DamagedPayloadError as another:
                error = another
            else:
                return

    def _damaged(self) -> dict[str, str]:
        """Return the reasons, by id, to refuse the updates with missing or altered chunks."""
        found = {}
        for update in (update for batch in self._taken_again() for update in batch):
            try:
                check_chunks(self._context, stored_payload(update))
            except DamagedPayloadError as error:
                found[update.update_id] = EVIDENCE_REASON + error.problem
                logger.warning("update not folded: %s: %s", update.update_id, error.problem)
        return found

    def take_known(self, batch: Sequence[AcceptedUpdate]) -> None:
        """Take updates in that another coordinator has checked; their judgements are recorded."""
        self._take(batch)

    def compute(self, name: PassName, start: int, stop: int) -> Iterator[np.ndarray[Any, Any]]:
        """Yield a pass's results over a slice; all judgements are recorded."""
        return self._aggregation.compute(name, start, stop)

    @property
    def update_bytes(self) -> int:
        """Size of one update's payload in bytes, before sealing."""
        return self._wire.size_bytes

    @property
    def batch_size(self) -> int:
        """How many updates are read at once, so that payloads in rows take a bounded memory whatever their number."""
        if self.update_bytes > self._context.config.inline_payload_bytes:
            return BATCH
        return max(1, min(BATCH, BATCH_BYTES // max(1, self.update_bytes)))

    def _take(self, batch: Sequence[AcceptedUpdate]) -> None:
        if self._is_large or all(update.location == "row" for update in batch):
            self._aggregation.extend([self._contribution(update) for update in batch])
        else:  # one large update in memory at a time
            for update in batch:
                self._aggregation.add(self._contribution(update))
        if self._strategy.folds:
            judged = {item.update_id: self._judgement(item) for item in batch}
            self._encoder.prepare(judged.values())
            self._count(batch, judged)
        else:  # who contributes is known when all are there
            self._waiting += [fact_of(update) for update in batch]

    def _judgement(self, update: AcceptedUpdate) -> UpdateAssessment:
        assert isinstance(self._aggregation, Accumulator)
        return self._aggregation.judgement_of(update.update_id)

    def _count(
        self, batch: Sequence[AcceptedUpdate], judged: Mapping[str, UpdateAssessment]
    ) -> None:
        for update in batch:
            if self.revision == 1 or judged[update.update_id].contributes:
                self._totals.add(update, self._weight(update))

    def totals(self) -> Totals:
        """Return the facts about the version's contributors; call after the last update was added."""
        if self._waiting:
            self._count(self._waiting, by_update(self._aggregation.outcome))
            self._waiting = []
        return self._totals

    def contributors(self, outcome: Outcome) -> tuple[str, ...]:
        """Return the statement digests of the updates in the version, in the order of their acceptance.

        Args:
            outcome: Facts of this aggregation, from `outcome`.
        """
        without = {*outcome.rejected, *(outcome.left_out if self.revision > 1 else ())}
        return tuple(digest for update_id, digest in self.taken if update_id not in without)

    def _contribution(self, update: AcceptedUpdate) -> Contribution:
        check_digests(stored_payload(update))
        if self._division is not None:
            self.sources[update.update_id] = PassUpdate.of(update)
        read = self._update_reader(update)
        staleness = self.plan.base_version - update.base_version
        full = self.plan.config.transfer.update_kind != training_pb2.UPDATE_KIND_DELTA
        if full and (staleness or self._download is not Encoding.FULL_PRECISION):
            read, full = difference(read, self._sent_reader(update.base_version)), False
        return Contribution(
            update_id=update.update_id,
            example_count=self._weight(update),
            read=read,
            staleness=staleness,
            full_weights=full,
            digest=update.statement_digest,
        )

    def _weight(self, update: AcceptedUpdate) -> int:
        """Return the number of examples that an update counts as."""
        most = self.plan.config.safeguards.max_example_count
        return min(update.example_count, most) if most else update.example_count

    def _update_reader(self, update: AcceptedUpdate) -> Reader:
        """Return the reader of an update: of a large model safe for several threads, and without its bytes."""
        if not self._is_large:
            return VectorReader(self._layout, self._source(update).read).read
        if not self._strategy.folds:
            source = self._source(update)
            return by_thread(lambda: VectorReader(self._layout, source.read).read)
        fact = fact_of(update)
        return self._opened.reader(lambda: VectorReader(self._layout, self._source(fact).read).read)

    def _source(self, update: AcceptedUpdate) -> PayloadBytes:
        return PayloadBytes(self._context, stored_payload(update), update.data, self._ahead)

    def _sent_reader(self, version: int) -> Reader:
        """Return the reader of a version as devices got it, for updates that were trained from it."""
        if version not in self._sent:
            with self._context.database.read() as session:
                model = global_models.get_model(session, self.plan.training_session_id, version)
                if model is None:
                    raise GlobalModelNotFoundError(f"no version {version}")
                payload_id = model.download_payload_id or model.payload_id
                stored = describe(payloads.get_payload(session, payload_id))
            wire = download_manifest(self.plan.manifest, self._download)
            layout = VectorLayout(self.plan.manifest, self._download, wire)
            self._sent[version] = held_slice(self._reader(stored, layout))
        return self._sent[version]

    @property
    def outcome(self) -> Outcome:
        """Facts of the aggregation; complete once the version is written."""
        order = [update_id for update_id, _ in self.taken]
        return with_refusals(self._aggregation.outcome, order, self.refusals)

    def metrics(self) -> dict[str, float]:
        """Return the example-weighted means of what the contributors reported, prefixed `train_`.

        They are as many as a version can state; those that decide about release and early stop come first. None with
        differential privacy: its noise does not cover them.
        """
        config = self.plan.config
        if config.privacy.noise_multiplier:
            return {}
        if self.revision == 1:
            return self.totals().metrics.means(TRAINING)
        bounds = [bound.metric for bound in config.release.bounds]
        names = objective_of(config).metric, config.early_stop.metric, "accuracy", "loss"
        deciding = [TRAINING + name for name in names]
        return self.totals().metrics.most_reported(TRAINING, [*bounds, *deciding])

    def write(self, executor: ThreadPoolExecutor, at: datetime) -> WrittenVersion:
        """Write the version's payload, the form in which devices get it, and its strategy's vectors.

        Raises:
            NotEnoughUpdatesError: The strategy accepted too few updates.
            NonFiniteError: The version would hold NaN or infinity, and no single update is to blame.
            InvalidUpdateError: It would, in the form in which devices get it.
            DamagedPayloadError: Stored bytes are missing or altered, and not (only) those of updates to be refused.
        """
        while True:
            try:
                return self._write_without_culprits(executor, at)
            except DamagedPayloadError as error:
                self._leave_out_damaged(error)

    def _write_without_culprits(self, executor: ThreadPoolExecutor, at: datetime) -> WrittenVersion:
        try:
            return self._write(executor, at)
        except (NonFiniteError, InvalidUpdateError) as error:
            culprits, problem = self._culprits(), str(error)
            if not culprits:
                return self._write_held(executor, at, error, {})
        self._take_again(culprits)
        try:
            return self._write(executor, at)
        except NotEnoughUpdatesError as error:
            raise NotEnoughUpdatesError(f"{problem}; without the culprits {error}") from error
        except (NonFiniteError, InvalidUpdateError) as error:
            return self._write_held(executor, at, error, culprits)

    def _write_held(
        self,
        executor: ThreadPoolExecutor,
        at: datetime,
        problem: Exception,
        culprits: Mapping[str, str],
    ) -> WrittenVersion:
        """Write a version whose elements stay as they are where the optimizer's memory takes them out of range."""
        if not self._strategy.optimizer.initial_vectors:
            raise problem
        logger.warning("elements held at their values in the base version: %s", problem)
        self._take_again(culprits)
        return self._write(executor, at, VectorRange(self.plan.manifest, self._download))

    def _take_again(self, culprits: Mapping[str, str]) -> None:
        self._begin(culprits)
        for batch in self._taken_again():
            self._take(batch)

    def _culprits(self) -> dict[str, str]:
        """Return the reasons, by id, to refuse the updates of which alone no version could be made.

        None with differential privacy: who is refused would tell of single updates.
        """
        if self.plan.config.privacy.noise_multiplier:
            return {}
        fitting, found = VectorRange(self.plan.manifest, self._download), {}
        judged = by_update(self._aggregation.outcome)
        release = self._aggregation.release
        for update in (update for batch in self._taken_again() for update in batch):
            judgement = judged[update.update_id]
            if not judgement.contributes:
                continue
            element = first_excess(release, self._contribution(update), judgement, fitting.fits)
            if element is not None:
                tensor = fitting.tensor_at(element)
                found[update.update_id] = f"alone it would take tensor {tensor!r} out of its range"
                logger.warning(
                    "update not folded: %s: %s", update.update_id, found[update.update_id]
                )
        return found

    def _taken_again(self) -> Iterator[list[AcceptedUpdate]]:
        """Read the updates that were taken once more, without those that are not what was signed."""
        plan, after = self.plan, 0
        while after < self.last_sequence:
            with self._context.database.read() as session:
                batch = updates.accepted_after(
                    session, plan.training_session_id, plan.number, after, self.batch_size
                )
            after = batch[-1].acceptance_sequence
            yield [
                update
                for update in batch
                if update.update_id not in self.refusals
                and update.acceptance_sequence <= self.last_sequence
            ]

    def _write(
        self, executor: ThreadPoolExecutor, at: datetime, held: VectorRange | None = None
    ) -> WrittenVersion:
        """Write the version; with `held`, elements out of that range keep the base's values."""
        count = float_count(self.plan.manifest)
        vectors: dict[str, PayloadWriter] = {}

        def slices() -> Iterator[np.ndarray[Any, Any]]:
            for made in self._aggregation.finish():
                piece = (
                    self._aggregation.release.held(made, whole(made, held.fits)) if held else made
                )
                for name, values in piece.vectors.items():
                    if name not in vectors:
                        layout = vector_manifest(name, count)
                        vectors[name] = self._writer(executor, layout, at, name)
                    vectors[name].feed(values.astype("<f8", copy=False).tobytes())
                yield piece.weights

        manifest, seal_context = self.plan.manifest, self._seal_context()
        writer = VersionWriter(self._context, executor, manifest, self._download, at, seal_context)
        payload, download = writer.write(write_payload(manifest, slices(), self._integers()))
        kept = {name: vector.finish() for name, vector in vectors.items()}
        return WrittenVersion(payload, kept, download)

    def write_outcome(
        self, executor: ThreadPoolExecutor, outcome: Outcome, at: datetime
    ) -> ReceivedPayload:
        """Write the record of every update's outcome, as JSON; after `write`."""
        data = self._encoder.encode(outcome)
        layout = Manifest((TensorSpec("outcome", DType.UINT8, (len(data),)),))
        writer = self._writer(executor, layout, at, "outcome")
        writer.feed(data)
        return writer.finish()

    def _writer(
        self, executor: ThreadPoolExecutor, layout: Manifest, at: datetime, state_name: str
    ) -> PayloadWriter:
        """Return what writes something that is kept of the version under a name."""
        return PayloadWriter(self._context, executor, layout, at, self._seal_context(state_name))

    def _seal_context(self, state_name: str = "") -> SealContext | None:
        """Return what the version, or what is kept of it under a name, is sealed for; None where nothing is sealed."""
        plan = self.plan
        return version_seal_context(
            self._context,
            plan.config,
            plan.training_session_id,
            plan.base_version + 1,
            state_name,
        )

    def _integers(self) -> Callable[[TensorSpec], Iterator[bytes]]:
        """Return where integer tensors' bytes come from: the contributor with the largest example count.

        With differential privacy the base version: no noise could cover a copy of one device's integers.
        """
        plan, largest = self.plan, self.totals().largest
        if largest is None:
            raise NotEnoughUpdatesError("needs 1 accepted update, got 0")
        if plan.config.privacy.noise_multiplier and self.revision > 1:
            source, wire = PayloadBytes(self._context, plan.base, None, AHEAD), plan.manifest
        else:
            source, wire = self._source(largest), self._wire
        return self._integers_from(source, wire)

    def _integers_from(
        self, source: PayloadBytes, wire: Manifest
    ) -> Callable[[TensorSpec], Iterator[bytes]]:
        """Return what reads integer tensors' bytes from a payload with a layout."""
        offsets = {spec.name: offset for spec, offset in integer_ranges(self.plan.manifest, wire)}

        def read(spec: TensorSpec) -> Iterator[bytes]:
            for start in range(0, spec.size_bytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, spec.size_bytes - start)
                yield bytes(source.read(offsets[spec.name] + start, length))

        return read
