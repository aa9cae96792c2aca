"""Control variates of SCAFFOLD as tensors: the coordinator's travel with the model, a device's own stay on it.

For each floating-point tensor, the model holds the coordinator's control variate, the paper's c, and a device keeps its
own, the paper's c_i, of the same shape and element type. Their names are the tensor's after `CONTROL` and `LOCAL`.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv:1910.06378,
Algorithm 1.
"""

from typing import Final

from qflare.tensors.manifest import Manifest

CONTROL: Final = "scaffold.control."
"""Beginning of the names of the coordinator's control variates."""
LOCAL: Final = "scaffold.local."
"""Beginning of the names of a device's control variates."""
LOCAL_PATTERN: Final = f"{LOCAL}*"
"""Pattern of the names of a device's control variates, for `transfer.local_tensors`."""


def missing_control(manifest: Manifest) -> str | None:
    """Return the name of a floating-point tensor without a control variate of its shape and type, None for none."""
    specs = {spec.name: spec for spec in manifest.tensors}
    for spec in manifest.tensors:
        if not spec.dtype.is_float or spec.name.startswith(CONTROL):
            continue
        control = specs.get(CONTROL + spec.name)
        if control is None or (control.dtype, control.shape) != (spec.dtype, spec.shape):
            return spec.name
    return None
