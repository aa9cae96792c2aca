"""Keras 3: the weights of a model as arrays, and arrays as its weights, with every backend.

    def train(arrays, config):
        load_arrays(model, arrays)
        history = model.fit(images, labels, epochs=config.local_epochs, verbose=0)
        return to_arrays(model), len(labels), {"loss": history.history["loss"][-1]}

Trainable and other weights are converted, such as the moving means of a BatchNormalization layer; the optimizer's state
and random seeds stay on the device. The name of an array is the path of its weight without the model's name, such as
``hidden/kernel``. Keras numbers layers without a name across the whole process, so give them names where a process
builds more than one model. Keras is imported at the first call; the SDK does not depend on it.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qflare.tensors import Array


def to_arrays(model: Any) -> dict[str, Array]:
    """Copy the weights of a built `keras.Model` into arrays, in the order of ``model.weights``.

    Raises:
        ValueError: The model has no weights yet, or two of the same name.
    """
    return {name: _to_array(weight) for name, weight in _weights(model).items()}


def load_arrays(model: Any, arrays: Mapping[str, Array]) -> None:
    """Copy arrays into the weights of a built `keras.Model`.

    Raises:
        ValueError: Names or shapes differ from the model's; the model is unchanged.
    """
    weights = _weights(model)
    if weights.keys() != arrays.keys():
        raise ValueError(f"the model lacks or has in addition: {sorted(weights.keys() ^ arrays)}")
    for name, weight in weights.items():
        if arrays[name].shape != tuple(weight.shape):
            raise ValueError(f"{name}: got shape {arrays[name].shape}, want {tuple(weight.shape)}")
    for name, weight in weights.items():
        weight.assign(arrays[name])


def _weights(model: Any) -> dict[str, Any]:
    weights = {weight.path.removeprefix(f"{model.name}/"): weight for weight in model.weights}
    if len(weights) != len(model.weights):
        raise ValueError("two weights of the model have the same path: give its layers names")
    if not weights:
        raise ValueError("the model has no weights: build it, for example with an Input layer")
    return weights


def _to_array(weight: Any) -> Array:
    import keras  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    kind = ml_dtypes.bfloat16 if weight.dtype == "bfloat16" else weight.dtype
    return np.array(keras.ops.convert_to_numpy(weight.value), dtype=kind)
