"""Secure aggregation with neighbors in simulations: virtual devices take the steps of real ones, in groups."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare.masking.parameters import MaskingParameters
from qflare_client import TrainingTask
from qflare_server.cli.main import main as server
from qflare_server.use_cases.training_sessions import neighbor_views
from qflare_server.verification.recomputation import recompute_version
from qflare_simulation import History, SimulationConfig, SimulationError, open_coordinator, simulate
from qflare_simulation.engine import _stragglers
from qflare_simulation.group_steps import STEPS, lost_at

Arrays = dict[str, NDArray[Any]]
COUNT = 500
MODEL: Arrays = {"weight": np.zeros(COUNT, np.float32)}
CLIP = 1000.0
MAX_WEIGHT = 100
NEIGHBORS = {
    "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_NEIGHBORS",
    "secure_aggregation.clip": CLIP,
    "safeguards.max_example_count": MAX_WEIGHT,
}
TABLES = ("rounds", "versions", "updates", "metrics", "timings", "selections")


def add_own(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Add a value and a weight of the device's own, and noise of numpy's global generator."""
    del task
    drawn = np.random.standard_normal(COUNT).astype(np.float32)  # noqa: NPY002
    return {"weight": arrays["weight"] + data + drawn}, 10 + data, {"loss": 0.1 * data}


def run(
    settings: dict[str, Any],
    *,
    devices: int = 6,
    seed: int = 1,
    drop_out: float = 0.0,
    workers: int = -1,
    **options: Any,
) -> History:
    config = {"total_rounds": 1, "rounds.quorum": 4, "rounds.target": devices} | settings
    virtual = {"seed": seed, "workers": workers, "drop_out": drop_out}
    virtual |= options.pop("virtual", {})
    data, train = range(devices), options.pop("train", add_own)
    return simulate(train, data, config | {"simulation": virtual}, model=MODEL, **options)


def seed_where(devices: int, drop_out: float, wanted: Mapping[str, int]) -> int:
    """Return the first seed with which so many devices drop out of the first round at each step, and no others."""
    for seed in range(1_000_000):
        config = replace(SimulationConfig(), seed=seed, drop_out=drop_out)
        if Counter(filter(None, (lost_at(config, i, 1) for i in range(devices)))) == wanted:
            return seed
    raise AssertionError("no such seed")


def bound(updates: int) -> float:
    """Return how far quantization may move the mean of updates with weights of 10 and more."""
    levels = MaskingParameters(32, CLIP, updates, MAX_WEIGHT, {}).scale
    return MAX_WEIGHT / (levels * 10) + 100 * float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> History:
    retained = {"transfer.payload_retention": "PAYLOAD_RETENTION_ALL", "total_rounds": 2}
    return run(NEIGHBORS | retained, folder=tmp_path_factory.mktemp("neighbors") / "kept")


def test_masks_leave_the_mean_but_for_quantization(masked: History) -> None:
    plain = run({"total_rounds": 2})

    assert masked.version == plain.version == 2
    difference = np.abs(masked.model["weight"] - plain.model["weight"])
    assert 0 < difference.max() <= 2 * bound(6)
    assert {row["examples"] for row in masked.history("updates")} == {1}
    assert [row["examples"] for row in masked.history("versions")][1:] == [75, 75]
    assert masked.virtual_s == plain.virtual_s
    assert masked.refusals == {}


def unmasked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what masks of later rounds change, which depend on how boxes of earlier ones were sealed."""
    is_masked = [row.get("sequence") is not None and row["round"] > 1 for row in rows]
    return [
        dict(row) | ({"digest": ""} if masks else {})
        for row, masks in zip(rows, is_masked, strict=True)
    ]


def test_equal_runs_repeat_to_the_byte_on_any_number_of_processes(masked: History) -> None:
    retained = {"transfer.payload_retention": "PAYLOAD_RETENTION_ALL", "total_rounds": 2}
    again = run(NEIGHBORS | retained, workers=2)

    assert masked.model["weight"].tobytes() == again.model["weight"].tobytes()
    for table in TABLES:
        ours, theirs = masked.history(table), again.history(table)
        if (
            table == "updates"
        ):  # masks of later rounds depend on how the boxes of earlier ones were sealed
            ours, theirs = ([row for row in rows if row["round"] == 1] for rows in (ours, theirs))
        assert ours == theirs


def test_a_kept_simulation_is_verified_like_a_real_session(
    masked: History, capsys: pytest.CaptureFixture[str]
) -> None:
    assert masked.folder is not None
    with open_coordinator(masked.folder) as parts:
        for version in (1, 2):
            found = recompute_version(parts.context, masked.session_id, version)
            assert (found.recomputed, found.differences) == (True, ())
    assert server(["--data-dir", str(masked.folder), "audit", "verify"]) == 0, capsys.readouterr()


def changes_alone(devices: int, seed: int) -> dict[int, NDArray[Any]]:
    """Return what each device adds in the first round, by a run without masks."""
    seen: dict[int, NDArray[Any]] = {}

    def note(
        arrays: Arrays, task: TrainingTask, data: int
    ) -> tuple[Arrays, int, Mapping[str, float]]:
        trained, examples, metrics = add_own(arrays, task, data)
        seen[data] = trained["weight"] - arrays["weight"]
        return trained, examples, metrics

    run({}, devices=devices, seed=seed, train=note)
    return seen


def check_mean(done: History, devices: int, seed: int) -> list[int]:
    """Check that the first version is the mean of the updates that it names, and return their devices."""
    used = [int(row["device"][-7:]) for row in done.history("updates") if row["version"] == 1]
    changes = changes_alone(devices, seed)
    weights = [10 + index for index in used]
    total = sum(weight * changes[index] for weight, index in zip(weights, used, strict=True))
    assert np.abs(done.model["weight"] - total / sum(weights)).max() <= bound(devices)
    return used


@pytest.mark.parametrize("step", STEPS)
def test_a_device_may_drop_out_at_any_step(step: str) -> None:
    seed = seed_where(6, 0.1, {step: 1})
    gone = next(
        i for i in range(6) if lost_at(replace(SimulationConfig(), seed=seed, drop_out=0.1), i, 1)
    )
    done = run(NEIGHBORS, seed=seed, drop_out=0.1)

    used = check_mean(done, 6, seed)
    assert (done.version, done.counts[1]["lost"]) == (1, 1)
    assert (gone in used) == (step in {"confirm", "reveal"})
    assert len(used) == 6 - (gone not in used)
    # The others wait for the device, unless enough have revealed without it.
    assert (done.virtual_s > 60) == (step != "reveal")


def test_a_group_that_loses_too_many_is_aborted_alone() -> None:
    """Of three devices of two groups of five, one group loses two or three and the other one at most one."""
    seed = seed_where(10, 0.3, {"train": 3})
    groups = {"secure_aggregation.group_size": 5}
    done = run(NEIGHBORS | groups, devices=10, seed=seed, drop_out=0.3)

    used = check_mean(done, 10, seed)
    aborted = [row for row in done.history("updates") if row["state"] == "rejected"]
    assert (done.version, len(used) + len(aborted), len(used) in {4, 5}) == (1, 7, True)
    assert all("its group was aborted" in row["reason"] for row in aborted)
    assert done.counts[1]["lost"] == 3


def test_a_round_whose_groups_are_all_aborted_says_why() -> None:
    done = run(NEIGHBORS, seed=seed_where(6, 0.3, {"confirm": 4}), drop_out=0.3)

    first, *others = done.history("rounds")
    assert (first["state"], first["rejected"]) == ("failed", 6)
    assert "secure aggregation needs" in first["reason"]
    alike = [str(row["round"]) for row in others if row["reason"] == first["reason"]]
    noun = "rounds" if alike else "round"
    assert f"\nfailed {noun} {', '.join(['1', *alike])}: {first['reason']}\n" in str(done)


def test_a_device_that_comes_too_late_takes_part_in_the_next_round() -> None:
    share, factor = 0.2, 2.5  # one device takes 150 s instead of 60 s
    made = SimulationConfig(devices=6, straggler_share=share)
    seed = next(seed for seed in count(1) if len(_stragglers(replace(made, seed=seed))) == 1)
    limits = {"rounds.deadline": "130s", "total_rounds": 3}
    slow = {"straggler_share": share, "straggler_factor": factor}
    done = run(NEIGHBORS | limits, virtual=slow, seed=seed, workers=2)

    assert done.version == 3
    assert [counts["late"] for counts in done.counts.values()] == [1, 1, 0]
    assert [row["accepted"] for row in done.history("rounds")] == [5, 5, 5]
    assert done.refusals == {}


def test_failed_trainings_leave_the_sum() -> None:
    def fail_on_zero(
        arrays: Arrays, task: TrainingTask, data: int
    ) -> tuple[Arrays, int, Mapping[str, float]]:
        if data == 0:
            raise MemoryError("no room for the batch")
        return add_own(arrays, task, data)

    done = run(NEIGHBORS, train=fail_on_zero)

    assert (done.version, done.counts[1]["failed"]) == (1, 1)
    assert 0 not in check_mean(done, 6, 1)


def test_more_neighbors_than_fit_into_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbor_views, "PAGE_BYTES", 30_000)

    assert run(NEIGHBORS).version == 1


def test_a_session_whose_groups_always_fail_ends() -> None:
    with pytest.raises(SimulationError, match=r"in 100 rounds"):
        run(NEIGHBORS, devices=4, drop_out=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"secure_aggregation.helpers": ["a" * 64]}, "helpers"),
        ({"strategy.name": "fedbuff"}, "fedbuff"),
        ({"strategy.name": "median"}, "median"),
    ],
)
def test_the_coordinator_refuses_what_it_refuses_for_real(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SimulationError, match=message):
        run(NEIGHBORS | settings)
