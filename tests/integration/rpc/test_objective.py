"""Held-out metrics decide: the best version and the early stop go by what evaluation measures, over real devices."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client import Receipt, TrainingTask, run

Deploy = Callable[..., Any]
Arrays = dict[str, Array]
MEASURED = training_pb2.EvaluationPolicy(every_rounds=1)
UP, DOWN = training_pb2.METRIC_GOAL_MAXIMIZE, training_pb2.METRIC_GOAL_MINIMIZE
HELD_OUT = training_pb2.METRIC_SOURCE_HELD_OUT
TRAINING = training_pb2.METRIC_SOURCE_TRAINING


def policy(quorum: int = 1, deadline_s: int = 60) -> training_pb2.RoundPolicy:
    return training_pb2.RoundPolicy(quorum=quorum, deadline=Duration(seconds=deadline_s))


def train(
    arrays: Arrays, task: TrainingTask, metrics: Mapping[int, Mapping[str, float]]
) -> tuple[Arrays, int, Mapping[str, float]]:
    return arrays, 10, metrics.get(task.round_number, {})


def evaluate(
    _arrays: Arrays, task: TrainingTask, metrics: Mapping[int, Mapping[str, float]]
) -> tuple[int, Mapping[str, float]]:
    return 10, metrics[task.base_version]


def found(deployment: Any, session_id: str) -> training_pb2.TrainingSession:
    request = admin_pb2.GetTrainingSessionRequest(training_session_id=session_id)
    answer = deployment.admin.GetTrainingSession(request, metadata=deployment.metadata)
    shown: training_pb2.TrainingSession = answer.training_session
    return shown


def take_part(
    deployment: Any,
    session_id: str,
    reported: Mapping[int, Mapping[str, float]],
    measured: Mapping[int, Mapping[str, float]] | None = None,
) -> training_pb2.TrainingSession:
    """Let one device take part until the end; return the training session as it ends."""
    client = deployment.device("a")
    run(
        client,
        partial(train, metrics=reported),
        evaluate=None if measured is None else partial(evaluate, metrics=measured),
        training_session_id=session_id,
        patience_s=20.0,
    )
    return found(deployment, session_id)


@pytest.mark.parametrize(
    ("metric", "goal", "measured", "best"),
    [
        ("accuracy", UP, (0.5, 0.9, 0.7), (2, 0.9)),
        ("auc", UP, (0.5, 0.6, 0.7), (3, 0.7)),
        ("loss", DOWN, (0.5, 0.9, 0.7), (1, 0.5)),
        ("mae", DOWN, (0.5, 0.2, 0.7), (2, 0.2)),
        ("gain", UP, (-3.0, -1.0, -2.0), (2, -1.0)),
    ],
)
def test_the_best_version_is_that_of_held_out_data(
    deploy: Deploy,
    metric: str,
    goal: training_pb2.MetricGoal.ValueType,
    measured: tuple[float, ...],
    best: tuple[int, float],
) -> None:
    deployment = deploy()
    objective = training_pb2.Objective(metric=metric, goal=goal)
    session_id = deployment.session(
        rounds=policy(), total_rounds=3, evaluation=MEASURED, objective=objective
    )
    misleading = {
        number: {metric: value} for number, value in zip((1, 2, 3), (99, -99, 0), strict=True)
    }

    session = take_part(
        deployment,
        session_id,
        misleading,
        {version: {metric: value} for version, value in enumerate(measured, 1)},
    )

    assert (session.best.version, session.best.value) == best
    assert (session.best.metric, session.best.goal) == (metric, goal)
    assert session.best.source == HELD_OUT


def test_training_metrics_alone_are_named_as_such(deploy: Deploy) -> None:
    deployment = deploy()
    objective = training_pb2.Objective(metric="loss")
    session_id = deployment.session(rounds=policy(), total_rounds=3, objective=objective)

    session = take_part(
        deployment, session_id, {1: {"loss": 0.5}, 2: {"loss": 0.25}, 3: {"loss": 0.75}}
    )

    assert (session.best.version, session.best.value, session.best.source) == (2, 0.25, TRAINING)


def test_a_session_that_evaluates_has_no_best_version_before_its_first_evaluation(
    deploy: Deploy,
) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=policy(), total_rounds=1, evaluation=MEASURED)

    session = take_part(deployment, session_id, {1: {"accuracy": 1.0}})

    assert session.current_version == 1
    assert not session.HasField("best")


def test_later_reports_may_take_a_best_version_back(deploy: Deploy) -> None:
    """The first report on version 1 is enthusiastic, the second is not; version 2 is better than their mean."""
    deployment = deploy()
    session_id = deployment.session(
        rounds=policy(2),
        total_rounds=2,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1, quorum=1),
    )
    reports = {"a": {1: 1.0, 2: 0.7}, "b": {1: 0.0, 2: 0.7}}

    def device(name: str) -> None:
        measured = {version: {"accuracy": value} for version, value in reports[name].items()}
        run(
            deployment.device(name),
            partial(train, metrics={}),
            evaluate=partial(evaluate, metrics=measured),
            training_session_id=session_id,
            patience_s=20.0,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(device, reports))

    session = found(deployment, session_id)
    assert (session.best.version, session.best.value) == (2, 0.7)


STOP = training_pb2.EarlyStopPolicy(metric="accuracy", target=0.9)


def only_train(deployment: Any, session_id: str, count: int) -> None:
    """Let a device that does not evaluate, and reports the highest accuracy from training, send some updates."""
    stop = threading.Event()
    receipts: list[Receipt] = []

    def accepted(receipt: Receipt) -> None:
        receipts.append(receipt)
        if len(receipts) == count:
            stop.set()

    run(
        deployment.device("trainer"),
        lambda arrays, _task: (arrays, 10, {"accuracy": 1.0}),
        training_session_id=session_id,
        stop=stop,
        patience_s=20.0,
        on_receipt=accepted,
    )


def current_round(deployment: Any, session_id: str) -> training_pb2.Round:
    request = admin_pb2.GetAggregationStatusRequest(training_session_id=session_id)
    answer = deployment.admin.GetAggregationStatus(request, metadata=deployment.metadata)
    shown: training_pb2.Round = answer.round
    return shown


def test_a_stop_waits_for_the_evaluation_that_it_needs(deploy: Deploy) -> None:
    """Round 2 has its update from a device that does not evaluate; it stays open until another has evaluated."""
    deployment = deploy()
    session_id = deployment.session(
        rounds=policy(), total_rounds=9, evaluation=MEASURED, early_stop=STOP
    )

    only_train(deployment, session_id, 2)
    waiting = current_round(deployment, session_id)
    session = take_part(deployment, session_id, {}, {key: {"accuracy": 0.95} for key in (1, 2)})

    assert (waiting.round_number, waiting.accepted_count) == (2, 1)
    assert waiting.state == training_pb2.ROUND_STATE_OPEN
    assert session.state == training_pb2.TRAINING_SESSION_STATE_COMPLETED
    assert "accuracy reached its target" in session.state_reason
    assert (session.current_round, session.current_version, session.best.version) == (2, 2, 1)


def test_a_stop_waits_until_the_deadline_at_most(deploy: Deploy) -> None:
    deployment = deploy()
    session_id = deployment.session(
        rounds=policy(deadline_s=1), total_rounds=9, evaluation=MEASURED, early_stop=STOP
    )

    only_train(deployment, session_id, 3)

    session = found(deployment, session_id)
    assert session.state == training_pb2.TRAINING_SESSION_STATE_RUNNING
    assert session.current_round == 3


def test_training_metrics_never_stop(deploy: Deploy) -> None:
    """Held-out accuracy stays at one half while training accuracy is one."""
    deployment = deploy()
    session_id = deployment.session(
        rounds=policy(), total_rounds=3, evaluation=MEASURED, early_stop=STOP
    )
    perfect = {key: {"accuracy": 1.0} for key in (1, 2, 3)}

    session = take_part(
        deployment, session_id, perfect, {key: {"accuracy": 0.5} for key in (1, 2, 3)}
    )

    assert (session.current_version, session.state_reason) == (3, "all rounds are done")
    assert (session.best.value, session.best.source) == (0.5, HELD_OUT)
