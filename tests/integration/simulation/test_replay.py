"""Replays: equal settings give the same versions, others what the coordinator would have made; nothing is written."""

import csv
import dataclasses
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_client import TrainingTask
from qflare_server.storage.payload_store import PayloadFolder
from qflare_simulation import History, SimulationError, open_coordinator, replay, simulate
from qflare_simulation.__main__ import main

Arrays = dict[str, NDArray[Any]]
MODEL = {"weight": np.zeros((3, 2), np.float32)}
ATTACKER = 7


def attacked(
    arrays: Arrays, task: TrainingTask, data: int
) -> tuple[Arrays, int, Mapping[str, float]]:
    """Add a step near one; the attacker's is a thousand times as long."""
    del task
    step = np.float32(1000.0 if data == ATTACKER else 1.0 + data / 100)
    return {name: array + step for name, array in arrays.items()}, 1, {}


def mean(arrays: Arrays, task: TrainingTask, test: float) -> tuple[int, Mapping[str, float]]:
    """Measure the mean weight over a unit."""
    del task
    return 1, {"mean": float(np.mean(arrays["weight"])) / test}


def simulated(folder: Path, **settings: Any) -> History:
    wanted = {
        "total_rounds": 3,
        "rounds.quorum": 8,
        "transfer.payload_retention": "all",
        "simulation": {"workers": -1, "name": "attacked"},
        **settings,
    }
    return simulate(attacked, range(8), wanted, model=MODEL, folder=folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> History:
    return simulated(tmp_path_factory.mktemp("replay") / "kept")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in {".db", ".payloads"}
    }


def test_the_same_settings_make_the_same_versions(kept: History) -> None:
    assert kept.folder is not None
    before = digests(kept.folder)
    with open_coordinator(kept.folder) as parts:
        rounds = replay(parts.context, kept.session_id, evaluate=mean, test=1.0)

    assert [(item.round, item.version, item.outcome) for item in rounds] == [
        (1, 1, "version"),
        (2, 2, "version"),
        (3, 3, "version"),
    ]
    assert {item.distance for item in rounds} == {0.0}
    assert all(item.metrics == item.real_metrics for item in rounds)
    assert digests(kept.folder) == before


def test_a_copy_of_a_database_in_use_can_be_replayed(kept: History, tmp_path: Path) -> None:
    assert kept.folder is not None
    folder = shutil.copytree(kept.folder, tmp_path / "copy")
    with open_coordinator(folder) as parts:
        store = PayloadFolder(tmp_path / "payloads")
        store.replace_owner("", "the original")
        context = dataclasses.replace(parts.context, store=store)
        rounds = replay(context, kept.session_id)

    assert {item.distance for item in rounds} == {0.0}


def test_an_optimizer_s_state_is_carried(tmp_path: Path) -> None:
    done = simulated(tmp_path / "kept", **{"strategy.name": "fedadam"})

    with open_coordinator(done.folder) as parts:
        rounds = replay(parts.context, done.session_id)

    assert [item.distance for item in rounds] == [0.0, 0.0, 0.0]


def test_a_robust_rule_leaves_the_attacker_out(kept: History) -> None:
    with open_coordinator(kept.folder) as parts:
        rounds = replay(
            parts.context,
            kept.session_id,
            strategy="multi_krum",
            settings=["strategy.parameters.byzantine_count=2"],
            evaluate=mean,
            test=1.0,
        )

    for item in rounds:
        assert "device-0000007" in item.left_out
        assert item.distance is not None
        assert item.distance > 100
        assert item.metrics["mean"] < item.real_metrics["mean"]


def test_a_higher_quorum_is_missed_and_a_lower_target_takes_the_first(kept: History) -> None:
    with open_coordinator(kept.folder) as parts:
        missed = replay(parts.context, kept.session_id, settings=["rounds.quorum=9"])
        first = replay(
            parts.context, kept.session_id, settings=["rounds.quorum=2", "rounds.target=7"]
        )

    assert {item.outcome for item in missed} == {"missed its quorum: got 8, want 9"}
    assert {item.updates for item in first} == {7}
    assert all(item.step is not None and item.step < 10 for item in first)


def test_updates_that_were_not_kept_are_said(tmp_path: Path) -> None:
    done = simulated(tmp_path / "kept", **{"transfer.payload_retention": "none"})

    with open_coordinator(done.folder) as parts:
        rounds = replay(parts.context, done.session_id)

    assert {item.outcome for item in rounds} == {"its updates were not kept"}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("best", ()), ("", ("rounds.quorums=3",)), ("krum", ("strategy.parameters.none=1",))],
)
def test_settings_that_cannot_be_used_are_refused(
    strategy: str, settings: tuple[str, ...], kept: History
) -> None:
    with open_coordinator(kept.folder) as parts, pytest.raises(SimulationError):
        replay(parts.context, kept.session_id, strategy=strategy, settings=settings)


def test_an_unknown_session_is_refused(kept: History) -> None:
    with (
        open_coordinator(kept.folder) as parts,
        pytest.raises(SimulationError, match="no training session"),
    ):
        replay(parts.context, "none")


def test_commands_replay_and_export(
    kept: History, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(kept.folder)

    assert main(["replay", "attacked", "--data-dir", folder, "--strategy", "median"]) == 0
    said = capfd.readouterr().out
    assert "round 3: version of 8 updates" in said

    assert main(["export", "attacked", str(tmp_path / "out"), "--data-dir", folder]) == 0
    with (tmp_path / "out" / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["accepted"] for row in rows] == ["8", "8", "8"]
    capfd.readouterr()

    assert main(["replay", "other", "--data-dir", folder]) == 1
    assert "try: " in capfd.readouterr().err
