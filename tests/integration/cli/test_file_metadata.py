"""The metadata of a model's own file comes back in every file that a version is exported to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1.training_pb2 import TrainingConfig
from qflare_client import run
from qflare_client.admin.__main__ import main as admin_main
from qflare_server.cli.main import main as server_main
from qflare_server.use_cases.versions.initial_model import MAX_METADATA_BYTES
from tests.support.use_cases import with_quorum

Deploy = Callable[..., Any]

OWN = {
    "format": "pt",
    "version": "of its own",
    "digest": "also its own",
    "Überschrift": "zwei\nZeilen",
    "long": "x" * 20_000,
    "": "no name",
    "two\nlines": "",
}
ADDED = {"training_session_id", "version", "digest"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    path = tmp_path / "initial.safetensors"
    # As if it had been exported before: what was added then is replaced.
    save_file({"w": np.zeros(4, np.float32)}, path, OWN | {"qflare_version": "99"})
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "numpy") as file:
        return dict(file.metadata())


def check(path: Path, version: int) -> None:
    found = metadata_of(path)
    added = {name: value for name, value in found.items() if name.startswith("qflare_")}
    assert {name: value for name, value in found.items() if name not in added} == OWN
    assert added["qflare_version"] == str(version)
    assert {f"qflare_{name}" for name in ADDED} <= added.keys()


@pytest.mark.parametrize("uploaded_by", ["create", "import", "admin"])
def test_every_export_has_it(
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    initial: Path,
    uploaded_by: str,
) -> None:
    deployment = deploy()
    monkeypatch.setenv("QFLARE_DATABASE_URL", deployment.config.database_url)
    server = ["--data-dir", str(deployment.config.data_dir)]
    (tmp_path / "token").write_text(deployment.admin_token)
    (tmp_path / "token").chmod(0o600)
    admin = ["--address", deployment.coordinator.address, "--token-file", str(tmp_path / "token")]
    create = [*server, "session", "create", "--name", "m", "--rounds", "1", "--quorum", "1"]
    create += ["--model", str(initial)] if uploaded_by == "create" else []
    assert server_main(create) == 0
    session_id = capsys.readouterr().out.split()[0]
    if uploaded_by == "import":
        assert server_main([*server, "model", "import", session_id, str(initial)]) == 0
    if uploaded_by == "admin":
        assert admin_main([*admin, "model", "upload", session_id, str(initial)]) == 0
    assert server_main([*server, "session", "start", session_id]) == 0
    client = deployment.device("a")
    run(client, lambda arrays, _: (arrays, 1, {}), training_session_id=session_id)

    for version in (0, 1):
        client.download(session_id, version).save(tmp_path / "sdk.safetensors")
        check(tmp_path / "sdk.safetensors", version)
        export = ["model", "export", session_id, str(tmp_path / "server.safetensors")]
        assert server_main([*server, *export, "--version", str(version)]) == 0
        check(tmp_path / "server.safetensors", version)
        download = ["model", "download", session_id, str(tmp_path / "admin.safetensors")]
        assert admin_main([*admin, *download, "--version", str(version)]) == 0
        check(tmp_path / "admin.safetensors", version)


@pytest.mark.parametrize("value", ["x" * MAX_METADATA_BYTES, "a\0b"])
def test_metadata_that_cannot_be_kept_is_refused(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    deployment = deploy()
    path = tmp_path / "other.safetensors"
    save_file({"w": np.zeros(4, np.float32)}, path, {"a": value})
    monkeypatch.setenv("QFLARE_DATABASE_URL", deployment.config.database_url)
    (tmp_path / "token").write_text(deployment.admin_token)
    (tmp_path / "token").chmod(0o600)
    created = deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(name="m", config=with_quorum(TrainingConfig())),
        metadata=deployment.metadata,
    )
    arguments = [created.training_session.training_session_id, str(path)]
    admin = ["--address", deployment.coordinator.address, "--token-file", str(tmp_path / "token")]

    server = ["--data-dir", str(deployment.config.data_dir)]
    assert server_main([*server, "model", "import", *arguments]) == 1
    assert admin_main([*admin, "model", "upload", *arguments]) == 1
