"""A device program: enrolls once, then trains and evaluates on request of the coordinator.

    python3 device.py BUNDLE TRAINING_SESSION

The model is a softmax regression on synthetic points. For a model and data of your own, replace `first_model`,
`load_data`, `train` and `evaluate`; nothing else has to change.
"""

import os
import sys
import zlib
from pathlib import Path

import numpy as np

from qflare_client import Client, enroll, run

FEATURES, CLASSES = 8, 3


def first_model():
    """Return the tensors of version 0, by name."""
    return {
        "weight": np.zeros((FEATURES, CLASSES), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }


def load_data(seed):
    """Return inputs and labels. Stands for data that never leaves the device."""
    centers = np.random.default_rng(0).standard_normal((CLASSES, FEATURES))
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=400)
    inputs = centers[labels] + random.standard_normal((400, FEATURES))
    return inputs.astype(np.float32), labels


# The same data in worker processes, which import this program again: each bundle is a device with data of its own.
INPUTS, LABELS = load_data(seed=zlib.crc32(os.fsencode("".join(sys.argv[1:2]))))
TRAINING, HELD_OUT = slice(0, 300), slice(300, 400)


def predict(arrays, inputs):
    """Return the probability of each class for each input."""
    scores = inputs @ arrays["weight"] + arrays["bias"]
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def measure(arrays, part):
    """Return loss and accuracy on a part of the data."""
    probabilities, labels = predict(arrays, INPUTS[part]), LABELS[part]
    chosen = probabilities[np.arange(len(labels)), labels]
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    return {"loss": float(-np.mean(np.log(chosen + 1e-9))), "accuracy": float(accuracy)}


def train(arrays, config):
    """Train the global model on this device's data; return the tensors, the number of examples, and metrics."""
    inputs, labels = INPUTS[TRAINING], LABELS[TRAINING]
    for _ in range(config.local_epochs):
        error = predict(arrays, inputs) - np.eye(CLASSES, dtype=np.float32)[labels]
        arrays["weight"] -= config.learning_rate * inputs.T @ error / len(inputs)
        arrays["bias"] -= config.learning_rate * error.mean(axis=0)
    return arrays, len(inputs), measure(arrays, TRAINING)


def evaluate(arrays, config):
    """Evaluate a version on data that is held out from training."""
    return HELD_OUT.stop - HELD_OUT.start, measure(arrays, HELD_OUT)


def main(bundle, training_session):
    """Enroll with a bundle unless already enrolled, and participate in a training session until it ends."""
    home = Path("devices") / bundle.stem
    enroll(bundle, home=home)
    with Client(home=home) as client:
        summary = run(client, train, evaluate=evaluate, training_session_id=training_session)
    print(f"{bundle.stem}: {summary.update_count} updates, version {summary.last_version}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
