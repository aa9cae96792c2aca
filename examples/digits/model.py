"""A small neural network in numpy: 64 inputs, one hidden layer, 10 classes."""

import math

import numpy as np
from data import CLASS_COUNT, Examples, FloatArray
from numpy.typing import NDArray

PIXEL_COUNT = 64
HIDDEN_COUNT = 48
Weights = dict[str, FloatArray]


def initial_weights(seed: int = 0) -> Weights:
    """Return random weights with the initialization of He et al. 2015 (arXiv:1502.01852) for rectified units."""
    random = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> FloatArray:
        drawn = random.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)
        return np.asarray(drawn, np.float32)

    return {
        "hidden.weight": layer(PIXEL_COUNT, HIDDEN_COUNT),
        "hidden.bias": np.zeros(HIDDEN_COUNT, np.float32),
        "output.weight": layer(HIDDEN_COUNT, CLASS_COUNT),
        "output.bias": np.zeros(CLASS_COUNT, np.float32),
    }


def _forward(weights: Weights, images: FloatArray) -> tuple[FloatArray, FloatArray]:
    hidden = np.maximum(images @ weights["hidden.weight"] + weights["hidden.bias"], 0)
    logits = hidden @ weights["output.weight"] + weights["output.bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, odds / odds.sum(axis=1, keepdims=True)


def _step(weights: Weights, batch: Examples, learning_rate: float) -> None:
    hidden, chances = _forward(weights, batch.images)
    error = chances.copy()
    error[np.arange(len(batch)), batch.digits] -= 1
    error /= len(batch)
    back = (error @ weights["output.weight"].T) * (hidden > 0)
    weights["output.weight"] -= learning_rate * hidden.T @ error
    weights["output.bias"] -= learning_rate * error.sum(axis=0)
    weights["hidden.weight"] -= learning_rate * batch.images.T @ back
    weights["hidden.bias"] -= learning_rate * back.sum(axis=0)


def fit(
    weights: Weights,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    proximal_mu: float = 0.0,
) -> Weights:
    """Return the weights after stochastic gradient descent; the given weights are not modified.

    `proximal_mu` adds a proximal term that pulls every step toward the given weights (Li et al. 2020,
    arXiv:1812.06127, equation 2).
    """
    trained = {name: values.copy() for name, values in weights.items()}
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order: NDArray[np.int64] = random.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            pulls = {
                name: learning_rate * proximal_mu * (values - weights[name])
                for name, values in trained.items()
                if proximal_mu
            }
            _step(trained, examples.take(order[start : start + batch_size]), learning_rate)
            for name, pull in pulls.items():
                trained[name] -= pull
    return trained


def measure(weights: Weights, examples: Examples) -> dict[str, float]:
    """Return accuracy (0 to 1) and cross-entropy loss."""
    _, chances = _forward(weights, examples.images)
    right = chances[np.arange(len(examples)), examples.digits]
    return {
        "accuracy": float(np.mean(chances.argmax(axis=1) == examples.digits)),
        "loss": float(-np.mean(np.log(right + 1e-12))),
    }
