"""SCAFFOLD's device step: agrees with the algorithm as the paper writes it, and refuses what it cannot train."""

import numpy as np
import pytest

from qflare_client import InvalidArgumentError, Scaffold
from qflare_client.tasks import TrainingTask

A = np.array([1.0, 10.0, 4.0])
B = np.array([-3.0, 2.0, 7.0])
RATE = 0.02
STEPS = 8


def settings(share: float = 1.0) -> TrainingTask:
    return TrainingTask("s", 1, 0, STEPS, 32, RATE, {"control_share": share})


def locally_trained(
    device: int, arrays: dict[str, np.ndarray], config: TrainingTask
) -> dict[str, np.ndarray]:
    """Train on f_i(w) = a_i / 2 (w - b_i)^2."""
    scaffold = Scaffold(arrays, config)
    weights = scaffold.weights
    for _ in range(STEPS):
        gradient = A[device] * (weights["w"] - B[device])
        weights["w"] -= config.learning_rate * (gradient + scaffold.correction["w"])
    return scaffold.trained(weights, STEPS)


def reference(rounds: int, sampled: list[list[int]]) -> list[float]:
    """Return the weights after each round by the paper's Algorithm 1, option II, with a global step of one."""
    x, c, local = 0.0, 0.0, np.zeros(len(A))
    path = []
    for number in range(rounds):
        moves, changes = [], []
        for device in sampled[number]:
            y = x
            for _ in range(STEPS):
                y -= RATE * (A[device] * (y - B[device]) - local[device] + c)
            fresh = local[device] - c + (x - y) / (STEPS * RATE)
            moves.append(y - x)
            changes.append(fresh - local[device])
            local[device] = fresh
        x += float(np.mean(moves))
        c += float(np.sum(changes)) / len(A)
        path.append(x)
    return path


@pytest.mark.parametrize("size", [3, 2])
def test_rounds_follow_the_papers_algorithm_to_the_known_minimum(size: int) -> None:
    rounds = 400
    sampled = [[(number + step) % 3 for step in range(size)] for number in range(rounds)]
    arrays = Scaffold.initial({"w": np.zeros(1)})
    local: list[dict[str, np.ndarray]] = [{}, {}, {}]
    path = []
    for devices in sampled:
        results = []
        for device in devices:
            result = locally_trained(device, arrays | local[device], settings(size / 3))
            local[device] = {"scaffold.local.w": result.pop("scaffold.local.w")}
            results.append(result)
        arrays = {name: np.mean([result[name] for result in results], axis=0) for name in arrays}
        path.append(float(arrays["w"][0]))

    assert path == pytest.approx(reference(rounds, sampled), rel=1e-9)
    assert path[-1] == pytest.approx(float(A @ B / A.sum()), rel=1e-6)


def test_integers_travel_as_they_are_and_have_no_control_variate() -> None:
    model = {"w": np.ones(2, np.float32), "steps": np.array([3])}
    arrays = Scaffold.initial(model)

    assert set(arrays) == {"w", "steps", "scaffold.control.w"}
    assert Scaffold(arrays, settings()).trained(model, 1)["steps"].tolist() == [3]


def test_what_cannot_be_trained_is_refused() -> None:
    model = {"w": np.ones(2, np.float32)}
    with pytest.raises(InvalidArgumentError, match="'w' has no control variate"):
        Scaffold(model, settings())
    with pytest.raises(InvalidArgumentError, match="control_share"):
        Scaffold(Scaffold.initial(model), settings(0.0))
    scaffold = Scaffold(Scaffold.initial(model), settings())
    with pytest.raises(InvalidArgumentError, match="step_count"):
        scaffold.trained(model, 0)
    with pytest.raises(InvalidArgumentError, match="want tensor 'w'"):
        scaffold.trained({"w": np.ones(3)}, 1)
