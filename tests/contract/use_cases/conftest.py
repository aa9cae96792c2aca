"""Updates that are about to be sent."""

import pytest

from tests.support.uploads import BIG, QUORUM_4
from tests.support.use_cases import CoordinatorHarness, Draft, vector


@pytest.fixture
def training_session_id(core: CoordinatorHarness) -> str:
    return core.start(rounds=QUORUM_4)


@pytest.fixture
def draft(core: CoordinatorHarness, training_session_id: str) -> Draft:
    return core.draft(
        "device-0", training_session_id, vector(1.0), loss=0.5, accuracy=0.25, epochs=2
    )


@pytest.fixture
def big_session_id(large: CoordinatorHarness) -> str:
    return large.start(vector(0.0, BIG), rounds=QUORUM_4)


@pytest.fixture
def big(large: CoordinatorHarness, big_session_id: str) -> Draft:
    return large.draft("device-0", big_session_id, vector(1.0, BIG))
