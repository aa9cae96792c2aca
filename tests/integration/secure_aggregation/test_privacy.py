"""Central differential privacy on the sum of masked updates, from real devices to the published version."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.masking.parameters import MaskingParameters
from qflare.v1 import training_pb2, verification_pb2
from qflare_client import Client
from qflare_server.aggregation import aggregator
from qflare_server.aggregation.fold import RoundFold
from qflare_server.aggregation.folds import open_fold
from qflare_server.aggregation.masked_fold import BOUND_TO_STATEMENTS
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.context import Context, utc_now
from qflare_server.strategies import REVISION
from qflare_server.strategies.accounting import PrivacyLedger, spent
from qflare_server.training.versions import find_version
from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import SecureDeployment, wait_for_version

COUNT = 40_000
NOISE = 2.0
CLIP = 3.0
DELTA = 1e-5
QUORUM = 2


def epsilon_of(releases: int) -> float:
    ledger = PrivacyLedger()
    for _ in range(releases):
        ledger = ledger.with_release(NOISE, 1.0)
    return spent(ledger, DELTA).epsilon


def private_session(made: SecureDeployment, bits: int = 32) -> str:
    """Create a session whose budget lasts for two versions and a little."""
    privacy = training_pb2.PrivacyPolicy(
        noise_multiplier=NOISE,
        clip_norm=CLIP,
        delta=DELTA,
        epsilon_budget=epsilon_of(2) * 1.01,
    )
    return made.session(
        QUORUM,
        9,
        arrays={"w": np.zeros(COUNT, np.float32)},
        policy={"clip": 0.0, "metrics": [], "bits": bits},
        safeguards=training_pb2.SafeguardPolicy(),
        privacy=privacy,
    )


def run_round(clients: list[Client], session_id: str, version: int) -> np.ndarray:
    """Let every device contribute; return the change of the version."""
    for client in clients:
        task = client.get_task(session_id)
        base = client.download_base(task)
        arrays = {"w": base.arrays["w"] + np.float32(1.0)}
        client.submit(task, base, arrays, 500, {"loss": 0.5})
    model = wait_for_version(clients[0], session_id, version)
    before = clients[0].download(session_id, version - 1)
    return np.asarray(model.arrays["w"].astype(float) - before.arrays["w"])


def test_a_sum_gets_noise_and_its_version_states_epsilon(
    secure: Callable[..., SecureDeployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 is published by the rules of an earlier release, version 2 by those of this one."""
    revisions = {1: BOUND_TO_STATEMENTS, 2: REVISION}

    def open_by_rules(context: Context, plan: RoundPlan, **settings: Any) -> RoundFold:
        return open_fold(context, plan, revision=revisions[plan.number], **settings)

    monkeypatch.setattr(aggregator, "open_fold", open_by_rules)
    made = secure()
    parts = made.deployment.coordinator.parts
    session_id = private_session(made)
    clients = [made.deployment.device(f"device-{index}") for index in range(QUORUM)]
    for version, revision in revisions.items():
        change = run_round(clients, session_id, version)
        # A clipped change has elements of CLIP / sqrt(COUNT), the mean of equal ones as well.
        assert change.std() == pytest.approx(NOISE * CLIP / QUORUM, rel=0.03)
        assert change.mean() == pytest.approx(CLIP / COUNT**0.5, abs=6 * 3.0 / COUNT**0.5)
        statement = clients[0].download(session_id, version).statement
        assert statement.epsilon == pytest.approx(epsilon_of(version))
        assert statement.delta == DELTA
        assert statement.weight_sum == QUORUM
        assert dict(statement.metrics) == {}
        found = recompute_version(parts.context, session_id, version)
        assert (found.recomputed, found.differences) == (True, ())
        with parts.database.read() as session:
            _, model = find_version(session, session_id, version)
        assert model.strategy_state["revision"] == revision
    assert parts.use_cases.training.get(session_id).state == "completed"
    bundle = verification_pb2.VerificationBundle()
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    verified = verify_bundle(bundle, parts.keys.trust.root_key_ids(), utc_now())
    assert verified.helper_ids == (made.helpers[0].helper_id,)


def test_the_noise_covers_rounding(secure: Callable[..., SecureDeployment]) -> None:
    """With 16 bits a level is coarse: the error of all elements together is longer than the clipped change."""
    made = secure()
    session_id = private_session(made, bits=16)
    clients = [made.deployment.device(f"device-{index}") for index in range(QUORUM)]
    change = run_round(clients, session_id, 1)
    scale = MaskingParameters(16, CLIP, QUORUM, 1, {}).scale
    sensitivity = CLIP + COUNT**0.5 / scale
    assert change.std() == pytest.approx(NOISE * sensitivity / QUORUM, rel=0.03)
