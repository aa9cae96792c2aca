"""A coordinator with real helper processes, and devices that train by a rule."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from qflare.evidence.verification import VerificationError, verify_bundle
from qflare.v1 import training_pb2, verification_pb2
from qflare_client import Client, GlobalModel, NotFoundError
from qflare_client.models.masked_update import add_masks
from qflare_server.context import utc_now
from qflare_server.keys.setup import bootstrap_bundle
from tests.independent.bundle import check_bundle
from tests.independent.verifier import RefusedError
from tests.integration.conftest import Deployment
from tests.support.helpers import HelperProcess
from tests.support.lying_helper import LyingHelper

TIMEOUT_S: Final = 30

WEIGHTS: Final[dict[str, np.ndarray]] = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "steps": np.arange(3, dtype=np.int64),
    "b": np.zeros(5, np.float64),
}


class SecureDeployment:
    """A coordinator with helpers.

    Attributes:
        deployment: The coordinator.
        helpers: Running helpers.
    """

    def __init__(self, deployment: Deployment, helpers: list[HelperProcess]) -> None:
        self.deployment = deployment
        self.helpers = helpers

    def session(
        self,
        quorum: int = 3,
        round_count: int = 1,
        *,
        arrays: dict[str, np.ndarray] | None = None,
        policy: dict[str, Any] | None = None,
        **config: Any,
    ) -> str:
        """Create and start a training session with secure aggregation; return its id."""
        settings: dict[str, Any] = {
            "mode": training_pb2.SECURE_AGGREGATION_MODE_HELPER,
            "clip": 100.0,
            "helpers": [helper.helper_id for helper in self.helpers],
            "metrics": [training_pb2.MaskedMetric(name="loss", bound=10.0)],
        }
        config.setdefault("rounds", training_pb2.RoundPolicy(quorum=quorum))
        config.setdefault("safeguards", training_pb2.SafeguardPolicy(max_example_count=1000))
        config.setdefault(
            "transfer",
            training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
        )
        return self.deployment.session(
            WEIGHTS if arrays is None else arrays,
            total_rounds=round_count,
            secure_aggregation=training_pb2.SecureAggregationPolicy(**(settings | (policy or {}))),
            **config,
        )


def trained(arrays: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    """Return what device `index` makes of a version."""
    random = np.random.default_rng(index)
    return {
        name: values + random.standard_normal(values.shape).astype(values.dtype)
        for name, values in arrays.items()
    }


def contribute(client: Client, session_id: str, index: int) -> tuple[dict[str, np.ndarray], Any]:
    """Let a device take part in the open round; return its change and its receipt."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    arrays = trained(base.arrays, index)
    receipt = client.submit(task, base, arrays, 100 * (index + 1), {"loss": 0.5 * index, "x": 1.0})
    change = {name: arrays[name].astype(float) - base.arrays[name] for name in arrays}
    return change, receipt


def check_refused(
    bundle: verification_pb2.VerificationBundle,
    pinned: Any,
    change: Callable[[verification_pb2.VerificationBundle], object],
) -> None:
    """Check that both verifiers refuse a bundle of version 1 in which something about its sums was changed."""
    other = verification_pb2.VerificationBundle()
    other.CopyFrom(bundle)
    change(other)
    with pytest.raises(VerificationError) as caught:
        verify_bundle(other, pinned, utc_now())
    assert caught.value.step == "unmasking"
    with pytest.raises(RefusedError):
        check_bundle(other, pinned, 1, utc_now())


def wait_for_version(client: Client, session_id: str, version: int) -> GlobalModel:
    """Return a version once it is published."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            return client.download(session_id, version)
        except NotFoundError:
            threading.Event().wait(0.02)
    raise AssertionError("no version was published")


def wait_for_round(client: Client, session_id: str, number: int) -> None:
    """Wait until a round is open to a device."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if client.get_task(session_id).round_number == number:
            return
        threading.Event().wait(0.02)
    raise AssertionError("the round was not opened")


SecureStart = Callable[..., SecureDeployment]
OpenLyingHelper = Callable[[SecureDeployment], LyingHelper]


@pytest.fixture
def secure(deploy: Callable[..., Deployment], tmp_path: Path) -> Iterator[SecureStart]:
    """Return a function that starts a coordinator with some helpers."""
    running: list[HelperProcess] = []

    def start(helper_count: int = 1, min_cohort: int = 2, **settings: Any) -> SecureDeployment:
        folder = tmp_path / "helpers"
        deployment = deploy(helper_dir=folder, worker_poll_s=0.02, **settings)
        pinned = bootstrap_bundle(deployment.coordinator.parts.keys.trust, "localhost:1")
        helpers = []
        for index in range(helper_count):
            helper = HelperProcess(tmp_path / f"helper-{index}", pinned, folder, min_cohort)
            helper.start()
            running.append(helper)
            helpers.append(helper)
        return SecureDeployment(deployment, helpers)

    yield start
    for helper in running:
        helper.stop()


@pytest.fixture
def open_lying_helper() -> Iterator[OpenLyingHelper]:
    """Return a function that puts a lying helper before the first one of a deployment."""
    opened: list[LyingHelper] = []

    def start(made: SecureDeployment) -> LyingHelper:
        opened.append(LyingHelper(made.helpers[0]))
        return opened[-1]

    yield start
    for liar in opened:
        liar.close()


def repeat_seed(patch: pytest.MonkeyPatch) -> None:
    """Let devices mask every update with the same seed."""
    defaults = add_masks.__kwdefaults__
    assert defaults is not None
    patch.setitem(defaults, "draw_seed", lambda: b"s" * 32)
