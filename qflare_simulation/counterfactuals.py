"""Counterfactuals: what another rule, clipping or quorum would have made of the rounds of a training session.

Each round is aggregated again from the updates that the coordinator has kept, from the base version that it had, by the
coordinator's own code. The state of an optimizer, such as FedAdam's moments, is carried from replayed round to replayed
round. Nothing is written to the coordinator's database.
"""

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qflare.tensors import assemble
from qflare.training_settings import SettingError, apply
from qflare.v1 import training_pb2
from qflare_client import TrainingTask
from qflare_server.aggregation.fold import RoundFold, WrittenVersion
from qflare_server.aggregation.plan import RoundPlan, read_plan
from qflare_server.context import Context
from qflare_server.errors import PayloadPrunedError, QflareError
from qflare_server.payloads.reader import PayloadBytes
from qflare_server.storage.payload_records import ReceivedPayload, StoredPayload, describe
from qflare_server.storage.payload_store import PayloadFile, PayloadStore
from qflare_server.storage.repository import (
    global_models,
    history,
    payloads,
    replaced_configs,
    training_sessions,
)
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.storage.training_configs import from_json
from qflare_server.strategies import NotEnoughUpdatesError
from qflare_server.training.masking import is_masked
from qflare_server.training.strategy import build_strategy
from qflare_server.verification.recomputation import ReadingDatabase, updates_of_round
from qflare_simulation.errors import SimulationError
from qflare_simulation.worker import EvaluateFunction

READ_AHEAD: Final = 4
STORE_TIMEOUT_S: Final = 30.0
NOISE_SEED: Final = hashlib.sha256(b"replay").digest()
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ReplayedRound:
    """What a round would have made.

    Attributes:
        round: Number of the round.
        base_version: Version that it was trained from.
        version: Version that it made; None if none.
        outcome: `version`, or why there would be none.
        updates: Updates that were folded.
        left_out: Ids of devices whose updates the rule would have left out.
        distance: Euclidean distance to the real version; None unless both exist.
        step: Euclidean length of the replayed step from the base version; None if none.
        metrics: Of the replayed version; empty without an evaluation function.
        real_metrics: Of the real version.
    """

    round: int
    base_version: int
    version: int | None
    outcome: str
    updates: int
    left_out: tuple[str, ...] = ()
    distance: float | None = None
    step: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    real_metrics: Mapping[str, float] = field(default_factory=dict)


def replay(
    context: Context,
    training_session_id: str,
    *,
    strategy: str = "",
    settings: Sequence[str] = (),
    evaluate: EvaluateFunction | None = None,
    test: Any = None,
) -> list[ReplayedRound]:
    """Aggregate the published rounds of a training session again, by other settings.

    Args:
        context: Parts of the coordinator; its database is only read.
        training_session_id: The training session.
        strategy: Another rule, with its default parameters; empty keeps the session's.
        settings: Further settings as `KEY=VALUE`, such as `safeguards.clip_norm=1` or `rounds.quorum=8`. A
            `rounds.target` takes the first updates only.
        evaluate: Measures the real and the replayed version of each round; None measures none.
        test: Test data of `evaluate`.

    Raises:
        SimulationError: There is no such training session, its updates are masked, or a setting cannot be used.
    """
    with context.database.read() as session:
        owner = training_sessions.get_session(session, training_session_id)
        if owner is None:
            raise SimulationError(f"no training session {training_session_id[:64]!r}")
        if is_masked(owner.config):
            raise SimulationError(
                "secure_aggregation: the coordinator has the sum of the updates alone, so that no round can be replayed"
            )
        rounds = [row for row in history.rounds(session, training_session_id) if row["closed_at"]]
        replaced = replaced_configs.list_replaced(session, training_session_id)
    rules = [_in_force(row["closed_at"], replaced, owner.config) for row in rounds]
    changed = [_changed(rule, strategy, settings) for rule in rules]
    if not rounds:
        _changed(owner.config, strategy, settings)
    with _scratch(context) as (reading, executor):
        replayer = _Replayer(reading, executor, evaluate, test)
        return [
            replayer.run(
                training_session_id,
                (row["number"], row["base_version"], row["version"]),
                config,
                config.rounds.target if config.rounds.target != rule.rounds.target else 0,
            )
            for row, rule, config in zip(rounds, rules, changed, strict=True)
        ]


def _in_force(
    closed_at: datetime,
    replaced: Sequence[replaced_configs.ReplacedConfig],
    current: training_pb2.TrainingConfig,
) -> training_pb2.TrainingConfig:
    """Return the configuration under which a round closed; `replaced` is in the order of time."""
    for row in replaced:
        if closed_at < row.replaced_at:
            return from_json(row.config)
    return current


def _changed(
    stored: training_pb2.TrainingConfig, strategy: str, settings: Sequence[str]
) -> training_pb2.TrainingConfig:
    """Return a configuration with other settings.

    Raises:
        SimulationError: A setting is unknown, or the rule refuses it.
    """
    config = training_pb2.TrainingConfig()
    config.CopyFrom(stored)
    if strategy:
        config.strategy.Clear()
        config.strategy.name = strategy
    try:
        for setting in settings:
            apply(config, setting)
        build_strategy(config)
    except SettingError as error:
        raise SimulationError(f"{error}; want {error.remedy}") from error
    except QflareError as error:
        raise SimulationError(str(error)) from error
    return config


@contextmanager
def _scratch(context: Context) -> Iterator[tuple[Context, ThreadPoolExecutor]]:
    """Open a context that reads the coordinator's payloads and writes to a file that is deleted afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="qflare-replay-") as folder,
        ThreadPoolExecutor(2) as executor,
    ):
        written = PayloadFile(Path(folder) / "payloads.db", timeout_s=STORE_TIMEOUT_S)
        try:
            config = dataclasses.replace(context.config, inline_payload_bytes=0)
            store = cast("PayloadStore", _OverlaidStore(context.store, written))
            database = ReadingDatabase(context.database)
            reading = dataclasses.replace(context, config=config, database=database, store=store)
            yield reading, executor
        finally:
            written.close()


class _OverlaidStore:
    """A payload store whose additions go elsewhere."""

    def __init__(self, below: PayloadStore, above: PayloadStore) -> None:
        self._below = below
        self._above = above
        self._added: set[str] = set()

    def owner(self) -> str:
        """Return the empty text: nothing is written below, so any copy of the database may be replayed."""
        return ""

    def append(self, payload_id: str, first_index: int, chunks: Sequence[bytes]) -> None:
        """Write chunks to the upper store."""
        self._added.add(payload_id)
        self._above.append(payload_id, first_index, chunks)

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Finish a payload of the upper store."""
        self._above.complete(payload_id, size_bytes)

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return chunks of the store that has them."""
        return self._of(payload_id).read(payload_id, first_index, count)

    def stored_count(self, payload_id: str) -> int:
        """Return the number of chunks of a payload."""
        return self._of(payload_id).stored_count(payload_id)

    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete payloads of the upper store."""
        self._above.delete([item for item in payload_ids if item in self._added])

    def _of(self, payload_id: str) -> PayloadStore:
        return self._above if payload_id in self._added else self._below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


class _Replayer:
    """Replays rounds one after the other, and carries the state of the strategy."""

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        evaluate: EvaluateFunction | None,
        test: Any,
    ) -> None:
        self._context = context
        self._executor = executor
        self._evaluate = evaluate
        self._test = test
        self._scalars: Mapping[str, float] = {}
        self._vectors: Mapping[str, StoredPayload] = {}

    def run(
        self,
        training_session_id: str,
        named: tuple[int, int, int | None],
        config: training_pb2.TrainingConfig,
        most: int,
    ) -> ReplayedRound:
        """Replay a round.

        Args:
            training_session_id: Its training session.
            named: Its number, base version, and version if it made one.
            config: The rule to replay it by.
            most: Number of updates to take; 0 takes all.
        """
        number, base_version, _ = named
        with self._context.database.read() as session:
            try:
                plan = read_plan(session, training_session_id, number, base_version)
            except QflareError as error:
                return ReplayedRound(*named, str(error) or error.reason, 0)
        accepted = updates_of_round(self._context, training_session_id, number)[: most or None]
        if any(update.location == "none" for update in accepted):
            return ReplayedRound(*named, "its updates were not kept", 0)
        if len(accepted) < config.rounds.quorum:
            missed = f"missed its quorum: got {len(accepted)}, want {config.rounds.quorum}"
            return ReplayedRound(*named, missed, len(accepted))
        changed = dataclasses.replace(plan, config=config)
        return self._folded(changed, accepted, ReplayedRound(*named, "version", len(accepted)))

    def _folded(
        self, plan: RoundPlan, accepted: Sequence[AcceptedUpdate], draft: ReplayedRound
    ) -> ReplayedRound:
        changed = dataclasses.replace(
            plan,
            strategy_state={"scalars": dict(self._scalars)},
            vectors=self._vectors,
        )
        fold = RoundFold(self._context, changed, noise_seed=NOISE_SEED)
        try:
            fold.take(accepted)
            written = fold.write(self._executor, self._context.clock())
        except (NotEnoughUpdatesError, QflareError) as error:
            return dataclasses.replace(draft, outcome=f"no version: {error}")
        self._carry(fold, written)
        excluded = {*fold.outcome.rejected, *fold.outcome.left_out}
        left_out = tuple(item.device_id for item in accepted if item.update_id in excluded)
        made = self._arrays(plan, _stored(written.payload))
        base = self._arrays(plan, plan.base)
        return dataclasses.replace(
            self._compared(plan, draft, made),
            left_out=left_out,
            step=_distance(made, base),
            metrics=self._measured(plan, made),
        )

    def _carry(self, fold: RoundFold, written: WrittenVersion) -> None:
        self._scalars = fold.outcome.scalars
        self._vectors = {name: _stored(payload) for name, payload in written.vectors.items()}

    def _compared(self, plan: RoundPlan, draft: ReplayedRound, made: Arrays) -> ReplayedRound:
        """Return a round with what its real version says."""
        if draft.version is None:
            return draft
        with self._context.database.read() as session:
            model = global_models.get_model(session, plan.training_session_id, draft.version)
            assert model is not None
            try:
                stored = describe(payloads.get_payload(session, model.payload_id))
            except PayloadPrunedError:
                return draft
        real = self._arrays(plan, stored)
        return dataclasses.replace(
            draft, distance=_distance(made, real), real_metrics=self._measured(plan, real)
        )

    def _arrays(self, plan: RoundPlan, stored: StoredPayload) -> Arrays:
        source = PayloadBytes(self._context, stored, None, READ_AHEAD)
        size = plan.manifest.size_bytes
        step = 2**20
        pieces = (source.read(start, min(step, size - start)) for start in range(0, size, step))
        return assemble(plan.manifest, pieces)

    def _measured(self, plan: RoundPlan, arrays: Arrays) -> dict[str, float]:
        if self._evaluate is None:
            return {}
        device = plan.config.device_training
        task = TrainingTask(
            plan.training_session_id,
            plan.number,
            plan.base_version + 1,
            device.local_epochs or 1,
            device.batch_size or 32,
            device.learning_rate or 0.01,
        )
        _, metrics = self._evaluate(
            {name: array.copy() for name, array in arrays.items()}, task, self._test
        )
        return {name: float(value) for name, value in metrics.items()}


def _stored(payload: ReceivedPayload) -> StoredPayload:
    return StoredPayload(
        payload.payload_id,
        payload.size_bytes,
        payload.digest,
        payload.chunk_digests,
        in_row=False,
        seal=payload.seal,
        chunks=payload.chunks,
    )


def _distance(first: Arrays, second: Arrays) -> float:
    """Return the Euclidean distance of two models."""
    return math.sqrt(
        sum(
            float(np.sum((array.astype(np.float64) - second[name].astype(np.float64)) ** 2))
            for name, array in first.items()
        )
    )


def table(rounds: Sequence[ReplayedRound]) -> Iterator[str]:
    """Yield a line for each round: what it would have made, and how far that is from what it made."""
    for item in rounds:
        parts = [f"round {item.round}:", item.outcome, f"of {item.updates} updates"]
        if item.step is not None:
            parts += [f"without {len(item.left_out)},", f"step {_shown(item.step)},"]
            parts += [f"distance {_shown(item.distance)}"]
        for name, value in sorted(item.metrics.items()):
            parts.append(f"{name} {_shown(value)} (was {_shown(item.real_metrics.get(name))})")
        yield " ".join(parts)


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
