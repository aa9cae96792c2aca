"""A training session that no device could serve is refused when its model is uploaded, or ends with the reason."""

from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import InvalidManifestError
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.training_configs import to_json
from tests.support.use_cases import CoordinatorHarness

INT8: dict[str, Any] = {"update_encoding": training_pb2.ENCODING_INT8}
TOP_K: dict[str, Any] = {
    "update_encoding": training_pb2.ENCODING_TOP_K,
    "update_kind": training_pb2.UPDATE_KIND_DELTA,
}
PRIVATE = training_pb2.PrivacyPolicy(
    noise_multiplier=4.0, clip_norm=1.0, delta=1e-5, epsilon_budget=10.0
)


def arrays(*names: str, dtype: str = "<f4") -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.zeros(2, dtype) for name in names}


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (
            arrays("w", "w#scale"),
            {"transfer": training_pb2.TransferPolicy(**INT8)},
            "updates as int8: tensor name",
        ),
        (
            arrays("x" * 252),
            {"transfer": training_pb2.TransferPolicy(**TOP_K)},
            "updates as top_k: tensor name: got 258 bytes",
        ),
        (arrays("w", dtype="<f8"), {"privacy": PRIVATE}, "tensor 'w' is float64"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(
    core: CoordinatorHarness,
    model: dict[str, np.ndarray[Any, Any]],
    config: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(InvalidManifestError, match=reason):
        core.create(model, **config)


def test_more_tensors_than_devices_take_are_refused(core: CoordinatorHarness) -> None:
    """The coordinator may be told to take more; the bound of devices holds all the same."""
    assert core.initial_models is not None
    with pytest.raises(InvalidManifestError, match="got 10001, wanted <= 10000"):
        core.create({f"w{number}": np.zeros(1, np.float32) for number in range(10_001)})


def test_a_session_that_an_earlier_release_has_let_begin_ends_with_the_reason(
    core: CoordinatorHarness,
) -> None:
    training_session_id = core.start(arrays("w", "w#scale"))
    stored = training_pb2.TrainingConfig()
    stored.CopyFrom(core.training.get(training_session_id).config)
    stored.transfer.update_encoding = training_pb2.ENCODING_INT8
    values = {"config": to_json(stored)}
    core.database.write(
        lambda session: training_sessions.update_session(session, training_session_id, values)
    )

    core.settle()

    ended = core.training.get(training_session_id)
    assert ended.state == "failed"
    assert "cannot be trained under its configuration: tensor name" in ended.state_reason
    assert core.round(training_session_id).state == "failed"
