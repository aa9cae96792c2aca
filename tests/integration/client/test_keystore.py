import os
import subprocess
import sys
from pathlib import Path

import pytest

from qflare_client.errors import KeyStoreError, KeyStoreLockedError, WrongPassphraseError
from qflare_client.keystore.passphrase import passphrase_coding
from qflare_client.keystore.store import KeyStore, read_document


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_secret_comes_back(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "home") as store:
        store.write_secret("keys", b"secret")

    with KeyStore(tmp_path / "home") as store:
        assert store.read_secret("keys") == b"secret"


def test_there_may_be_no_secret(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "home") as store:
        assert store.read_secret("keys") is None


def test_folder_and_files_are_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with KeyStore(tmp_path / "home") as store:
            store.write_secret("keys", b"secret")
            store.write_document("device.json", {"a": 1})
    finally:
        os.umask(old)

    files = {path.name: mode_of(path) for path in (tmp_path / "home").iterdir()}
    assert mode_of(tmp_path / "home") == 0o700
    assert files == {"keys": 0o600, "device.json": 0o600, "lock": 0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with KeyStore(tmp_path / "home") as store:
        store.write_secret("keys", b"secret")
        (tmp_path / "home" / "keys").chmod(mode)

        with pytest.raises(KeyStoreError, match="open to others"):
            store.read_secret("keys")


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)

    with pytest.raises(KeyStoreError, match="open to others"):
        KeyStore(tmp_path / "home")


def test_a_second_store_in_the_process_is_refused(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "home"), pytest.raises(KeyStoreLockedError):
        KeyStore(tmp_path / "home")


def test_another_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qflare_client.keystore.store import KeyStore\n"
        "from qflare_client.errors import KeyStoreLockedError\n"
        "try: KeyStore(Path(sys.argv[1]))\n"
        "except KeyStoreLockedError: sys.exit(7)"
    )

    with KeyStore(tmp_path / "home"):
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "home")],
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    assert result.returncode == 7


def test_the_lock_is_given_back(tmp_path: Path) -> None:
    KeyStore(tmp_path / "home").close()

    KeyStore(tmp_path / "home").close()


def test_a_damaged_document_is_reported(tmp_path: Path) -> None:
    (tmp_path / "device.json").write_text("{")

    with pytest.raises(KeyStoreError, match="damaged"):
        read_document(tmp_path, "device.json")


def test_writing_leaves_no_temporary_file_behind(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "home") as store:
        store.write_secret("keys", b"1")
        store.write_secret("keys", b"2")

    assert {path.name for path in (tmp_path / "home").iterdir()} == {"keys", "lock"}


def test_a_passphrase_opens_what_it_closed(tmp_path: Path) -> None:
    with KeyStore(tmp_path / "home", passphrase_coding("open sesame")) as store:
        store.write_secret("keys", b"secret")

        assert store.read_secret("keys") == b"secret"
    data = (tmp_path / "home" / "keys").read_bytes()
    assert b"secret" not in data


@pytest.mark.parametrize("place", [0, 5, 20, 40, -1])
def test_an_altered_file_does_not_open(place: int) -> None:
    coding = passphrase_coding("open sesame")
    data = bytearray(coding.encode(b"secret"))
    data[place] ^= 1

    with pytest.raises(WrongPassphraseError):
        coding.decode(bytes(data))


def test_another_passphrase_does_not_open() -> None:
    data = passphrase_coding("open sesame").encode(b"secret")

    with pytest.raises(WrongPassphraseError):
        passphrase_coding("open barley").decode(data)


def test_plain_keys_do_not_open_with_a_passphrase() -> None:
    with pytest.raises(WrongPassphraseError):
        passphrase_coding("open sesame").decode(b"secret")
