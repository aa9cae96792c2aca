"""SCAFFOLD on a device: local steps corrected for the drift between devices with dissimilar data.

    def train(arrays, config):
        scaffold = Scaffold(arrays, config)
        weights = scaffold.weights
        for _ in range(steps):
            for name, gradient in gradients(weights).items():
                weights[name] -= config.learning_rate * (gradient + scaffold.correction[name])
        return scaffold.trained(weights, step_count=steps), example_count, {}

The control variates are tensors: the coordinator's are part of the model (`Scaffold.initial` adds them), the device's
own stay on it (`qflare_client.models.local_tensors`) and take effect with their update.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv:1910.06378,
Algorithm 1, option II.
"""

from collections.abc import Mapping

import numpy as np

from qflare.tensors import Array, DType
from qflare.tensors.control_variates import CONTROL, LOCAL
from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError
from qflare_client.tasks import TrainingTask


class Scaffold:
    """One training with control variates.

    Args:
        arrays: What the training function was given: the model with the coordinator's control variates, and the
            device's own from the second training on.
        config: The settings that the training function was given.

    Raises:
        InvalidArgumentError: A floating-point tensor has no control variate, or `control_share` is not within (0, 1].
    """

    def __init__(self, arrays: Mapping[str, Array], config: TrainingTask) -> None:
        given = arguments.tensors("arrays", arrays)
        settings = arguments.instance("config", config, TrainingTask)
        self._learning_rate = settings.learning_rate
        self._share = arguments.positive(
            "control_share", settings.parameters.get("control_share", 1.0), 1.0
        )
        self._base = {name: array for name, array in given.items() if not _is_control(name)}
        self._names = [name for name, array in self._base.items() if _is_float(array)]
        for name in self._names:
            if CONTROL + name not in given:
                raise InvalidArgumentError(f"arrays: tensor {name!r} has no control variate")
        self._control = {name: _wide(given[CONTROL + name]) for name in self._names}
        self._local = {
            name: _wide(given[LOCAL + name])
            if LOCAL + name in given
            else np.zeros(self._base[name].shape)
            for name in self._names
        }

    @staticmethod
    def initial(arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return a model with control variates of zero, to be uploaded as the initial model.

        Args:
            arrays: The model's tensors.

        Raises:
            InvalidArgumentError: They are no arrays by name.
        """
        model = dict(arguments.tensors("arrays", arrays))
        controls = {
            CONTROL + name: np.zeros_like(array)
            for name, array in model.items()
            if _is_float(array)
        }
        return {**model, **controls}

    @property
    def weights(self) -> dict[str, Array]:
        """Copies of the model's tensors, without control variates, to be trained in place."""
        return {name: array.copy() for name, array in self._base.items()}

    @property
    def correction(self) -> dict[str, Array]:
        """What is added to each gradient, `c - c_i`, in the shapes and element types of the floating-point tensors."""
        return {
            name: (self._control[name] - self._local[name]).astype(self._base[name].dtype)
            for name in self._names
        }

    def trained(self, weights: Mapping[str, Array], step_count: int) -> dict[str, Array]:
        """Return what the training function returns: the trained tensors and both kinds of control variates.

        Args:
            weights: The trained tensors.
            step_count: Number of local steps K that were taken, each with the learning rate of the settings; 1 or more.

        Raises:
            InvalidArgumentError: A tensor is missing or has another shape, or `step_count` is below 1.
        """
        trained = arguments.tensors("weights", weights)
        steps = arguments.whole("step_count", step_count, 1)
        result = dict(trained)
        for name in self._names:
            if name not in trained or trained[name].shape != self._base[name].shape:
                raise InvalidArgumentError(
                    f"weights: want tensor {name!r} in the shape of the base version"
                )
            dtype = self._base[name].dtype
            moved = _wide(self._base[name]) - _wide(trained[name])
            change = moved / (steps * self._learning_rate) - self._control[name]
            result[LOCAL + name] = (self._local[name] + change).astype(dtype)
            result[CONTROL + name] = (self._control[name] + self._share * change).astype(dtype)
        return result


def _is_control(name: str) -> bool:
    return name.startswith((CONTROL, LOCAL))


def _is_float(array: Array) -> bool:
    return DType.from_numpy(array.dtype).is_float


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
