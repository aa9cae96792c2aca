"""A training session with secure aggregation from its first round to its last: all that others have goes on."""

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client import Client, NotFoundError
from qflare_client.tasks import TaskKind
from qflare_server.context import utc_now
from qflare_server.verification.recomputation import recompute_version
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import (
    SecureStart,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_neighbors import bundle_of, together
from tests.integration.secure_aggregation.test_stages import _wait_until as wait_until

TIMEOUT_S: Final = 60
DEVICES: Final = 3
INITIAL: Final = {"w": np.linspace(-1, 1, 12, dtype=np.float32)}
HELPER: Final = training_pb2.SECURE_AGGREGATION_MODE_HELPER
NEIGHBORS: Final = training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS
ACCURACY: Final = {1: 0.95, 2: 0.5, 3: 0.97, 4: 0.6}
"""What devices measure of each version."""


class Life:
    """A training session in progress: versions are measured, gated, and rolled back; some tensors stay on devices.

    Args:
        deployment: The coordinator.
        session_id: The training session.
    """

    def __init__(self, deployment: Deployment, session_id: str) -> None:
        self.deployment = deployment
        self.session_id = session_id
        self.clients = [deployment.device(f"device-{index}") for index in range(DEVICES)]
        self.changes: dict[int, dict[int, Array]] = {}

    def round(self, number: int, version: int) -> None:
        """Let all devices take part in a round until its version is published, and measure what they are asked to."""
        together(lambda index: self._take_part(index, number, version), DEVICES)

    def _take_part(self, index: int, number: int, version: int) -> None:
        client, end = self.clients[index], time.monotonic() + TIMEOUT_S
        while not self._is_published(client, version):
            assert time.monotonic() < end, f"round {number} makes no version {version}"
            task = client.get_task(self.session_id)
            if task.kind is TaskKind.EVALUATE:
                client.report_evaluation(task, 10, {"accuracy": ACCURACY[task.base_version]})
            elif task.kind is TaskKind.TRAIN and task.round_number == number:
                self._train(client, task, index)
            else:
                threading.Event().wait(0.02)

    def _is_published(self, client: Client, version: int) -> bool:
        try:
            client.download(self.session_id, version)
        except NotFoundError:
            return False
        return True

    def _train(self, client: Client, task: Any, index: int) -> None:
        base = client.download_base(task)
        random = np.random.default_rng([task.round_number, index])
        change = random.standard_normal(12).astype(np.float32)
        count = client.local_tensors(self.session_id).get("bn.count", np.zeros(1, np.int64)) + 1
        arrays = {"w": base.arrays["w"] + change, "bn.count": count}
        client.submit(task, base, arrays, 100 * (index + 1), {"loss": 0.5 * index})
        self.changes.setdefault(task.round_number, {})[index] = arrays["w"] - base.arrays["w"]

    def measure(self, version: int) -> None:
        """Let all devices measure a version that they have not yet measured."""
        end = time.monotonic() + TIMEOUT_S
        for client in self.clients:
            while (task := client.get_task(self.session_id)).kind is TaskKind.EVALUATE:
                assert time.monotonic() < end
                client.report_evaluation(task, 10, {"accuracy": ACCURACY[version]})

    def step_of(self, number: int) -> Array:
        """Return the weighted mean of the changes in a round."""
        changes = self.changes[number]
        total = sum((index + 1) * change.astype(float) for index, change in changes.items())
        return np.asarray(total / sum(index + 1 for index in changes))

    def released(self) -> int:
        """Return the latest released version."""
        return int(self.clients[0].download(self.session_id, released=True).version)

    def open_round(self) -> int:
        """Return the number of the round that is open."""
        request = pb.GetAggregationStatusRequest(training_session_id=self.session_id)
        answer = self.deployment.admin.GetAggregationStatus(
            request, metadata=self.deployment.metadata
        )
        return int(answer.round.round_number)

    def recomputed(self, version: int) -> tuple[str, ...] | None:
        """Return how a version differs from what its updates give; None if they are pruned."""
        context = self.deployment.coordinator.parts.context
        found = recompute_version(context, self.session_id, version)
        return tuple(map(str, found.differences)) if found.recomputed else None

    def roll_back(self, version: int) -> int:
        """Roll back to a version; return the version that restores it."""
        request = pb.RollbackGlobalModelRequest(
            training_session_id=self.session_id, version=version
        )
        answer = self.deployment.admin.RollbackGlobalModel(
            request, metadata=self.deployment.metadata
        )
        return int(answer.global_model.version)


def settings() -> Mapping[str, Any]:
    """Return the settings of a training session without a policy for secure aggregation."""
    gate = training_pb2.MetricBound(metric="accuracy", min_value=0.9)
    return {
        "rounds": training_pb2.RoundPolicy(quorum=DEVICES, target=DEVICES),
        "evaluation": training_pb2.EvaluationPolicy(every_rounds=1, quorum=DEVICES),
        "release": training_pb2.ReleasePolicy(bounds=[gate]),
        "transfer": training_pb2.TransferPolicy(
            payload_retention=training_pb2.PAYLOAD_RETENTION_LAST_ROUNDS,
            retained_rounds=1,
            local_tensors=["bn.*"],
        ),
    }


@pytest.mark.parametrize("mode", [HELPER, NEIGHBORS])
def test_versions_are_measured_released_rolled_back_and_pruned(
    secure: SecureStart, mode: int
) -> None:
    made = secure(helper_count=mode == HELPER)
    policy: dict[str, Any] = {} if mode == HELPER else {"mode": mode, "corrupt_fraction": 0.1}
    session_id = made.session(round_count=3, arrays=INITIAL, policy=policy, **settings())
    life = Life(made.deployment, session_id)
    life.round(1, 1)
    life.round(2, 2)
    assert life.released() == 1
    life.measure(2)
    assert life.released() == 1

    restored = life.roll_back(1)
    assert restored == 3
    first = life.clients[0].download(session_id, 1)
    assert np.array_equal(
        life.clients[0].download(session_id, restored).arrays["w"], first.arrays["w"]
    )
    number = life.open_round()
    life.round(number, 4)
    last = wait_for_version(life.clients[0], session_id, 4)
    for model, base, step in ((first, INITIAL, 1), (last, first.arrays, number)):
        got = model.arrays["w"].astype(float) - base["w"]
        assert np.abs(got - life.step_of(step)).max() < 1e-5
    for client in life.clients:
        assert client.local_tensors(session_id)["bn.count"].tolist() == [3]
    assert life.released() == restored

    wait_until(lambda: life.recomputed(2) is None)
    assert [life.recomputed(version) for version in (1, 4)] == [None, ()]
    pinned = made.deployment.coordinator.parts.keys.trust.root_key_ids()
    bundle = bundle_of(made.deployment, session_id)
    assert verify_bundle(bundle, pinned, utc_now()).contributor_count == DEVICES
