"""One update stops no round: where a version would leave the range of its model, who is to blame is left out."""

from typing import Any

import numpy as np
import pytest

from qflare.tensors import Manifest, assemble
from qflare.v1 import training_pb2
from qflare_server.storage.repository import devices
from qflare_server.storage.tables import DeviceState
from qflare_server.training import rounds
from qflare_server.verification import recompute_version
from tests.support.use_cases import CoordinatorHarness

DELTA = training_pb2.UPDATE_KIND_DELTA
WEIGHTS = training_pb2.UPDATE_KIND_WEIGHTS
ALL = training_pb2.PAYLOAD_RETENTION_ALL
QUORUM_3 = training_pb2.RoundPolicy(quorum=3)
HALF = {"download_encoding": training_pb2.ENCODING_FLOAT16}

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(value: float, dtype: str, steps: int = 1) -> Arrays:
    return {
        "steps": np.array([steps], np.int32),
        "fine": np.full(3, 0.5, dtype),
        "w": np.full(5, value, dtype),
    }


def start(
    core: CoordinatorHarness, dtype: str, *, base: float = 1.0, transfer: Any = None, **config: Any
) -> str:
    policy = {"payload_retention": ALL, "update_kind": DELTA, **(transfer or {})}
    settings: dict[str, Any] = {"rounds": QUORUM_3, **config}
    return core.start(
        arrays(base, dtype), transfer=training_pb2.TransferPolicy(**policy), **settings
    )


def submit(
    core: CoordinatorHarness,
    device: str,
    training_session_id: str,
    weights: Arrays,
    examples: int = 10,
) -> None:
    """Submit an update of the kind that the training session wants."""
    task = core.tasks.next_task(device, training_session_id)
    draft = core.draft(device, training_session_id, weights, examples=examples)
    assert task.config is not None
    draft.statement.kind = task.config.transfer.update_kind
    draft.statement.base_encoding = task.config.transfer.download_encoding
    core.send(draft)


def run_round(
    core: CoordinatorHarness,
    training_session_id: str,
    dtype: str,
    hostile: float,
    hostile_examples: int = 2**40,
) -> None:
    submit(core, "device-0", training_session_id, arrays(0.25, dtype, 2))
    submit(core, "device-1", training_session_id, arrays(hostile, dtype, 9), hostile_examples)
    submit(core, "device-2", training_session_id, arrays(0.75, dtype, 3))
    core.settle()


CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "float16 leaves its range": ("float16", 65504.0, {"base": 100.0}),
    "float16 by an optimizer": (
        "float16",
        60000.0,
        {"base": 10_000.0, "strategy": ("fedavgm", {})},
    ),
    "float16 by a learning rate": (
        "float16",
        2000.0,
        {"strategy": ("fedavg", {"server_learning_rate": 50.0})},
    ),
    "float32 leaves the range of downloads": ("float32", 70000.0, {"transfer": HALF}),
    "float64 sums exceed float64": ("float64", 1.7e308, {}),
    "squares of an optimizer exceed float64": ("float64", 1e200, {"strategy": ("fedadam", {})}),
    "geometric median": ("float64", 1e155, {"strategy": ("geometric_median", {})}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_round_goes_on_without_the_culprit(core: CoordinatorHarness, case: str) -> None:
    dtype, hostile, changes = CASES[case]
    config = dict(changes)
    if "strategy" in config:
        name, parameters = config["strategy"]
        config["strategy"] = training_pb2.StrategyConfig(name=name, parameters=parameters)
    training_session_id = start(core, dtype, **config)
    run_round(core, training_session_id, dtype, hostile)

    rows = core.updates(training_session_id, 1)

    assert core.round(training_session_id, 1).state == "published"
    assert [row.state for row in rows] == ["aggregated", "rejected", "aggregated"]
    assert core.versions(training_session_id)[1].example_count == 20
    version = core.weights(training_session_id, 1)
    assert np.isfinite(np.frombuffer(version[4:], np.dtype(dtype))).all()
    again = recompute_version(core.context, training_session_id, 1)
    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


def test_the_reason_names_the_tensor(core: CoordinatorHarness) -> None:
    training_session_id = start(core, "float16", base=100.0)

    run_round(core, training_session_id, "float16", 65504.0)

    reason = core.updates(training_session_id, 1)[1].state_reason
    assert reason == "alone it would take tensor 'w' out of its range"


def test_full_weights_beyond_the_range_of_downloads_are_found_too(core: CoordinatorHarness) -> None:
    training_session_id = start(core, "float32", transfer={"update_kind": WEIGHTS, **HALF})

    run_round(core, training_session_id, "float32", 1e6)

    assert [row.state for row in core.updates(training_session_id, 1)][1] == "rejected"
    assert core.round(training_session_id, 1).state == "published"


def test_too_few_are_left_and_only_the_culprit_is_to_blame(core: CoordinatorHarness) -> None:
    """Three updates are the fewest of Krum: the round fails, the device is quarantined, the next one goes on."""
    safeguards = training_pb2.SafeguardPolicy(quarantine_rejections=1)
    krum = training_pb2.StrategyConfig(name="krum")
    training_session_id = start(core, "float64", strategy=krum, safeguards=safeguards)

    run_round(core, training_session_id, "float64", 1e306)

    rows = core.updates(training_session_id, 1)
    assert core.round(training_session_id, 1).state == "failed"
    assert "exceeds 1e+150" in rows[1].state_reason
    assert {rows[0].state_reason, rows[2].state_reason} == {
        core.round(training_session_id, 1).state_reason
    }
    assert state_of(core, "device-0") == DeviceState.ACTIVE.value
    assert state_of(core, "device-1") == DeviceState.QUARANTINED.value
    assert core.round(training_session_id).number == 2


def run_rounds(core: CoordinatorHarness, training_session_id: str, makes_version: str) -> str:
    """Run rounds with Krum, for which two updates are too few; return the state of the training session."""
    for wanted in makes_version:
        hostile = 0.5 if wanted == "+" else 1e306
        run_round(core, training_session_id, "float64", hostile)
    return core.training.get(training_session_id).state


def test_rounds_that_make_no_version_do_not_count(core: CoordinatorHarness) -> None:
    krum = training_pb2.StrategyConfig(name="krum")
    training_session_id = start(core, "float64", strategy=krum, total_rounds=2)

    assert run_rounds(core, training_session_id, "-+-") == "running"
    assert run_rounds(core, training_session_id, "-+") == "completed"
    assert core.round(training_session_id).number == 5
    assert [row.version for row in core.versions(training_session_id)] == [0, 1, 2]


def test_too_many_rounds_in_a_row_that_make_no_version_end_the_session(
    core: CoordinatorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "MAX_BARREN_ROUNDS", 3)
    krum = training_pb2.StrategyConfig(name="krum")
    training_session_id = start(core, "float64", strategy=krum, total_rounds=2)

    assert run_rounds(core, training_session_id, "--+--") == "running"
    assert run_rounds(core, training_session_id, "-") == "failed"
    reason = core.training.get(training_session_id).state_reason
    assert reason.startswith("3 rounds in a row have made no version: no version could be made: ")
    assert core.round(training_session_id).number == 6


def weight(core: CoordinatorHarness, training_session_id: str, version: int) -> float:
    """Return the first element of `w` in a version."""
    delivery = core.deliveries.find(training_session_id, version)
    chunks = [data for _, data in core.deliveries.chunks(delivery, 0)]
    manifest = Manifest.from_arrays(arrays(0.0, "float16"))
    return float(assemble(manifest, chunks)["w"][0])


def state_of(core: CoordinatorHarness, device_id: str) -> str:
    with core.database.read() as session:
        device = devices.lock_device(session, device_id)
        assert device is not None
        return device.state


def test_what_diverges_by_everyone_s_hand_stays_as_it_is(
    core: CoordinatorHarness,
) -> None:
    """Each step alone stays in range; the momentum of both leaves it: elements stay, no update is refused."""
    fedavgm = training_pb2.StrategyConfig(name="fedavgm")
    one = training_pb2.RoundPolicy(quorum=1)
    training_session_id = start(core, "float16", base=0.0, strategy=fedavgm, rounds=one)
    submit(core, "device-0", training_session_id, arrays(50000.0, "float16"))
    core.settle()

    submit(core, "device-1", training_session_id, arrays(0.25, "float16"))
    core.settle()

    assert core.round(training_session_id, 2).state == "published"
    assert core.updates(training_session_id, 2)[0].state == "aggregated"
    assert weight(core, training_session_id, 2) == np.float16(50000.0)
    submit(core, "device-2", training_session_id, arrays(-64.0, "float16"))
    core.settle()
    assert weight(core, training_session_id, 3) == np.float16(50000.0) - 64  # without momentum
