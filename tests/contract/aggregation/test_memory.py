"""Memory of a coordinator over many rounds."""

import gc
import tracemalloc

import numpy as np
import pytest

from qflare.v1 import training_pb2
from tests.support.use_cases import CoordinatorHarness

pytestmark = pytest.mark.slow

WEIGHTS = np.zeros(64, np.float32)

WARM_ROUNDS = 200
ROUNDS = 800
DEVICES = 1
BYTES_A_ROUND = 128
"""Less than a digest with its place in a set, which is the least that an update could leave."""


def run_rounds(core: CoordinatorHarness, session_id: str, count: int) -> int:
    """Run rounds; return the bytes that Python has allocated after them."""
    for _ in range(count):
        for device in range(DEVICES):
            draft = core.draft(f"device-{device}", session_id, {"w": WEIGHTS})
            core.send(draft)
        core.settle()
        delivery = core.deliveries.find(session_id, None)
        for _chunk in core.deliveries.chunks(delivery, 0):
            pass
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_a_thousand_rounds_leave_nothing_in_memory(core: CoordinatorHarness) -> None:
    session_id = core.start(
        {"w": WEIGHTS},
        total_rounds=WARM_ROUNDS + ROUNDS + 1,
        rounds=training_pb2.RoundPolicy(quorum=DEVICES, target=DEVICES),
    )
    run_rounds(core, session_id, WARM_ROUNDS)
    tracemalloc.start()
    try:
        before = run_rounds(core, session_id, ROUNDS // 4)
        after = run_rounds(core, session_id, ROUNDS - ROUNDS // 4)
    finally:
        tracemalloc.stop()

    assert (after - before) / (ROUNDS - ROUNDS // 4) < BYTES_A_ROUND
