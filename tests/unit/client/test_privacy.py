from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from qflare_client.errors import InvalidArgumentError
from qflare_client.privacy import (
    LocalPrivacy,
    clip_by_global_norm,
    floating_deltas,
    gaussian_delta,
    gaussian_stddev,
    global_norm,
    normal_samples,
)

Tensors = dict[str, NDArray[np.generic]]


def model(value: float) -> Tensors:
    return {
        "weight": np.full((2, 3), value, dtype=np.float32),
        "half": np.full(4, value, dtype=ml_dtypes.bfloat16),
        "steps": np.array([7], dtype=np.int64),
    }


def test_clipping_bounds_the_norm_over_all_tensors() -> None:
    protected = LocalPrivacy(clip_norm=1.0).protect(model(5.0), model(0.0))

    assert global_norm(floating_deltas(protected, model(0.0))) == pytest.approx(1.0, rel=1e-2)


def test_a_short_delta_passes_unchanged() -> None:
    protected = LocalPrivacy(clip_norm=1e3).protect(model(2.0), model(0.5))

    assert all(np.array_equal(protected[name], tensor) for name, tensor in model(2.0).items())


def test_dtypes_and_integers_are_kept() -> None:
    protected = LocalPrivacy(1.0, 1.0).protect(model(2.0), model(0.5))

    assert {name: tensor.dtype for name, tensor in protected.items()} == {
        name: tensor.dtype for name, tensor in model(0.0).items()
    }
    assert protected["steps"].tolist() == [7]


def test_noise_has_the_size_of_multiplier_times_bound() -> None:
    zero: Tensors = {"w": np.zeros(200_000, dtype=np.float32)}

    protected = LocalPrivacy(clip_norm=2.0, noise_multiplier=1.5).protect(
        zero, zero, np.random.default_rng(0)
    )

    assert protected["w"].astype(np.float64).std() == pytest.approx(3.0, rel=0.01)


def test_noise_is_never_the_same() -> None:
    zero: Tensors = {"w": np.zeros(10, dtype=np.float32)}
    privacy = LocalPrivacy(1.0, 1.0)

    assert not np.array_equal(privacy.protect(zero, zero)["w"], privacy.protect(zero, zero)["w"])


def test_the_system_is_the_source_of_the_noise() -> None:
    zero: Tensors = {"w": np.zeros(400_001, dtype=np.float32)}

    noise = LocalPrivacy(1.0, 1.0).protect(zero, zero)["w"].astype(np.float64)

    assert kstest(noise, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(noise[:200_000], noise[200_000:400_000])[0, 1]) < 0.02


def test_random_bytes_become_normal_samples_up_to_the_ends() -> None:
    least, most = bytes(8), b"\xff" * 8

    pairs = [normal_samples(first + second) for first in (least, most) for second in (least, most)]

    assert np.isfinite(pairs).all()
    assert np.max(np.abs(pairs)) == pytest.approx(9.4, abs=0.1)


def test_noise_leaves_no_low_bits_of_a_float64_delta() -> None:
    base: Tensors = {"w": np.zeros(1000)}
    protected = LocalPrivacy(1.0, 1.0).protect({"w": np.full(1000, 1e-3)}, base)["w"]

    assert np.array_equal(protected, protected.astype(np.float32))


@pytest.mark.parametrize("wrong", [None, "1", True, [1.0], 1j, 10**400, np.array([1.0, 2.0])])
def test_settings_that_are_no_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="clip_norm must be"):
        LocalPrivacy(wrong)


def test_hardly_any_noise_costs_without_end() -> None:
    assert LocalPrivacy(1.0, 1e-200).cost == np.inf


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    bound=st.floats(1e-3, 1e3),
)
def test_clipped_norms_never_exceed_the_bound(values: list[float], bound: float) -> None:
    clipped = clip_by_global_norm({"w": np.array(values)}, bound)

    assert global_norm(clipped) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_delta_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="norm of the update"):
        LocalPrivacy(1.0).protect(model(value), model(0.0))


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="differ from the base version"):
        floating_deltas(model(1.0), {"weight": np.zeros((2, 3))})


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="has shape"):
        floating_deltas({"w": np.zeros(2)}, {"w": np.zeros(3)})


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, -1.0)])
def test_settings_that_protect_nothing_are_refused(clip: float, noise: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        LocalPrivacy(clip, noise)


@given(epsilon=st.floats(0.01, 100.0), log_delta=st.floats(-12.0, -1.0))
def test_the_standard_deviation_is_the_smallest(epsilon: float, log_delta: float) -> None:
    delta = 10.0**log_delta

    stddev = gaussian_stddev(epsilon, delta, 2.0)

    assert gaussian_delta(epsilon, 2.0, stddev) <= delta
    assert gaussian_delta(epsilon, 2.0, 0.999 * stddev) > delta


def test_it_is_below_the_classical_bound() -> None:
    """Dwork and Roth 2014, theorem A.1: sqrt(2 log(1.25 / delta)) / epsilon suffices below epsilon one."""
    classical = np.sqrt(2 * np.log(1.25 / 1e-5)) / 0.5

    assert gaussian_stddev(0.5, 1e-5, 1.0) < classical


def test_it_agrees_with_the_accounting_library() -> None:
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss  # noqa: PLC0415

    stddev = gaussian_stddev(1.0, 1e-5, 1.0)

    loss = GaussianPrivacyLoss(stddev)
    assert loss.get_delta_for_epsilon(1.0) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(
    "numbers", [(0.0, 0.1, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (1.0, 0.1, 0.0)]
)
def test_impossible_guarantees_are_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="got epsilon"):
        gaussian_stddev(*numbers)
