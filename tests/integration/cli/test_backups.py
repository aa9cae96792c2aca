"""A backup of a serving coordinator restores to a database that verifies, and nothing is ever overwritten."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import make_url

from qflare.tensors import CHUNK_BYTES
from qflare_client import TaskKind
from qflare_server.cli.main import main
from qflare_server.config import ServerConfig
from qflare_server.errors import PayloadPlaceTakenError
from qflare_server.serving.application import open_application
from qflare_server.serving.coordinator import Coordinator
from qflare_server.storage.backups import back_up, restore
from qflare_server.storage.place_ownership import renew
from qflare_server.verification import DatabaseReport, verify_database
from tests.integration.conftest import Deployment
from tests.support.finished_session import train
from tests.support.postgresql import fresh_database, installed_prefix

LARGE = {"w": np.zeros(CHUNK_BYTES, np.float32)}  # four chunks


@pytest.fixture(autouse=True)
def client_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the client programs of the tests' own PostgreSQL on the path."""
    prefix = installed_prefix()
    if prefix is not None:
        monkeypatch.setenv("PATH", f"{prefix / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def vacant(
    request: pytest.FixtureRequest, deploy: Callable[..., Deployment], tmp_path: Path
) -> Iterator[ServerConfig]:
    """Yield the settings of another coordinator of the same kind, with neither database nor keys."""
    _ = deploy
    folder = tmp_path / "restored"
    if request.node.callspec.params["database_url"] == "sqlite":
        yield ServerConfig(data_dir=folder).checked()
        return
    with fresh_database(request.getfixturevalue("postgres_server_url")) as url:
        yield ServerConfig(data_dir=folder, database_url=url).checked()


def run(config: ServerConfig, *words: str) -> int:
    """Run a command on the data of a configuration."""
    return main(["--data-dir", str(config.data_dir), "--database-url", config.database_url, *words])


def verified(config: ServerConfig) -> DatabaseReport:
    """Open a restored coordinator and verify its database with all its bytes."""
    with open_application(config) as parts:
        return verify_database(parts.context, parts.keys.root_key_ids)


def test_a_backup_of_a_serving_coordinator_verifies_after_a_restore(
    deploy: Callable[..., Deployment],
    vacant: ServerConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = train(deploy())
    parts = trained.deployment.coordinator.parts
    config = parts.context.config
    parts.use_cases.audit.head(fresh=True)
    original = verify_database(parts.context, trained.pins)
    backup = tmp_path / "backups" / "first"

    assert run(config, "backup", str(backup)) == 0
    assert run(vacant, "restore", str(backup)) == 0

    report = verified(vacant)
    assert report.findings == ()
    assert dict(report.checked) == dict(original.checked)
    assert "qflare-server audit verify" in capsys.readouterr().out


@pytest.mark.parametrize("store", ["files", "database", "object"])
def test_the_documented_restore_of_each_payload_store(
    deploy: Callable[..., Deployment],
    vacant: ServerConfig,
    store: str,
    object_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Back up, stop, restore, verify, claim, serve; the original, started again by mistake, is refused."""
    settings = {**(object_settings if store == "object" else {}), "payload_store": store}
    settings |= {"inline_payload_bytes": 0}
    for name, value in settings.items():
        monkeypatch.setenv(f"QFLARE_{name.upper()}", str(value))
    trained = train(deploy(**settings))
    coordinator = trained.deployment.coordinator
    config = coordinator.parts.context.config
    coordinator.parts.use_cases.audit.head(fresh=True)
    for place in coordinator.parts.context.stores:
        renew(coordinator.parts.database, place)
    assert run(config, "backup", str(tmp_path / "backup")) == 0

    assert run(vacant, "restore", str(tmp_path / "backup")) == 0
    assert run(vacant, "payloads", "verify") == 0
    assert run(vacant, "audit", "verify", "--root-key-id", trained.pins[0]) == 0
    assert run(vacant, "model", "verify", trained.session_id) == 0
    restored = replace(vacant, **settings, listen="127.0.0.1:0")
    if store == "object":
        with pytest.raises(PayloadPlaceTakenError):
            Coordinator(restored).start()
        assert run(vacant, "payloads", "move", "--to", "database") == 1
        assert "payloads claim" in capsys.readouterr().err
    assert run(vacant, "payloads", "claim") == 0
    again = Coordinator(restored)
    again.start()
    again.stop(0.5)
    if store == "object":
        with pytest.raises(PayloadPlaceTakenError):
            coordinator._housekeeping.join()
    assert verified(restored).findings == ()


def test_a_backup_says_that_it_has_no_payloads_of_a_bucket(
    deploy: Callable[..., Deployment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = deploy().coordinator.parts.context.config
    monkeypatch.setenv("QFLARE_OBJECT_STORE_URL", "s3://bucket/prefix")

    assert run(config, "backup", str(tmp_path / "backup")) == 0

    assert "not included: the payloads in s3://bucket/prefix" in capsys.readouterr().out


def test_a_backup_and_what_is_restored_are_private(
    deploy: Callable[..., Deployment], vacant: ServerConfig, tmp_path: Path
) -> None:
    config = deploy().coordinator.parts.context.config
    back_up(config, config.data_dir / "keys", tmp_path / "backup")
    restore(vacant, vacant.data_dir / "keys", tmp_path / "backup")

    found = [*(tmp_path / "backup").rglob("*"), *vacant.data_dir.rglob("*")]
    assert {path.stat().st_mode & 0o077 for path in found} == {0}


def test_a_restore_overwrites_nothing_and_can_be_repeated(
    deploy: Callable[..., Deployment], vacant: ServerConfig, tmp_path: Path
) -> None:
    config = deploy().coordinator.parts.context.config
    assert run(config, "backup", str(tmp_path / "backup")) == 0
    keys = vacant.data_dir / "keys"
    shutil.copytree(tmp_path / "backup" / "keys", keys)  # as far as an interrupted restore came
    (keys / "online.key").unlink()

    assert run(config, "backup", str(tmp_path / "backup")) == 1, "a backup is not overwritten"
    assert run(config, "restore", str(tmp_path / "backup")) == 1, "a coordinator is not overwritten"
    (keys / "other.key").write_text("of another coordinator")
    assert run(vacant, "restore", str(tmp_path / "backup")) == 1, "keys are not mixed"
    (keys / "other.key").unlink()
    assert run(vacant, "restore", str(tmp_path / "backup")) == 0
    assert verified(vacant).findings == ()


def test_a_damaged_backup_is_refused_whatever_is_damaged(
    deploy: Callable[..., Deployment],
    vacant: ServerConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = deploy().coordinator.parts.context.config
    backup = tmp_path / "backup"
    assert run(config, "backup", str(backup)) == 0
    files = [path for path in backup.rglob("*") if path.is_file()]

    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        damaged = run(vacant, "restore", str(backup))
        path.unlink()
        missing = run(vacant, "restore", str(backup))
        path.write_bytes(data)
        assert (damaged, missing) == (1, 1), path

    assert "Traceback" not in capsys.readouterr().err
    assert not vacant.data_dir.exists() or not list(vacant.data_dir.rglob("*.key"))


def test_backups_of_another_kind_or_a_later_program_are_refused(
    deploy: Callable[..., Deployment], vacant: ServerConfig, tmp_path: Path
) -> None:
    config = deploy().coordinator.parts.context.config
    backup = tmp_path / "backup"
    assert run(config, "backup", str(backup)) == 0
    manifest = json.loads((backup / "backup.json").read_text())

    changes: list[dict[str, object]] = [
        {"schema": "9999"},
        {"dialect": "oracle"},
        {"format": 2},
        {"files": []},
    ]
    for change in changes:
        (backup / "backup.json").write_text(json.dumps(manifest | change))
        assert run(vacant, "restore", str(backup)) == 1, change


def test_a_place_without_a_coordinator_is_not_backed_up(
    vacant: ServerConfig, tmp_path: Path
) -> None:
    assert run(vacant, "backup", str(tmp_path / "backup")) == 1
    assert not (tmp_path / "backup").exists()
    assert not vacant.data_dir.exists(), "an attempt leaves nothing"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_password_is_no_argument_of_a_client_program(
    deploy: Callable[..., Deployment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Arguments are visible to every user of the machine."""
    config = deploy().coordinator.parts.context.config
    url = make_url(config.database_url).set(password="hunter2")
    program = tmp_path / "pg_dump"
    program.write_text(
        '#!/bin/sh\necho "$@" > $0.arguments\necho $PGPASSWORD > $0.password\nexit 1\n'
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = replace(config, database_url=url.render_as_string(hide_password=False))

    assert run(config, "backup", str(tmp_path / "backup")) == 1

    assert (tmp_path / "pg_dump.password").read_text() == "hunter2\n"
    assert "hunter2" not in (tmp_path / "pg_dump.arguments").read_text()
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_backup_while_payloads_come_and_go_is_consistent(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    """Updates are deleted when their round is over: each backup has every chunk that its rows refer to."""
    deployment = deploy()
    config = deployment.coordinator.parts.context.config
    device = deployment.device("device")
    session_id = deployment.session(
        LARGE,
        total_rounds=1000,
        rounds={"quorum": 1, "target": 1},
        transfer={"payload_retention": "PAYLOAD_RETENTION_NONE"},
    )
    done = threading.Event()

    def take_part() -> None:
        while not done.is_set():
            task = device.get_task(session_id)
            if task.kind is TaskKind.TRAIN:
                base = device.download_base(task)
                device.submit(task, base, base.arrays, 10, {"loss": 1.0})

    with ThreadPoolExecutor(1) as executor:
        work = executor.submit(take_part)
        try:
            for number in range(3):
                back_up(config, config.data_dir / "keys", tmp_path / f"backup-{number}")
        finally:
            done.set()
        work.result()

    for number in range(3):
        target = ServerConfig(data_dir=tmp_path / f"restored-{number}").checked()
        restore(target, target.data_dir / "keys", tmp_path / f"backup-{number}")
        assert verified(target).findings == ()


def test_new_keys_are_never_made_for_a_database_that_has_keys(
    deploy: Callable[..., Deployment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = deploy().coordinator.parts.context.config
    keys = config.data_dir / "keys"
    keys.rename(tmp_path / "lost")

    for command in (["init"], ["serve", "--listen", "127.0.0.1:0"]):
        assert run(config, *command) == 1
        assert "restore the keys from a backup" in capsys.readouterr().err
        assert not keys.exists()

    (tmp_path / "lost").rename(keys)
    assert run(config, "init") == 0
