"""A training job of three devices whose every update is kept, and the check that nothing was lost or taken twice."""

import time
from pathlib import Path
from typing import Final

import numpy as np

from qflare.tensors import Array, Manifest, assemble, chunks
from qflare.v1 import admin_service_pb2, training_pb2
from qflare_client import Tls, enroll
from qflare_server.aggregation.fold import RoundFold
from qflare_server.aggregation.plan import read_plan
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.payloads.reader import read_chunks
from qflare_server.serving.application import Application
from qflare_server.storage.payload_records import describe
from qflare_server.storage.records import Round
from qflare_server.storage.repository import (
    global_models,
    payloads,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.training.versions import manifest_of
from tests.support.processes import DeviceThread

DEVICES: Final = 3
ROUNDS: Final = 8
SMALL: Final[dict[str, Array]] = {
    "w": np.zeros((300, 7), np.float32),
    "b": np.zeros(5, np.float64),
}


def prepare(
    parts: Application,
    weights: dict[str, Array] | None = None,
    *,
    quorum: int = DEVICES,
    deadline_s: int = 0,
    rounds: int = ROUNDS,
    secure: training_pb2.SecureAggregationPolicy | None = None,
    sealed: bool = False,
    strategy: training_pb2.StrategyConfig | None = None,
) -> str:
    """Create and start a training session whose every update is kept; return its id."""
    weights = SMALL if weights is None else weights
    manifest = Manifest.from_arrays(weights)
    config = training_pb2.TrainingConfig(total_rounds=rounds)
    config.rounds.quorum = quorum
    if deadline_s:
        config.rounds.deadline.seconds = deadline_s
    if secure is not None:
        config.secure_aggregation.CopyFrom(secure)
        config.safeguards.max_example_count = 1000
    if strategy is not None:
        config.strategy.CopyFrom(strategy)
        config.rounds.max_staleness = rounds
    config.transfer.sealed = sealed
    config.transfer.payload_retention = training_pb2.PAYLOAD_RETENTION_ALL
    training = parts.use_cases.training
    created = training.create(SYSTEM, name="crash", model_type="", architecture={}, config=config)
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=created.id, manifest=manifest.to_proto()
    )
    parts.use_cases.initial_models.upload(SYSTEM, header, enumerate(chunks(weights, manifest)))
    training.start(SYSTEM, created.id)
    return created.id


def enroll_devices(
    parts: Application, tmp_path: Path, address: str, tls: Tls | None = None
) -> list[Path]:
    """Enroll the devices at a coordinator; return their homes."""
    homes = [tmp_path / f"device-{index}" for index in range(DEVICES)]
    for home in homes:
        secret = parts.use_cases.tokens.issue_enrollment(SYSTEM)[0].secret
        bundle = bootstrap_bundle(parts.keys.trust, address, enrollment_token=secret)
        enroll(bundle, home=home, tls=tls)
    return homes


def recompute(parts: Application, session_id: str, round_row: Round) -> dict[str, np.ndarray]:
    """Fold the kept updates of a round again, in the order of their acceptance."""
    with parts.database.read() as session:
        plan = read_plan(session, session_id, round_row.number, round_row.base_version)
        accepted = updates.accepted_after(session, session_id, round_row.number, 0, 100)
    fold = RoundFold(parts.context, plan)
    fold.take(accepted)
    received = fold.write(parts.executor, parts.context.clock()).payload
    assert received.data is not None
    return assemble(plan.manifest, [received.data])


def check_every_version(parts: Application, session_id: str) -> None:
    """Versions are gapless, and each has the bytes of an undisturbed run over the same accepted updates."""
    for version in range(1, ROUNDS + 1):
        with parts.database.read() as session:
            model = global_models.get_model(session, session_id, version)
            assert model is not None
            round_row = training_sessions.get_round(session, session_id, model.round_number)
            stored = describe(payloads.get_payload(session, model.payload_id))
        assert round_row is not None
        assert (model.base_version, model.participant_count) == (version - 1, DEVICES)
        published = assemble(manifest_of(model), read_chunks(parts.context, stored))
        for name, values in recompute(parts, session_id, round_row).items():
            assert values.tobytes() == published[name].tobytes()


def wait_for_end(threads: list[DeviceThread], seconds: float) -> None:
    """Wait until every device has finished."""
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.1, end - time.monotonic()))
        assert thread.failure is None
        assert not thread.is_alive()
