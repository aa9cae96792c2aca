"""What docs/protocol.md says of `strategy_name` and `config_digest`, in the statements of a real session."""

import hashlib
from collections.abc import Callable
from typing import Any

from qflare.v1 import admin_service_pb2 as admin_pb2
from tests.integration.client.test_device import ONE_DEVICE, take_part, wait_for_training


def test_every_version_names_its_strategy_and_the_configuration_of_the_session(
    deploy: Callable[..., Any],
) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=5)
    client = deployment.device("ward")
    take_part(client, session_id)
    wait_for_training(client, session_id)
    deployment.admin.RollbackGlobalModel(
        admin_pb2.RollbackGlobalModelRequest(training_session_id=session_id, version=0),
        metadata=deployment.metadata,
    )

    versions = [found.statement for found in client.lineage(session_id)]
    session = deployment.admin.GetTrainingSession(
        admin_pb2.GetTrainingSessionRequest(training_session_id=session_id),
        metadata=deployment.metadata,
    ).training_session

    assert [found.strategy_name for found in versions] == ["initial", "fedavg", "rollback"]
    serialized = session.config.SerializeToString(deterministic=True)
    wanted = hashlib.sha256(b"\0" + serialized).hexdigest()
    assert {found.config_digest for found in versions} == {wanted}
