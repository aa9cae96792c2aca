"""The apps that `flwr new` writes, unchanged on our devices, end with the model of Flower's own run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from qflare.v1 import training_pb2
from qflare_client import Client
from tests.integration.flower.conftest import HERE, Run, finished

Deploy = Callable[..., Any]
COUNT = 2
ROUNDS = 3
FIRST: dict[str, list[NDArray[np.float64]]] = {
    "numpy": [np.ones((1, 1))],
    "sklearn": [np.zeros((10, 784)), np.zeros(10)],
}


@pytest.mark.parametrize("framework", ["numpy", "sklearn"])
def test_an_app_ends_with_the_model_of_flowers_own_run(
    framework: str,
    interpreter: Path,
    start: Run,
    new_app: Callable[[str], Path],
    deploy: Deploy,
    tmp_path: Path,
) -> None:
    app = new_app(framework)
    first = {str(index): array for index, array in enumerate(FIRST[framework])}
    np.savez(tmp_path / "first.npz", **first)  # type: ignore[arg-type] # arrays by name
    files = tmp_path / "first.npz", tmp_path / "theirs.npz"
    own = start(interpreter, HERE / "own_run.py", app, COUNT, ROUNDS, *files)
    deployment = deploy()
    rounds = training_pb2.RoundPolicy(quorum=COUNT, target=COUNT, deadline=Duration(seconds=60))
    session_id = deployment.session(first, rounds=rounds, total_rounds=ROUNDS)
    homes = []
    for node in range(COUNT):
        client = deployment.device(f"device{node}")
        client.close()
        homes.append(deployment.folder / f"device{node}")

    devices = [
        start(interpreter, HERE / "our_device.py", app, COUNT, node, home, session_id)
        for node, home in enumerate(homes)
    ]
    for process in [own, *devices]:
        finished(process)

    with Client(home=homes[0]) as client:
        ours = client.download(session_id)
    theirs = np.load(files[1])
    assert ours.version == ROUNDS
    assert sorted(theirs) == sorted(ours.arrays)
    for name, array in ours.arrays.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-12, atol=1e-15)
        assert not np.array_equal(array, first[name])
