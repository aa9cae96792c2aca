"""The devices of examples/frameworks, against a coordinator."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from qflare_client import enroll
from qflare_client.admin.administrator import Administrator
from qflare_server.serving.local import LocalCoordinator

pytestmark = pytest.mark.frameworks
EXAMPLES = Path(__file__).parents[2] / "examples/frameworks"
RATES = {"flax": 0.5, "keras": 0.1, "lightning": 0.1, "lora": 0.01}


def example(name: str, *arguments: object) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}_device.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RATES)
def test_the_device_trains_a_better_model(name: str, tmp_path: Path) -> None:
    example(name, "initial", tmp_path / "model.safetensors")
    model = load_file(tmp_path / "model.safetensors")
    settings = {
        "total_rounds": 3,
        "rounds.quorum": 1,
        "rounds.target": 1,
        "device_training.local_epochs": 5,
        "device_training.learning_rate": RATES[name],
        "device_training.parameters": {"proximal_mu": 0.01},
    }
    with (
        LocalCoordinator(tmp_path / "coordinator") as coordinator,
        Administrator(coordinator.address, coordinator.token) as admin,
    ):
        session = admin.create_session(name, settings, model=model, start=True)
        session_id = session.training_session_id
        enroll(coordinator.bundle(), home=tmp_path / "device")

        example(name, "train", tmp_path / "device", session_id)

        admin.wait(session_id)
        losses = [value for _, value in admin.metrics(session_id)["train_loss"]]
        final = admin.download(session_id)
    assert final.keys() == model.keys()
    assert len(losses) == 3
    assert losses[-1] < losses[0]
