"""Metrics under any names: the version that comes of them is one that devices and auditors take."""

import pytest

from qflare.evidence.lineage import verify_chain
from qflare.v1 import security_pb2, training_pb2
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import global_models
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.use_cases.versions.promotion import Promotion
from tests.support.use_cases import CoordinatorHarness, vector

QUORUM_2 = training_pb2.RoundPolicy(quorum=2)


def envelope_of(model: GlobalModel) -> security_pb2.SignedEnvelope:
    envelope = security_pb2.SignedEnvelope.FromString(model.signature)
    envelope.payload = model.statement
    return envelope


def check_chain(core: CoordinatorHarness, training_session_id: str) -> None:
    """Follow all versions as a device does."""
    envelopes = [envelope_of(model) for model in core.versions(training_session_id)]
    keys = [core.key.public]
    verify_chain(envelopes, keys, realm=core.config.realm, training_session_id=training_session_id)


def run_round(
    core: CoordinatorHarness, training_session_id: str, *reports: dict[str, float]
) -> None:
    for number, metrics in enumerate(reports):
        core.submit(f"device-{number}", training_session_id, vector(1.0), **metrics)
    core.settle()


@pytest.mark.parametrize("length", [94, 95, 100])
def test_the_longest_names(core: CoordinatorHarness, length: int) -> None:
    training_session_id = core.start(rounds=QUORUM_2)
    report = {"x" * length: 0.5, "accuracy": 0.25}

    run_round(core, training_session_id, report, report)

    check_chain(core, training_session_id)
    assert core.versions(training_session_id)[1].metrics["train_accuracy"] == 0.25
    assert ("train_" + "x" * length in core.versions(training_session_id)[1].metrics) == (
        length == 94
    )


def test_many_different_names(core: CoordinatorHarness) -> None:
    training_session_id = core.start(rounds=QUORUM_2)
    reports = [{f"{device}-{number}": 1.0 for number in range(40)} for device in range(2)]

    run_round(core, training_session_id, *reports)

    check_chain(core, training_session_id)
    assert len(core.versions(training_session_id)[1].metrics) == 64


def test_a_rollback_to_a_version_of_many_measurements(core: CoordinatorHarness) -> None:
    """Evaluation adds metrics to a version that nobody signs; a rollback would sign them all."""
    training_session_id = core.start(rounds=QUORUM_2)
    run_round(core, training_session_id, {"accuracy": 0.25}, {"accuracy": 0.25})
    run_round(core, training_session_id, {}, {})
    measured = {f"measured {number}": 1.0 for number in range(100)} | {"x" * 100: 1.0}

    def measure(session: object) -> None:
        metrics = {"train_accuracy": 0.25, **measured}
        global_models.update_model(session, training_session_id, 1, {"metrics": metrics})  # type: ignore[arg-type]

    core.database.write(measure)
    Promotion(core.context).roll_back(SYSTEM, training_session_id, 1, "a test")

    check_chain(core, training_session_id)
    statement = security_pb2.ModelStatement.FromString(
        core.versions(training_session_id)[-1].statement
    )
    assert len(statement.metrics) == 64
    assert statement.metrics["train_accuracy"] == 0.25
