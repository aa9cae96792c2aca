"""Noise of devices and of helpers: the coordinator never holds the exact sum of masked updates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qflare.evidence.verification import verify_bundle
from qflare.masking import noise
from qflare.v1 import training_pb2, verification_pb2
from qflare_client import (
    Client,
    InsufficientTaskError,
    InvalidRequestError,
    SecureAggregation,
    UnsupportedTaskError,
)
from qflare_server.context import utc_now
from qflare_server.storage.repository import training_sessions
from qflare_server.strategies.accounting import PrivacyLedger, spent
from qflare_server.training.privacy import SEED
from qflare_server.verification.recomputation import recompute_version
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import SecureDeployment, wait_for_version

COUNT = 4_000
NOISE = 2.0
CLIP = 3.0
DELTA = 1e-5
QUORUM = 2
DEVICES = training_pb2.NOISE_SOURCE_DEVICES
HELPER = training_pb2.NOISE_SOURCE_HELPER

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

SecureStart = Callable[..., SecureDeployment]


def session_settings(source: int, **settings: Any) -> dict[str, Any]:
    """Settings of a private training session with noise of a source."""
    policy = {"clip": 0.0, "metrics": [], "noise": source, **settings.pop("policy", {})}
    privacy = {"noise_multiplier": NOISE, "clip_norm": CLIP, "delta": DELTA, "epsilon_budget": 50.0}
    return {
        "arrays": {"w": np.zeros(COUNT, np.float32)},
        "policy": policy,
        "safeguards": training_pb2.SafeguardPolicy(),
        "privacy": training_pb2.PrivacyPolicy(**(privacy | settings.pop("privacy", {}))),
        **settings,
    }


def run_round(clients: list[Client], session_id: str, version: int) -> np.ndarray:
    """Let every device contribute; return the change of the version."""
    for client in clients:
        task = client.get_task(session_id)
        base = client.download_base(task)
        client.submit(task, base, {"w": base.arrays["w"] + np.float32(1.0)}, 500)
    model = wait_for_version(clients[0], session_id, version)
    before = clients[0].download(session_id, version - 1)
    return np.asarray(model.arrays["w"].astype(float) - before.arrays["w"])


def device(made: Deployment, name: str, policy: SecureAggregation | None) -> Client:
    """Enroll a device with a policy; the deployment closes it."""
    made.device(name).close()
    client = Client(home=made.folder / name, secure_aggregation=policy)
    made._clients.append(client)
    return client


def epsilon_of(releases: int) -> float:
    ledger = PrivacyLedger()
    for _ in range(releases):
        ledger = ledger.with_release(NOISE, 1.0)
    return spent(ledger, DELTA).epsilon


@pytest.mark.parametrize("source", [DEVICES, HELPER])
def test_the_noise_is_in_the_sum_and_the_version_repeats_from_it(
    secure: SecureStart, source: int
) -> None:
    """Two helpers each add the whole noise; two devices of a minimum of two add half of the variance each."""
    made = secure(2)
    parts = made.deployment.coordinator.parts
    session_id = made.session(QUORUM, 9, **session_settings(source))
    policy = SecureAggregation(
        QUORUM, {helper.helper_id for helper in made.helpers}, noise_multiplier=NOISE
    )
    clients = [device(made.deployment, f"device-{index}", policy) for index in range(QUORUM)]
    whole = NOISE * CLIP / QUORUM * (2**0.5 if source == HELPER else 1)
    for version in (1, 2):
        change = run_round(clients, session_id, version)
        assert change.std() == pytest.approx(whole, rel=0.06)
        assert change.mean() == pytest.approx(CLIP / COUNT**0.5, abs=6 * whole / COUNT**0.5)
        statement = clients[0].download(session_id, version).statement
        assert (statement.epsilon, statement.delta) == (pytest.approx(epsilon_of(version)), DELTA)
        found = recompute_version(parts.context, session_id, version)
        assert (found.recomputed, found.differences) == (True, ())
    with parts.database.read() as session:
        row = training_sessions.get_session(session, session_id)
    assert row is not None
    assert SEED not in (row.privacy_state or {})
    bundle = verification_pb2.VerificationBundle()
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    verified = verify_bundle(bundle, parts.keys.trust.root_key_ids(), utc_now())
    assert set(verified.helper_ids) == {helper.helper_id for helper in made.helpers}
