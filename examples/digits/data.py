"""Handwritten digits (scans of 8 x 8 pixels), split unevenly between devices, like real data."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
TEST_SHARE = 0.2
CLASS_COUNT = 10


@dataclass(frozen=True)
class Examples:
    """Images of shape (n, 64), values 0 to 1, and their digits of shape (n,)."""

    images: FloatArray
    digits: IntArray

    def __len__(self) -> int:
        return len(self.digits)

    def take(self, indices: IntArray) -> "Examples":
        """Return the examples at these indices."""
        return Examples(self.images[indices], self.digits[indices])


def load(seed: int = 0) -> tuple[Examples, Examples]:
    """Return training and test examples.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as shipped with
    scikit-learn.
    """
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(digits))
    everything = Examples((images / 16).astype(np.float32), digits.astype(np.int64))
    held_out = int(len(order) * TEST_SHARE)
    return everything.take(order[held_out:]), everything.take(order[:held_out])


def dirichlet_partition(
    digits: IntArray, device_count: int, alpha: float, seed: int, least: int = 10
) -> list[IntArray]:
    """Split examples so that each class is distributed over the devices in Dirichlet(alpha) shares.

    Args:
        digits: Class of each example.
        device_count: Number of parts.
        alpha: Concentration of the distribution; smaller values give a more uneven split.
        seed: Seed of the random split.
        least: Minimum number of examples per device; the split is redrawn until every device has that many.

    Returns:
        Indices for each device.

    Source: Hsu et al. 2019, arXiv:1909.06335, section 2.
    """
    random = np.random.default_rng(seed)
    while True:
        parts: list[list[int]] = [[] for _ in range(device_count)]
        for label in range(CLASS_COUNT):
            members = random.permutation(np.flatnonzero(digits == label))
            shares = np.cumsum(random.dirichlet(np.full(device_count, alpha)))
            for part, chosen in zip(
                parts, np.split(members, (shares[:-1] * len(members)).astype(int)), strict=True
            ):
                part.extend(chosen.tolist())
        if min(map(len, parts)) >= least:
            return [np.array(sorted(part), dtype=np.int64) for part in parts]
