"""Memory of a large model: what a device and a coordinator hold of it at once, measured on real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qflare.tensors import Array, Manifest, assemble, chunks
from qflare.v1 import admin_service_pb2, training_pb2
from qflare_client import enroll
from qflare_client.models.upload import delta_pieces
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import SYSTEM
from tests.support.processes import Replicas

PAYLOAD_BYTES = 256 * 2**20
"""In one tensor."""

COORDINATOR_BYTES = 400 * 2**20
"""Less than the total of an aggregation of that tensor in float64, and more than slices, buffers and caches take."""

DEVICE = """\
import resource
import sys

from qflare_client import Client, run


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(arrays, config):
    arrays["w"] += 1
    return arrays, 1, {}


if __name__ == "__main__":
    with Client(home=sys.argv[1]) as client:
        client.heartbeat()
        before = peak_bytes()
        summary = run(client, train, training_session_id=sys.argv[2], patience_s=60.0)
        assert summary.update_count == 2, summary
        print(peak_bytes() - before)
"""


def start_session(parts: Application, kind: training_pb2.UpdateKind.ValueType) -> str:
    """Create and start a training session of two rounds on one large tensor; return its id."""
    config = training_pb2.TrainingConfig(total_rounds=2)
    config.rounds.quorum = 1
    config.transfer.update_kind = kind
    weights = {"w": np.zeros(PAYLOAD_BYTES // 4, np.float32)}
    manifest = Manifest.from_arrays(weights)
    created = parts.use_cases.training.create(
        SYSTEM, name="large", model_type="", architecture={}, config=config
    )
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=created.id, manifest=manifest.to_proto()
    )
    parts.use_cases.initial_models.upload(SYSTEM, header, enumerate(chunks(weights, manifest)))
    parts.use_cases.training.start(SYSTEM, created.id)
    return created.id


def peak_bytes_of(process_id: int) -> int:
    """Return the largest resident memory that a running process has had."""
    status = Path(f"/proc/{process_id}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("kind", "device_copies"),
    [(training_pb2.UPDATE_KIND_WEIGHTS, 1), (training_pb2.UPDATE_KIND_DELTA, 2)],
    ids=["weights", "delta"],
)
def test_a_large_tensor_is_held_few_times(
    parts: Application,
    replicas: Replicas,
    tmp_path: Path,
    kind: training_pb2.UpdateKind.ValueType,
    device_copies: int,
) -> None:
    """A device holds what it trains, and the base of a delta; a coordinator slices of it, whatever its size."""
    session_id = start_session(parts, kind)
    coordinator = replicas.start()
    assert coordinator.process is not None
    before = peak_bytes_of(coordinator.process.pid)
    secret = parts.use_cases.tokens.issue_enrollment(SYSTEM)[0].secret
    bundle = bootstrap_bundle(parts.keys.trust, coordinator.address, enrollment_token=secret)
    enroll(bundle, home=tmp_path / "device")
    (tmp_path / "device.py").write_text(DEVICE)

    done = subprocess.run(
        [sys.executable, os.fspath(tmp_path / "device.py"), tmp_path / "device", session_id],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (device_copies + 0.2) * PAYLOAD_BYTES
    grown_bytes = peak_bytes_of(coordinator.process.pid) - before
    assert grown_bytes < COORDINATOR_BYTES


Make = Callable[[], Array]


@pytest.mark.parametrize(
    "make",
    [
        partial(np.full, (3, 700_001), 2.5, np.float32),
        partial(np.full, 1_000_003, 1.5, ml_dtypes.bfloat16),
        partial(np.full, (), 4.0, np.float64),
        partial(np.zeros, (0, 3), np.float16),
    ],
)
def test_a_delta_in_pieces_is_the_delta(make: Make) -> None:
    arrays: dict[str, Array] = {"w": make(), "count": np.array([7, 8], np.int64)}
    base: dict[str, Array] = {"w": make() * 0 + 1, "count": np.array([1, 1], np.int64)}
    base = {name: array.astype(arrays[name].dtype) for name, array in base.items()}
    manifest = Manifest.from_arrays(arrays)

    got = assemble(manifest, delta_pieces(arrays, base, manifest))

    np.testing.assert_array_equal(got["w"], np.asarray(arrays["w"] - base["w"]))
    np.testing.assert_array_equal(got["count"], arrays["count"])
