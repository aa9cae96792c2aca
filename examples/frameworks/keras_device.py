"""A device that trains a Keras model, with the backend of KERAS_BACKEND: classes of points that a line separates.

python keras_device.py initial model.safetensors
python keras_device.py train HOME SESSION
"""

import sys
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import save_file

from qflare_client import Client, TrainingTask, run
from qflare_client.adapters.keras import load_arrays, to_arrays

points = np.random.default_rng(1).normal(size=(200, 2)).astype(np.float32)
classes = (points.sum(axis=1) > 0).astype(np.int32)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((2,)),
        keras.layers.Dense(8, name="hidden"),
        keras.layers.BatchNormalization(name="normalization"),
        keras.layers.ReLU(),
        keras.layers.Dense(2, name="head"),
    ]
)


def train(
    arrays: dict[str, np.ndarray], task: TrainingTask
) -> tuple[dict[str, np.ndarray], int, dict[str, float]]:
    """Fit the model to the device's data."""
    load_arrays(model, arrays)
    model.compile(
        keras.optimizers.SGD(task.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        points, classes, epochs=task.local_epochs, batch_size=task.batch_size, verbose=0
    ).history
    metrics = {name: float(history[name][-1]) for name in ("loss", "accuracy")}
    return to_arrays(model), len(points), metrics


if __name__ == "__main__":
    if sys.argv[1] == "initial":
        save_file(to_arrays(model), sys.argv[2])
    else:
        with Client(home=Path(sys.argv[2])) as client:
            print(run(client, train, training_session_id=sys.argv[3]))
