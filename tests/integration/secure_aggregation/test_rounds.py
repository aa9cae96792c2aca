"""Rounds with secure aggregation, from real devices to the published version."""

from functools import partial
from typing import Any, Final

import grpc
import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.v1 import verification_pb2
from qflare_client import Client, InsufficientTaskError, SecureAggregation
from qflare_server.context import utc_now
from qflare_server.verification.recomputation import recompute_version
from tests.independent.bundle import check_bundle
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    SecureStart,
    check_refused,
    contribute,
    wait_for_round,
    wait_for_version,
)


def test_the_version_is_the_weighted_mean_up_to_quantization(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=3)
    clients = [made.deployment.device(f"device-{index}") for index in range(3)]
    changes = [contribute(client, session_id, index)[0] for index, client in enumerate(clients)]
    model = wait_for_version(clients[0], session_id, 1)
    weights = np.array([100, 200, 300])
    for name in ("w", "b"):
        mean = sum(w * change[name] for w, change in zip(weights, changes, strict=True)) / 600
        got = model.arrays[name].astype(float) - WEIGHTS[name]
        assert np.abs(got - mean).max() < 1e-5
    assert model.arrays["steps"].tolist() == [0, 1, 2]
    assert model.statement.example_count == 600
    assert abs(model.statement.metrics["train_loss"] - (200 * 0.5 + 300 * 1.0) / 600) < 1e-5
    assert dict(model.statement.metrics).keys() == {"train_loss"}
    found = recompute_version(made.deployment.coordinator.parts.context, session_id, 1)
    assert found.recomputed
    assert found.differences == ()


def test_two_helpers_and_several_rounds(secure: SecureStart) -> None:
    made = secure(helper_count=2)
    session_id = made.session(quorum=2, round_count=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for version in (1, 2):
        changes = [contribute(client, session_id, index)[0] for index, client in enumerate(clients)]
        model = wait_for_version(clients[0], session_id, version)
        base = clients[0].download(session_id, version - 1)
        mean = (100 * changes[0]["w"] + 200 * changes[1]["w"]) / 300
        assert np.abs(model.arrays["w"].astype(float) - base.arrays["w"] - mean).max() < 1e-5
        assert len(model.statement.unmasking.answer_digests) == 2


def test_the_bundle_of_a_version_verifies_offline_with_its_transcript(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=2)
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_version(clients[0], session_id, 1)
    parts = made.deployment.coordinator.parts
    bundle = verification_pb2.VerificationBundle()
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    pinned = parts.keys.trust.root_key_ids()
    assert verify_bundle(bundle, pinned, utc_now()).helper_ids == (made.helpers[0].helper_id,)
    assert len(check_bundle(bundle, pinned, 1, utc_now())) == 2

    refused = partial(check_refused, bundle, pinned)
    refused(lambda other: other.ClearField("unmasking"))
    refused(lambda other: other.unmasking.ClearField("answers"))
    refused(lambda other: other.unmasking.ClearField("task"))

    def another_answer(other: verification_pb2.VerificationBundle) -> None:
        other.unmasking.answers[0].payload += b"\x98\x06\x01"

    refused(another_answer)


def test_a_helper_that_was_down_answers_later(secure: SecureStart) -> None:
    made = secure()
    session_id = made.session(quorum=2)
    made.helpers[0].kill()
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    made.helpers[0].start()
    model = wait_for_version(clients[0], session_id, 1)
    assert model.statement.contributor_count == 2


def test_a_round_whose_helper_stays_away_fails_and_another_one_opens(secure: SecureStart) -> None:
    made = secure(helper_wait_s=4.0)
    session_id = made.session(quorum=2)
    made.helpers[0].kill()
    clients = [made.deployment.device(f"device-{index}") for index in range(2)]
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    wait_for_round(clients[0], session_id, 2)
    made.helpers[0].start()
    for index, client in enumerate(clients):
        contribute(client, session_id, index)
    assert wait_for_version(clients[0], session_id, 1).statement.round_number == 2


def test_a_device_refuses_less_than_its_policy(secure: SecureStart) -> None:
    made = secure()
    secret = made.session(quorum=2)
    plain = made.deployment.session(dict(WEIGHTS), rounds={"quorum": 2})
    helper_id = made.helpers[0].helper_id
    trusted = {"helper_key_ids": {helper_id}, "metrics": {"loss"}}
    made.deployment.device("device").close()

    def task(session_id: str, **policy: Any) -> object:
        values = {"min_cohort": 2, **trusted, **policy}
        home = made.deployment.folder / "device"
        with Client(home=home, secure_aggregation=SecureAggregation(**values)) as client:
            return client.get_task(session_id)

    assert task(secret)
    for session_id, policy in (
        (plain, {}),
        (secret, {"min_cohort": 3}),
        (secret, {"helper_key_ids": {"0" * 64}}),
        (secret, {"metrics": set()}),
    ):
        with pytest.raises(InsufficientTaskError):
            task(session_id, **policy)


PRIVACY: Final = {
    "noise_multiplier": 4.0,
    "clip_norm": 1.0,
    "epsilon_budget": 10.0,
    "delta": 1e-5,
}
CONTRADICTIONS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("strategy.name", {"strategy": {"name": "median"}}),
    ("transfer.update_encoding", {"transfer": {"update_encoding": "ENCODING_INT8"}}),
    ("safeguards.max_example_count", {"safeguards": {}}),
    (
        "safeguards.quarantine_rejections",
        {"safeguards": {"max_example_count": 9, "quarantine_rejections": 3}},
    ),
    ("strategy", {"safeguards": {"max_example_count": 9, "max_norm": 1.0}}),
    ("strategy", {"rounds": {"quorum": 3, "late_update_action": "LATE_UPDATE_ACTION_CARRY"}}),
    ("secure_aggregation.min_cohort", {"policy": {"min_cohort": 4}}),
    ("secure_aggregation.max_cohort", {"policy": {"max_cohort": 2}}),
    ("secure_aggregation.bits", {"policy": {"bits": 8}}),
    ("secure_aggregation.clip", {"policy": {"clip": 0.0}}),
    ("secure_aggregation.helpers", {"policy": {"helpers": []}}),
    ("secure_aggregation.helpers", {"policy": {"helpers": ["0" * 64]}}),
    ("secure_aggregation.mode", {"policy": {"mode": 0}}),
    ("secure_aggregation.clip", {"privacy": PRIVACY, "policy": {"metrics": []}}),
    ("secure_aggregation.metrics", {"privacy": PRIVACY, "policy": {"clip": 0.0}}),
    (
        "privacy.target_quantile",
        {"privacy": {**PRIVACY, "target_quantile": 0.5}, "policy": {"clip": 0.0, "metrics": []}},
    ),
]


def test_contradictions_are_refused_when_the_session_is_created(secure: SecureStart) -> None:
    made = secure()
    for field, config in CONTRADICTIONS:
        with pytest.raises(grpc.RpcError) as caught:
            made.session(**config)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, field
        assert field.rpartition(".")[2] in error.details() or field == "strategy", error.details()
