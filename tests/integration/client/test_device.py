"""The device SDK against a real coordinator."""

import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import qflare_client
from qflare.evidence.lineage import ModelVersion
from qflare.tensors import Array
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import security_pb2, training_pb2
from qflare_client import (
    Client,
    DeviceSuspendedError,
    DuplicateUpdateError,
    Evidence,
    InvalidEnrollmentTokenError,
    KeyStoreError,
    KeyStoreLockedError,
    LocalPrivacy,
    NotEnrolledError,
    NotFoundError,
    Receipt,
    RewrittenLogError,
    RolledBackModelError,
    Task,
    TaskKind,
    TrainingFunctionError,
    TrainingTask,
    UntrustedKeysetError,
    WrongPassphraseError,
    enroll,
)
from qflare_client import run as run_forever
from qflare_client.keystore.identity import DeviceKeys
from qflare_client.keystore.store import KeyStore
from qflare_client.models.accepted_versions import AcceptedVersions
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.trust.evidence import verify
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import rotate_online
from qflare_server.keys.setup import write_bootstrap

Deploy = Callable[..., Any]
run = partial(run_forever, patience_s=20.0)
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))


def add_one(
    arrays: dict[str, Array], config: TrainingTask
) -> tuple[dict[str, Array], int, dict[str, float]]:
    assert config.round_number >= 1
    trained = {name: array + np.array(1, array.dtype) for name, array in arrays.items()}
    return trained, 10, {"loss": 1 / config.round_number, "accuracy": 0.5}


def wait_for_training(client: Client, session_id: str) -> Task:
    """Poll until there is something to train."""
    pause = threading.Event()
    for _ in range(500):
        task = client.get_task(session_id)
        if task.kind is TaskKind.TRAIN:
            return task
        pause.wait(task.poll_delay_s)
    raise AssertionError("no task to train")


def take_part(client: Client, session_id: str) -> Receipt:
    task = wait_for_training(client, session_id)
    base = client.download_base(task)
    return client.submit(task, base, *add_one(base.arrays, task.config))


def test_a_device_takes_part_until_the_end(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=3)

    summary = run(client, add_one, training_session_id=session_id)

    assert summary.update_count == 3
    final = client.download(session_id)
    assert final.version == 3
    np.testing.assert_array_equal(final.arrays["w"], np.full(4, 3, np.float32))


def test_two_devices_share_rounds(deploy: Deploy) -> None:
    deployment = deploy()
    clients = [deployment.device(name) for name in "ab"]
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60)), total_rounds=3
    )
    threads = [
        threading.Thread(
            target=run, args=(client, add_one), kwargs={"training_session_id": session_id}
        )
        for client in clients
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert clients[0].download(session_id).version == 3


def test_the_loop_ends_when_it_is_told_to(deploy: Deploy) -> None:
    client = deploy().device("a")
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(client, add_one), kwargs={"stop": stop})

    thread.start()
    stop.set()
    thread.join(30)

    assert not thread.is_alive()


def test_training_may_change_its_arrays_in_place(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=2,
        transfer=training_pb2.TransferPolicy(update_kind=training_pb2.UPDATE_KIND_DELTA),
    )

    def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
        arrays["w"] += 2
        return arrays, 1, {}

    run(client, train, training_session_id=session_id)

    np.testing.assert_array_equal(client.download(session_id).arrays["w"], np.full(4, 4))


@pytest.mark.parametrize(
    "encoding",
    [
        training_pb2.ENCODING_FLOAT16,
        training_pb2.ENCODING_BFLOAT16,
        training_pb2.ENCODING_INT8,
        training_pb2.ENCODING_TOP_K,
    ],
)
def test_updates_may_be_encoded(deploy: Deploy, encoding: Any) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=1,
        transfer=training_pb2.TransferPolicy(
            update_kind=training_pb2.UPDATE_KIND_DELTA,
            update_encoding=encoding,
            top_k_fraction=1.0,
        ),
    )

    run(client, add_one, training_session_id=session_id)

    np.testing.assert_allclose(client.download(session_id).arrays["w"], np.ones(4), rtol=0.01)


def test_a_large_model_makes_the_round_trip(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    weights = {"w": np.random.default_rng(1).normal(size=3_000_001).astype(np.float32)}
    session_id = deployment.session(weights, rounds=ONE_DEVICE, total_rounds=1)

    run(client, lambda arrays, _: (arrays, 1, {}), training_session_id=session_id)

    np.testing.assert_array_equal(client.download(session_id).arrays["w"], weights["w"])


def test_the_loop_survives_a_restart_of_the_coordinator(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=4)
    address = deployment.coordinator.address
    enroll(deployment.bundle(), home=tmp_path / "device")
    restarted: list[Any] = []

    def train(arrays: dict[str, Array], config: TrainingTask) -> Any:
        if config.round_number == 2 and not restarted:
            deployment.coordinator.stop(0.2)
            restarted.append(deploy(listen=address))
        return add_one(arrays, config)

    with Client(home=tmp_path / "device") as client:
        summary = run(client, train, training_session_id=session_id)

        assert summary.update_count == 4
        assert client.download(session_id).version == 4


def test_a_training_function_that_returns_nothing_is_told(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE)

    with pytest.raises(TrainingFunctionError):
        run(client, lambda *_: None, training_session_id=session_id)  # type: ignore[arg-type]


def test_a_different_update_for_the_same_round_is_refused(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60))
    )
    task = wait_for_training(client, session_id)
    base = client.download_base(task)
    client.submit(task, base, *add_one(base.arrays, task.config))

    with pytest.raises(DuplicateUpdateError):
        client.submit(task, base, base.arrays, 10)


def evaluated(deployment: Any) -> str:
    return str(
        deployment.session(
            rounds=ONE_DEVICE,
            total_rounds=2,
            evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
        )
    )


def test_a_device_evaluates_what_it_is_asked_to(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = evaluated(deployment)
    measured: list[float] = []

    def evaluate(arrays: dict[str, Array], config: TrainingTask) -> tuple[int, dict[str, float]]:
        assert config.training_session_id == session_id
        measured.append(float(arrays["w"][0]))
        return 7, {"accuracy": 0.25}

    summary = run(client, add_one, evaluate=evaluate, training_session_id=session_id)

    assert summary.update_count == 2
    assert summary.evaluation_count == len(measured) >= 2
    assert measured == sorted(set(measured))


def test_a_device_that_does_not_evaluate_trains(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")

    summary = run(client, add_one, training_session_id=evaluated(deployment))

    assert (summary.update_count, summary.evaluation_count) == (2, 0)


def test_an_evaluation_function_that_returns_nothing_is_told(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")

    with pytest.raises(TrainingFunctionError):
        run(
            client,
            add_one,
            evaluate=lambda *_: None,  # type: ignore[arg-type]
            training_session_id=evaluated(deployment),
        )


def test_local_privacy_clips_what_leaves_the_device(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=1)

    run(client, add_one, privacy=LocalPrivacy(0.5), training_session_id=session_id)

    np.testing.assert_allclose(client.download(session_id).arrays["w"], np.full(4, 0.25), rtol=1e-6)


def test_an_evaluation_that_cannot_be_sent_is_told(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = evaluated(deployment)
    take_part(client, session_id)
    while (task := client.get_task(session_id)).kind is not TaskKind.EVALUATE:
        threading.Event().wait(task.poll_delay_s)

    with pytest.raises(TrainingFunctionError, match="example count"):
        client.report_evaluation(task, 2**40 + 1, {"accuracy": 0.75})
    with pytest.raises(TrainingFunctionError, match="reserved"):
        client.report_evaluation(task, 20, {"train_loss": 0.75})
    with pytest.raises(TrainingFunctionError, match="no metric"):
        client.report_evaluation(task, 20, {})
    client.report_evaluation(task, 20, {"accuracy": 0.75})
    with pytest.raises(DuplicateUpdateError):
        client.report_evaluation(task, 20, {"accuracy": 0.5})


def test_a_heartbeat_says_how_the_device_stands(deploy: Deploy) -> None:
    heartbeat = deploy().device("a").heartbeat()

    assert heartbeat.device_state == "active"
    assert abs(heartbeat.server_time - datetime.now(UTC)) < timedelta(minutes=5)


def test_no_such_training_session(deploy: Deploy) -> None:
    client = deploy().device("a")

    with pytest.raises(NotFoundError):
        client.download("7d2c1f70-9c8e-4a55-b3f1-5a1a7cf3a001")


def test_the_lineage_is_verified(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=2)
    run(client, add_one, training_session_id=session_id)

    lineage = client.lineage(session_id)

    assert [entry.statement.version for entry in lineage] == [0, 1, 2]
    assert [entry.statement.contributor_count for entry in lineage] == [0, 1, 1]


def test_evidence_convinces_an_auditor(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    bundle = deployment.bundle()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=2)
    receipts: list[Receipt] = []
    run(client, add_one, training_session_id=session_id, on_receipt=receipts.append)
    client.download(session_id).save(tmp_path / "final.safetensors")

    evidence = Evidence.from_json(client.evidence(session_id, receipts).to_json())
    shown = verify(
        evidence,
        root_key_ids=bundle.root_key_ids,
        threshold=bundle.threshold,
        reference_time=datetime.now(UTC),
        model=tmp_path / "final.safetensors",
    )

    assert sum("with the key that it enrolled" in line for line in shown) == 2
    assert shown[-2] == "version 2 was made from these 1 updates alone"
    assert shown[-1].endswith("is version 2, byte by byte")


def device_with_audit_log(deploy: Deploy) -> Client:
    """A device of a coordinator that has a head over the device's enrollment."""
    deployment = deploy()
    client: Client = deployment.device("a")
    deployment.coordinator.use_cases.audit.head(fresh=True)
    return client


def test_the_audit_log_grows(deploy: Deploy) -> None:
    client = device_with_audit_log(deploy)

    first, second = client.audit_head(), client.audit_head()

    assert 0 < first.size <= second.size


def test_another_audit_log_is_noticed(deploy: Deploy) -> None:
    client = device_with_audit_log(deploy)
    head = client.audit_head()
    client._store.write_document(
        "audit.json", {"head": tree_head(head.size, "0" * 64).SerializeToString().hex()}
    )

    with pytest.raises(RewrittenLogError):
        client.audit_head()


def test_a_shorter_audit_log_is_noticed(deploy: Deploy) -> None:
    client = device_with_audit_log(deploy)
    head = client.audit_head()
    kept = tree_head(head.size + 1_000, head.root_digest)
    client._store.write_document("audit.json", {"head": kept.SerializeToString().hex()})

    with pytest.raises(RewrittenLogError):
        client.audit_head()


def tree_head(size: int, root_digest: str) -> security_pb2.TreeHead:
    return security_pb2.TreeHead(origin="qflare/audit", size=size, root_digest=root_digest)


def test_an_update_is_in_no_version_yet(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60))
    )
    receipt = take_part(client, session_id)

    with pytest.raises(NotFoundError):
        client.contribution_proof(receipt)


def test_a_suspended_device_is_told_at_its_next_call(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    client.heartbeat()
    deployment.admin.SuspendDevice(
        admin_pb2.SuspendDeviceRequest(device_id=client.device_id, reason="test"),
        metadata=deployment.metadata,
    )

    with pytest.raises(DeviceSuspendedError):
        client.heartbeat()


def test_an_older_version_than_the_accepted_one_is_refused(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    model = client.download(session_id)
    model.statement.version = 99
    accepted = ModelVersion(model.statement, model.digest)
    client._versions.accept(accepted)

    with pytest.raises(RolledBackModelError):
        client.download(session_id)
    with pytest.raises(RolledBackModelError):
        client.download_base(wait_for_training(client, session_id))


def test_an_older_version_may_be_had_by_its_number(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=2)
    run(client, add_one, training_session_id=session_id)

    assert client.download(session_id).version == 2
    assert client.download(session_id, 1).version == 1
    assert client.download(session_id).version == 2


def test_what_was_accepted_outlives_the_process(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    session_id = deployment.session()
    enroll(deployment.bundle(), home=tmp_path / "device")
    with Client(home=tmp_path / "device") as client:
        digest = client.download(session_id).digest

    with KeyStore(tmp_path / "device") as store:
        last = AcceptedVersions(store).last(session_id)

    assert last is not None
    assert (last.statement.version, last.digest) == (0, digest)


def test_a_token_enrols_one_device(deploy: Deploy, tmp_path: Path) -> None:
    bundle = deploy().bundle()
    enroll(bundle, home=tmp_path / "a")

    with pytest.raises(InvalidEnrollmentTokenError):
        enroll(bundle, home=tmp_path / "b")


def test_a_broken_off_enrollment_is_finished_by_enrolling_again(
    deploy: Deploy, tmp_path: Path
) -> None:
    bundle = deploy().bundle()
    first = enroll(bundle, home=tmp_path / "a")
    (tmp_path / "a" / "device.json").unlink()

    second = enroll(bundle, home=tmp_path / "a")

    assert second.device_id == first.device_id


def test_an_enrolled_device_is_left_as_it_is(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    first = enroll(deployment.bundle(), home=tmp_path / "a")

    assert enroll(deployment.bundle(), home=tmp_path / "a").device_id == first.device_id


def test_another_root_is_not_trusted(deploy: Deploy, tmp_path: Path) -> None:
    bundle = deploy().bundle()
    bundle.root_key_ids[:] = ["0" * 64]

    with pytest.raises(UntrustedKeysetError):
        enroll(bundle, home=tmp_path / "a")

    with pytest.raises(NotEnrolledError):
        Client(home=tmp_path / "a")


@pytest.mark.slow  # coordinators look for their next keys every few seconds
def test_a_device_follows_the_coordinators_next_keys(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=3)
    take_part(client, session_id)
    rotate_online(
        KeyFolder.from_config(deployment.config),
        deployment.coordinator.parts.context.database,
        datetime.now(UTC),
    )
    pause = threading.Event()
    for _ in range(300):
        client.heartbeat()
        if client._trust._trusted.keyset_version == 2:
            break
        pause.wait(0.1)

    run(client, add_one, training_session_id=session_id)

    signers = {entry.envelope.signatures[0].key_id for entry in client.lineage(session_id)}
    assert len(signers) == 2


def test_two_clients_do_not_share_a_key_store(deploy: Deploy, tmp_path: Path) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a")

    with Client(home=tmp_path / "a"), pytest.raises(KeyStoreLockedError):
        Client(home=tmp_path / "a")


def test_keys_under_a_passphrase_that_is_not_given_are_said_to_be_so(
    deploy: Deploy, tmp_path: Path
) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a", passphrase="open sesame")

    with pytest.raises(WrongPassphraseError, match="under a passphrase"):
        Client(home=tmp_path / "a")


def test_an_empty_passphrase_is_refused(deploy: Deploy, tmp_path: Path) -> None:
    bundle = deploy().bundle()

    with pytest.raises(KeyStoreError, match="empty"):
        enroll(bundle, home=tmp_path / "a", passphrase="")
    enroll(bundle, home=tmp_path / "a")
    with pytest.raises(KeyStoreError, match="empty"):
        Client(home=tmp_path / "a", passphrase="")


def test_a_heartbeat_takes_plain_values(deploy: Deploy) -> None:
    deployment = deploy()
    device = deployment.device("a", device_type="phone")

    device.heartbeat(device_type="tablet", capabilities={"ram_mib": 4096.0})

    request = admin_pb2.GetDeviceRequest(device_id=device.device_id)
    answer = deployment.admin.GetDevice(request, metadata=deployment.metadata)
    assert answer.device.reported_type == "tablet"
    assert dict(answer.device.reported_capabilities) == {"ram_mib": 4096.0}


def test_the_example_of_the_package_runs(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    session_id = deployment.session({"w": np.zeros(3, np.float32)}, total_rounds=1)
    write_bootstrap(tmp_path / "bundle.json", deployment.bundle())
    example = qflare_client.__doc__ or ""
    start, end = example.index("    from pathlib"), example.index("Everything public")
    (tmp_path / "example.py").write_text(textwrap.dedent(example[start:end]))

    with subprocess.Popen([sys.executable, "example.py"], cwd=tmp_path) as process:
        request = admin_pb2.GetTrainingSessionRequest(training_session_id=session_id)
        for _ in range(600):
            answer = deployment.admin.GetTrainingSession(request, metadata=deployment.metadata)
            if answer.training_session.current_version == 1 or process.poll() is not None:
                break
            threading.Event().wait(0.1)
        process.terminate()

    assert answer.training_session.current_version == 1


def test_a_passphrase_protects_the_keys(deploy: Deploy, tmp_path: Path) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a", passphrase="open sesame")

    with pytest.raises(WrongPassphraseError):
        Client(home=tmp_path / "a", passphrase="open barley")
    with Client(home=tmp_path / "a", passphrase="open sesame") as client:
        client.heartbeat()


def test_keys_are_replaced(deploy: Deploy, tmp_path: Path) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a")
    with Client(home=tmp_path / "a") as client:
        before = client._login.identity.keys.signing.public.key_id

        assert client.rotate_keys() == 1
        client.heartbeat()
    with Client(home=tmp_path / "a") as client:
        client.heartbeat()

        assert client._login.identity.keys.signing.public.key_id != before
        assert client.rotate_keys() == 2


def test_a_rotation_that_broke_off_is_settled_at_the_next_login(
    deploy: Deploy, tmp_path: Path
) -> None:
    home, kept = tmp_path / "a", tmp_path / "kept"
    enroll(deploy().bundle(), home=home)
    shutil.copytree(home, kept)
    with Client(home=home) as client:
        client.rotate_keys()
    shutil.copy(home / "keys", kept / "keys-next")

    with Client(home=kept) as client:
        client.heartbeat()

        assert client._login.identity.key_rotation_count == 1
    assert not (kept / "keys-next").exists()


def test_a_rotation_that_was_not_sent_leaves_the_keys_in_use(
    deploy: Deploy, tmp_path: Path
) -> None:
    home = tmp_path / "a"
    identity = enroll(deploy().bundle(), home=home)
    with KeyStore(home) as store:
        store.write_secret("keys-next", DeviceKeys.generate().to_bytes())

    with Client(home=home) as client:
        client.heartbeat()
        in_use = client._login.identity.keys.signing.public.key_id

        assert in_use == identity.keys.signing.public.key_id
        assert client.rotate_keys() == 1


def test_tokens_are_refreshed_before_they_expire(deploy: Deploy) -> None:
    client = deploy(access_token_s=1.0).device("a")
    client.heartbeat()
    first = client._login._session
    assert first is not None
    client._login._session = replace(first, refresh_at=0.0)

    client.heartbeat()

    second = client._login._session
    assert second is not None
    assert second.grant.access_token != first.grant.access_token
    assert second.keys.session_id == first.keys.session_id


def test_a_lost_session_is_logged_in_again(deploy: Deploy) -> None:
    client = deploy().device("a")
    client.heartbeat()
    session = client._login._session
    assert session is not None
    session.grant.access_token = "qfa1.gone"

    client.heartbeat()

    assert client._login._session is not session


def test_a_coordinator_may_ask_for_proof_of_possession(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(require_pop=True)
    session_id = deployment.session(
        {"w": np.zeros(600_000, np.float32)}, rounds=ONE_DEVICE, total_rounds=1
    )
    enroll(deployment.bundle(), home=tmp_path / "a")

    with Client(home=tmp_path / "a", proof_of_possession=True) as client:
        summary = run(client, add_one, training_session_id=session_id)

    assert summary.update_count == 1


def test_nothing_on_the_network_happens_at_construction(deploy: Deploy, tmp_path: Path) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a")

    with Client(
        home=tmp_path / "a", address="127.0.0.1:1", retry=RetryPolicy(total_time_s=0)
    ) as client:
        assert client.realm == "qflare"
