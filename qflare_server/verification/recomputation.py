"""Recomputation of a version from its stored updates, and comparison with the published version.

The updates of the version's round are folded in order of acceptance, as the aggregator did; nothing is written. On the
same machine and libraries the bytes are the same; strategies that screen updates by their norms may round differently
on another.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from sqlalchemy.orm import Session

from qflare.evidence.lineage import contributors_digest
from qflare.v1 import security_pb2
from qflare_server.aggregation.fold import BATCH, RoundFold, WrittenVersion
from qflare_server.aggregation.folds import open_fold
from qflare_server.aggregation.outcome import read_outcome
from qflare_server.aggregation.plan import read_plan
from qflare_server.context import Context
from qflare_server.errors import DamagedPayloadError, HelperRefusedError, InvalidUpdateError
from qflare_server.storage.database import Database
from qflare_server.storage.payload_records import ReceivedPayload, content_digest_of
from qflare_server.storage.payload_store import PayloadStore
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import global_models, payloads, updates
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.strategies import NotEnoughUpdatesError, UpdateAssessment, by_update
from qflare_server.training.masking import has_noise_in_sum
from qflare_server.training.privacy import open_seed
from qflare_server.training.versions import find_version
from qflare_server.verification.configurations import read_configurations
from qflare_server.verification.downloads import download_problem

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """Result of the recomputation of a version.

    Attributes:
        version: The version.
        payload_digest: Digest of the published version.
        update_count: Updates of its round.
        pruned_count: Updates whose bytes are no longer kept; if there are any, the version cannot be recomputed.
        recomputed: Whether it was recomputed.
        differences: Differences from the published version; empty if the recomputed version is identical.
        by_record: Whether the recorded outcomes of the updates were needed to reproduce the version. Evaluating the
            updates again gave other outcomes, as it may on another machine; the record is the coordinator's claim.
    """

    version: int
    payload_digest: str
    update_count: int = 0
    pruned_count: int = 0
    recomputed: bool = False
    differences: tuple[str, ...] = ()
    by_record: bool = False


def recompute_version(
    context: Context,
    training_session_id: str,
    version: int | None = None,
    *,
    noise_seed: bytes | None = None,
    thread_count: int = 1,
) -> Recomputation:
    """Recompute a version and compare it with the published one.

    Args:
        context: The coordinator's dependencies.
        training_session_id: Training session.
        version: None means the latest.
        noise_seed: The training session's noise seed, needed if the coordinator adds noise; None decrypts the stored
            one.
        thread_count: Number of threads for the arithmetic.

    Raises:
        TrainingSessionNotFoundError: There is no such training session.
        GlobalModelNotFoundError: There is no such version.
    """
    with context.database.read() as session:
        training_session, model = find_version(session, training_session_id, version)
        configurations = read_configurations(session, training_session.id)
    statement = security_pb2.ModelStatement.FromString(model.statement)
    result = Recomputation(model.version, statement.payload_digest)
    if not model.round_number:
        return _compare_copy(context, model, statement, result)
    folded = updates_of_round(context, model.training_session_id, model.round_number)
    pruned_count = sum(update.location == "none" for update in folded)
    result = dataclasses.replace(result, update_count=len(folded), pruned_count=pruned_count)
    config = configurations.find(model.round_number, statement.config_digest)
    if config is None:
        problem = "the configuration of the training session is not the one it was made with"
        return dataclasses.replace(result, differences=(problem,))
    if pruned_count:
        return result
    with context.database.read() as session:
        plan = read_plan(session, model.training_session_id, model.round_number, model.base_version)
    plan = dataclasses.replace(plan, config=config)
    seed = noise_seed or open_seed(context, plan.training_session_id, plan.privacy_state)
    needs_seed = plan.config.privacy.noise_multiplier and not has_noise_in_sum(plan.config)
    if needs_seed and seed is None:
        problem = "noise: its seed does not open under this state key"
        return dataclasses.replace(result, differences=(problem,))

    def run(recorded: Mapping[str, UpdateAssessment] | None) -> tuple[str, ...]:
        try:
            fold = open_fold(
                _without_writing(context),
                plan,
                noise_seed=seed,
                thread_count=thread_count,
                recorded=recorded,
                revision=int(model.strategy_state.get("revision", 1)),
                refuses_damaged=False,
            )
            return _repeat(context, model, statement, fold, folded)
        except DamagedPayloadError as error:
            return (_damage(error, folded),)

    found = run(None)
    record = read_outcome(context, model) if found else None
    if record is not None and not run(by_update(record)):
        return dataclasses.replace(result, recomputed=True, by_record=True)
    return dataclasses.replace(result, recomputed=True, differences=found)


def _repeat(
    context: Context,
    model: GlobalModel,
    statement: security_pb2.ModelStatement,
    fold: RoundFold,
    folded: Sequence[AcceptedUpdate],
) -> tuple[str, ...]:
    """Fold the updates again and return the differences from the published version."""
    fold.take(folded)
    try:
        with ThreadPoolExecutor(2) as executor:
            written = fold.write(executor, context.clock())
    except (NotEnoughUpdatesError, HelperRefusedError, InvalidUpdateError) as error:
        return (f"no version comes out: {error}",)
    return (
        *_compare(fold, statement, written),
        *_compare_vectors(context, model, written.vectors),
    )


def _damage(error: DamagedPayloadError, folded: Sequence[AcceptedUpdate]) -> str:
    """Describe stored bytes that no version can be recomputed from."""
    for update in folded:
        if update.payload_id == error.payload_id:
            return f"payload: made of update {update.update_id}, of which {error.problem}"
    return f"payload: made of {error}"


def _compare_copy(
    context: Context,
    model: GlobalModel,
    statement: security_pb2.ModelStatement,
    result: Recomputation,
) -> Recomputation:
    """Compare a rollback with the version that it restores; an initial model has nothing to compare with."""
    if not statement.HasField("rollback_version"):
        if not statement.HasField("download"):
            return result
        problem = download_problem(context, model)
        return dataclasses.replace(result, differences=(problem,) if problem else ())
    with context.database.read() as session:
        restored = global_models.get_model(
            session, model.training_session_id, statement.rollback_version
        )
        same = restored is not None and (
            restored.payload_digest == statement.payload_digest
            and (restored.download_payload_digest or "") == statement.download.payload_digest
        )
    problem = f"payload is not that of version {statement.rollback_version}"
    return dataclasses.replace(result, recomputed=True, differences=() if same else (problem,))


def updates_of_round(
    context: Context, training_session_id: str, round_number: int
) -> list[AcceptedUpdate]:
    """Return the updates of a round in order of acceptance, without payload bytes stored in rows."""
    found: list[AcceptedUpdate] = []
    while True:
        after = found[-1].acceptance_sequence if found else 0
        with context.database.read() as session:
            batch = updates.facts_after(session, training_session_id, round_number, after, BATCH)
        found += batch
        if len(batch) < BATCH:
            return found


def _compare(
    fold: RoundFold, statement: security_pb2.ModelStatement, written: WrittenVersion
) -> list[str]:
    outcome = fold.outcome
    pairs = {
        "payload": (written.payload.content_digest, statement.payload_digest),
        "download": (
            "" if written.download is None else written.download.payload.digest,
            statement.download.payload_digest,
        ),
        "contributors": (
            contributors_digest(fold.contributors(outcome)),
            statement.contributors_digest,
        ),
        "weight_sum": (outcome.weight_sum, statement.weight_sum),
        "example_count": (fold.totals().example_count, statement.example_count),
        "metrics": (fold.metrics(), dict(statement.metrics)),
        "unmasking": (fold.unmasking(), _unmasking(statement)),
    }
    return [
        f"{name}: got {got}, published {want}" for name, (got, want) in pairs.items() if got != want
    ]


def _unmasking(statement: security_pb2.ModelStatement) -> security_pb2.ModelUnmasking | None:
    return statement.unmasking if statement.HasField("unmasking") else None


def _compare_vectors(
    context: Context, model: GlobalModel, vectors: Mapping[str, ReceivedPayload]
) -> list[str]:
    """Compare the optimizer's state vectors, which no statement covers but the next version depends on."""
    problems = []
    for name, payload_id in model.strategy_state.get("vectors", {}).items():
        with context.database.read() as session:
            stored = payloads.get_payload(session, payload_id)
            digest = None if stored is None else content_digest_of(stored)
        if name not in vectors or vectors[name].content_digest != digest:
            problems.append(f"vector {name} of the strategy")
    return problems


class ReadingDatabase(Database):
    """A read-only database."""

    def __init__(self, database: Database) -> None:
        self._read_only = database
        self.engine = database.engine
        self.is_sqlite = database.is_sqlite

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a block of consistent reads."""
        with self._read_only.read() as session:
            yield session

    def write(self, work: Callable[[Session], T]) -> T:
        """Do nothing: a recomputation records no uploads."""
        del work
        return cast("T", None)


class _ReadingStore:
    """A read-only payload store, which counts chunks instead of writing them."""

    def __init__(self, store: PayloadStore) -> None:
        self._store = store
        self._counts: dict[str, int] = {}

    def owner(self) -> str:
        """Return the empty text: nothing is written, so any copy of the database may read."""
        return ""

    def append(self, payload_id: str, first_index: int, chunks: Sequence[bytes]) -> None:
        """Count chunks; only their digests are needed."""
        self._counts[payload_id] = first_index + len(chunks)

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Do nothing: nothing is written."""

    def stored_count(self, payload_id: str) -> int:
        """Return the number of chunks counted, or of those stored."""
        written = self._counts.get(payload_id)
        return self._store.stored_count(payload_id) if written is None else written

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return stored chunks."""
        return self._store.read(payload_id, first_index, count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _without_writing(context: Context) -> Context:
    return dataclasses.replace(
        context,
        database=ReadingDatabase(context.database),
        store=cast("PayloadStore", _ReadingStore(context.store)),
    )
