"""Random bytes that the seed of a simulation decides, so that equal runs repeat.

Whoever knows the configuration knows them: noise and masks of a simulation protect nobody. A real coordinator and a
real device draw from their operating system.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


class SeededBytes:
    """Draws bytes.

    Args:
        *label: Seed of the simulation, and what is unique to the purpose within it.
    """

    def __init__(self, *label: object) -> None:
        self._label = ":".join(str(part) for part in label)
        self._drawn = 0

    def draw(self, count: int = 32) -> bytes:
        """Return the next bytes, that many."""
        self._drawn += 1
        text = f"simulation:{self._label}:{self._drawn}"
        return hashlib.shake_256(text.encode()).digest(count)


class SeededNoise:
    """Draws rounded Gaussian noise, whose deviation is that of the exact noise of devices and helpers.

    Args:
        *label: As of `SeededBytes`.
    """

    def __init__(self, *label: object) -> None:
        self._random = np.random.default_rng(list(SeededBytes(*label).draw()))

    def draw(self, count: int, stddev: float) -> NDArray[np.int64]:
        """Return the next samples, that many."""
        return np.rint(self._random.normal(0.0, stddev, count)).astype(np.int64)
