"""Signature algorithms: chosen on either side, the same from enrollment to the audit, refused where not accepted."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from qflare.crypto.signing import ONLINE_ALGORITHMS, Algorithm, algorithm_names
from qflare.v1 import training_pb2
from qflare_client import (
    AlgorithmNotAcceptedError,
    Client,
    TaskKind,
    UntrustedKeysetError,
    enroll,
)
from qflare_client.__main__ import main
from qflare_client.keystore.identity import DeviceKeys, Identity, load_keys, read_facts, save_keys
from qflare_client.keystore.store import KeyStore
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import replace_stolen, rotate_online
from qflare_server.storage.tables import AuditLog, DeviceKey, ModelUpdate
from qflare_server.verification import verify_database
from tests.integration.conftest import Deployment
from tests.support.finished_session import ROUND_COUNT, train

Deploy = Callable[..., Any]
HYBRID = Algorithm.ML_DSA_65_ED25519
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
STRICT = "ml-dsa-87,ml-dsa-65-ed25519"

every_algorithm = pytest.mark.parametrize(
    "algorithm", sorted(ONLINE_ALGORITHMS), ids=lambda algorithm: algorithm.name.lower()
)


def name_of(algorithm: Algorithm) -> str:
    return algorithm_names([algorithm])[0]


@pytest.fixture
def fresh(deploy: Deploy, tmp_path: Path) -> Deploy:
    """Start a coordinator that makes keys of its own."""
    shutil.rmtree(tmp_path / "coordinator" / "keys")
    return deploy


@every_algorithm
def test_an_algorithm_serves_from_enrollment_to_the_audit(
    fresh: Deploy, algorithm: Algorithm
) -> None:
    deployment = fresh(
        online_algorithm=name_of(algorithm),
        root_algorithm=name_of(algorithm),
        device_algorithms=name_of(algorithm),
    )

    trained = train(deployment, algorithm=algorithm, server_algorithms=[algorithm])

    report = trained.verify(trained.bundle())
    assert (report.version, report.signed_count, report.missing) == (ROUND_COUNT, 2, ())
    parts = deployment.coordinator.parts
    parts.use_cases.audit.head(fresh=True)
    assert verify_database(parts.context, trained.pins).findings == ()
    with parts.database.read() as session:
        assert {row.algorithm for row in session.query(DeviceKey)} == {int(algorithm)}
    roles = {key.signature_key.algorithm for key in parts.keys.trust.keyset.keys} - {0}
    assert roles == {int(algorithm)}


def refusals(deployment: Deployment, kind: str) -> list[AuditLog]:
    with deployment.coordinator.parts.database.read() as session:
        return session.query(AuditLog).filter_by(event_type=kind).all()


def test_a_device_cannot_enrol_with_another_algorithm(deploy: Deploy) -> None:
    deployment = deploy(device_algorithms=STRICT)

    with pytest.raises(AlgorithmNotAcceptedError, match="got ml-dsa-65") as caught:
        deployment.device("a")

    assert caught.value.accepted == ("ml-dsa-87", "ml-dsa-65-ed25519")
    assert len(refusals(deployment, "enrollment.refused")) == 1


def test_a_device_that_was_refused_enrols_with_an_accepted_one_and_the_same_token(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(device_algorithms=STRICT)
    bundle = deployment.bundle()
    with pytest.raises(AlgorithmNotAcceptedError):
        enroll(bundle, home=tmp_path / "a")

    identity = enroll(bundle, home=tmp_path / "a", algorithm=HYBRID)

    assert identity.keys.algorithm is HYBRID
    assert read_facts(tmp_path / "a")["signature_algorithm"] == "ml-dsa-65-ed25519"


def test_an_enrollment_that_broke_off_goes_on_with_its_keys(deploy: Deploy, tmp_path: Path) -> None:
    bundle = deploy().bundle()
    keys = DeviceKeys.generate(HYBRID)
    with KeyStore(tmp_path / "a") as store:
        save_keys(store, keys)

    identity = enroll(bundle, home=tmp_path / "a")

    assert identity.keys.signing.public == keys.signing.public


def test_a_device_cannot_rotate_to_another_algorithm(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(device_algorithms=STRICT)
    client = deployment.device("a", algorithm=HYBRID)

    with pytest.raises(AlgorithmNotAcceptedError):
        client.rotate_keys(Algorithm.ML_DSA_44)

    assert len(refusals(deployment, "rotation.refused")) == 1
    assert client.rotate_keys() == 1
    client.close()
    with KeyStore(tmp_path / "a") as store:
        assert Identity.load(store).keys.algorithm is HYBRID


def test_a_rotation_that_broke_off_is_finished_before_one_of_another_algorithm(
    deploy: Deploy,
) -> None:
    deployment = deploy()
    client = deployment.device("a")
    save_keys(client._store, DeviceKeys.generate(), "keys-next")

    assert client.rotate_keys(HYBRID) == 2

    assert client._login.identity.keys.algorithm is HYBRID
    assert load_keys(client._store, "keys-next") is None


def wait_for_training(client: Client, session_id: str) -> Any:
    while (task := client.get_task(session_id)).kind is not TaskKind.TRAIN:
        pass
    return task


def test_a_device_whose_algorithm_is_retired_can_only_log_in_and_rotate(
    deploy: Deploy, tmp_path: Path
) -> None:
    first = deploy()
    first.device("a").close()
    first.close()
    deployment = deploy(device_algorithms=STRICT)
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    with Client(home=tmp_path / "a", address=deployment.coordinator.address) as client:
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        with pytest.raises(AlgorithmNotAcceptedError, match="got ml-dsa-65"):
            client.submit(task, base, base.arrays, 10)
        with deployment.coordinator.parts.database.read() as session:
            assert session.query(ModelUpdate).count() == 0

        client.rotate_keys(HYBRID)
        receipt = client.submit(task, base, base.arrays, 10)

    assert receipt.acceptance_sequence == 1


# What a device accepts of the coordinator.


def test_a_keyset_of_another_algorithm_than_the_pinned_one_is_refused(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy()  # its online keys are ML-DSA-65

    with pytest.raises(UntrustedKeysetError, match="keys of ml-dsa-65, want ml-dsa-65-ed25519"):
        deployment.device("a", server_algorithms=[HYBRID])

    assert not read_facts(tmp_path / "a")


def test_a_downgrade_of_the_keyset_is_refused_later_as_well(fresh: Deploy, tmp_path: Path) -> None:
    deployment = fresh(online_algorithm="ml-dsa-65-ed25519")
    client = deployment.device("a", server_algorithms=[HYBRID])
    parts = deployment.coordinator.parts
    folder = KeyFolder.from_config(deployment.config)
    rotate_online(folder, parts.database, utc_now(), algorithm=Algorithm.ML_DSA_65)
    while parts.keys.keyset_version < 2:
        threading.Event().wait(0.05)
    client.close()

    with Client(home=tmp_path / "a") as again, pytest.raises(UntrustedKeysetError):
        again._trust.refresh()


def test_a_keyset_that_names_no_earlier_key_ends_a_migration(
    deploy: Deploy,
) -> None:
    deployment = deploy()
    parts = deployment.coordinator.parts
    replace_stolen(
        KeyFolder.from_config(deployment.config), parts.database, utc_now(), algorithm=HYBRID
    )
    deployment.close()
    again = deploy()

    assert again.device("a", server_algorithms=[HYBRID]).heartbeat().device_state == "active"


# The command line.


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: main([*words, "--home", "a"])


def test_the_command_line_chooses_and_rotates(
    deploy: Deploy,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = json_format.MessageToJson(deploy().bundle())
    (tmp_path / "bundle.json").write_text(bundle)
    chosen = ("--algorithm", "ml-dsa-44", "--server-algorithm", "ml-dsa-65")

    assert command("enroll", "bundle.json", *chosen) == 0
    assert command("rotate") == 0
    assert command("rotate", "--algorithm", "ml-dsa-65-ed25519") == 0
    assert command("status") == 0

    shown = capsys.readouterr().out
    assert "rotated to keys number 1, ml-dsa-44" in shown
    assert "rotated to keys number 2, ml-dsa-65-ed25519" in shown
    assert '"signature_algorithm": "ml-dsa-65-ed25519"' in shown


def test_the_command_line_says_what_the_coordinator_accepts(
    deploy: Deploy,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = json_format.MessageToJson(deploy(device_algorithms=STRICT).bundle())
    (tmp_path / "bundle.json").write_text(bundle)

    assert command("enroll", "bundle.json", "--algorithm", "ml-dsa-44") == 1

    assert "want one of ml-dsa-87,ml-dsa-65-ed25519" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rsa", "slh-dsa-sha2-128s"])
def test_the_command_line_refuses_an_algorithm_for_devices_that_is_none(
    command: Callable[..., int], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("enroll", "bundle.json", "--algorithm", name)

    assert "ml-dsa-65-ed25519" in capsys.readouterr().err


def test_a_round_of_devices_with_different_algorithms(deploy: Deploy) -> None:
    deployment = deploy()
    algorithms = sorted(ONLINE_ALGORITHMS)
    devices = [
        deployment.device(f"device-{number}", algorithm=algorithm)
        for number, algorithm in enumerate(algorithms)
    ]
    session_id = deployment.session(
        rounds=training_pb2.RoundPolicy(quorum=len(devices)), total_rounds=1
    )
    for number, client in enumerate(devices):
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        client.submit(task, base, {"w": np.full(4, number, np.float32)}, 10)
    while (model := devices[0].download(session_id)).statement.version == 0:
        pass

    np.testing.assert_allclose(model.arrays["w"], np.full(4, 1.5))
