"""An early stop waits for the evaluation that it needs, with several devices that train and others that evaluate."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client import Client, TaskKind

Deploy = Callable[..., Any]
STOP: Final = training_pb2.EarlyStopPolicy(metric="accuracy", target=0.9)
TRAINERS: Final = ("trainer-1", "trainer-2", "trainer-3")
EVALUATORS: Final = ("evaluator-1", "evaluator-2")
PATIENCE_S: Final = 60.0


class Site:
    """A training session that needs three updates for a version and two reports for its evaluation."""

    def __init__(self, deployment: Any, deadline_s: int) -> None:
        self.deployment = deployment
        self.trainers: list[Client] = [deployment.device(name) for name in TRAINERS]
        self.evaluators: list[Client] = [deployment.device(name) for name in EVALUATORS]
        self.session_id = deployment.session(
            rounds=training_pb2.RoundPolicy(
                quorum=3, target=3, deadline=Duration(seconds=deadline_s)
            ),
            total_rounds=9,
            evaluation=training_pb2.EvaluationPolicy(every_rounds=1, quorum=2),
            early_stop=STOP,
        )

    def train(self, client: Client, number: int) -> None:
        """Send the update of one device to a round."""
        task = client.get_task(self.session_id, trains_only=True)
        while task.round_number != number:
            task = client.get_task(self.session_id, trains_only=True)
        base = client.download_base(task)
        client.submit(task, base, base.arrays, 10, {"accuracy": 1.0})

    def evaluate(self, client: Client, version: int, accuracy: float) -> None:
        """Send the evaluation of one device."""
        task = client.get_task(self.session_id)
        while task.kind is not TaskKind.EVALUATE or task.base_version != version:
            task = client.get_task(self.session_id)
        client.report_evaluation(task, 10, {"accuracy": accuracy})

    def together(self, *actions: Callable[[], None]) -> None:
        """Let devices act at once."""
        with ThreadPoolExecutor(len(actions)) as pool:
            for part in [pool.submit(action) for action in actions]:
                part.result(PATIENCE_S)

    def round(self, number: int) -> Sequence[Callable[[], None]]:
        """Return what each trainer does in a round."""
        return [partial(self.train, client, number) for client in self.trainers]

    def session(self) -> training_pb2.TrainingSession:
        request = admin_pb2.GetTrainingSessionRequest(training_session_id=self.session_id)
        answer = self.deployment.admin.GetTrainingSession(
            request, metadata=self.deployment.metadata
        )
        shown: training_pb2.TrainingSession = answer.training_session
        return shown

    def open_round(self) -> tuple[int, int]:
        """Return number and count of accepted updates of the round that is open."""
        request = admin_pb2.GetAggregationStatusRequest(training_session_id=self.session_id)
        found = self.deployment.admin.GetAggregationStatus(
            request, metadata=self.deployment.metadata
        ).round
        assert found.state == training_pb2.ROUND_STATE_OPEN
        return found.round_number, found.accepted_count

    def until(self, wanted: Callable[[training_pb2.TrainingSession], bool]) -> Any:
        """Return the training session as soon as it is as wanted; fail after a minute."""
        pause = threading.Event()
        for _ in range(int(PATIENCE_S / 0.05)):
            shown = self.session()
            if wanted(shown):
                return shown
            pause.wait(0.05)
        raise AssertionError(f"still {shown}")


def is_over(session: training_pb2.TrainingSession) -> bool:
    return session.state == training_pb2.TRAINING_SESSION_STATE_COMPLETED


def test_a_full_round_stays_open_until_enough_devices_have_evaluated(deploy: Deploy) -> None:
    site = Site(deploy(), deadline_s=600)
    site.together(*site.round(1))
    site.together(*site.round(2))
    assert site.open_round() == (2, 3)

    site.evaluate(site.evaluators[0], 1, 0.95)
    assert site.open_round() == (2, 3)
    site.evaluate(site.evaluators[1], 1, 0.93)

    ended = site.until(is_over)
    assert "accuracy reached its target" in ended.state_reason
    assert (ended.current_round, ended.current_version, ended.best.version) == (2, 2, 1)
    assert ended.best.value == pytest.approx(0.94)


def test_a_session_whose_evaluation_is_below_the_target_goes_on(deploy: Deploy) -> None:
    site = Site(deploy(), deadline_s=600)
    site.together(*site.round(1))
    site.together(*site.round(2))

    for client in site.evaluators:
        site.evaluate(client, 1, 0.5)
    site.together(*site.round(3))

    assert site.session().current_version == 2
    assert site.open_round() == (3, 3)


def test_reports_that_arrive_with_the_last_updates_close_the_round_in_any_order(
    deploy: Deploy,
) -> None:
    site = Site(deploy(), deadline_s=600)
    site.together(*site.round(1))
    site.until(lambda shown: shown.current_version == 1)

    site.together(
        *site.round(2), *(partial(site.evaluate, client, 1, 0.95) for client in site.evaluators)
    )

    ended = site.until(is_over)
    assert (ended.current_round, ended.current_version) == (2, 2)
    assert "accuracy reached its target" in ended.state_reason


def test_too_few_reports_hold_a_round_until_its_deadline_at_most(deploy: Deploy) -> None:
    site = Site(deploy(), deadline_s=2)
    site.together(*site.round(1))
    site.until(lambda shown: shown.current_version == 1)

    site.evaluate(site.evaluators[0], 1, 0.95)
    site.together(*site.round(2))

    shown = site.until(lambda found: found.current_version == 2)
    assert shown.state == training_pb2.TRAINING_SESSION_STATE_RUNNING
