"""Asynchronous training end to end: a slow device's work on an older version counts when it comes."""

import threading
from collections.abc import Callable, Mapping

import numpy as np

from qflare.v1 import training_pb2
from qflare_client import Client, Receipt, TrainingTask, run
from qflare_server.storage.repository import updates
from tests.integration.conftest import Deployment

WAIT_S = 120.0
ROUNDS = 6
HELD_AT = 3
"""Version that the fast devices do not go past before the slow one has sent its update."""


class Devices:
    """Two fast devices, and a slow one that is still at version 0 when the others are at version 3."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._slow_has_begun = threading.Event()
        self._others_are_ahead = threading.Event()
        self._slow_is_done = threading.Event()
        self.receipts: list[Receipt] = []

    def train_fast(
        self, arrays: dict[str, np.ndarray], task: TrainingTask
    ) -> tuple[Mapping[str, np.ndarray], int, Mapping[str, float]]:
        assert self._slow_has_begun.wait(WAIT_S)
        if task.base_version >= HELD_AT:
            self._others_are_ahead.set()
            assert self._slow_is_done.wait(WAIT_S)
        return {"w": arrays["w"] + np.float32(1)}, 10, {"loss": 1.0}

    def train_slowly(
        self, arrays: dict[str, np.ndarray], _task: TrainingTask
    ) -> tuple[Mapping[str, np.ndarray], int, Mapping[str, float]]:
        self._slow_has_begun.set()
        assert self._others_are_ahead.wait(WAIT_S)
        return {"w": arrays["w"] + np.float32(1)}, 10, {"loss": 1.0}

    def heard(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self._slow_is_done.set()

    def run_all(self, slow: Client, fast: list[Client]) -> None:
        """Take part with every device until the training session is over."""
        threads = [threading.Thread(target=self._run_slow, args=(slow,))]
        threads += [threading.Thread(target=self._run_fast, args=(client,)) for client in fast]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)

    def _run_slow(self, client: Client) -> None:
        session_id = self._session_id
        run(client, self.train_slowly, training_session_id=session_id, on_receipt=self.heard)

    def _run_fast(self, client: Client) -> None:
        run(client, self.train_fast, training_session_id=self._session_id)


def test_a_slow_devices_work_counts_in_the_round_that_is_open_when_it_comes(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy()
    clients = [deployment.device(name) for name in ("slow", "fast-0", "fast-1")]
    session_id = deployment.session(
        total_rounds=ROUNDS,
        strategy=training_pb2.StrategyConfig(name="fedbuff"),
        rounds=training_pb2.RoundPolicy(quorum=2, max_staleness=4),
    )
    devices = Devices(session_id)

    devices.run_all(clients[0], clients[1:])

    first = devices.receipts[0]
    assert first.round_number == HELD_AT + 1
    use_cases = deployment.coordinator.use_cases
    assert use_cases.training.get(session_id).current_version == ROUNDS
    with deployment.coordinator.parts.database.read() as session:
        update = updates.get_update(session, first.update_id)
        assert update is not None
        assert (update.base_version, update.state) == (0, "aggregated")
        assert update.aggregated_version == HELD_AT + 1
