"""Rounds that several coordinators on one PostgreSQL aggregate slice by slice: the same bytes, nothing from outside."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from qflare.tensors import CHUNK_BYTES
from qflare.v1 import training_pb2
from qflare_server.aggregation.pass_inputs import FORMAT, PassInputs
from qflare_server.aggregation.slice_results import LeaseLostError, read_result, store_result
from qflare_server.aggregation.slice_worker import SliceWorker
from qflare_server.errors import DamagedPayloadError
from qflare_server.storage.repository import fold_slices, leases
from qflare_server.storage.repository.fold_slices import SliceLease, SliceResult
from qflare_server.storage.tables import (
    FoldPass,
    FoldSlice,
    ModelUpdate,
    Payload,
    PayloadChunk,
    Upload,
)
from qflare_server.strategies import PassName
from qflare_server.strategies.blocks import BLOCK, GRAM_BLOCK
from qflare_server.training.retention import sweep
from qflare_server.verification import recompute_version
from tests.contract.conftest import MakeCore
from tests.support.slices import BegunPass
from tests.support.use_cases import CoordinatorHarness

COUNT = 4 * BLOCK + 77
"""Elements: five slices at most."""
UPDATES = 5
TOTAL_BYTES = UPDATES * 4 * (COUNT + 2)
KEEP = training_pb2.PAYLOAD_RETENTION_ALL


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """Return a PostgreSQL database: only coordinators on one share rounds."""
    return postgres_url


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "w": random.standard_normal(COUNT, dtype=np.float32),
        "step": np.array([seed], np.int64),
    }


def config(name: str, **settings: Any) -> dict[str, Any]:
    transfer = {"payload_retention": KEEP, **settings.pop("transfer", {})}
    return {
        "strategy": training_pb2.StrategyConfig(name=name),
        "transfer": training_pb2.TransferPolicy(**transfer),
        "rounds": training_pb2.RoundPolicy(quorum=UPDATES),
        **settings,
    }


CONFIGS = {
    "mean": config("fedavg"),
    "clipped deltas": config(
        "fedavg",
        transfer={"update_kind": training_pb2.UPDATE_KIND_DELTA},
        safeguards=training_pb2.SafeguardPolicy(clip_norm=100.0),
    ),
    "download in half": config(
        "fedavg", transfer={"download_encoding": training_pb2.ENCODING_FLOAT16}
    ),
    "sealed": config("median", transfer={"sealed": True}),
    "median": config("median"),
    "trimmed mean": config("trimmed_mean"),
    "krum": config("krum"),
    "geometric median": config("geometric_median"),
    "clipped krum": config("krum", safeguards=training_pb2.SafeguardPolicy(clip_norm=100.0)),
}


def send_all(core: CoordinatorHarness, session_id: str) -> None:
    for number in range(UPDATES):
        device = f"device-{number}"
        task = core.tasks.next_task(device, session_id)
        draft = core.draft(device, session_id, arrays(number + 1), examples=number + 1)
        assert task.config is not None
        draft.statement.kind = task.config.transfer.update_kind
        draft.statement.base_encoding = task.config.transfer.download_encoding
        core.send(draft)


@pytest.fixture
def cores(make_core: MakeCore) -> Callable[..., list[CoordinatorHarness]]:
    """Return what makes coordinators that know each other, the first with devices."""

    def make(slice_count: int = 5, **settings: Any) -> list[CoordinatorHarness]:
        size = -(-TOTAL_BYTES // slice_count)
        made = [
            make_core(name=name, fold_slice_bytes=size, **settings)
            for name in ("one", "two", "three")
        ]
        made[0].add_devices(UPDATES)
        for core, name in zip(made, ("one", "two", "three"), strict=True):
            core.database.write(partial(_announce, name=name, at=core.clock()))
        return made

    return make


def _announce(session: Session, name: str, at: datetime) -> None:
    leases.announce(session, name, "localhost:1", "1", "database", at, at)


def worker_of(core: CoordinatorHarness, name: str) -> SliceWorker:
    return SliceWorker(core.context, core.executor, name)


@contextmanager
def working(*workers: SliceWorker) -> Iterator[None]:
    """Let workers work beside the block, each in a thread."""
    stop = threading.Event()

    def run(worker: SliceWorker) -> None:
        while not stop.is_set():
            if not worker.run_once():
                stop.wait(0.001)

    with ThreadPoolExecutor(len(workers)) as pool:
        jobs = [pool.submit(run, worker) for worker in workers]
        try:
            yield
        finally:
            stop.set()
            for job in jobs:
                job.result()


def work_off(worker: SliceWorker) -> int:
    """Compute slices until none is free; return how many there were."""
    count = 0
    while worker.run_once():
        count += 1
    return count


@pytest.mark.parametrize(
    ("name", "slice_count"),
    [
        *((name, 5) for name in CONFIGS),
        *((name, n) for name in ("mean", "krum") for n in (1, 2, 4)),
    ],
)
def test_slices_and_coordinators_change_no_byte(
    cores: Callable[..., list[CoordinatorHarness]], name: str, slice_count: int
) -> None:
    one, two, three = cores(slice_count)
    session_id = one.start(arrays(0), **CONFIGS[name])
    send_all(one, session_id)

    with working(worker_of(two, "two"), worker_of(three, "three")):
        one.settle()

    assert one.round(session_id, 1).state == "published"
    again = recompute_version(one.context, session_id, 1)
    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)
    assert (one.count(FoldPass), one.count(FoldSlice)) == (0, 0)


@pytest.mark.parametrize(
    ("name", "step", "inline"),
    [
        ("mean", "aggregate", 2**20),
        ("median", "aggregate", 0),
        ("sealed", "aggregate", 0),
        ("sealed", "aggregate", 2**20),
        ("krum", "products", 0),
        ("clipped krum", "norms", 2**20),
    ],
)
def test_workers_compute_what_one_coordinator_computes(
    cores: Callable[..., list[CoordinatorHarness]], name: str, step: Any, inline: int
) -> None:
    one, two, three = cores(inline_payload_bytes=inline)
    session_id = one.start(arrays(0), **CONFIGS[name])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id, name=step)
    before = one.count(Payload)

    workers = [worker_of(two, "two"), worker_of(three, "three")]
    turns = [worker.run_once() for worker in workers * 3]

    assert sum(turns) == len(begun.bounds) == 5
    assert {row.holder for row in begun.rows()} == {"two", "three"}
    assert begun.results().tobytes() == begun.alone().tobytes()
    begun.end()
    sweep(one.context)
    assert one.count(Payload) == before
    assert one.count(Upload) == 0


@pytest.mark.parametrize("inline", [0, 2**20], ids=["chunks", "rows"])
def test_a_late_result_is_refused_by_the_fence(
    cores: Callable[..., list[CoordinatorHarness]], inline: int
) -> None:
    one, two, three = cores(lease_s=0.0, inline_payload_bytes=inline)
    session_id = one.start(arrays(0), **CONFIGS["median"])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id, size=BLOCK * 5)
    late = two.database.write(
        lambda session: fold_slices.acquire_any(session, "two", FORMAT, [], 0.0)
    )
    assert late is not None
    values = begun.fold.compute("aggregate", 0, COUNT)
    assert worker_of(three, "three").run_once()
    before = one.count(Payload)

    with pytest.raises(LeaseLostError):
        store_result(
            two.context, two.executor, begun.fold.plan, begun.found, late, values, lambda: None
        )

    (row,) = begun.rows()
    assert (row.fence, row.holder, one.count(Payload)) == (2, "three", before)
    assert begun.results().tobytes() == begun.alone().tobytes()
    sweep(one.context)
    assert one.count(Upload) == 0


@pytest.mark.parametrize("name", ["products", "norms", "aggregate"])
def test_figures_of_one_block_are_read_in_one_part(
    cores: Callable[..., list[CoordinatorHarness]], name: PassName
) -> None:
    one, *_ = cores()
    session_id = one.start(arrays(0), **CONFIGS["median"])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id, name=name, size=COUNT)
    of_five = PassInputs.from_json(begun.found.inputs)
    inputs = replace(of_five, updates=of_five.updates * 8, judgements=of_five.judgements * 8)
    found = replace(begun.found, inputs=inputs.to_json())
    acquired = one.database.write(
        lambda session: fold_slices.acquire_any(session, "x", FORMAT, [], 60.0)
    )
    assert acquired is not None
    unit = {"products": (40, 40), "norms": (40, 3), "aggregate": ()}[name]
    length = {"products": 100 * GRAM_BLOCK, "norms": 1500 * BLOCK, "aggregate": 2 * BLOCK + 1}[name]
    shape = ({"products": 100, "norms": 1500, "aggregate": 2 * BLOCK + 1}[name], *unit)
    values = np.random.default_rng(1).standard_normal(shape)
    assert values.nbytes > CHUNK_BYTES
    lease = replace(acquired, end_element=length)

    store_result(
        one.context,
        one.executor,
        begun.fold.plan,
        found,
        lease,
        iter([values]),
        lambda: None,
    )
    (row,) = begun.rows()
    assert row.payload_id is not None
    assert row.authenticator is not None
    result = SliceResult(row.payload_id, row.authenticator)
    parts = list(read_result(one.context, found.inputs, 0, length, result))

    assert all(part.reshape(-1, *unit).nbytes <= CHUNK_BYTES for part in parts)
    assert np.concatenate(parts).tobytes() == values.tobytes()


def test_only_the_current_fence_renews_releases_and_records(
    cores: Callable[..., list[CoordinatorHarness]],
) -> None:
    one, *_ = cores()
    session_id = one.start(arrays(0), **CONFIGS["median"])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id, size=COUNT)
    write = one.database.write

    def acquire(life_s: float) -> SliceLease | None:
        return write(lambda session: fold_slices.acquire_any(session, "x", FORMAT, [], life_s))

    stale = acquire(0.0)
    current = acquire(600.0)
    assert stale is not None
    assert current is not None
    assert (stale.fence, current.fence, acquire(600.0)) == (1, 2, None)
    assert not write(lambda session: fold_slices.renew(session, stale, 600.0))
    write(lambda session: fold_slices.release(session, stale))
    assert acquire(600.0) is None
    assert write(lambda session: fold_slices.renew(session, current, 600.0))
    write(lambda session: fold_slices.release(session, current))
    assert acquire(600.0) is not None
    begun.end()
    assert not write(lambda session: fold_slices.renew(session, current, 600.0))


def test_a_result_that_no_coordinator_computed_is_not_used(
    cores: Callable[..., list[CoordinatorHarness]],
) -> None:
    one, two, _ = cores(inline_payload_bytes=2**20)
    session_id = one.start(arrays(0), **CONFIGS["mean"])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id)
    assert work_off(worker_of(two, "two")) == 5
    first, second = begun.rows()[:2]

    def read(row: FoldSlice, *, tag: bytes | None = None, inputs: bytes = b"") -> None:
        assert row.payload_id is not None
        assert row.authenticator is not None
        result = SliceResult(row.payload_id, row.authenticator if tag is None else tag)
        bounds = begun.bounds[0]
        list(read_result(one.context, inputs or begun.found.inputs, *bounds, result))

    read(first)
    other_inputs = begun.found.inputs + b" "
    for row, others in (
        (second, {}),
        (first, {"tag": bytes(32)}),
        (first, {"inputs": other_inputs}),
    ):
        with pytest.raises(DamagedPayloadError, match="not the result of a coordinator"):
            read(row, **others)
    one.database.write(
        lambda session: session.execute(
            update(Payload)
            .where(Payload.id == first.payload_id)
            .values(data=func.overlay(Payload.data, b"\x01", 1, 1))
        )
    )
    with pytest.raises(DamagedPayloadError, match="not those of its digest"):
        read(first)


def test_updates_that_are_not_what_the_leader_checked_are_left_alone(
    cores: Callable[..., list[CoordinatorHarness]],
) -> None:
    one, two, three = cores()
    session_id = one.start(arrays(0), **CONFIGS["mean"])
    send_all(one, session_id)
    begun = BegunPass.begin(one.context, session_id)
    other = ModelUpdate.__table__.alias()
    first = select(other.c.payload_id).where(other.c.acceptance_sequence == 1)
    first_payload = first.scalar_subquery()
    one.database.write(
        lambda session: session.execute(
            update(ModelUpdate)
            .where(ModelUpdate.acceptance_sequence == 2)
            .values(payload_id=first_payload)
        )
    )
    worker = worker_of(two, "two")

    assert worker.run_once()
    assert not worker.run_once()

    assert len(begun.unfinished()) == 5
    assert [row.expires_at for row in begun.rows()] == [None] * 5
    assert worker_of(three, "three").run_once()
    assert len(begun.unfinished()) == 5


def test_passes_of_rounds_that_are_over_are_ended(
    cores: Callable[..., list[CoordinatorHarness]],
) -> None:
    one, two, _ = cores(slice_count=1, inline_payload_bytes=0)
    session_id = one.start(arrays(0), **CONFIGS["mean"])
    send_all(one, session_id)
    BegunPass.begin(one.context, session_id)
    work_off(worker_of(two, "two"))
    assert one.database.write(fold_slices.end_abandoned) == 0
    one.settle()

    assert one.database.write(fold_slices.end_abandoned) == 1
    sweep(one.context)
    assert (one.count(FoldPass), one.count(FoldSlice), one.count(Upload)) == (0, 0, 0)
    with one.database.read() as session:
        named = set(session.scalars(select(Payload.chunks_id)))
        stored = set(session.scalars(select(PayloadChunk.payload_id)))
    assert stored <= named
