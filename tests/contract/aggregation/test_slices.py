"""A large model is folded by slices: by any number of threads to the same bytes, which are hashed as they are read."""

from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from qflare.v1 import training_pb2
from qflare_server.aggregation.aggregator import REST_S
from qflare_server.storage.repository import global_models
from qflare_server.storage.tables import EVIDENCE_REASON, AuditLog, Payload
from qflare_server.strategies import accumulator, blocks
from qflare_server.verification import recompute_version
from tests.conftest import FakeClock
from tests.support.use_cases import CoordinatorHarness

COUNT = 1_300_000
"""Elements of the large tensor: five chunks of float32, the last one short."""
SLICE = 3 * blocks.BLOCK
KEEP = training_pb2.PAYLOAD_RETENTION_ALL
WEIGHTS, DELTA = training_pb2.UPDATE_KIND_WEIGHTS, training_pb2.UPDATE_KIND_DELTA
Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        "bias": random.standard_normal(7).astype(np.float32),
        "step": np.array([seed], np.int64),
        "w": random.standard_normal(COUNT, dtype=np.float32),
    }


def strategy(name: str, **parameters: float) -> dict[str, Any]:
    return {"strategy": training_pb2.StrategyConfig(name=name, parameters=parameters)}


def safeguards(**settings: Any) -> dict[str, Any]:
    return {"safeguards": training_pb2.SafeguardPolicy(**settings)}


CONFIGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "deltas": {"kind": DELTA},
    "download in half": {"transfer": {"download_encoding": training_pb2.ENCODING_FLOAT16}},
    "clipped": {"kind": DELTA, **safeguards(clip_norm=100.0)},
    "screened": {"kind": DELTA, **safeguards(max_norm=1e6, min_cosine_similarity=-1.0)},
    "optimizer": strategy("fedadam"),
    "median": strategy("median"),
    "krum": strategy("krum"),
    "geometric median": strategy("geometric_median"),
}


def start(core: CoordinatorHarness, kind: int = WEIGHTS, **config: Any) -> str:
    """Create and start a training session on the large model."""
    transfer = training_pb2.TransferPolicy(
        payload_retention=KEEP,
        update_kind=training_pb2.UpdateKind.ValueType(kind),
        **config.pop("transfer", {}),
    )
    rounds = training_pb2.RoundPolicy(quorum=3)
    return core.start(arrays(0), rounds=rounds, transfer=transfer, **config)


def send(core: CoordinatorHarness, session_id: str, number: int) -> str:
    """Submit an update of the kind that the training session wants; return its id."""
    device = f"device-{number}"
    task = core.tasks.next_task(device, session_id)
    draft = core.draft(device, session_id, arrays(number + 1), examples=number + 1)
    assert task.config is not None
    draft.statement.kind = task.config.transfer.update_kind
    draft.statement.base_encoding = task.config.transfer.download_encoding
    return core.send(draft).update_id


def payload_of(core: CoordinatorHarness, session_id: str, update_id: str) -> str:
    (payload_id,) = (row.payload_id for row in core.updates(session_id, 1) if row.id == update_id)
    assert payload_id is not None
    return payload_id


def flip(core: CoordinatorHarness, payload_id: str, number: int) -> bytes:
    """Alter one byte of a stored chunk; return the chunk as it was."""
    (chunk,) = core.store.read(payload_id, number, 1)
    core.store.append(payload_id, number, [bytes([chunk[0] ^ 1]) + chunk[1:]])
    return chunk


def come_back(core: CoordinatorHarness, clock: FakeClock) -> None:
    """Aggregate, and once more after the rest of a round that failed."""
    core.settle()
    clock.advance(REST_S)
    core.settle()


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_and_threads_change_no_byte(
    core: CoordinatorHarness, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is made with a total in memory, and made again from slices by one thread, two and four."""
    session_id = start(core, **dict(CONFIGS[name]))
    for number in range(3):
        send(core, session_id, number)
    core.settle()
    assert core.round(session_id, 1).state == "published"
    monkeypatch.setattr(accumulator, "RESIDENT_BYTES", 0)
    for module in (accumulator, blocks):
        monkeypatch.setattr(module, "SLICE", SLICE)

    for threads in (1, 2, 4):
        again = recompute_version(core.context, session_id, 1, thread_count=threads)
        assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


@pytest.mark.parametrize("resident", [True, False], ids=["on arrival", "at the end"])
@pytest.mark.parametrize("missing", [False, True], ids=["altered", "missing"])
@pytest.mark.parametrize("rule", ["fedavg", "median"])
def test_a_damaged_update_is_refused_and_the_others_are_aggregated(
    core: CoordinatorHarness,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    missing: bool,
    resident: bool,
) -> None:
    if not resident:
        monkeypatch.setattr(accumulator, "RESIDENT_BYTES", 0)
    session_id = start(core, **strategy(rule), **safeguards(quarantine_rejections=1))
    ids = [send(core, session_id, number) for number in range(3)]
    payload_id = payload_of(core, session_id, ids[1])
    if missing:
        core.store.delete([payload_id])
    else:
        flip(core, payload_id, 3)

    come_back(core, clock)

    rows = core.updates(session_id, 1)
    assert core.round(session_id, 1).state == "published"
    assert [row.state for row in rows] == ["aggregated", "rejected", "aggregated"]
    problem = "chunks are missing from chunk 0 on" if missing else "chunk 3 is not the one"
    assert (rows[1].state_reason or "").startswith(EVIDENCE_REASON + problem)
    with core.database.read() as session:
        assert session.query(AuditLog).filter_by(event_type="update.evidence_refused").count() == 1
    assert core.versions(session_id)[1].example_count == 4
    again = recompute_version(core.context, session_id, 1)
    assert (again.recomputed, again.differences) == (True, ())
    send(core, session_id, 1)  # its device is not held responsible


def test_integers_that_were_altered_after_the_fold_are_not_published(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = start(core)
    ids = [send(core, session_id, number) for number in (2, 1)]
    core.settle()
    flip(core, payload_of(core, session_id, ids[0]), 0)
    send(core, session_id, 0)

    come_back(core, clock)

    assert core.updates(session_id, 1)[0].state == "rejected"
    assert core.weights(session_id, 1)[28:36] == np.array([2], np.int64).tobytes()


def test_bytes_that_are_right_again_after_the_rest_are_folded(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = start(core)
    ids = [send(core, session_id, number) for number in range(3)]
    payload_id = payload_of(core, session_id, ids[2])
    kept = flip(core, payload_id, 4)
    core.settle()
    core.store.append(payload_id, 4, [kept])

    clock.advance(REST_S)
    core.settle()

    assert {row.state for row in core.updates(session_id, 1)} == {"aggregated"}


def test_an_altered_base_version_makes_no_other(core: CoordinatorHarness, clock: FakeClock) -> None:
    """No update is to blame: the round waits until the chunk is restored."""
    session_id = start(core)
    with core.database.read() as session:
        model = global_models.get_model(session, session_id, 0)
        assert model is not None
        base = model.payload_id
    kept = flip(core, base, 2)
    for number in range(3):
        send(core, session_id, number)
    come_back(core, clock)
    waiting = core.round(session_id, 1).state, len(core.versions(session_id))
    core.store.append(base, 2, [kept])

    clock.advance(REST_S)
    core.settle()

    assert waiting == ("closed", 1)
    assert {row.state for row in core.updates(session_id, 1)} == {"aggregated"}


def test_chunk_digests_that_were_altered_with_the_bytes_are_found(
    core: CoordinatorHarness, clock: FakeClock
) -> None:
    session_id = start(core)
    ids = [send(core, session_id, number) for number in range(3)]
    payload_id = payload_of(core, session_id, ids[0])
    core.database.write(
        lambda session: session.execute(
            update(Payload).where(Payload.id == payload_id).values(chunk_digests=bytes(5 * 32))
        )
    )

    come_back(core, clock)

    rows = core.updates(session_id, 1)
    assert [row.state for row in rows] == ["rejected", "aggregated", "aggregated"]
    assert "its chunk digests are not those of its payload digest" in (rows[0].state_reason or "")


def test_a_version_of_a_payload_that_was_altered_later_is_told_apart(
    core: CoordinatorHarness,
) -> None:
    session_id = start(core)
    ids = [send(core, session_id, number) for number in range(3)]
    core.settle()
    flip(core, payload_of(core, session_id, ids[1]), 1)

    again = recompute_version(core.context, session_id, 1)

    problem = "chunk 1 is not the one that was received"
    assert again.differences == (f"payload: made of update {ids[1]}, of which {problem}",)
