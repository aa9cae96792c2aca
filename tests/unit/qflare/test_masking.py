"""Quantization, masks and sealed seeds of secure aggregation."""

from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qflare.crypto.sealing import KemKey, UnsealError
from qflare.crypto.symmetric import hkdf_expand
from qflare.masking import masks
from qflare.masking.masks import SLICE_BYTES, KeyStream, Mask, new_buffer
from qflare.masking.parameters import InvalidMaskingError, MaskingParameters
from qflare.masking.quantization import Quantizer, mean_change, quantize_slots, slot_totals
from qflare.masking.seeds import open_seed, seal_seed
from qflare.masking.staleness import (
    MAX_ROUNDINGS,
    Rounding,
    find_problem,
    mean_rounding,
    usual_weights,
    weigh,
    weights_digest,
)
from qflare.v1 import security_pb2

BITS = st.sampled_from([16, 32, 64])


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[MaskingParameters, list[int], list[np.ndarray]]:
    """Draw parameters, and the weights and changes of a cohort that may be larger than the clip."""
    bits = draw(BITS)
    count = draw(st.integers(1, 6))
    clip = draw(st.sampled_from([0.01, 1.0, 7.5, 40.0]))
    most = draw(st.sampled_from([1, 7, 1000, 2**40]))
    parameters = MaskingParameters(
        bits, clip, count + draw(st.integers(0, 20)), most, {"loss": 3.0}
    )
    weights = [draw(st.integers(1, most)) for _ in range(count)]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    changes = [random.standard_normal(50) * draw(st.floats(0, 100)) for _ in range(count)]
    return parameters, weights, changes


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_the_unmasked_sum_is_exact_to_the_bound_of_quantization(
    cohort: tuple[MaskingParameters, list[int], list[np.ndarray]],
) -> None:
    parameters, weights, changes = cohort
    total = np.zeros(50 + parameters.slot_count, parameters.dtype)
    wanted, means = np.zeros(50), 0.0
    for index, (weight, change) in enumerate(zip(weights, changes, strict=True)):
        norm = float(np.linalg.norm(change))
        vector = np.concatenate(
            [
                Quantizer(parameters, weight, norm).quantize(change),
                quantize_slots(parameters, weight, {"loss": index / 2 - 1}),
            ]
        )
        Mask(bytes([index]) * 32).add_to(vector, 0)
        total += vector
        wanted += weight * change * (min(1.0, parameters.clip / norm) if norm else 1.0)
        means += weight * max(-3.0, min(3.0, index / 2 - 1))
    negative = np.zeros_like(total)
    for index in range(len(weights)):
        Mask(bytes([index]) * 32).add_to(negative, 0)
    total -= negative
    weight_sum, found = slot_totals(parameters, total[50:])
    assert weight_sum == sum(weights)
    assert abs(found["loss"] - means / weight_sum) < 1e-6
    got = mean_change(parameters, total[:50], weight_sum)
    bound = len(weights) * parameters.max_weight / (parameters.scale * weight_sum)
    assert np.abs(got - wanted / weight_sum).max() <= bound * 1.0001 + 1e-9 * parameters.clip


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_one_update_moves_a_sum_by_no_more_than_clip_and_rounding(
    cohort: tuple[MaskingParameters, list[int], list[np.ndarray]],
) -> None:
    """The sensitivity that noise on a sum is calibrated for (`CentralPrivacy.sensitivity`)."""
    parameters, weights, changes = cohort
    bound = parameters.clip + np.sqrt(50) / parameters.scale
    for weight, change in zip(weights, changes, strict=True):
        levels = Quantizer(parameters, weight, float(np.linalg.norm(change))).quantize(change)
        share = mean_change(parameters, levels, parameters.max_weight)
        assert np.linalg.norm(share) <= bound * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(BITS, st.integers(0, 3000), st.integers(1, 3000))
def test_any_range_of_a_mask_is_the_same_bytes(bits: int, start: int, length: int) -> None:
    itemsize, whole = bits // 8, Mask(b"s" * 32).read(0, 48_000)
    values = np.zeros(length, f"<u{itemsize}")
    Mask(b"s" * 32).add_to(values, start)
    assert values.tobytes() == whole[start * itemsize : (start + length) * itemsize]


_KEY = algorithms.AES(hkdf_expand(b"s" * 32, b"qflare/v1/mask"))
_WHOLE = Cipher(_KEY, modes.CTR(bytes(16))).encryptor().update(bytes(3 * SLICE_BYTES))
"""Of the mask of 32 letters "s", as the specification has it."""


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.sampled_from([0, 0, 5, 16, 32, 33, 400]),
    st.lists(st.sampled_from([1, 7, 16, 31, 32, 33, 1000, SLICE_BYTES]), max_size=9),
)
def test_a_stream_has_the_bytes_of_its_mask_by_either_cipher(
    wide: bool, offset: int, lengths: list[int]
) -> None:
    stream, buffer, position = KeyStream(_KEY, offset, wide=wide), new_buffer(), offset
    for length in lengths:
        if position + length > len(_WHOLE):
            break
        expected = _WHOLE[position : position + length]
        assert stream.write_to(buffer, length).tobytes() == expected
        position += length


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_long_mask_is_the_same_by_either_cipher(
    monkeypatch: pytest.MonkeyPatch, bits: int, faster: bool
) -> None:
    monkeypatch.setattr(masks, "is_gcm_faster", lambda: faster)
    values = np.zeros(len(_WHOLE) // (bits // 8) - 3, f"<u{bits // 8}")
    Mask(b"s" * 32).add_to(values, 0)
    assert values.tobytes() == _WHOLE[: values.nbytes]
    Mask(b"s" * 32).subtract_from(values, 0)
    assert not values.any()


def test_a_stream_leaves_gcm_before_its_counter_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_GCM_END", SLICE_BYTES + 160)
    stream, buffer = KeyStream(_KEY, 0, wide=True), new_buffer()
    made = [stream.write_to(buffer, SLICE_BYTES - 5).tobytes() for _ in range(3)]
    assert b"".join(made) == _WHOLE[: 3 * (SLICE_BYTES - 5)]


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 1000), st.integers(1, 2**40), st.integers(0, 4))
def test_digits_of_a_full_cohort_never_wrap(
    bits: int, cohort: int, weight: int, metric_count: int
) -> None:
    metrics = {f"m{index}": 1.0 for index in range(metric_count)}
    parameters = MaskingParameters(bits, 1e-6, cohort, weight, metrics)
    slots = quantize_slots(parameters, weight, dict.fromkeys(metrics, 1.0))
    total = (slots.astype(object) * cohort) % parameters.modulus
    assert slot_totals(parameters, total.astype(parameters.dtype)) == (weight * cohort, metrics)


@pytest.mark.parametrize(
    ("bits", "clip", "cohort", "weight", "field"),
    [
        (8, 1.0, 2, 1, "bits"),
        (32, 0.0, 2, 1, "clip"),
        (32, float("nan"), 2, 1, "clip"),
        (32, 1.0, 0, 1, "max_cohort"),
        (32, 1.0, 2, 0, "max_weight"),
        (16, 1.0, 40_000, 1, "bits"),
        (32, 1e10, 2, 1, "bits"),
    ],
)
def test_parameters_without_room_are_refused(
    bits: int, clip: float, cohort: int, weight: int, field: str
) -> None:
    with pytest.raises(InvalidMaskingError) as caught:
        MaskingParameters(bits, clip, cohort, weight, {})
    assert caught.value.field == field


def test_a_seed_opens_for_its_update_alone() -> None:
    key, seed = KemKey.generate(), b"x" * 32
    statement = security_pb2.UpdateStatement(realm="r", training_session_id="s", round_number=1)
    statement.update_id, statement.device_id, statement.payload_digest = "u", "d", "p"
    statement.masking.task_digest = "t"
    sealed = seal_seed(seed, "h" * 64, key.public, statement)
    assert open_seed(sealed, key, statement) == seed
    changes = {
        "realm": "x",
        "training_session_id": "x",
        "round_number": 2,
        "update_id": "x",
        "device_id": "x",
        "payload_digest": "x",
    }
    for field, value in changes.items():
        other = security_pb2.UpdateStatement()
        other.CopyFrom(statement)
        setattr(other, field, value)
        with pytest.raises(UnsealError):
            open_seed(sealed, key, other)
    other.CopyFrom(statement)
    other.masking.task_digest = "x"
    with pytest.raises(UnsealError):
        open_seed(sealed, key, other)
    with pytest.raises(UnsealError):
        open_seed(sealed, KemKey.generate(), statement)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_rounding_has_no_bias_and_never_leaves_the_limit(bits: int) -> None:
    parameters = MaskingParameters(bits, 1.0, 7, 1, {})
    count = 200_000
    for level in (0.25, -0.75, 3.5, -parameters.limit / 3):
        change = np.full(count, level / parameters.scale)
        found = Quantizer(parameters, 1, 0.0).quantize(change).view(f"<i{bits // 8}")
        error = found.astype(np.float64) - change * parameters.scale
        assert abs(error.mean()) < 6 * 0.5 / count**0.5 + 1e-9 * abs(level)
        assert np.abs(error).max() < 1 + 1e-9 * abs(level)
    extreme = np.array([1.0, -1.0, 5.0, -5.0])
    levels = Quantizer(parameters, 1, 0.0).quantize(extreme).view(f"<i{bits // 8}")
    assert np.abs(levels.astype(object)).max() <= parameters.limit
    assert (np.sign(levels) == np.sign(extreme)).all()
    alone = MaskingParameters(bits, 1.0, 1, 1, {})
    levels = Quantizer(alone, 1, 0.0).quantize(extreme).view(f"<i{bits // 8}")
    assert (np.sign(levels) == np.sign(extreme)).all()


def test_each_update_is_rounded_by_chance_of_its_own() -> None:
    parameters, change = MaskingParameters(32, 1.0, 2, 1, {}), np.full(1000, 1e-10)
    found = [Quantizer(parameters, 1, 1.0).quantize(change).tobytes() for _ in range(2)]
    assert found[0] != found[1]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, ...]:
    last = draw(st.integers(1, 16))
    rest = draw(st.lists(st.integers(last, 16 * last), max_size=5))
    return (*sorted(rest, reverse=True), last)


@given(
    tables(), st.sampled_from([16, 32, 64]), st.integers(2, 20), st.randoms(use_true_random=False)
)
def test_the_largest_weighted_sum_with_the_largest_roundings_does_not_wrap(
    weights: tuple[int, ...], bits: int, cohort: int, random: Any
) -> None:
    try:
        parameters = MaskingParameters(bits, 1e-6, cohort, 1, {}, staleness_weights=weights)
    except InvalidMaskingError:
        assume(False)
    largest = parameters.largest_staleness_weight
    most = parameters.limit * largest * cohort + MAX_ROUNDINGS * (largest - 1)
    assert most <= 2 ** (bits - 1) - 1
    values = np.array([random.choice([-1, 1]) * parameters.limit for _ in range(cohort)])
    chosen = [random.choice(weights) for _ in range(cohort)]
    total = np.zeros(3, parameters.dtype)
    for value, weight in zip(values, chosen, strict=True):
        vector = np.array([int(value), int(value), 1]).astype(parameters.dtype)
        weigh(vector, 0, 2, weight)
        total += vector
    exact = sum(int(v) * w for v, w in zip(values, chosen, strict=True))
    assert total.view(f"<i{parameters.itemsize}").tolist() == [exact, exact, cohort]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_roundings_are_even_repeat_and_leave_slots_alone(bits: int) -> None:
    count, largest = 200_000, 45
    seeds = [(b"a" * 32, 45), (b"b" * 32, 32)]
    rounding = Rounding(largest, count, seeds)
    whole = np.zeros(count + 2, f"<u{bits // 8}")
    rounding.subtract_from(whole, 0)
    added = (-whole).astype(np.uint64)
    assert added[count:].tolist() == [0, 0]
    assert (added[:count].min(), added[:count].max()) == (0, largest - 1)
    tallies = np.bincount(added[:count].astype(int), minlength=largest)
    assert np.abs(tallies - count / largest).max() < 6 * (count / largest) ** 0.5
    assert abs(added[:count].mean() - mean_rounding(largest, 1)) < 0.2
    for first in (0, 1, 70_001, count - 1, count, count + 1):
        part = np.zeros(min(1000, count + 2 - first), whole.dtype)
        Rounding(largest, count, seeds).subtract_from(part, first)
        assert part.tolist() == whole[first : first + len(part)].tolist()
    other = np.zeros_like(whole)
    Rounding(largest, count, [seeds[0], (b"c" * 32, 32)]).subtract_from(other, 0)
    assert (other != whole).mean() > 0.9


def test_no_class_of_equally_stale_updates_follows_from_a_sum() -> None:
    """Every value of the stale part is consistent with exactly one of the fresh part, each equally likely."""
    fresh, stale = usual_weights(1)
    for seen in range(-300, 300, 7):
        for b in range(-50, 50):
            fits = [a for a in range(-60, 60) if 0 <= seen - fresh * a - stale * b < fresh]
            assert len(fits) == 1


def test_tables_of_staleness_weights() -> None:
    assert usual_weights(3) == [64, 45, 37, 32]
    assert find_problem(usual_weights(255)) == ""
    assert find_problem(()) == ""
    for wrong in ((64, 65), (64, 0), (257,), (64, 3), (1,) * 257):
        assert find_problem(wrong)
    made = [("aa" * 32, 64), ("bb" * 32, 45)]
    assert (
        weights_digest(made)
        == weights_digest(made[::-1])
        != weights_digest([*made[:1], ("bb" * 32, 64)])
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 256))
def test_parts_are_weighed_like_the_whole(element_count: int, cut: int, weight: int) -> None:
    whole = np.arange(1, 41, dtype="<u2") * np.uint16(1600)
    first, second = whole[:cut].copy(), whole[cut:].copy()
    weigh(first, 0, element_count, weight)
    weigh(second, cut, element_count, weight)
    weigh(whole, 0, element_count, weight)
    assert np.concatenate([first, second]).tolist() == whole.tolist()
    assert whole[element_count:].tolist() == [
        1600 * k % 2**16 for k in range(element_count + 1, 41)
    ]
