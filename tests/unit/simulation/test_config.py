"""Configurations of simulations: what is read, what is refused, and that a real session takes the same file."""

from pathlib import Path
from typing import Any

import pytest

from qflare.training_settings import read_file
from qflare.v1 import training_pb2
from qflare_simulation import SimulationConfig, SimulationError

TEMPLATE = Path(__file__).parents[3] / "qflare_simulation" / "template" / "config.toml"


def test_a_real_session_takes_the_same_file() -> None:
    real = training_pb2.TrainingConfig()

    read_file(TEMPLATE, real)

    simulated = SimulationConfig.read(TEMPLATE)
    assert simulated.training == real
    assert real.total_rounds == 20
    assert (simulated.devices, simulated.partition) == (100, "dirichlet")


def test_files_are_beside_the_configuration() -> None:
    config = SimulationConfig.read(TEMPLATE)

    assert config.train == f"{TEMPLATE.parent / 'train.py'}:train"
    assert config.data == "digits"
    assert config.name == "config"


def test_a_mapping_has_both_kinds_of_settings() -> None:
    config = SimulationConfig.from_value(
        {"total_rounds": 3, "rounds.quorum": 2, "simulation": {"devices": 7, "drop_out": 0.5}}
    )

    assert (config.training.total_rounds, config.training.rounds.quorum) == (3, 2)
    assert (config.devices, config.drop_out) == (7, 0.5)


def test_settings_that_need_identities_are_left_out() -> None:
    config = SimulationConfig.from_value(
        {"groups": ["a"], "transfer.sealed": True, "selection.device_types": ["phone"]}
    )

    simulated = config.session_config()

    assert not simulated.groups
    assert not simulated.transfer.sealed
    assert not simulated.selection.device_types
    assert config.training.transfer.sealed


WRONG: dict[str, Any] = {
    "devices": 0,
    "seed": -1,
    "workers": 1.5,
    "drop_out": 1.1,
    "straggler_share": -0.1,
    "straggler_factor": 0.5,
    "duration_s": -1,
    "duration_spread": float("nan"),
    "alpha": 0,
    "shards": True,
    "partition": "by size",
    "failure_share": "half",
    "evaluate_every": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_out_of_range_is_named(name: str) -> None:
    with pytest.raises(SimulationError, match=rf"simulation\.{name}: got"):
        SimulationConfig.from_value({"simulation": {name: WRONG[name]}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simulation": {"device": 3}}, "no setting simulation.device"),
        ({"simulation": 3}, "want a table"),
        ({"rounds.quorums": 3}, "no setting rounds.quorums"),
        (3, "want a path, a mapping or SimulationConfig"),
    ],
)
def test_other_mistakes_are_named(settings: Any, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        SimulationConfig.from_value(settings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"none\.toml"):
        SimulationConfig.read(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["total_rounds = [", "[simulation]\ntrain = 3\n"])
def test_a_broken_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)

    with pytest.raises(SimulationError):
        SimulationConfig.read(path)
