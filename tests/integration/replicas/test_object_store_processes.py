"""Coordinators as processes of their own on an object store: a kill under an upload."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qflare.tensors import assemble
from qflare_server.config import ServerConfig
from qflare_server.payloads.reader import read_chunks
from qflare_server.serving.application import Application, open_application
from qflare_server.storage.payload_records import describe
from qflare_server.storage.payload_store.objects import PART_BYTES
from qflare_server.storage.repository import global_models, payloads
from qflare_server.training.versions import manifest_of
from qflare_server.verification.payload_stores import verify_payloads
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.jobs import enroll_devices, prepare, wait_for_end
from tests.support.processes import DeviceThread, Replicas, trained

pytestmark = pytest.mark.slow

LARGE = {"w": np.zeros(PART_BYTES // 4 + 1000, np.float32)}  # two parts
WAIT_S = 60.0


@pytest.fixture(params=["sqlite"])
def database_url(sqlite_url: str) -> str:
    """Return the URL of a database of the test's own; the store is the same with both databases."""
    return sqlite_url


@pytest.fixture
def bucket(
    parts: Application, object_settings: dict[str, Any], database_url: str, tmp_path: Path
) -> Iterator[Application]:
    """Yield the use cases with their payloads in an object store."""
    del parts  # made the keys
    config = ServerConfig(
        data_dir=tmp_path / "coordinator", database_url=database_url, **object_settings
    ).checked()
    with open_application(config) as opened:
        yield opened


def test_an_upload_goes_on_after_the_coordinator_was_killed_under_it(
    bucket: Application,
    object_settings: dict[str, Any],
    object_store_endpoint: str,
    database_url: str,
    tmp_path: Path,
) -> None:
    session_id = prepare(bucket, LARGE, quorum=1, rounds=1)
    with FaultProxy(object_store_endpoint) as proxy, ExitStack() as stack:
        settings = object_settings | {"object_store_endpoint": proxy.url}
        replicas = Replicas(tmp_path / "coordinator", database_url, stack)
        coordinator = replicas.start(**settings)
        home = enroll_devices(bucket, tmp_path, coordinator.address)[0]
        proxy.fault = Fault("hang", count=1, methods=("PUT",), after=1)
        thread = DeviceThread(home, 0, session_id)
        thread.start()

        assert proxy.struck.wait(WAIT_S)
        coordinator.kill()
        proxy.fault = None
        coordinator.start()
        wait_for_end([thread], WAIT_S)

    written = [path for method, path in proxy.carried_out if method == "PUT"]
    assert len(set(written)) == len(written), "no part is written twice"
    assert [verdict for verdict in verify_payloads(bucket.context) if verdict.problem] == []
    with bucket.database.read() as session:
        model = global_models.get_model(session, session_id, 1)
        assert model is not None
        stored = describe(payloads.get_payload(session, model.payload_id))
    published = assemble(manifest_of(model), read_chunks(bucket.context, stored))
    assert np.array_equal(published["w"], trained(LARGE, 0, 1)["w"])
