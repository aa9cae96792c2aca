"""Flax and JAX: a tree of arrays as named arrays, and back.

    def train(arrays, config):
        parameters = load_arrays(parameters_of_that_structure, arrays)
        ...
        return to_arrays(parameters), len(labels), {"loss": float(loss)}

Works for every JAX tree whose leaves are arrays: variables of Flax Linen, ``nnx.state(model, nnx.Param)`` of Flax NNX,
parameters of other JAX libraries. The name of an array is the path of its leaf, joined by dots, such as
``params.Dense_0.kernel``. Trees are immutable: `load_arrays` returns a new one. JAX is imported at the first call; the
SDK does not depend on it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qflare.tensors import Array


def to_arrays(tree: Any) -> dict[str, Array]:
    """Copy the leaves of a tree into arrays, in the order of the tree.

    Raises:
        ValueError: Two leaves have the same name, or the tree has no leaves.
    """
    return {name: np.array(leaf) for name, leaf in _leaves(tree).items()}


def load_arrays(tree: Any, arrays: Mapping[str, Array]) -> Any:
    """Return a tree of the structure and element types of `tree` that holds the arrays.

    Args:
        tree: A tree of arrays; its values are not used.
        arrays: One array for each leaf, by name.

    Raises:
        ValueError: Names or shapes differ from the tree's.
    """
    import jax  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    leaves = _leaves(tree)
    if leaves.keys() != arrays.keys():
        raise ValueError(f"the tree lacks or has in addition: {sorted(leaves.keys() ^ arrays)}")
    for name, leaf in leaves.items():
        if arrays[name].shape != leaf.shape:
            raise ValueError(f"{name}: got shape {arrays[name].shape}, want {leaf.shape}")
    loaded = [jax.numpy.array(arrays[name], dtype=leaf.dtype) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), loaded)


def _leaves(tree: Any) -> dict[str, Any]:
    import jax  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    pairs, _ = jax.tree.flatten_with_path(tree)
    leaves = {_name(path): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the tree have the same name")
    if not leaves:
        raise ValueError("the tree has no leaves")
    return leaves


def _name(path: tuple[Any, ...]) -> str:
    import jax  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    # Flax NNX wraps each leaf in a variable, whose only child is its attribute `value`.
    wrapped = path and path[-1] == jax.tree_util.GetAttrKey("value")
    name: str = jax.tree_util.keystr(path[:-1] if wrapped else path, simple=True, separator=".")
    return name
