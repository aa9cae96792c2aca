"""Noise of devices and of helpers: the coordinator never holds the exact sum of masked updates."""

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import qflare
from qflare.evidence.verification import verify_bundle
from qflare.masking import noise
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import Client, InsufficientTaskError, SecureAggregation, UnsupportedTaskError
from qflare_client.tasks import TaskKind
from qflare_helper.errors import NoiseUnavailableError
from qflare_helper.unmasking import _require_sampler
from qflare_server.context import utc_now
from qflare_server.storage.repository import training_sessions
from qflare_server.strategies.accounting import PrivacyLedger, spent
from qflare_server.training.privacy import SEED
from qflare_server.use_cases.access.roles import Role
from qflare_server.verification.recomputation import recompute_version
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import (
    SecureStart,
    wait_for_round,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_attacks import LyingCoordinator
from tests.integration.secure_aggregation.test_neighbors import together, until
from tests.support.visitor import Visitor

COUNT = 4_000
NOISE = 2.0
CLIP = 3.0
DELTA = 1e-5
QUORUM = 2
DEVICES = training_pb2.NOISE_SOURCE_DEVICES
HELPER = training_pb2.NOISE_SOURCE_HELPER

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


RUN_FROM = """
import sys
sys.path[:0] = {paths}
from qflare_helper.__main__ import main
sys.exit(main())
"""

LARGE = {"arrays": {"w": np.zeros(40_000, np.float32)}}


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


def contribute(client: Client, session_id: str) -> None:
    """Let a device take part in the open round."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    client.submit(task, base, {"w": base.arrays["w"] + np.float32(1.0)}, 500)


def run_round(clients: list[Client], session_id: str, version: int) -> np.ndarray:
    """Let every device contribute; return the change of the version."""
    for client in clients:
        contribute(client, session_id)
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
    made = secure(2, dashboard="127.0.0.1:0")
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
        assert statement.epsilon == pytest.approx(epsilon_of(version))
        assert statement.delta == DELTA
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
    assert made.deployment.coordinator.dashboard is not None
    viewer = Visitor(made.deployment.coordinator.dashboard.url)
    viewer.log_in(made.deployment.issue_admin(Role.VIEWER))
    page = viewer.get(f"/sessions/{session_id}/versions/2").text
    assert f"noise by {'the helpers' if source == HELPER else 'the devices'}" in page


def test_devices_with_neighbors_add_their_shares(deploy: Callable[..., Deployment]) -> None:
    """Three devices of a minimum of two add half as much variance again as the noise has at least."""
    made, count = deploy(worker_poll_s=0.02), 3
    settings = session_settings(DEVICES)
    policy = {"mode": training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS, "min_cohort": 2}
    session_id = made.session(
        settings.pop("arrays"),
        total_rounds=1,
        rounds=training_pb2.RoundPolicy(quorum=count, target=count),
        secure_aggregation=training_pb2.SecureAggregationPolicy(
            **(settings.pop("policy") | policy)
        ),
        transfer=training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
        **settings,
    )
    own = SecureAggregation(2, (), neighbors=True, noise_multiplier=NOISE)
    clients = [device(made, f"device-{index}", own) for index in range(count)]

    def work(index: int) -> None:
        until(clients[index], session_id, lambda task: task.kind is TaskKind.TRAIN)
        contribute(clients[index], session_id)
        until(clients[index], session_id, lambda task: task.kind is TaskKind.DONE)

    together(work, count)
    change = wait_for_version(clients[0], session_id, 1).arrays["w"].astype(float)
    assert change.std() == pytest.approx(NOISE * CLIP / count * 1.5**0.5, rel=0.06)
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert (found.recomputed, found.differences) == (True, ())


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("secure_aggregation.noise", {"privacy": {"noise_multiplier": 0.0}}),
    ("secure_aggregation.noise", {"policy": {"noise": 9}}),
    ("secure_aggregation.noise", {"policy": {"mode": 2, "helpers": [], "noise": HELPER}}),
    ("privacy.accountant", {"privacy": {"accountant": training_pb2.PRIVACY_ACCOUNTANT_PLD}}),
    ("secure_aggregation.bits", {"policy": {"bits": 16}, "privacy": {"noise_multiplier": 1e-4}}),
    ("secure_aggregation.bits", {"policy": {"bits": 16}, "privacy": {"noise_multiplier": 1e5}}),
    ("secure_aggregation.metrics", {"policy": {"metrics": [{"name": "loss", "bound": 1.0}]}}),
]


@on_sqlite
def test_what_has_no_room_or_no_noise_is_refused_at_creation(secure: SecureStart) -> None:
    made = secure()
    for field, config in CONTRADICTIONS:
        with pytest.raises(grpc.RpcError) as caught:
            made.session(3, **session_settings(DEVICES, **config))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, error.details())
        assert field in error.details(), error.details()
    with pytest.raises(grpc.RpcError, match="twice the square root of the number"):
        made.session(
            QUORUM, **session_settings(HELPER, policy={"bits": 16, "max_cohort": 1000}) | LARGE
        )


@on_sqlite
def test_a_device_that_cannot_draw_noise_refuses_before_it_trains(
    secure: SecureStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secure()
    session_id = made.session(QUORUM, **session_settings(DEVICES))
    client = made.deployment.device("device")
    assert client.get_task(session_id).masking is not None
    monkeypatch.setattr(noise, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedTaskError, match=r"qflare\[device-noise\]"):
        client.get_task(session_id)
    with pytest.raises(NoiseUnavailableError):
        _require_sampler()


@on_sqlite
def test_a_round_whose_helper_cannot_draw_noise_fails_and_says_why(
    secure: SecureStart, tmp_path: Path
) -> None:
    """The helper is a process whose import path lacks OpenDP: it answers nothing."""
    made = secure()
    session_id = made.session(QUORUM, 2, **session_settings(HELPER))
    helper, path = made.helpers[0], tmp_path / "without-opendp"
    path.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("opendp"):
            (path / entry.name).symlink_to(entry)
    helper.stop()
    root = Path(qflare.__file__).parents[1]
    helper.interpreter = (sys.executable, "-S", "-c", RUN_FROM.format(paths=[str(path), str(root)]))
    helper.start()
    clients = [made.deployment.device(f"device-{index}") for index in range(QUORUM)]
    for client in clients:
        contribute(client, session_id)
    wait_for_round(clients[0], session_id, 2)
    with made.deployment.coordinator.parts.database.read() as session:
        failed = training_sessions.get_round(session, session_id, 1)
    assert failed is not None
    assert failed.version is None
    assert f"helper {helper.helper_id}: the noise of this task needs" in failed.state_reason
    helper.stop()
    helper.interpreter = (sys.executable, "-m", "qflare_helper")
    helper.start()
    for client in clients:
        contribute(client, session_id)
    assert wait_for_version(clients[0], session_id, 1).statement.round_number == 2


@on_sqlite
def test_a_device_trains_for_no_task_with_less_noise(secure: SecureStart) -> None:
    """Neither a session with noise of the coordinator nor one with less noise is trained for."""
    made = secure()
    helpers = {made.helpers[0].helper_id}
    central = made.session(QUORUM, **session_settings(0))
    less = made.session(QUORUM, **session_settings(HELPER, privacy={"noise_multiplier": 1.0}))
    own = device(made.deployment, "device", SecureAggregation(2, helpers, noise_multiplier=NOISE))
    for session_id in (central, less):
        with pytest.raises(InsufficientTaskError, match="this device requires 2"):
            own.get_task(session_id)


@pytest.fixture
def liar(secure: SecureStart) -> LyingCoordinator:
    """Return a coordinator whose round has noise of the helper and two updates, and is not closed."""
    made = secure()
    session_id = made.session(3, **session_settings(HELPER, policy={"min_cohort": 2}))
    for index in range(2):
        contribute(made.deployment.device(f"device-{index}"), session_id)
    return LyingCoordinator(made, session_id)


def answer_of(responses: list[messages.UnmaskResponse]) -> security_pb2.UnmaskingAnswer:
    return security_pb2.UnmaskingAnswer.FromString(responses[0].answer.answer.payload)


@on_sqlite
def test_a_helper_draws_the_noise_of_a_set_once(liar: LyingCoordinator) -> None:
    helper = liar._helper
    kept = (helper.home / "policy.toml").read_text()
    (helper.home / "policy.toml").write_text("min_cohort = 2\nnoise_multiplier = 2.5\n")
    assert "want at least 2.5" in (text := liar.refusal(liar.members)), text
    (helper.home / "policy.toml").write_text(kept)
    first = liar.ask(liar.members)
    assert answer_of(first).noise_multiplier == NOISE
    helper.kill()
    helper.start()
    assert liar.ask(list(reversed(liar.members))) == first
    assert "1 answers with 2 updates verified" in helper.run("audit", "verify")
