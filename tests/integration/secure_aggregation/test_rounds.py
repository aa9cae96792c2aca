"""Rounds with secure aggregation, from real devices to the published version."""

from collections.abc import Callable

import numpy as np

from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    SecureDeployment,
    contribute,
    wait_for_version,
)

SecureStart = Callable[..., SecureDeployment]


def test_the_version_is_the_weighted_mean_up_to_quantization(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=3)
    clients = [made.deployment.device(f"device-{index}") for index in range(3)]
    changes = [contribute(client, session_id, index)[0] for index, client in enumerate(clients)]
    model = wait_for_version(clients[0], session_id, 1)
    weights = np.array([100, 200, 300])
    for name in ("w", "b"):
        mean = sum(w * change[name] for w, change in zip(weights, changes, strict=True)) / 600
        got = model.arrays[name].astype(float) - WEIGHTS[name]
        assert np.abs(got - mean).max() < 1e-5
    assert model.arrays["steps"].tolist() == [0, 1, 2]
    assert model.statement.example_count == 600
    assert abs(model.statement.metrics["train_loss"] - (200 * 0.5 + 300 * 1.0) / 600) < 1e-5
    assert dict(model.statement.metrics).keys() == {"train_loss"}
    found = recompute_version(made.deployment.coordinator.parts.context, session_id, 1)
    assert found.recomputed
    assert found.differences == ()
