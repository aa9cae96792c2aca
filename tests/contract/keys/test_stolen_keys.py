"""After a key file was stolen: nothing that it held counts any more."""

from dataclasses import replace

import pytest

from qflare.v1.security_pb2 import KEY_ROLE_MODEL as MODEL
from qflare_server.cli.main import main
from qflare_server.config import ServerConfig
from qflare_server.context import UnknownKeyError
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.ring import ROLES
from qflare_server.keys.rotation import replace_stolen
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.storage.database import Database
from tests.conftest import START
from tests.support.statements import statement_of


@pytest.fixture
def config(server_config: ServerConfig, key_folder: KeyFolder) -> ServerConfig:
    """Return the settings of a coordinator with these keys."""
    return replace(server_config, key_dir=key_folder.directory)


@pytest.fixture
def folder(config: ServerConfig, database: Database, key_folder: KeyFolder) -> KeyFolder:
    """Return a folder with keys that are published in the test's database."""
    ServerKeys.load(config, database, lambda: START)
    return key_folder


def test_no_stolen_key_is_accepted(folder: KeyFolder, database: Database) -> None:
    stolen = {key.key_id for key in folder.read_online().keys}
    trust = replace_stolen(folder, database, START)
    accepted = [key_id for role in ROLES for key_id in trust.key_ids(role)]
    assert len(accepted) == len(ROLES)
    assert not stolen & set(accepted)


def test_a_key_that_was_prepared_in_the_file_is_not_accepted_either(
    folder: KeyFolder, database: Database
) -> None:
    replace_stolen(folder, database, START)
    stolen = {key.key_id for key in folder.read_online().keys}
    trust = replace_stolen(folder, database, START)
    assert not stolen & {key_id for role in ROLES for key_id in trust.key_ids(role)}


def test_the_state_key_is_another(folder: KeyFolder, database: Database) -> None:
    before = folder.read_online().state_key
    replace_stolen(folder, database, START)
    assert folder.read_online().state_key != before


def test_a_coordinator_goes_on_with_the_next_keys(
    folder: KeyFolder, database: Database, config: ServerConfig
) -> None:
    stolen = folder.read_online().public()[0].kem_key.key_id
    replace_stolen(folder, database, START)
    keys = ServerKeys.load(config, database, lambda: START)
    assert keys.sign(MODEL, statement_of(MODEL)).signatures
    with pytest.raises(UnknownKeyError):
        keys.decapsulate(stolen, bytes(1120))


def test_nothing_changes_without_the_root_keys(folder: KeyFolder, database: Database) -> None:
    folder.root_file.unlink()
    before = folder.online_file.read_bytes()
    with pytest.raises(KeyStoreError):
        replace_stolen(folder, database, START)
    assert folder.online_file.read_bytes() == before


def test_the_command_replaces_stolen_keys(
    folder: KeyFolder,
    config: ServerConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QFLARE_KEY_DIR", str(folder.directory))
    monkeypatch.setenv("QFLARE_DATABASE_URL", config.database_url)
    before = folder.read_online().keys
    assert main(["keys", "rotate", "--stolen"]) == 0
    assert "start each of them again" in capsys.readouterr().out
    assert not {key.key_id for key in before} & {key.key_id for key in folder.read_online().keys}
