"""The app that `flwr new` writes for PyTorch, unchanged on our devices, ends with the model of Flower's own run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_client import enroll
from qflare_client.admin.administrator import Administrator
from qflare_server.serving.local import LocalCoordinator
from tests.integration.flower.conftest import HERE, ROOT, Run, finished, require

pytestmark = pytest.mark.frameworks
INTERPRETER = ROOT / ".venv-flower-pytorch/bin/python"
COUNT = 2
ROUNDS = 3
SHAPES = {
    "conv1.weight": (6, 3, 5, 5),
    "conv1.bias": (6,),
    "conv2.weight": (16, 6, 5, 5),
    "conv2.bias": (16,),
    "fc1.weight": (120, 400),
    "fc1.bias": (120,),
    "fc2.weight": (84, 120),
    "fc2.bias": (84,),
    "fc3.weight": (10, 84),
    "fc3.bias": (10,),
}
"""Of the model that the app defines, by name in its state dict."""
LEARNING_RATE = 0.01
TOLERANCE = 0.01 * LEARNING_RATE
"""A hundredth of one step of Adam, which divides the rounding of float32 means by the size of the gradient."""
SETTINGS = {
    "total_rounds": ROUNDS,
    "rounds.quorum": COUNT,
    "rounds.target": COUNT,
    "device_training.learning_rate": LEARNING_RATE,
}


def first_model() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(4)
    return {
        name: (0.1 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def test_the_app_of_pytorch_ends_with_the_model_of_flowers_own_run(
    start: Run, new_app: Callable[[str], Path], tmp_path: Path
) -> None:
    require(INTERPRETER)
    app, first = new_app("pytorch"), first_model()
    np.savez(tmp_path / "first.npz", **first)  # type: ignore[arg-type] # arrays by name
    files = tmp_path / "first.npz", tmp_path / "theirs.npz"
    own = start(INTERPRETER, HERE / "own_run.py", app, COUNT, ROUNDS, *files)
    finished(own, timeout_s=600)
    with (
        LocalCoordinator(tmp_path / "coordinator") as coordinator,
        Administrator(coordinator.address, coordinator.token) as admin,
    ):
        session = admin.create_session("flower", SETTINGS, model=first, start=True)
        session_id = session.training_session_id
        devices = []
        for node in range(COUNT):
            home = tmp_path / f"device{node}"
            enroll(coordinator.bundle(), home=home)
            device = HERE / "our_device.py"
            devices.append(start(INTERPRETER, device, app, COUNT, node, home, session_id))
        for process in devices:
            finished(process, timeout_s=600)
        ours = admin.download(session_id)

    theirs = np.load(files[1])
    assert sorted(theirs) == sorted(ours) == sorted(first)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=TOLERANCE)
        assert np.abs(array - first[name]).max() > 10 * TOLERANCE, name
