"""Fixtures of the strategy tests."""

import numpy as np
import pytest

from tests.unit.server.strategies.updates import (
    Aggregate,
    Deltas,
    Maker,
    adversarial,
    aggregate_deltas,
    clustered,
    discrete,
    wide,
)


@pytest.fixture
def aggregate() -> Aggregate:
    return aggregate_deltas


@pytest.fixture(params=[clustered, adversarial, wide, discrete])
def deltas(request: pytest.FixtureRequest) -> Deltas:
    """Eleven float32 updates of 5,000 elements."""
    maker: Maker = request.param
    return maker(np.random.default_rng(7), 11, 5_000).astype(np.float32)
