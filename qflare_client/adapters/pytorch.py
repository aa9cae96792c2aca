"""PyTorch: a module's state as arrays, and arrays as its state.

    def train(arrays, config):
        load_arrays(model, arrays)
        ...
        return to_arrays(model), len(dataset), {"loss": loss}

Every entry of the state dict is converted, including buffers: a BatchNorm counter is an integer tensor. bfloat16 stays
bfloat16. PyTorch is imported at the first call; the SDK does not depend on it.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qflare.tensors import Array


def to_arrays(module: Any) -> dict[str, Array]:
    """Copy the state of a `torch.nn.Module` into arrays, in the order of its state dict."""
    return {name: to_array(tensor) for name, tensor in module.state_dict().items()}


def load_arrays(module: Any, arrays: Mapping[str, Array]) -> None:
    """Copy arrays into a `torch.nn.Module`, onto the devices of its tensors.

    Raises:
        RuntimeError: Names or shapes differ from the module's.
    """
    module.load_state_dict({name: to_tensor(array) for name, array in arrays.items()})


def to_array(tensor: Any) -> Array:
    """Copy a `torch.Tensor` into an array of the same element type; bfloat16 stays bfloat16."""
    import torch  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw: Array = tensor.view(torch.int16).numpy().copy()
        return raw.view(ml_dtypes.bfloat16)
    copy: Array = tensor.numpy().copy()
    return copy


def to_tensor(array: Array) -> Any:
    """Copy an array into a `torch.Tensor` of the same element type, in the memory of the processor."""
    import torch  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


class ProximalTerm:
    """Gradient of the proximal term of FedProx, ``mu / 2 * ||parameters - base||^2``.

    The base is what the trainable parameters of the module are now, so construct it after `load_arrays`. Call
    `add_gradient` between the backward pass and the step of the optimizer.

    Args:
        module: A `torch.nn.Module`.
        mu: `TrainingTask.proximal_mu`, at least 0; 0 adds nothing.
    """

    def __init__(self, module: Any, mu: float) -> None:
        trainable = (entry for entry in module.parameters() if entry.requires_grad) if mu else ()
        self._mu = mu
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in trainable]

    def add_gradient(self) -> None:
        """Add the gradient to those of all parameters that have one."""
        for parameter, base in self._parameters:
            if parameter.grad is not None:
                difference = parameter.detach() - base.to(parameter.device)
                parameter.grad.add_(difference, alpha=self._mu)
