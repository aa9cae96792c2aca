"""scikit-learn: converts the fitted attributes of an estimator to arrays and back.

    def train(arrays, config):
        load_arrays(model, arrays)
        model.partial_fit(features, labels)
        return to_arrays(model), len(labels), {"accuracy": model.score(features, labels)}

Linear models (`coef_`, `intercept_`) and multi-layer perceptrons (`coefs_`, `intercepts_`, lists of arrays) are
supported; for other estimators, pass the attribute names. An estimator has these attributes only after a first fit, so
call `partial_fit` once with all classes. Optimizer state stays on the device. scikit-learn itself is not imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qflare.tensors import Array

DEFAULT_ATTRIBUTES = ("coefs_", "intercepts_", "coef_", "intercept_")
"""Attributes that are copied if the estimator has them."""


def to_arrays(estimator: Any, attributes: Sequence[str] = DEFAULT_ATTRIBUTES) -> dict[str, Array]:
    """Copy the fitted attributes of an estimator; entry i of a list becomes ``attribute.i``.

    Raises:
        ValueError: The estimator has none of the attributes: it is not fitted.
    """
    arrays: dict[str, Array] = {}
    for name in attributes:
        value = getattr(estimator, name, None)
        if isinstance(value, list):
            arrays |= {f"{name}.{i}": np.array(entry) for i, entry in enumerate(value)}
        elif value is not None:
            arrays[name] = np.array(value)
    if not arrays:
        raise ValueError(f"the estimator has none of {tuple(attributes)}: fit it once")
    return arrays


def load_arrays(estimator: Any, arrays: Mapping[str, Array]) -> None:
    """Copy arrays into the fitted attributes of an estimator, in place where an attribute is a list.

    Raises:
        ValueError: The estimator has no such attribute, or another shape.
    """
    for name, array in arrays.items():
        attribute, _, index = name.rpartition(".")
        if attribute:
            # In place: the solver of a perceptron keeps references to these arrays.
            _checked(name, getattr(estimator, attribute, [])[int(index)], array)[...] = array
        else:
            current = _checked(name, getattr(estimator, name, None), array)
            setattr(estimator, name, np.array(array, dtype=current.dtype))


def _checked(name: str, current: Any, array: Array) -> Array:
    if not isinstance(current, np.ndarray) or current.shape != array.shape:
        raise ValueError(f"{name}: got shape {array.shape}, want {np.shape(current)}")
    return current
