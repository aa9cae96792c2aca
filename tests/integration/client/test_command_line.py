"""The command line of a device against a real coordinator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import Manifest, chunks
from qflare.tensors.safetensors_files import export_safetensors
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import training_pb2
from qflare_client.__main__ import main

Deploy = Callable[..., Any]

TRAINING = """
def train(arrays, config):
    return {name: array + 1 for name, array in arrays.items()}, 5, {"loss": 0.5}

def evaluate(arrays, config):
    return 5, {"accuracy": 0.5}
"""


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A coordinator whose bundle lies in the working directory, beside a module that trains."""
    running = deploy()
    (tmp_path / "bundle.json").write_text(json_format.MessageToJson(running.bundle()))
    (tmp_path / "own_training.py").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    return running


def session(deployment: Any) -> str:
    rounds = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
    return str(deployment.session(rounds=rounds, total_rounds=2))


def test_from_enrollment_to_evidence(deployment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session_id = session(deployment)

    assert main(["enroll", "bundle.json", "--home", "a", "--capability", "ram_mib=512"]) == 0
    assert (
        main(["run", "own_training:train", "--home", "a", "--training-session", session_id[:8]])
        == 0
    )
    assert main(["status", "--home", "a"]) == 0
    assert main(["evidence", session_id[:8], "--home", "a"]) == 0
    assert main(["verify", "evidence.json", "--bundle", "bundle.json"]) == 0

    shown = capsys.readouterr().out
    assert "enrolled as " in shown
    assert '"device_name": "' in shown
    assert "2 updates accepted" in shown
    assert "round 2: update accepted, number 1 of the round" in shown
    assert '"device_state": "active"' in shown
    assert "versions 0 to 2 are signed and follow each other" in shown


def test_a_device_that_is_not_enrolled_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--home", "/nonexistent/device"]) == 1

    assert "qflare-client: " in capsys.readouterr().err


def test_status_needs_no_coordinator(deployment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["enroll", "bundle.json", "--home", "a"])
    deployment.coordinator.stop(0.1)

    assert main(["status", "--home", "a", "--offline"]) == 0

    assert '"realm": "qflare"' in capsys.readouterr().out


@pytest.mark.usefixtures("deployment")
def test_the_keys_may_be_under_a_passphrase() -> None:
    Path("passphrase").write_text("open sesame\n")
    Path("other").write_text("open barley\n")

    assert main(["enroll", "bundle.json", "--home", "a", "--passphrase-file", "passphrase"]) == 0
    assert main(["status", "--home", "a", "--passphrase-file", "passphrase"]) == 0
    assert main(["status", "--home", "a", "--passphrase-file", "other"]) == 1
    assert main(["status", "--home", "a", "--passphrase-file", "absent"]) == 1


def test_evidence_of_another_realm_is_refused(deployment: Any) -> None:
    session_id = session(deployment)
    main(["enroll", "bundle.json", "--home", "a"])
    main(["evidence", session_id, "--home", "a"])
    text = Path("evidence.json").read_text()
    Path("evidence.json").write_text(text.replace('"realm": "qflare"', '"realm": "other"'))

    assert main(["verify", "evidence.json", "--bundle", "bundle.json"]) == 1


@pytest.fixture
def exported(deployment: Any) -> Path:
    """The bundle of a version that a device has made."""
    session_id = session(deployment)
    main(["enroll", "bundle.json", "--home", "a"])
    main(["run", "own_training:train", "--home", "a", "--training-session", session_id])
    request = admin_pb2.ExportVerificationBundleRequest(training_session_id=session_id)
    parts = deployment.admin.ExportVerificationBundle(request, metadata=deployment.metadata)
    path = Path("version.bundle")
    path.write_bytes(b"".join(part.bundle.SerializeToString() for part in parts))
    return path


def test_a_bundle_of_an_auditor_is_verified(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(exported), "--bundle", "bundle.json"]) == 0

    shown = capsys.readouterr().out
    assert "it was made from these 1 updates alone" in shown
    assert "1 of them are signed by 1 devices" in shown


def test_a_changed_bundle_is_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    exported.write_bytes(data)

    assert main(["verify", str(exported), "--bundle", "bundle.json"]) == 1
    assert "qflare-client: " in capsys.readouterr().err


def test_another_model_than_that_of_the_bundle_is_refused(exported: Path) -> None:
    arrays = {"w": np.ones(3, np.float32)}
    manifest = Manifest.from_arrays(arrays)
    export_safetensors(Path("other.safetensors"), manifest, chunks(arrays, manifest))

    words = ["verify", str(exported), "--bundle", "bundle.json", "--model"]
    assert main([*words, "other.safetensors"]) == 1
    assert main([*words, "absent.safetensors"]) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"text"])
def test_other_files_are_no_evidence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)

    assert main(["verify", str(tmp_path / "file"), "--root-key-id", "0" * 64]) == 1
    assert main(["verify", str(tmp_path / "absent"), "--root-key-id", "0" * 64]) == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "nothing"],
        ["run", "absent:train"],
        ["run", "json:absent"],
        ["enroll"],
        ["verify", "evidence.json", "--at", "2030-01-01T00:00"],
        ["enroll", "bundle.json", "--capability", "ram"],
    ],
)
def test_wrong_usage_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)

    assert caught.value.code == 2
    assert "usage: qflare-client" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["enroll", "run", "status", "evidence", "verify"])
def test_every_command_has_an_example(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([word, "--help"])

    assert f"example:\n  qflare-client {word} " in capsys.readouterr().out


def test_a_project_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tmp_path / "first"

    assert main(["init", str(project)]) == 0
    before = {path.name: path.read_bytes() for path in project.iterdir()}
    assert main(["init", str(project)]) == 1

    assert set(before) == {
        ".gitignore",
        "README.md",
        "device.py",
        "initial.safetensors",
        "session.json",
    }
    assert {path.name: path.read_bytes() for path in project.iterdir()} == before
    assert "is not empty" in capsys.readouterr().err
