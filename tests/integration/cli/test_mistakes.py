"""A hundred mistakes of people at the command line: each is told in a line, with a line on what to do about it.

`FOLDER` holds what the words name: a running coordinator's data folder, its bundle and token, and files that are not
what they should be. No command may end in a traceback, and none may exit with code 0.
"""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import numpy as np
import pytest
from google.protobuf import json_format
from safetensors.numpy import save_file

import qflare_client.__main__ as client_program
import qflare_client.admin.__main__ as admin_program
from qflare.v1 import training_pb2
from qflare_server.cli import main as server_program
from qflare_server.config import ServerConfig
from tests.integration.conftest import Deployment

PROGRAMS: Final = {
    "qflare-server": server_program.main,
    "qflare-client": client_program.main,
    "qflare-admin": admin_program.main,
}
ID: Final = "00000000-0000-4000-8000-000000000000"
SERVER: Final = [
    "serve --listen localhost",
    "serve --listen localhost:http",
    "serve --listen TAKEN",
    "serve --listen 192.0.2.1:50051",
    "serve --listen 0.0.0.0:50051",
    "serve --listen 127.0.0.1:0 --dashboard TAKEN",
    "serve --listen 127.0.0.1:0 --dashboard nowhere",
    "serve --listen 127.0.0.1:0 --workers 0",
    "serve --listen 127.0.0.1:0 --workers many",
    "serve --data-dir FOLDER/data",
    "backup",
    "backup FOLDER/text",
    "--data-dir FOLDER/absent backup FOLDER/backup",
    "--data-dir FOLDER/data backup FOLDER/text/backup",
    "restore FOLDER/absent",
    "restore FOLDER/text",
    "restore FOLDER/data",
    "QFLARE_HEALTH_LISTEN=TAKEN serve --listen 127.0.0.1:0",
    "QFLARE_METRICS_LISTEN=TAKEN serve --listen 127.0.0.1:0",
    "QFLARE_LISTN=127.0.0.1:0 serve",
    "QFLARE_MAX_UPLOADS=lots serve",
    "QFLARE_REALM=UPPER serve",
    "QFLARE_REALM=other.example serve --listen 127.0.0.1:0",
    "QFLARE_LOG_LEVEL=LOUD serve",
    "QFLARE_TLS_CERTIFICATE_FILE=FOLDER/absent.pem serve --listen 127.0.0.1:0",
    "QFLARE_TLS_CERTIFICATE_FILE=FOLDER/absent.pem QFLARE_TLS_KEY_FILE=FOLDER/absent.key serve --listen 127.0.0.1:0",
    "QFLARE_TLS_CERTIFICATE_FILE=FOLDER/text QFLARE_TLS_KEY_FILE=FOLDER/text serve --listen 127.0.0.1:0",
    "QFLARE_KEY_PASSPHRASE_FILE=FOLDER/absent serve --listen 127.0.0.1:0",
    "QFLARE_KEY_PASSPHRASE_FILE=FOLDER/text serve --listen 127.0.0.1:0",
    "QFLARE_KEY_DIR=FOLDER/text serve --listen 127.0.0.1:0",
    "QFLARE_PKCS11_MODULE=FOLDER/absent.so QFLARE_PKCS11_PIN_FILE=FOLDER/text serve --listen 127.0.0.1:0",
    "QFLARE_WITNESS_FILE=FOLDER/absent/heads serve --workers -1",
    "--data-dir FOLDER/text serve --listen 127.0.0.1:0",
    "--database-url mysql://root@localhost/qflare status",
    "--database-url nonsense status",
    "--database-url sqlite:// status",
    "--database-url sqlite:////dev/null/qflare.db status",
    "--database-url sqlite:///FOLDER/text status",
    "--database-url sqlite:///FOLDER/noschema.db status",
    "--database-url postgresql://127.0.0.1:1/qflare status",
    "--database-url postgresql://127.0.0.1:1/qflare migrate",
    "--database-url sqlite:///FOLDER/text migrate",
    "--database-url sqlite:///FOLDER/newer.db migrate",
    "health --address 127.0.0.1:1",
    "health --address nowhere --timeout 0.2",
    "health --address ADDRESS --service no.such.Service",
    "health --address ADDRESS --ca FOLDER/absent.pem",
    "health --address ADDRESS --ca FOLDER/text --timeout 0.2",
    "health --address ADDRESS --timeout soon",
    "session create",
    "session create --name x --quorum 1 --model FOLDER/absent.safetensors",
    "session create --name x --quorum 1 --model FOLDER/text",
    "session create --name x --config FOLDER/absent.json",
    "session create --name x --config FOLDER/text",
    "session create --name x --config FOLDER/typo.json",
    "session create --name x --config FOLDER/range.json",
    "session create --name x --config FOLDER/list.json",
    "session create --name x --config FOLDER/binary",
    "session create --name x --config FOLDER",
    "session create --name x --quorum 1 --strategy fedbest",
    "session create --name x --rounds -1",
    "session create --name x --rounds many",
    "session create --name x",
    "session create --name x --rounds 2 --quorum 0 --start",
    "session create --name x --quorum 3 --devices 2",
    "session create --name x --deadline-s -1",
    f"session start {ID}",
    "session pause SESSION",
    "session start digits",
    f"model export {ID} FOLDER/out.safetensors",
    "model export SESSION FOLDER/absent/out.safetensors",
    "model export SESSION FOLDER/out.safetensors --version 99",
    "model export SESSION FOLDER/out.safetensors --version latest",
    "model import SESSION FOLDER/model.safetensors",
    f"model import {ID} FOLDER/model.safetensors",
    f"model verify {ID}",
    "model verify SESSION --version 7",
    "token issue --count 0",
    "token issue --count 1001",
    "token issue --bundles FOLDER/text",
    "token issue --device somebody",
    "token issue --output FOLDER/text",
    "token issue --bundles FOLDER/b --address ADDRESS --ca FOLDER/text",
    "token issue --lifetime-s -5",
    "token issue-admin --name x --role king",
    "token issue-admin --role viewer",
    "bundle --address fl.example.org --output FOLDER/b.json",
    "bundle --address https://fl.example.org --output FOLDER/b.json",
    "bundle --address ADDRESS --output FOLDER/text",
    "bundle --address ADDRESS --output FOLDER/absent/b.json",
    "bundle --address ADDRESS --ca FOLDER/absent.pem --output FOLDER/b.json",
    "registry import FOLDER/absent.json",
    "registry import FOLDER/text",
    "registry import FOLDER/list.json",
    "registry vouch zz",
    f"registry vouch {'ab' * 32}",
    "audit verify --root-key-id zz",
    "audit verify --witness FOLDER/text",
    "audit witness FOLDER/absent/heads",
    "certificates make --output FOLDER/text",
    "certificates make --output FOLDER/c --host a/b",
    "certificates make --output FOLDER/c --days 0",
    "keys sign --keyset FOLDER/text --output FOLDER/s.json",
    "keys sign --keyset FOLDER/absent --output FOLDER/s.json",
    "keys publish --signed FOLDER/text",
    "keys publish --signed FOLDER/binary",
    "keys rotate --without nobody",
    "keys rotate --root-key FOLDER/absent.key",
    "keys rotate --root-key FOLDER/text",
    "keys make-root --root-key FOLDER/text --output FOLDER/r.json",
    "keys draft --output FOLDER/text",
    "keys draft --output FOLDER/k.json --days 0",
    "keys draft --output FOLDER/k.json --without nobody",
    "bundle --address ADDRESS --ca FOLDER/text --output FOLDER/b2.json",
    "--data-dir FOLDER/nothing session start SESSION",
    "init --root-threshold 3 --root-dir FOLDER/a",
    "--data-dir FOLDER/fresh init --root-threshold 5 --root-count 2",
    "--data-dir FOLDER/fresh init --root-passphrase-file FOLDER/text --root-dir FOLDER/text",
    "fly",
    "",
]
CLIENT: Final = [
    "",
    "fly",
    "init FOLDER",
    "init FOLDER/text",
    "enroll FOLDER/absent.json --home FOLDER/d",
    "enroll FOLDER/text --home FOLDER/d",
    "enroll FOLDER/binary --home FOLDER/d",
    "enroll FOLDER/used.json --home FOLDER/d",
    "enroll FOLDER/bundle.json --home FOLDER/text",
    "enroll FOLDER/bundle.json --home FOLDER/d --algorithm rsa",
    "enroll FOLDER/bundle.json --home FOLDER/d --algorithm slh-dsa-sha2-128s",
    "enroll FOLDER/bundle.json --home FOLDER/d --capability ram",
    "enroll FOLDER/bundle.json --home FOLDER/d --capability ram=much",
    "enroll FOLDER/bundle.json --home FOLDER/d --passphrase-file FOLDER/absent",
    "enroll FOLDER/bundle.json --home FOLDER/d --ca-file FOLDER/absent",
    "run --home FOLDER/device",
    "run absent:train --home FOLDER/device",
    "run broken:train --home FOLDER/device",
    "run raising:train --home FOLDER/device",
    "run own:absent --home FOLDER/device",
    "run own:number --home FOLDER/device",
    "run own --home FOLDER/device",
    "run own:train --home FOLDER/nobody",
    "run own:train --home FOLDER/open",
    "run own:wrong --home FOLDER/device --training-session RUNNING",
    f"run own:train --home FOLDER/device --training-session {ID}",
    "run own:train --home FOLDER/device --patience soon",
    "status --home FOLDER/nobody",
    "status --home FOLDER/device --passphrase-file FOLDER/text",
    "rotate --home FOLDER/nobody",
    "rotate --home FOLDER/device --algorithm none",
    f"evidence {ID} --home FOLDER/device --output FOLDER/e.json",
    "evidence RUNNING --home FOLDER/device --output FOLDER/absent/e.json",
    "verify FOLDER/absent.json",
    "verify FOLDER/text --root-key-id 00",
    "verify FOLDER/binary --root-key-id 00",
    "verify FOLDER/list.json --bundle FOLDER/bundle.json",
    "verify FOLDER/list.json --at tomorrow",
]
ADMIN: Final = [
    "",
    "fly",
    "--address 127.0.0.1:1 --token-file FOLDER/token status",
    "--address nowhere --token-file FOLDER/token --timeout-s 1 status",
    "--address ADDRESS --token-file FOLDER/absent status",
    "--address ADDRESS --token-file FOLDER/text status",
    "--address ADDRESS --token-file FOLDER/opentoken status",
    "--address ADDRESS --token-file FOLDER/token --ca FOLDER/absent status",
    "--token-file FOLDER/token status",
    "--address ADDRESS status",
    "QFLARE_PROFILE=FOLDER/text --address ADDRESS status",
    "@ session show nobody",
    f"@ session show {ID}",
    f"@ session start {ID}",
    "@ session pause SESSION",
    "@ session create --name x --config FOLDER/typo.json",
    "@ session create --name x --config FOLDER/range.json",
    "@ session create --name x --config FOLDER/text",
    "@ session create --name x --config FOLDER/absent",
    "@ session create --name x --quorum 1 --strategy fedbest --rounds 1",
    "@ session create --name x --rounds 1",
    "@ session list --limit none",
    "@ model upload SESSION FOLDER/absent.safetensors",
    "@ session create --name x --quorum 1 --model FOLDER/absent.safetensors",
    "@ session create --name x --quorum 1 --model FOLDER/text",
    "@ model upload SESSION FOLDER/text",
    f"@ model upload {ID} FOLDER/model.safetensors",
    "@ model upload RUNNING FOLDER/model.safetensors",
    "@ model download SESSION FOLDER/out2.safetensors --version 9",
    "@ model download RUNNING FOLDER/absent/out.safetensors",
    "@ model rollback RUNNING 9",
    f"@ metrics show {ID}",
    "@ metrics plot RUNNING FOLDER/absent/p.png",
    "@ metrics plot RUNNING FOLDER/p.docx",
    "@ metrics export RUNNING --tensorboard FOLDER/text",
    "@ metrics export RUNNING --mlflow FOLDER/text",
    "@ metrics export RUNNING --mlflow ftp://nowhere",
    f"@ device show {ID}",
    "@ device show nobody",
    f"@ device revoke {ID}",
    "@ device list --seen-after yesterday",
    "@ device list --capability much",
    "@ token issue --count 0",
    "@ token issue --output FOLDER/text",
    "@ token issue --bundles FOLDER/bs --bundle FOLDER/text",
    "@ token issue --bundles FOLDER/bs",
    f"@ token revoke {ID}",
    "@ token issue-admin --name x --role king",
    "@ audit list --since yesterday",
    "@ audit list --limit -1",
    "@ audit export --output FOLDER/absent/log.jsonl",
    f"@ watch {ID}",
    "profile set --token-file FOLDER/absent",
    "QFLARE_PROFILE=FOLDER/text/profile profile set --address ADDRESS",
    "completion fish",
]
MISTAKES: Final = [
    *(f"qflare-server {words}" for words in SERVER),
    *(f"qflare-client {words}" for words in CLIENT),
    *(f"qflare-admin {words}" for words in ADMIN),
]
PYTHON: Final = """
number = 7
def train(arrays, config):
    return arrays, 1, {}
def wrong(arrays, config):
    return {"other": 1}, 1, {}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, key_folder: Path) -> Iterator[SimpleNamespace]:
    """Return names of the place that mistakes are made in."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(key_folder, folder / "data" / "keys")
    config = ServerConfig(data_dir=folder / "data", listen="127.0.0.1:0").checked()
    deployment = Deployment(config, folder)
    taken = socket.create_server(("127.0.0.1", 0))
    _write_files(folder, deployment)
    session = deployment.session(start=False)
    yield SimpleNamespace(
        FOLDER=str(folder),
        ADDRESS=deployment.coordinator.address,
        TAKEN=f"127.0.0.1:{taken.getsockname()[1]}",
        SESSION=session,
        RUNNING=deployment.session(rounds=training_pb2.RoundPolicy(quorum=2)),
    )
    taken.close()
    deployment.close()


def _write_files(folder: Path, deployment: Deployment) -> None:
    for name in ("text", "typo.json", "range.json", "list.json", "token", "opentoken"):
        (folder / name).touch(mode=0o600)
    (folder / "text").write_text("neither JSON nor anything else\n")
    (folder / "typo.json").write_text('{"totalRonds": 3}')
    (folder / "range.json").write_text(json.dumps({"totalRounds": 3, "rounds": {"quorum": -2}}))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "token").write_text(deployment.admin_token)
    (folder / "opentoken").write_text(deployment.admin_token)
    (folder / "opentoken").chmod(0o644)
    (folder / "own.py").write_text(PYTHON)
    (folder / "broken.py").write_text("def train(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    save_file({"w": np.ones(4, np.float32)}, folder / "model.safetensors")
    deployment.device("device").close()
    shutil.copytree(folder / "device", folder / "open")
    (folder / "open").chmod(0o775)
    _make_databases(folder)
    used = deployment.bundle()
    for name, bundle in (("used", used), ("bundle", deployment.bundle())):
        (folder / f"{name}.json").write_text(json_format.MessageToJson(bundle))
    assert (
        client_program.main(["enroll", str(folder / "used.json"), "--home", str(folder / "u")]) == 0
    )


def _make_databases(folder: Path) -> None:
    statements = {
        "noschema.db": "CREATE TABLE other (id INTEGER)",
        "newer.db": "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('9999')",
    }
    for name, script in statements.items():
        with contextlib.closing(sqlite3.connect(folder / name)) as database:
            database.executescript(script)


def _split(mistake: str, place: SimpleNamespace) -> tuple[str, list[str], dict[str, str]]:
    """Return program, words and environment of a mistake."""
    mistake = mistake.replace("@", "--address ADDRESS --token-file FOLDER/token")
    for name, value in vars(place).items():
        mistake = mistake.replace(name, value)
    program, *words = mistake.split()
    variables = {}
    while words and words[0].startswith("QFLARE_"):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return program, words, variables


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_cause_and_its_remedy(
    mistake: str,
    place: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program, words, variables = _split(mistake, place)
    monkeypatch.chdir(place.FOLDER)
    for name in [name for name in os.environ if name.startswith("QFLARE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", place.FOLDER)
    monkeypatch.setenv("QFLARE_DATA_DIR", f"{place.FOLDER}/data")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    code = _exit_code(program, words)

    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert 0 < code < 126, lines
    assert not [line for line in lines if "Traceback" in line or "internal error" in line], lines
    assert lines[-1].startswith("try: "), lines
    assert len(lines[-1]) > len("try: "), lines
    assert lines[-2].startswith(f"{program}"), lines
    assert lines[-2].partition(": ")[2], lines


def _exit_code(program: str, words: list[str]) -> int:
    try:
        return PROGRAMS[program](words)
    except SystemExit as ended:
        return int(ended.code or 0)


def test_there_are_a_hundred_of_them() -> None:
    assert len(MISTAKES) >= 100
