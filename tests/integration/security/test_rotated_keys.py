"""What devices are shown verifies with the keyset in force, however often keys were rotated meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from qflare.crypto.envelope import open_envelope
from qflare.crypto.signing import InvalidSignatureError, SigningContext
from qflare.evidence.verification import verify_bundle
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import Client, InvalidStatementError
from qflare_client.tasks import TaskKind
from qflare_server.context import utc_now
from qflare_server.keys.rotation import (
    draft_keyset,
    prepare_online,
    publish_keyset,
    replace_stolen,
)
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.keys.trust_documents import most_keys, sign_document
from qflare_server.storage.repository import training_sessions
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.use_cases.training_sessions.administration import Training
from qflare_server.verification import verify_database
from tests.independent.bundle import check_bundle
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import wait_for_round, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import session_of
from tests.support.newer_coordinator import SIGNED, NewerCoordinator
from tests.support.sealing import key_folder, rotate
from tests.support.statements import statement_of

MODEL: Final = security_pb2.KEY_ROLE_MODEL
TASK: Final = security_pb2.KEY_ROLE_TASK
WEIGHTS: Final = {"w": np.zeros(4, np.float32)}
ROLES: Final = {
    SigningContext.TASK: security_pb2.KEY_ROLE_TASK,
    SigningContext.MODEL: security_pb2.KEY_ROLE_MODEL,
    SigningContext.TREE_HEAD: security_pb2.KEY_ROLE_LOG,
}
"""Roles of what is signed online and shown without the keysets of its time."""


class Watch(NewerCoordinator):
    """Forwards every call, and checks each envelope in the answers with the keyset in force."""

    def __init__(self, address: str, keys: ServerKeys) -> None:
        self.seen: set[str] = set()
        self.outdated: set[str] = set()
        self._server_keys = keys
        super().__init__(address, ())

    def _changed(self, method: Any, data: bytes) -> bytes:
        answer = GetMessageClass(method.output_type).FromString(data)
        for path, envelope in _envelopes(answer, method.name):
            self._check(path, envelope)
        return data

    def _check(self, path: str, envelope: security_pb2.SignedEnvelope) -> None:
        role = ROLES.get(SIGNED[path][1])
        if role is None or not envelope.payload:
            return
        try:
            open_envelope(envelope, SIGNED[path][1], self._server_keys.trust.signature_keys(role))
        except InvalidSignatureError:
            self.outdated.add(path)
        self.seen.add(path)


def _envelopes(message: Message, path: str) -> Iterator[tuple[str, Any]]:
    """Yield all envelopes of an answer, with the path of each."""
    for field, value in message.ListFields():
        inner = f"{path}.{field.name}"
        if field.message_type is None or inner.endswith("keysets"):
            continue
        for one in [value] if hasattr(value, "DESCRIPTOR") else list(value):
            if isinstance(one, security_pb2.SignedEnvelope):
                yield inner, one
            elif isinstance(one, Message):
                yield from _envelopes(one, inner)


def _contribute(client: Client, session_id: str, number: int) -> Any:
    wait_for_round(client, session_id, number)
    task = client.get_task(session_id)
    return client.submit(task, client.download_base(task), WEIGHTS, 10)


def _bundle(made: Deployment, session_id: str) -> verification_pb2.VerificationBundle:
    bundle = verification_pb2.VerificationBundle()
    for part in made.coordinator.parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    return bundle


def _training(made: Deployment, *, start: bool = True) -> str:
    return made.session(
        WEIGHTS,
        start=start,
        total_rounds=3,
        rounds=training_pb2.RoundPolicy(quorum=1),
        transfer=training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL),
    )


@pytest.mark.parametrize("rotations", [3, most_keys(MODEL) + 2])
def test_everything_that_is_shown_outlives_the_keys_that_signed_it(
    deploy: Callable[..., Deployment], rotations: int
) -> None:
    made = deploy(worker_poll_s=0.02)
    parts = made.coordinator.parts
    session_id, masked = _training(made), session_of(made, 5, 4)
    first, second = made.device("first"), made.device("second")
    second.download(session_id)
    second.close()
    receipt = _contribute(first, session_id, 1)
    _contribute(first, session_id, 2)
    wait_for_round(first, session_id, 3)

    rotate(made, rotations)
    _bundle(made, session_id)  # signs the next head of the log at once, instead of within seconds

    watch = Watch(made.coordinator.address, parts.keys)
    home = made.folder / "second"
    with closing(watch), Client(home=home, address=watch.address, insecure=True) as client:
        client.get_task(masked)
        _contribute(client, session_id, 3)
        wait_for_version(client, session_id, 3)
        assert len(client.lineage(session_id)) == 4
        client.audit_head()
    made.device("third")
    with closing(Watch(made.coordinator.address, parts.keys)) as second_watch:
        first.close()
        home = made.folder / "first"
        with Client(home=home, address=second_watch.address, insecure=True) as client:
            client.contribution_proof(receipt)
    shown = {path for path, (_, context) in SIGNED.items() if context in ROLES}
    assert watch.seen | second_watch.seen == shown
    assert watch.outdated | second_watch.outdated == set()
    pins = parts.keys.trust.root_key_ids()
    bundle = _bundle(made, session_id)
    assert verify_bundle(bundle, pins, utc_now()).contributor_count == 1
    check_bundle(bundle, pins, 1, utc_now())
    assert verify_database(parts.context, pins).findings == ()


def test_what_a_stolen_key_signed_is_not_signed_anew(deploy: Callable[..., Deployment]) -> None:
    made = deploy()
    session_id, client = _training(made), made.device("device")
    assert client.get_task(session_id).kind is TaskKind.TRAIN
    parts = made.coordinator.parts
    replace_stolen(key_folder(made), parts.database, utc_now())
    rotate(made)
    client.close()
    with (
        Client(home=made.folder / "device", insecure=True) as again,
        pytest.raises(InvalidStatementError),
    ):
        again.get_task(session_id)


def test_a_task_that_no_key_signed_is_not_signed_at_all(
    deploy: Callable[..., Deployment], caplog: pytest.LogCaptureFixture
) -> None:
    made = deploy()
    session_id, client = _training(made), made.device("device")
    database = made.coordinator.parts.database
    with database.read() as session:
        found = training_sessions.get_round(session, session_id, 1)
    assert found is not None
    task = security_pb2.SignedEnvelope.FromString(found.task or b"")
    statement = security_pb2.TaskStatement.FromString(task.payload)
    statement.transfer.sealed = not statement.transfer.sealed
    task.payload = statement.SerializeToString(deterministic=True)
    forged = {"task": task.SerializeToString()}
    database.write(lambda session: training_sessions.update_round(session, session_id, 1, forged))
    rotate(made, 3)
    assert "not signed anew" in caplog.text
    with pytest.raises(InvalidStatementError):
        client.get_task(session_id)


def _publish_signed_elsewhere(made: Deployment) -> None:
    """Rotate as where the root keys are elsewhere: who publishes does not know why keys are missing."""
    folder, parts = key_folder(made), made.coordinator.parts
    prepare_online(folder)
    keyset = draft_keyset(folder, parts.database, utc_now())
    signed = sign_document(keyset, folder.read_root().signing_keys())
    publish_keyset(folder, parts.database, signed, utc_now())
    parts.keys._look()


def test_a_task_that_a_replica_signs_with_the_earlier_key_is_signed_anew(
    deploy: Callable[..., Deployment],
) -> None:
    made = deploy()
    parts = made.coordinator.parts
    behind = ServerKeys(key_folder(made).read_online(), parts.database, utc_now)
    _publish_signed_elsewhere(made)
    session_id, client = _training(made, start=False), made.device("device")
    Training(replace(parts.context, signer=behind)).start(SYSTEM, session_id)
    used = behind.sign(TASK, statement_of(TASK)).signatures[0].key_id
    assert used == parts.keys.trust.key_ids(TASK)[1]

    behind.renew_tasks()  # has no newer key
    parts.keys.renew_tasks()
    parts.keys.renew_tasks()

    _publish_signed_elsewhere(made)
    assert client.get_task(session_id).kind is TaskKind.TRAIN
