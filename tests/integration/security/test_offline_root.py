"""Rotation by command line where the root keys are on a machine of their own."""

import json
import shutil
from pathlib import Path

import pytest

from qflare_server.cli.main import main

INTACT_DAYS = "30"


@pytest.fixture
def offline(tmp_path: Path, key_folder: Path) -> Path:
    """Return the folder of a machine that has nothing but the root keys."""
    folder = tmp_path / "offline"
    folder.mkdir()
    for name in ("root.key", "root.passphrase"):
        shutil.copyfile(key_folder / name, folder / name)
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def online(tmp_path: Path, key_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data folder of a coordinator without the root keys."""
    folder = tmp_path / "online"
    shutil.copytree(key_folder, folder / "keys")
    (folder / "keys" / "root.key").unlink()
    (folder / "keys" / "root.passphrase").unlink()
    monkeypatch.setenv("QFLARE_DATABASE_URL", f"sqlite:///{folder / 'qflare.db'}")
    run(folder, "bundle", "--address", "localhost:1", "--output", str(tmp_path / "bundle.json"))
    return folder


def run(data_dir: Path, *arguments: str) -> None:
    assert main(["--data-dir", str(data_dir), *arguments]) == 0


def test_a_keyset_is_signed_on_another_machine(
    online: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, signed = tmp_path / "keyset.json", tmp_path / "signed.json"
    run(online, "keys", "prepare")
    run(online, "keys", "draft", "--days", INTACT_DAYS, "--output", str(draft))
    elsewhere = ("keys", "sign", "--root-dir", str(offline), "--keyset", str(draft))
    run(tmp_path / "nothing", *elsewhere, "--output", str(signed))
    run(online, "keys", "publish", "--signed", str(signed))
    assert "keyset version 2 is in force" in capsys.readouterr().out


def test_the_signer_sees_every_key(
    online: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = tmp_path / "keyset.json"
    run(online, "keys", "prepare")
    run(online, "keys", "draft", "--output", str(draft))
    capsys.readouterr()
    elsewhere = ("keys", "sign", "--root-dir", str(offline), "--keyset", str(draft))
    run(tmp_path / "nothing", *elsewhere, "--output", str(tmp_path / "signed.json"))
    shown = capsys.readouterr().out
    for key in json.loads(draft.read_text())["keys"]:
        assert (key.get("signatureKey") or key.get("kemKey"))["keyId"] in shown


def test_a_keyset_that_was_changed_after_signing_is_refused(
    online: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft, signed = tmp_path / "keyset.json", tmp_path / "signed.json"
    run(online, "keys", "prepare")
    run(online, "keys", "draft", "--output", str(draft))
    elsewhere = ("keys", "sign", "--root-dir", str(offline), "--keyset", str(draft))
    run(tmp_path / "nothing", *elsewhere, "--output", str(signed))
    envelope = json.loads(signed.read_text())
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    signed.write_text(json.dumps(envelope))
    assert main(["--data-dir", str(online), "keys", "publish", "--signed", str(signed)]) == 1
    assert "keyset" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}x", '{"version": "high"}', "\udcff"])
def test_another_file_is_refused(
    offline: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keyset.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    elsewhere = ["keys", "sign", "--root-dir", str(offline), "--keyset", str(path)]
    assert main(["--data-dir", str(tmp_path), *elsewhere, "--output", str(tmp_path / "out")]) == 1
    assert "not what `keys` writes" in capsys.readouterr().err


def test_rotation_needs_the_root(online: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-dir", str(online), "keys", "rotate"]) == 1
    assert "root.key" in capsys.readouterr().err
