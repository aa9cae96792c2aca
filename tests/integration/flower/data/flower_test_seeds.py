"""The seed of a training, the same in Flower's own run and on our devices."""

import random
import sys

import numpy as np


def seed(node: int, number: int) -> None:
    """Seed the global generators for a node and a round."""
    value = 1000 * node + number
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the apps use it
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
