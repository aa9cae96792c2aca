"""Softmax regression: the model and the training function of the ready data sets, in numpy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qflare.tensors.control_variates import CONTROL
from qflare_client import Scaffold, TrainingTask, proximal_gradient


class Examples(NamedTuple):
    """Examples of a device: one row of inputs and one class for each."""

    inputs: NDArray[Any]
    labels: NDArray[Any]


def first_model(features: int, classes: int) -> dict[str, NDArray[Any]]:
    """Return the model of version 0: zeros."""
    return {
        "weight": np.zeros((features, classes), np.float32),
        "bias": np.zeros(classes, np.float32),
    }


def train(
    arrays: dict[str, NDArray[Any]], task: TrainingTask, data: Examples
) -> tuple[dict[str, NDArray[Any]], int, dict[str, float]]:
    """Train by stochastic gradient descent, with the proximal term or control variates if the session has them."""
    if CONTROL + "weight" in arrays:
        scaffold = Scaffold(arrays, task)
        weights = scaffold.weights
        steps = _descend(weights, task, data, scaffold.correction)
        return scaffold.trained(weights, steps), len(data.labels), measure(weights, data)
    _descend(arrays, task, data, {})
    return arrays, len(data.labels), measure(arrays, data)


def _descend(
    arrays: dict[str, NDArray[Any]],
    task: TrainingTask,
    data: Examples,
    correction: Mapping[str, NDArray[Any]],
) -> int:
    """Train in place and return the number of steps."""
    base = {name: array.copy() for name, array in arrays.items()}
    order = np.random.default_rng(task.round_number)
    steps = 0
    for _ in range(task.local_epochs):
        shuffled = order.permutation(len(data.labels))
        for start in range(0, len(shuffled), task.batch_size):
            chosen = shuffled[start : start + task.batch_size]
            _step(arrays, base, task, data, chosen, correction)
            steps += 1
    return steps


def _step(
    arrays: dict[str, NDArray[Any]],
    base: Mapping[str, NDArray[Any]],
    task: TrainingTask,
    data: Examples,
    chosen: NDArray[Any],
    correction: Mapping[str, NDArray[Any]],
) -> None:
    inputs, labels = data.inputs[chosen], data.labels[chosen]
    error = _probabilities(arrays, inputs)
    error[np.arange(len(labels)), labels] -= 1
    gradient = {"weight": inputs.T @ error / len(labels), "bias": error.mean(axis=0)}
    if task.proximal_mu:
        for name, pull in proximal_gradient(arrays, base, task.proximal_mu).items():
            gradient[name] = gradient[name] + pull
    for name, added in correction.items():
        gradient[name] = gradient[name] + added
    for name, slope in gradient.items():
        arrays[name] -= np.float32(task.learning_rate) * slope.astype(np.float32)


def evaluate(
    arrays: Mapping[str, NDArray[Any]], task: TrainingTask, data: Examples
) -> tuple[int, dict[str, float]]:
    """Return the number of examples, and loss and accuracy on them."""
    del task
    return len(data.labels), measure(arrays, data)


def measure(arrays: Mapping[str, NDArray[Any]], data: Examples) -> dict[str, float]:
    """Return cross-entropy in nats and accuracy, 0 to 1."""
    probabilities = _probabilities(arrays, data.inputs)
    chosen = probabilities[np.arange(len(data.labels)), data.labels]
    return {
        "loss": float(-np.mean(np.log(chosen + 1e-9))),
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == data.labels)),
    }


def _probabilities(arrays: Mapping[str, NDArray[Any]], inputs: NDArray[Any]) -> NDArray[Any]:
    scores = inputs @ arrays["weight"] + arrays["bias"]
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
