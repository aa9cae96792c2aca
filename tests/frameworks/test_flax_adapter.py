from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

from qflare_client.adapters.flax import load_arrays, to_arrays

pytestmark = pytest.mark.frameworks


class Block(linen.Module):  # type: ignore[misc,unused-ignore]
    @linen.compact  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, inputs: Any) -> Any:
        normalized = linen.BatchNorm(use_running_average=True)(linen.Dense(4)(inputs))
        return linen.Dense(2, param_dtype=jnp.bfloat16)(normalized)


class Net(nnx.Module):  # type: ignore[misc,unused-ignore]
    def __init__(self, seed: int) -> None:
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(seed)) for _ in range(1)])
        self.normal = nnx.BatchNorm(4, rngs=nnx.Rngs(seed))

    def __call__(self, inputs: Any) -> Any:
        return self.normal(self.layers[0](inputs), use_running_average=True)


INPUTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def variables(seed: int) -> Any:
    return Block().init(jax.random.key(seed), INPUTS)


def test_a_linen_model_predicts_the_same_after_the_round_trip() -> None:
    trained, other = variables(1), variables(2)

    loaded = load_arrays(other, to_arrays(trained))

    assert jax.tree.structure(loaded) == jax.tree.structure(trained)
    np.testing.assert_array_equal(Block().apply(loaded, INPUTS), Block().apply(trained, INPUTS))


def test_names_are_paths_and_element_types_stay() -> None:
    arrays = to_arrays(variables(1))

    assert arrays["params.Dense_0.kernel"].dtype == np.float32
    assert arrays["params.Dense_1.kernel"].dtype == jnp.bfloat16
    assert arrays["batch_stats.BatchNorm_0.mean"].shape == (4,)


def test_an_nnx_model_predicts_the_same_after_the_round_trip() -> None:
    trained, other = Net(1), Net(2)
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)

    nnx.update(other, load_arrays(nnx.state(other, kinds), to_arrays(nnx.state(trained, kinds))))

    np.testing.assert_array_equal(other(INPUTS), trained(INPUTS))
    assert "layers.0.kernel" in to_arrays(nnx.state(trained, kinds))


def test_arrays_are_copies() -> None:
    state = variables(1)

    to_arrays(state)["params.Dense_0.kernel"][:] = 7

    assert (state["params"]["Dense_0"]["kernel"] != 7).all()


@pytest.mark.parametrize("name", ["params.Dense_0.kernel", "absent"])
def test_another_shape_or_name_is_refused(name: str) -> None:
    arrays = to_arrays(variables(1)) | {name: np.zeros(3, np.float32)}

    with pytest.raises(ValueError, match=name):
        load_arrays(variables(1), arrays)


def test_ambiguous_and_empty_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="the same name"):
        to_arrays({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)})
    with pytest.raises(ValueError, match="no leaves"):
        to_arrays({})
