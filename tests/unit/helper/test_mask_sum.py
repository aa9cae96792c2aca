"""The sum of masks that a helper makes."""

import numpy as np
import pytest

from qflare.masking.masks import SLICE_BYTES, Mask
from qflare.masking.staleness import Rounding
from qflare_helper import unmasking

SEEDS = [(bytes([number]) * 32, weight) for number, weight in enumerate((1, 4, 1, 4, 3))]


@pytest.mark.parametrize("most_open", [0, 2, 4096])
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("bits", [16, 64])
def test_the_sum_is_that_of_the_masks_however_many_streams_are_open(
    monkeypatch: pytest.MonkeyPatch, bits: int, most_open: int, is_rounded: bool
) -> None:
    monkeypatch.setattr(unmasking, "MAX_STREAMS", most_open)
    dtype, count, slots = np.dtype(f"<u{bits // 8}"), 2 * SLICE_BYTES // (bits // 8) + 77, 3
    seeds = SEEDS if is_rounded else [(seed, 1) for seed, _ in SEEDS]
    rounding = Rounding(4, count, seeds) if is_rounded else None
    expected = np.zeros(count + slots, dtype)
    for seed, weight in seeds:
        mask = np.zeros_like(expected)
        Mask(seed).add_to(mask, 0)
        mask[:count] *= dtype.type(weight)
        expected += mask
    if rounding is not None:
        rounding.subtract_from(expected, 0)
    total = unmasking._MaskSum(seeds, expected.nbytes, count, dtype, rounding)
    noise, cut = b"\1" * expected.nbytes, SLICE_BYTES + 8 * 100
    expected += np.frombuffer(noise, dtype)
    made = b"".join((total.next(cut, noise[:cut]), total.next(expected.nbytes - cut, noise[cut:])))
    assert made == expected.tobytes()
