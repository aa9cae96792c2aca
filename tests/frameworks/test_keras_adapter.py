from typing import Any

import keras
import numpy as np
import pytest

from qflare_client.adapters.keras import load_arrays, to_arrays

pytestmark = pytest.mark.frameworks
INPUTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def made(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="hidden"),
            keras.layers.BatchNormalization(name="normal"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2, dtype="bfloat16", name="head"),
        ]
    )


def test_a_model_predicts_the_same_after_the_round_trip() -> None:
    trained, other = made(1), made(2)
    trained.compile(keras.optimizers.SGD(0.1), "mse")
    trained.fit(INPUTS, np.ones((5, 2), np.float32), verbose=0)

    load_arrays(other, to_arrays(trained))

    expected = trained.predict(INPUTS, verbose=0)
    np.testing.assert_array_equal(other.predict(INPUTS, verbose=0), expected)


def test_names_are_paths_without_seeds_and_optimizer_and_element_types_stay() -> None:
    arrays = to_arrays(made(1))

    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "hidden/kernel": "float32",
        "hidden/bias": "float32",
        "normal/gamma": "float32",
        "normal/beta": "float32",
        "normal/moving_mean": "float32",
        "normal/moving_variance": "float32",
        "head/kernel": "bfloat16",
        "head/bias": "bfloat16",
    }


def test_arrays_are_copies() -> None:
    model = made(1)

    to_arrays(model)["hidden/kernel"][:] = 7

    assert (to_arrays(model)["hidden/kernel"] != 7).all()


@pytest.mark.parametrize("name", ["head/bias", "absent"])
def test_another_shape_or_name_is_refused_and_changes_nothing(name: str) -> None:
    model = made(1)
    before = to_arrays(model)

    with pytest.raises(ValueError, match=name):
        load_arrays(model, to_arrays(made(2)) | {name: np.zeros(3, np.float32)})

    for weight, array in to_arrays(model).items():
        np.testing.assert_array_equal(array, before[weight])


def test_a_model_without_weights_or_with_ambiguous_paths_is_refused() -> None:
    with pytest.raises(ValueError, match="no weights"):
        to_arrays(keras.Sequential([keras.layers.Dense(2)]))
    inputs = keras.Input((3,))
    twins = [keras.layers.Dense(2, name="twin")(inputs) for _ in range(2)]
    with pytest.raises(ValueError, match=r"names|unique"):
        to_arrays(keras.Model(inputs, keras.layers.add(twins)))
