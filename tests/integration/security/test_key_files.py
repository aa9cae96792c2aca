"""Key folders on a real file system: made once, whole, for their owner only."""

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format

from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.keys import KeyFolder, ensure_initialized
from qflare_server.keys.secret_files import (
    KeyStoreError,
    forbidden_bits,
    read_passphrase,
    read_secret,
    write_secret,
)
from qflare_server.keys.setup import (
    SetupOptions,
    bootstrap_bundle,
    initialize,
    write_bootstrap,
)
from tests.conftest import START
from tests.support.identity import CHEAP

REALM = "qflare"
NAMES = {"online.key", "online.passphrase", "root.key", "root.passphrase"}


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "keys", cost=CHEAP)


class TestWriting:
    def test_only_the_owner_may_read(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "secret", b"x")
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600

    def test_what_is_there_is_left_alone(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "secret", b"first")
        with pytest.raises(KeyStoreError):
            write_secret(tmp_path / "secret", b"second")
        assert read_secret(tmp_path / "secret") == b"first"

    def test_it_is_replaced_when_asked(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "secret", b"first")
        write_secret(tmp_path / "secret", b"second", replace=True)
        assert read_secret(tmp_path / "secret") == b"second"

    def test_no_temporary_file_stays(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "secret", b"first")
        with pytest.raises(KeyStoreError):
            write_secret(tmp_path / "secret", b"second")
        assert [path.name for path in tmp_path.iterdir()] == ["secret"]

    def test_a_folder_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyStoreError):
            write_secret(tmp_path / "none" / "secret", b"x")


class TestReading:
    @pytest.mark.parametrize(
        "mode", [0o604, 0o602, 0o601, 0o640, 0o440, 0o644, 0o660, 0o666, 0o620, 0o777]
    )
    def test_a_file_that_is_open_to_others_is_refused(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "secret"
        write_secret(path, b"x")
        path.chmod(mode)
        with pytest.raises(KeyStoreError, match="open to others"):
            read_secret(path)

    def test_a_group_may_read_what_an_orchestrator_mounts(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        write_secret(path, b"x")
        path.chmod(0o440)
        code = f"from pathlib import Path; print(secret_files.read_secret(Path({str(path)!r})))"
        if os.geteuid() != 0:
            pytest.skip("only root can own a file that another user reads")
        for parent in path.parents[:4]:
            parent.chmod(parent.stat().st_mode | 0o011)
        os.chown(path, 0, 12345)
        loaded = (
            "import os; from qflare_server.keys import secret_files; os.setgid(12345); os.setuid(12345); "
            + code
        )
        done = subprocess.run(
            [sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "b'x'\n", done.stderr

    def test_only_what_root_owns_may_be_readable_by_a_group(self) -> None:
        assert forbidden_bits(0, 10001) == 0o037
        assert forbidden_bits(10001, 10001) == forbidden_bits(0, 0) == 0o077

    def test_a_file_of_another_user_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "secret"
        write_secret(path, b"x")
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(KeyStoreError, match="another user"):
            read_secret(path)

    def test_a_file_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "secret", bytes(2**20 + 1))
        with pytest.raises(KeyStoreError, match="longer"):
            read_secret(tmp_path / "secret")

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyStoreError, match="cannot read"):
            read_secret(tmp_path / "secret")

    @pytest.mark.parametrize("content", [b"word", b"word\n", b"word\r\n", b"word\nmore"])
    def test_a_passphrase_is_the_first_line(self, tmp_path: Path, content: bytes) -> None:
        write_secret(tmp_path / "passphrase", content)
        assert read_passphrase(tmp_path / "passphrase") == b"word"

    def test_an_empty_passphrase_is_refused(self, tmp_path: Path) -> None:
        write_secret(tmp_path / "passphrase", b"\n")
        with pytest.raises(KeyStoreError):
            read_passphrase(tmp_path / "passphrase")


class TestInitializing:
    def test_everything_is_there_for_its_owner_only(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        files = list(folder.directory.iterdir())
        assert {path.name for path in files} == NAMES
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert stat.S_IMODE(folder.directory.stat().st_mode) == 0o700

    def test_nothing_else_is_left(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        assert list(folder.directory.parent.iterdir()) == [folder.directory]

    def test_keys_are_not_made_twice(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        before = folder.online_file.read_bytes()
        with pytest.raises(KeyStoreError):
            initialize(folder, REALM, START)
        assert folder.online_file.read_bytes() == before
        assert list(folder.directory.parent.iterdir()) == [folder.directory]

    def test_of_many_at_the_same_moment_one_makes_them(self, folder: KeyFolder) -> None:
        def attempt(_: int) -> bool:
            try:
                initialize(folder, REALM, START)
            except KeyStoreError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(attempt, range(4))) == 1
        assert folder.read_online().realm == REALM

    def test_serving_needs_no_root_key(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        folder.root_file.unlink()
        folder.root_file.with_suffix(".passphrase").unlink()
        assert folder.read_online().realm == REALM

    def test_the_online_keys_hold_no_root_key(self, folder: KeyFolder) -> None:
        trust = initialize(folder, REALM, START)
        held = {entry.key_id for entry in folder.read_online().keys}
        assert not held & set(trust.root_key_ids())

    def test_no_key_is_in_the_clear(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        ring = folder.read_online()
        stored = folder.online_file.read_bytes()
        assert ring.state_key not in stored
        assert b"qflare" not in stored

    def test_a_given_passphrase_is_used(self, folder: KeyFolder, tmp_path: Path) -> None:
        write_secret(tmp_path / "passphrase", b"correct horse\n")
        given = replace(folder, passphrase_file=tmp_path / "passphrase")
        initialize(given, REALM, START)
        assert not (folder.directory / "online.passphrase").exists()
        assert given.read_online().realm == REALM

    def test_the_root_keys_can_be_elsewhere(self, folder: KeyFolder, tmp_path: Path) -> None:
        apart = replace(folder, root_directory=tmp_path / "stick")
        initialize(apart, REALM, START)
        assert {path.name for path in folder.directory.iterdir()} == {
            "online.key",
            "online.passphrase",
        }
        assert apart.read_root().realm == REALM

    def test_a_setup_that_fails_leaves_nothing(self, folder: KeyFolder, tmp_path: Path) -> None:
        apart = replace(folder, root_directory=tmp_path / "stick")
        initialize(apart, REALM, START)
        shutil.rmtree(folder.directory)
        with pytest.raises(KeyStoreError):
            initialize(apart, REALM, START)
        assert {path.name for path in tmp_path.iterdir()} == {"stick"}

    def test_several_root_keys_share_the_signing(self, folder: KeyFolder) -> None:
        trust = initialize(folder, REALM, START, SetupOptions(root_count=3, threshold=2))
        assert len(trust.root_key_ids()) == 3
        assert trust.first_threshold() == 2

    def test_a_changed_key_file_is_refused(self, folder: KeyFolder) -> None:
        initialize(folder, REALM, START)
        data = bytearray(folder.online_file.read_bytes())
        data[-1] ^= 1
        write_secret(folder.online_file, bytes(data), replace=True)
        with pytest.raises(KeyStoreError, match="changed"):
            folder.read_online()

    def test_a_missing_folder_says_what_to_do(self, folder: KeyFolder) -> None:
        with pytest.raises(KeyStoreError, match="qflare-server init"):
            folder.read_online()

    def test_it_is_done_where_a_configuration_has_no_keys(self, tmp_path: Path) -> None:
        config = ServerConfig(data_dir=tmp_path / "data").checked()
        assert ensure_initialized(config)
        assert not ensure_initialized(config)
        assert {path.name for path in (tmp_path / "data" / "keys").iterdir()} == NAMES


class TestBootstrapBundle:
    def test_it_is_written_for_its_owner_only(self, folder: KeyFolder, tmp_path: Path) -> None:
        trust = initialize(folder, REALM, START)
        bundle = bootstrap_bundle(trust, "localhost:50051", enrollment_token="qfe1.a.b")
        write_bootstrap(tmp_path / "bundle.json", bundle)
        path = tmp_path / "bundle.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["rootKeyIds"] == trust.root_key_ids()
        assert json_format.Parse(path.read_text(), security_pb2.BootstrapBundle()) == bundle


OUT_OF_MEMORY = """
import resource
from qflare_server.keys.secret_files import Cost, KeyStoreError, OutOfMemoryError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
try:
    Cost(memory_kib=2**20).key(b"passphrase", b"salt" * 4)
except OutOfMemoryError as error:
    print(error)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells and bounds the memory of a process"
)
def test_missing_memory_for_a_passphrase_is_an_error_with_a_remedy() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert "it takes 1048576 KiB" in done.stdout, done.stderr
