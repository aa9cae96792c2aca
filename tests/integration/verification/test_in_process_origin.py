"""Updates of embedding programs are marked as such everywhere, and mixed with those of devices nowhere."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from qflare.evidence.verification import VerificationError
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare_server.serving.embedded import CALLER
from qflare_server.storage.tables import GlobalModel, ModelUpdate
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices
from qflare_server.use_cases.in_process.training import Contribution, InProcess
from qflare_server.verification import verify_database
from tests.independent import bundle as independent
from tests.independent.verifier import RefusedError
from tests.support.finished_session import Bundle, Trained

SESSION = "in-process-1"


@dataclass
class Program:
    """A program that embeds a serving coordinator, with one version made of two contributions."""

    trained: Trained

    @property
    def parts(self) -> Any:
        return self.trained.deployment.coordinator.parts

    def execute(self, statement: Any) -> None:
        self.parts.database.write(lambda session: session.execute(statement))

    def findings(self) -> list[str]:
        report = verify_database(self.parts.context, self.trained.pins, read_bytes=False)
        return [str(found) for found in report.findings]

    def check_independently(self, bundle: Bundle) -> None:
        independent.check_bundle(bundle, self.trained.pins, 1, datetime.now(UTC))


@pytest.fixture
def program(deploy: Callable[..., Any]) -> Program:
    deployment = deploy()
    parts = deployment.coordinator.parts
    in_process = InProcess(parts.context, parts.executor, parts.use_cases.training)
    for name, value in (("one", 1.0), ("two", 3.0)):
        KnownDevices(parts.context).add(CALLER, KnownDevice(name, Profile()))
        data = np.full(3, value, "<f4").tobytes()
        in_process.contribute(CALLER, Contribution(name, data, 1, {}))
    in_process.close_round(2)
    parts.context.wake()
    while in_process.progress().session.current_version < 1:  # type: ignore[union-attr]
        threading.Event().wait(0.02)
    return Program(Trained(deployment, SESSION, []))


def test_they_are_marked_for_administrators_and_auditors(program: Program) -> None:
    trained = program.trained
    stub, metadata = trained.deployment.admin, trained.deployment.metadata
    named = admin_pb2.DescribeGlobalModelRequest(training_session_id=SESSION, version=1)
    rows = admin_pb2.ListUpdatesRequest(training_session_id=SESSION, round_number=1)

    model = stub.DescribeGlobalModel(named, metadata=metadata).global_model
    updates = stub.ListUpdates(rows, metadata=metadata).updates
    bundle = trained.bundle(1)
    report = trained.verify(bundle)
    program.check_independently(bundle)

    assert (model.participant_count, model.in_process_count) == (2, 2)
    assert [item.in_process for item in updates] == [True, True]
    assert (report.contributor_count, report.signed_count, report.in_process_count) == (2, 0, 2)
    assert report.missing == ("2 updates are in-process: no device signed them",)
    assert program.findings() == []


def test_a_bundle_cannot_hide_that_an_update_is_in_process(program: Program) -> None:
    bundle = program.trained.bundle(1)
    bundle.updates[0].in_process = False

    with pytest.raises(VerificationError, match="in_process_count"):
        program.trained.verify(bundle)
    with pytest.raises(RefusedError):
        program.check_independently(bundle)


@pytest.mark.parametrize(
    "edit",
    [update(ModelUpdate).values(origin="device"), update(GlobalModel).values(in_process_count=0)],
)
def test_an_edited_origin_is_found(program: Program, edit: Any) -> None:
    program.execute(edit)

    assert any("origin" in found or "in_process_count" in found for found in program.findings())
