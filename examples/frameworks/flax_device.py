"""A device that trains a Flax model: classes of points that a line separates.

python flax_device.py initial model.safetensors
python flax_device.py train HOME SESSION
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen
from jax import numpy as jnp
from safetensors.numpy import save_file

from qflare_client import Client, TrainingTask, run
from qflare_client.adapters.flax import load_arrays, to_arrays

points = np.random.default_rng(1).normal(size=(200, 2)).astype(np.float32)
classes = (points.sum(axis=1) > 0).astype(np.int32)

model = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(2)])
variables = model.init(jax.random.key(0), points)


@jax.jit  # type: ignore[untyped-decorator,unused-ignore]
def step(parameters: Any, base: Any, rate: float, mu: float) -> tuple[Any, Any]:
    """Take one gradient step, with the proximal term of FedProx; return the loss before it too."""

    def loss(variables: Any) -> Any:
        logits = jax.nn.log_softmax(model.apply(variables, points))
        return -logits[jnp.arange(len(points)), classes].mean()

    value, gradient = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(
        lambda now, then, slope: now - rate * (slope + mu * (now - then)),
        parameters,
        base,
        gradient,
    ), value


def train(
    arrays: dict[str, np.ndarray], task: TrainingTask
) -> tuple[dict[str, np.ndarray], int, dict[str, float]]:
    """Take a step for each epoch."""
    parameters = base = load_arrays(variables, arrays)
    for _ in range(task.local_epochs):
        parameters, loss = step(parameters, base, task.learning_rate, task.proximal_mu)
    return to_arrays(parameters), len(points), {"loss": float(loss)}


if __name__ == "__main__":
    if sys.argv[1] == "initial":
        save_file(to_arrays(variables), sys.argv[2])
    else:
        with Client(home=Path(sys.argv[2])) as client:
            print(run(client, train, training_session_id=sys.argv[3]))
