"""Secure aggregation in simulations: the engine and the helpers of real sessions, with masks that repeat."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qflare_client
import qflare_helper
import qflare_server
from qflare.masking.parameters import MaskingParameters
from qflare_client import TrainingTask
from qflare_helper.ledger import Ledger
from qflare_server.cli.main import main as server
from qflare_server.verification.recomputation import recompute_version
from qflare_simulation import (
    History,
    SimulationError,
    open_coordinator,
    ready,
    replay,
    simulate,
    train,
)

Arrays = dict[str, NDArray[Any]]
COUNT = 2000
MODEL: Arrays = {"weight": np.zeros(COUNT, np.float32), "steps": np.arange(3)}
CLIP = 100.0
MAX_WEIGHT = 64
NAMED = ["a" * 64, "b" * 64]
MASKED = {
    "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_HELPER",
    "secure_aggregation.clip": CLIP,
    "secure_aggregation.helpers": NAMED,
    "safeguards.max_example_count": MAX_WEIGHT,
}
PRIVATE = {
    "secure_aggregation.mode": "SECURE_AGGREGATION_MODE_HELPER",
    "privacy.noise_multiplier": 2.0,
    "privacy.clip_norm": 3.0,
    "privacy.epsilon_budget": 1000.0,
    "privacy.delta": 1e-5,
}
DEVICE_NOISE = PRIVATE | {"secure_aggregation.noise": "NOISE_SOURCE_DEVICES"}
HELPER_NOISE = PRIVATE | {"secure_aggregation.noise": "NOISE_SOURCE_HELPER"}


def wander(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Add noise of numpy's global generator, with a weight of the device's own."""
    del task
    drawn = np.random.standard_normal(COUNT).astype(np.float32)  # noqa: NPY002
    return arrays | {"weight": arrays["weight"] + drawn}, 10 * data, {"loss": 0.1 * data}


def run(settings: dict[str, Any], *, seed: int = 1, workers: int = -1, **options: Any) -> History:
    config = {"total_rounds": 2, "rounds.quorum": 4} | settings
    virtual = {"seed": seed, "workers": workers} | options.pop("virtual", {})
    return simulate(wander, [1, 2, 3, 4], config | {"simulation": virtual}, model=MODEL, **options)


def test_masks_leave_the_mean_but_for_quantization() -> None:
    masked, plain = run(MASKED | {"total_rounds": 1}), run({"total_rounds": 1})

    assert masked.version == plain.version == 1
    levels = MaskingParameters(32, CLIP, 4, MAX_WEIGHT, {}).scale
    weight_sum = 10 * (1 + 2 + 3 + 4)
    # Each of four updates is off by less than a level, which is max_weight over the sum of the weights in the mean.
    bound = 4 * MAX_WEIGHT / (levels * weight_sum) + np.finfo(np.float32).eps * 4
    difference = np.abs(masked.model["weight"] - plain.model["weight"])
    assert 0 < difference.max() <= bound
    assert (masked.model["steps"] == MODEL["steps"]).all()
    assert {row["examples"] for row in masked.history("updates")} == {1}
    assert [row["examples"] for row in masked.history("versions")][1:] == [weight_sum]


def test_masks_cost_no_accuracy_of_the_digits() -> None:
    """The same devices train the same rounds from the same seeds: every version is as accurate to 0.2 points."""
    data, evaluate = ready("digits", devices=10, partition="dirichlet", alpha=0.5)
    config = {
        "total_rounds": 5,
        "rounds.quorum": 8,
        "device_training.learning_rate": 0.1,
        "simulation": {"workers": -1},
    }
    masks = MASKED | {"secure_aggregation.clip": 20.0, "safeguards.max_example_count": 1000}
    masked, plain = (
        simulate(train, data, config | settings, evaluate=evaluate).metrics()["test_accuracy"]
        for settings in (masks, {})
    )

    assert len(masked) == len(plain) == 6
    assert plain[-1][1] > 0.8
    for (_, ours), (_, theirs) in zip(masked, plain, strict=True):
        assert abs(ours - theirs) <= 0.002


ASYNCHRONOUS = MASKED | {
    "strategy.name": "fedbuff",
    "rounds.max_staleness": 3,
    "rounds.quorum": 2,
    "secure_aggregation.min_cohort": 2,
    "total_rounds": 4,
}


def test_stale_updates_count_by_their_weights(tmp_path: Path) -> None:
    kept = {"transfer.payload_retention": "PAYLOAD_RETENTION_ALL"}
    uneven = {"duration_spread": 1.0}
    done = run(ASYNCHRONOUS | kept, virtual=uneven, folder=tmp_path / "kept")

    assert done.version == 4
    bases = {(row["round"], row["base_version"]) for row in done.history("updates")}
    assert any(number - 1 > base for number, base in bases)
    with open_coordinator(tmp_path / "kept") as parts:
        for version in range(1, 5):
            found = recompute_version(parts.context, done.session_id, version)
            assert (found.recomputed, found.differences) == (True, ())
    again = run(ASYNCHRONOUS | kept, virtual=uneven)
    assert done.model["weight"].tobytes() == again.model["weight"].tobytes()


@pytest.mark.parametrize(
    "settings",
    [MASKED, PRIVATE, DEVICE_NOISE, HELPER_NOISE],
    ids=["masked", "private", "device noise", "helper noise"],
)
def test_equal_runs_repeat_to_the_byte(settings: dict[str, Any]) -> None:
    first, again, other = run(settings), run(settings, workers=2), run(settings, seed=2)

    assert first.version == 2
    assert {name: array.tobytes() for name, array in first.model.items()} == {
        name: array.tobytes() for name, array in again.model.items()
    }
    for table in ("rounds", "versions", "updates", "metrics", "timings", "selections"):
        assert first.history(table) == again.history(table)
    digests = {row["digest"] for row in first.history("updates")}
    assert len(digests) == 8
    assert digests.isdisjoint(row["digest"] for row in other.history("updates"))


@pytest.mark.parametrize("settings", [PRIVATE, DEVICE_NOISE, HELPER_NOISE])
def test_the_sum_gets_noise_and_its_versions_say_epsilon(settings: dict[str, Any]) -> None:
    done = run(settings | {"total_rounds": 1})

    clipped = np.linalg.norm(done.model["weight"])
    assert clipped == pytest.approx(2.0 * 3.0 / 4 * COUNT**0.5, rel=0.1)
    assert done.history("versions")[1]["epsilon"] > 0


def test_a_kept_simulation_is_verified_like_a_real_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"transfer.payload_retention": "PAYLOAD_RETENTION_ALL"}
    done = run(MASKED | kept, folder=tmp_path / "kept")

    for home in (tmp_path / "kept" / "helpers").iterdir():
        answers = list(Ledger(home).answers())
        assert [(counter, members) for counter, _, members in answers] == [(1, 4), (2, 4)]
    with open_coordinator(tmp_path / "kept") as parts:
        found = recompute_version(parts.context, done.session_id, 2)
        assert (found.recomputed, found.differences) == (True, ())
        with pytest.raises(SimulationError, match="the sum of the updates alone"):
            replay(parts.context, done.session_id, strategy="median")
    assert server(["--data-dir", str(tmp_path / "kept"), "audit", "verify"]) == 0, (
        capsys.readouterr()
    )


def test_devices_that_drop_out_cost_nothing() -> None:
    done = run(
        MASKED | {"total_rounds": 5, "rounds.quorum": 2, "rounds.target": 4},
        virtual={"drop_out": 0.3, "duration_spread": 0.5},
    )

    assert (done.version, sum(count["lost"] for count in done.counts.values()) > 0) == (5, True)
    assert done.refusals == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy.name": "median"}, "median looks at single updates"),
        (
            {"secure_aggregation.helpers": [str(digit) * 64 for digit in range(9)]},
            "got 4, want 1 to 3",
        ),
        ({"secure_aggregation.helpers": NAMED[:1] * 2}, "got 2, want 1 to 3 different"),
        ({"secure_aggregation.min_cohort": 1}, "min_cohort: got 1, want 2"),
    ],
)
def test_the_coordinator_refuses_what_it_refuses_for_real(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SimulationError, match=message):
        run(MASKED | settings)


def test_only_simulations_decide_what_masks_are_drawn_from() -> None:
    """A real device and a real helper have no way to be given seeds, or a time."""
    for package in (qflare_client, qflare_helper, qflare_server):
        for file in Path(str(package.__file__)).parent.rglob("*.py"):
            text = file.read_text("utf-8")
            assert "draw_seed=" not in text, file
            assert "draw_random=" not in text, file
            assert "draw_noise=" not in text, file
            assert text.count("Sources(") == 2 * (file.name == "neighbor_rounds.py"), file
