"""Our rules against Flower's, which run in an environment of their own: it needs another protobuf.

Make it once by `python -m venv .venv-flower && .venv-flower/bin/pip install flwr`, or name an interpreter in
`QFLARE_FLOWER_PYTHON`.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_server.strategies import Contribution, Prior, StrategyConfig, build
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of
from tests.unit.server.strategies.updates import (
    Array,
    Maker,
    adversarial,
    clustered,
    discrete,
    wide,
)

ROOT = Path(__file__).parents[4]
REFERENCE = Path(__file__).with_name("flower_reference.py")
PYTHON = Path(os.environ.get("QFLARE_FLOWER_PYTHON", ROOT / ".venv-flower/bin/python"))
SIZE = 400
Data = dict[str, NDArray[np.generic]]

ROUNDS: dict[str, dict[str, object]] = {
    "fedavg": {},
    "median": {},
    "trimmed_mean": {"trimmed_fraction": 0.2},
    "krum": {"byzantine_count": 2},
    "multi_krum": {"byzantine_count": 2, "selected_count": 5},
    "bulyan": {"byzantine_count": 2},
}
ADAPTIVE: dict[str, object] = {
    "server_learning_rate": 0.1,
    "tau": 1e-3,
    "initial_second_moment": 0.0,
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "fedavgm": {"momentum": 0.9, "server_learning_rate": 0.5},
    "fedadam": {**ADAPTIVE, "beta1": 0.9, "beta2": 0.99, "bias_correction": True},
    "fedyogi": {**ADAPTIVE, "beta1": 0.9, "beta2": 0.99},
    "fedadagrad": {**ADAPTIVE, "beta1": 0.0},
}


@pytest.fixture(scope="module", params=[clustered, adversarial, wide, discrete])
def updates(request: pytest.FixtureRequest) -> Data:
    """Eleven updates as full weights, with example counts."""
    maker: Maker = request.param
    generator = np.random.default_rng(11)
    base = generator.standard_normal(SIZE)
    return {
        "base": base,
        "weights": base + maker(generator, 11, SIZE).astype(np.float64),
        "counts": generator.integers(1, 500, 11),
    }


@pytest.fixture(scope="module")
def flower(updates: Data, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What Flower makes of them."""
    if not PYTHON.is_file():
        reason = f"{PYTHON} is no interpreter; Flower's strategies were NOT compared"
        if os.environ.get("QFLARE_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("flower")
    np.savez(folder / "updates.npz", **updates)  # type: ignore[arg-type] # arrays by name
    command = [PYTHON, REFERENCE, folder / "updates.npz", folder / "results.npz"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
    subprocess.run(command, check=True, timeout=120, env=environment, capture_output=True)
    return dict(np.load(folder / "results.npz"))


def cohort(weights: Array, counts: Array) -> list[Contribution]:
    return [
        Contribution(f"{index:03}", int(count), reader_of(row), full_weights=True)
        for index, (row, count) in enumerate(zip(weights, counts, strict=True))
    ]


def assert_close(ours: Array, theirs: Array, scale: float) -> None:
    """Agree to 1e-6 relative, or to the rounding of float64 sums at the size of the updates."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-14 * scale)


@pytest.mark.parametrize("name", ROUNDS)
def test_rules_agree_with_flower(name: str, updates: Data, flower: Data) -> None:
    config = StrategyConfig.from_mapping({"name": name, "quorum": 11, **ROUNDS[name]})
    base, weights = updates["base"].astype(np.float64), updates["weights"].astype(np.float64)

    made = make_version(build(config), base, cohort(weights, updates["counts"].astype(np.float64)))

    assert_close(made.weights, flower[name].astype(np.float64), float(np.abs(weights).max()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimizers_agree_with_flower(name: str, updates: Data, flower: Data) -> None:
    strategy = build(StrategyConfig.from_mapping({"name": name, **OPTIMIZERS[name]}))
    current, prior, made = updates["base"].astype(np.float64), Prior(), []
    deltas = updates["weights"].astype(np.float64) - current

    for version in range(1, len(flower[name]) + 1):
        updated = cohort(current + deltas, updates["counts"].astype(np.float64))
        result = make_version(strategy, current, updated, RunOptions(prior=prior))
        current, prior = result.weights, result.prior(version + 1)
        made.append(current)

    scale = float(np.abs(updates["weights"].astype(np.float64)).max())
    assert_close(np.array(made), flower[name].astype(np.float64), scale)
