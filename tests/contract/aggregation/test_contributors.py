"""Only contributors count: what a safeguard or the rule leaves out of a version has no say in anything of it."""

from typing import Any

import numpy as np
import pytest

from qflare.v1 import security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.aggregation.fold import RoundFold
from qflare_server.aggregation.plan import read_plan
from qflare_server.aggregation.publication import prepare_publication
from qflare_server.errors import UpdateNotFoundError
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import devices, updates
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import LEFT_OUT_REASON, DeviceState
from qflare_server.training.privacy import noise_seed
from qflare_server.verification import recompute_version
from tests.support.use_cases import CoordinatorHarness, floats

KEEP = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL)
MANY = 2**40
QUORUM_3 = training_pb2.RoundPolicy(quorum=3)


def arrays(weight: float, steps: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"steps": np.array([steps], np.int64), "w": np.full(4, weight, np.float32)}


def start(core: CoordinatorHarness, name: str = "fedavg", **config: Any) -> str:
    strategy = training_pb2.StrategyConfig(name=name)
    return core.start(
        arrays(0.0, 1), **{"strategy": strategy, "rounds": QUORUM_3, "transfer": KEEP, **config}
    )


def submit_round(core: CoordinatorHarness, training_session_id: str) -> list[UpdateReceipt]:
    """Two alike updates, and one far off that claims most examples, the best accuracy and other integers."""
    return [
        core.submit("device-0", training_session_id, arrays(1.0, 2), examples=10, accuracy=0.25),
        core.submit("device-1", training_session_id, arrays(50.0, 9), examples=MANY, accuracy=1.0),
        core.submit("device-2", training_session_id, arrays(1.5, 3), examples=4, accuracy=0.5),
    ]


def statement_of(model: GlobalModel) -> security_pb2.ModelStatement:
    return security_pb2.ModelStatement.FromString(model.statement)


SAFEGUARD: dict[str, Any] = {"safeguards": training_pb2.SafeguardPolicy(max_norm=10.0)}

PRIVATE: dict[str, Any] = {
    "privacy": training_pb2.PrivacyPolicy(
        noise_multiplier=1.0, clip_norm=1.0, delta=1e-5, epsilon_budget=100.0, target_quantile=0.5
    ),
    "rounds": training_pb2.RoundPolicy(quorum=3, target=30),
}


def test_an_update_that_is_refused_counts_for_nothing(core: CoordinatorHarness) -> None:
    training_session_id = start(core, **SAFEGUARD)
    submit_round(core, training_session_id)
    core.settle()

    statement = statement_of(core.versions(training_session_id)[1])

    assert (statement.contributor_count, statement.example_count) == (2, 14)
    assert dict(statement.metrics) == {"train_accuracy": pytest.approx((2.5 + 2.0) / 14)}
    assert np.frombuffer(core.weights(training_session_id, 1)[:8], "<i8").tolist() == [2]
    assert core.training.get(training_session_id).best_value == pytest.approx(4.5 / 14)
    assert core.round(training_session_id, 1).example_count == 14


def test_updates_that_the_rule_leaves_out_count_for_nothing(core: CoordinatorHarness) -> None:
    """Krum takes one of the two that are alike; which one is a matter of their ids."""
    training_session_id = start(core, "krum")
    submit_round(core, training_session_id)
    core.settle()

    version = core.versions(training_session_id)[1]
    statement = statement_of(version)

    rows = core.updates(training_session_id, 1)
    (taken,) = (row for row in rows if row.state == "aggregated")
    others = [row for row in rows if row is not taken]
    assert all(row.state == "rejected" for row in others)
    assert all(row.state_reason.startswith(LEFT_OUT_REASON + "krum") for row in others)
    assert (version.participant_count, statement.contributor_count) == (1, 1)
    assert statement.example_count == taken.example_count
    assert dict(statement.metrics) == {"train_accuracy": taken.accuracy}
    assert core.round(training_session_id, 1).rejected_count == 2
    assert core.deliveries.contribution_proof(taken.id).tree_size == 1
    with pytest.raises(UpdateNotFoundError):
        core.deliveries.contribution_proof(others[0].id)


def test_the_preference_of_a_rule_is_not_held_against_devices(core: CoordinatorHarness) -> None:
    safeguards = training_pb2.SafeguardPolicy(quarantine_rejections=1)
    training_session_id = start(core, "krum", safeguards=safeguards)

    submit_round(core, training_session_id)
    core.settle()

    with core.database.read() as session:
        states = {devices.lock_device(session, f"device-{n}").state for n in range(3)}  # type: ignore[union-attr]
    assert states == {DeviceState.ACTIVE.value}


@pytest.mark.parametrize(
    "config", [SAFEGUARD, {"name": "krum"}, {"name": "median"}, PRIVATE], ids=str
)
def test_a_version_is_made_again_by_the_same_rules(
    core: CoordinatorHarness, config: dict[str, Any]
) -> None:
    training_session_id = start(core, **config)
    submit_round(core, training_session_id)
    core.clock.advance(10_000.0)
    core.settle()

    again = recompute_version(core.context, training_session_id, 1)

    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


@pytest.mark.parametrize("config", [SAFEGUARD, {"name": "krum"}, PRIVATE], ids=str)
def test_versions_of_earlier_releases_are_made_again_by_theirs(
    core: CoordinatorHarness, config: dict[str, Any]
) -> None:
    training_session_id = start(core, **config)
    submit_round(core, training_session_id)
    publish_as_before(core, training_session_id)

    statement = statement_of(core.versions(training_session_id)[1])
    again = recompute_version(core.context, training_session_id, 1)

    assert statement.example_count == MANY + 14
    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


def publish_as_before(core: CoordinatorHarness, training_session_id: str) -> None:
    """Close round 1 and publish its version by the rules of versions that keep no number of them."""
    core.aggregator = NoAggregator(core.context, core.executor, "one")
    core.clock.advance(10_000.0)
    core.settle()
    with core.database.read() as session:
        plan = read_plan(session, training_session_id, 1, 0)
        accepted = updates.accepted_after(session, training_session_id, 1, 0, 10)
    seed = noise_seed(core.context, plan.config, training_session_id, plan.privacy_state)
    fold = RoundFold(core.context, plan, noise_seed=seed, revision=1)
    fold.take(accepted)
    closed_at = core.round(training_session_id, 1).closed_at
    assert closed_at is not None
    publication = prepare_publication(core.context, core.executor, fold, closed_at)
    assert core.database.write(publication.run)


class NoAggregator(Aggregator):
    """Closes rounds and publishes nothing."""

    def _publish(self, item: Any, fold: RoundFold) -> bool:
        del item, fold
        return False


def test_an_update_counts_as_no_more_examples_than_the_session_says(
    core: CoordinatorHarness,
) -> None:
    limited = start(core, safeguards=training_pb2.SafeguardPolicy(max_example_count=10))
    submit_round(core, limited)
    core.settle()

    version = core.versions(limited)[1]

    weights = (10 * 1.0 + 10 * 50.0 + 4 * 1.5) / 24
    assert floats(core.weights(limited)[8:]) == pytest.approx([weights] * 4)
    assert np.frombuffer(core.weights(limited)[:8], np.int64).tolist() == [2], (
        "the earliest of equals"
    )
    assert version.metrics["train_accuracy"] == pytest.approx((2.5 + 10 + 2) / 24)
    assert version.example_count == 10 + MANY + 4
    assert statement_of(version).example_count == version.example_count
