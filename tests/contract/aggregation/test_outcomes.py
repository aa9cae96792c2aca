"""What became of every update is kept with its version, and a version can be made again from it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from qflare.v1 import training_pb2
from qflare_server.aggregation.outcome import read_outcome
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import global_models
from qflare_server.strategies.accounting import PrivacyLedger, spent
from qflare_server.verification import Recomputation, recompute_version
from tests.support.use_cases import CoordinatorHarness, vector

KEEP = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL)
QUORUM_4 = training_pb2.RoundPolicy(quorum=4)


def publish(core: CoordinatorHarness, name: str, **config: Any) -> str:
    """Publish a version from three alike updates and one that is far off."""
    strategy = training_pb2.StrategyConfig(name=name)
    config = {"strategy": strategy, "rounds": QUORUM_4, "transfer": KEEP, **config}
    training_session_id = core.start(vector(0.0, 500), **config)
    random = np.random.default_rng(1)
    for number, offset in enumerate((0.0, 0.1, -0.1, 50.0)):
        weights = {"w": (random.standard_normal(500) + offset).astype(np.float32)}
        core.submit(f"device-{number}", training_session_id, weights)
    core.settle()
    return training_session_id


def published(core: CoordinatorHarness, training_session_id: str) -> GlobalModel:
    return core.versions(training_session_id)[1]


@pytest.mark.parametrize("name", ["fedavg", "median", "krum", "fedadam", "geometric_median"])
def test_every_update_has_its_judgement(core: CoordinatorHarness, name: str) -> None:
    training_session_id = publish(core, name)

    outcome = read_outcome(core.context, published(core, training_session_id))

    assert outcome is not None
    assert outcome.strategy == name
    accepted = [update.id for update in core.updates(training_session_id, 1)]
    assert [entry.update_id for entry in outcome.judgements] == accepted


def test_the_record_says_why_an_update_was_left_out(core: CoordinatorHarness) -> None:
    safeguards = training_pb2.SafeguardPolicy(max_norm=100.0)
    training_session_id = publish(core, "fedavg", safeguards=safeguards)

    outcome = read_outcome(core.context, published(core, training_session_id))

    assert outcome is not None
    assert [bool(entry.rejection) for entry in outcome.judgements] == [False, False, False, True]


@pytest.mark.parametrize("name", ["fedavg", "trimmed_mean", "krum", "geometric_median"])
def test_a_version_is_made_again(core: CoordinatorHarness, name: str) -> None:
    training_session_id = publish(core, name)

    again = recompute_version(core.context, training_session_id, 1)

    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


def test_a_private_version_is_made_again_with_its_noise(core: CoordinatorHarness) -> None:
    budget = spent(PrivacyLedger().with_release(1.0, 1.0), 1e-5).epsilon * 2
    privacy = training_pb2.PrivacyPolicy(
        noise_multiplier=1.0, clip_norm=1.0, delta=1e-5, epsilon_budget=budget
    )
    training_session_id = publish(core, "fedavg", privacy=privacy)

    assert recompute_version(core.context, training_session_id, 1).differences == ()
    assert recompute_with_another_state_key(core, training_session_id).differences != ()


def recompute_with_another_state_key(
    core: CoordinatorHarness, training_session_id: str
) -> Recomputation:
    context = dataclasses.replace(core.context, state_key=bytes(32))
    return recompute_version(context, training_session_id, 1)


def test_an_initial_model_has_no_record(core: CoordinatorHarness) -> None:
    training_session_id = publish(core, "fedavg")
    with core.database.read() as session:
        model = global_models.get_model(session, training_session_id, 0)
        assert model is not None

    assert read_outcome(core.context, model) is None
