"""A coordinator with a dashboard, and devices that really train on handwritten digits, as far as they are let."""

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client import Client, run
from qflare_client.tasks import TrainingTask
from tests.integration.conftest import Deployment

ROOT: Final = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "digits"))

from data import Examples, dirichlet_partition, load  # noqa: E402
from model import Weights, fit, initial_weights, measure  # noqa: E402

TIMEOUT_S: Final = 120


class Fleet:
    """Devices with a part of the digits each.

    Args:
        deployment: Where they enroll.
        types: One for each device.
    """

    def __init__(self, deployment: Deployment, types: list[str]) -> None:
        self.deployment = deployment
        training, held_back = load()
        parts = dirichlet_partition(training.digits, len(types), 0.7, seed=3)
        tests = np.array_split(np.arange(len(held_back)), len(types))
        self._training = [training.take(part) for part in parts]
        self._held_back = [held_back.take(part) for part in tests]
        self.clients = [
            deployment.device(
                f"device-{index}",
                label=f"{kind}-{1 + types[:index].count(kind)}",
                device_type=kind,
                capabilities={"cores": 4},
            )
            for index, kind in enumerate(types)
        ]

    def create(self, name: str, rounds: int, **changed: Any) -> str:
        """Create and start a training session that every device is wanted in; return its id.

        Args:
            name: Of the training session.
            rounds: How many.
            changed: Fields of its configuration, over those that all sessions have.
        """
        count = len(self.clients)
        config = training_pb2.TrainingConfig(
            total_rounds=rounds,
            rounds=training_pb2.RoundPolicy(quorum=max(1, count // 2), target=count),
            device_training=training_pb2.DeviceTraining(
                local_epochs=3, batch_size=32, learning_rate=0.05
            ),
            evaluation=training_pb2.EvaluationPolicy(
                every_rounds=1, group_by="device_type", quorum=2
            ),
            release=training_pb2.ReleasePolicy(
                bounds=[training_pb2.MetricBound(metric="accuracy", min_value=0.85)]
            ),
        )
        config.MergeFrom(training_pb2.TrainingConfig(**changed))
        created = self.deployment.admin.CreateTrainingSession(
            admin_pb2.CreateTrainingSessionRequest(name=name, model_type="mlp", config=config),
            metadata=self.deployment.metadata,
        )
        session_id = created.training_session.training_session_id
        self.deployment.upload(session_id, initial_weights())
        self.deployment.admin.StartTrainingSession(
            admin_pb2.StartTrainingSessionRequest(training_session_id=session_id),
            metadata=self.deployment.metadata,
        )
        return session_id

    def train(self, session_id: str, updates: list[int]) -> None:
        """Let each device contribute so many updates to a training session."""
        with ThreadPoolExecutor(len(self.clients)) as executor:
            work: list[Future[Any]] = [
                executor.submit(self._take_part, index, session_id, count)
                for index, count in enumerate(updates)
                if count
            ]
            for part in work:
                part.result(TIMEOUT_S)

    def _take_part(self, index: int, session_id: str, update_count: int) -> None:
        stop, sent = threading.Event(), 0

        def train(arrays: Weights, config: TrainingTask) -> tuple[Weights, int, dict[str, float]]:
            examples, started = self._training[index], time.monotonic()
            trained = fit(
                arrays,
                examples,
                epochs=config.local_epochs,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                seed=100 * index + config.round_number,
            )
            metrics = measure(trained, examples)
            metrics["training_time_s"] = time.monotonic() - started
            return trained, len(examples), metrics

        def evaluate(arrays: Weights, _config: TrainingTask) -> tuple[int, dict[str, float]]:
            examples: Examples = self._held_back[index]
            return len(examples), measure(arrays, examples)

        def count(_receipt: object) -> None:
            nonlocal sent
            sent += 1
            if sent == update_count:
                stop.set()

        client: Client = self.clients[index]
        run(
            client,
            train,
            evaluate=evaluate,
            training_session_id=session_id,
            stop=stop,
            on_receipt=count,
        )
