"""Secure aggregation with other settings of a training session: strategies, rings, types of tensors, deadlines."""

from typing import Any, Final

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import (
    SecureStart,
    contribute,
    wait_for_version,
)

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


STRATEGIES: Final = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
TYPES: Final[dict[str, np.ndarray[Any, Any]]] = {
    "half": np.linspace(-1, 1, 6, dtype=np.float16),
    "single": np.linspace(-1, 1, 6, dtype=np.float32),
    "double": np.linspace(-1, 1, 6, dtype=np.float64),
    "steps": np.arange(3, dtype=np.int64),
}
BOUNDS: Final = {16: 5e-2, 32: 1e-5, 64: 1e-9}
ROUNDING: Final = {"half": 1e-3, "single": 1e-6, "double": 0.0}
"""Largest rounding error of numbers up to 4 in a type, above the error of quantization."""


def test_every_ring_strategy_and_type_of_tensor(secure: SecureStart) -> None:
    made = secure()
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    cases = [(bits, "fedavg") for bits in BOUNDS] + [(32, name) for name in STRATEGIES[1:]]
    for bits, strategy in cases:
        session_id = made.session(
            arrays=TYPES,
            quorum=2,
            policy={"bits": bits, "clip": 20.0},
            strategy=training_pb2.StrategyConfig(
                name=strategy, parameters={"proximal_mu": 0.1} if strategy == "fedprox" else {}
            ),
        )
        changes = [contribute(client, session_id, index)[0] for index, client in enumerate(clients)]
        model = wait_for_version(clients[0], session_id, 1)
        assert model.arrays["steps"].tolist() == [0, 1, 2]
        found = recompute_version(made.deployment.coordinator.parts.context, session_id, 1)
        assert (found.recomputed, found.differences) == (True, ()), strategy
        if strategy not in {"fedavg", "fedprox"}:
            continue
        for name, rounding in ROUNDING.items():
            mean = (100 * changes[0][name] + 200 * changes[1][name]) / 300
            got = model.arrays[name].astype(float) - TYPES[name]
            assert np.abs(got - mean).max() < BOUNDS[bits] + 4 * rounding, (bits, name)


def test_a_deadline_closes_a_round_with_the_updates_that_came(secure: SecureStart) -> None:
    made = secure()
    rounds = training_pb2.RoundPolicy(quorum=3, target=4)
    rounds.deadline.seconds = 2
    session_id = made.session(rounds=rounds)
    clients = [made.deployment.device(f"device-{index}") for index in range(4)]
    for index, client in enumerate(clients[:3]):
        contribute(client, session_id, index)
    model = wait_for_version(clients[0], session_id, 1)
    assert model.statement.contributor_count == 3
