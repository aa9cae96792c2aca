"""Whatever the umask of the shell is, what the programs write is for their user alone."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from safetensors.numpy import save_file

import qflare_client.__main__ as client_program
import qflare_client.admin.__main__ as admin_program
from qflare_server.cli.main import main as server
from tests.integration.conftest import Deployment

PUBLIC = {"ca.pem", "server.pem", "device.pem"}
"""Certificates, which hold no secret and which devices are given."""


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: its files are what this is about."""
    return sqlite_url


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> dict[str, str]:
    """Return what lies below a folder that a group or others may use, with its mode."""
    return {
        str(path.relative_to(folder)): f"{mode:04o}"
        for path in folder.rglob("*")
        if (mode := stat.S_IMODE(path.lstat().st_mode)) & 0o077 and path.name not in PUBLIC
    }


@pytest.mark.usefixtures("_open_umask")
def test_everything_that_the_commands_write_is_private(
    deploy: Callable[..., Deployment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("QFLARE_DATA_DIR", str(place / "data" / "inner"))
    monkeypatch.setenv("QFLARE_PROFILE", str(place / "config" / "profile"))
    save_file({"w": np.ones(300_000, np.float32)}, place / "model.safetensors")
    (place / "model.safetensors").chmod(0o600)
    deployment = deploy()
    token = place / "token"
    token.touch(mode=0o600)
    token.write_text(deployment.admin_token)
    (place / "bundle.json").touch(mode=0o600)
    (place / "bundle.json").write_text(json_format.MessageToJson(deployment.bundle()))
    session = deployment.session({"w": np.zeros(4, np.float32)})
    address = deployment.coordinator.address

    for words in (
        "init",
        "session create --name x --rounds 1 --quorum 1 --model model.safetensors",
        "token issue --count 2 --bundles out/bundles --address localhost:1",
        "token issue --output tokens",
        "token issue-admin --name a --role viewer --output admin",
        "bundle --address localhost:1 --output trust.json",
        "audit witness heads",
        "certificates make --output certificates --client device",
        "keys prepare",
        "keys draft --output keyset.json",
    ):
        assert server(words.split()) == 0, words
    for words in (
        "init project",
        "enroll bundle.json --home device",
        f"evidence {session} --home device --output evidence.json",
    ):
        assert client_program.main(words.split()) == 0, words
    for words in (
        f"profile set --address {address} --token-file token",
        f"model download {session} got.safetensors",
        f"model evidence {session} evidence.bin",
        "audit export --output log.jsonl",
        "token issue --output more",
    ):
        assert admin_program.main(words.split()) == 0, words

    assert open_to_others(place) == {}
    assert open_to_others(deployment.config.data_dir) == {}
    assert {path.name for path in place.iterdir()} >= {"data", "device", "project", "out", "heads"}
