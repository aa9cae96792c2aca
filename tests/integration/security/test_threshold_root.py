"""Root keys that are kept apart: each in a file of its own, and no file signs alone."""

import json
import shutil
from pathlib import Path

import pytest

from qflare.crypto.signing import Algorithm
from qflare.protocol.keysets import TrustedKeyset
from qflare.v1 import security_pb2
from qflare_server.cli.main import main
from qflare_server.config import ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.ring import KeyRing
from qflare_server.keys.root_files import found_in
from qflare_server.keys.secret_files import decrypt_secret, read_passphrase, read_secret
from qflare_server.keys.trust_documents import Trust
from qflare_server.keys.trust_store import read_published, trust_from_bundle
from qflare_server.serving.application import open_database


@pytest.fixture
def data(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFLARE_DATABASE_URL", database_url)
    monkeypatch.setenv("QFLARE_AUTO_MIGRATE", "true")
    return tmp_path / "data"


def run(data: Path, *arguments: object) -> None:
    assert main(["--data-dir", str(data), *map(str, arguments)]) == 0


def refused(
    data: Path, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1
) -> str:
    capsys.readouterr()
    usage = 2
    try:
        got: object = main(["--data-dir", str(data), *map(str, arguments)])
    except SystemExit as ended:  # argparse ends the program by itself
        got = ended.code
    assert got in {code, usage}
    return capsys.readouterr().err


def sticks(tmp_path: Path, count: int = 3) -> list[Path]:
    return [tmp_path / f"stick-{number}" for number in range(count)]


def init(data: Path, tmp_path: Path, *arguments: object) -> list[Path]:
    """Set up a coordinator whose three root keys lie on three sticks, of which two have to sign."""
    folders = sticks(tmp_path)
    places = [word for folder in folders for word in ("--root-dir", folder)]
    run(data, "init", "--root-threshold", 2, *places, *arguments)
    return folders


def trust_of(data: Path, database_url: str) -> Trust:
    config = ServerConfig(data_dir=data, database_url=database_url).checked()
    ring = KeyFolder.from_config(config).read_online()
    database = open_database(config)
    try:
        return read_published(database, trust_from_bundle(ring.realm, ring.bundle))
    finally:
        database.close()


def test_each_key_has_a_file_and_a_passphrase_of_its_own(data: Path, tmp_path: Path) -> None:
    folders = init(data, tmp_path)

    assert {path.name for path in (data / "keys").iterdir()} == {"online.key", "online.passphrase"}
    rings = [_open(folder / "root.key") for folder in folders]
    assert [len(ring.keys) for ring in rings] == [1, 1, 1]
    assert len({entry.key_id for ring in rings for entry in ring.keys}) == 3
    assert len({read_passphrase(folder / "root.passphrase") for folder in folders}) == 3


def _open(path: Path) -> KeyRing:
    secret = decrypt_secret(read_secret(path), read_passphrase(path.with_suffix(".passphrase")))
    return KeyRing.from_bytes(secret)


def test_without_folders_the_files_are_numbered(data: Path) -> None:
    run(data, "init", "--root-count", 3, "--root-threshold", 2)

    names = [file.path.name for file in found_in(data / "keys")]
    assert names == ["root-1.key", "root-2.key", "root-3.key"]


def test_each_passphrase_may_come_from_a_file_of_its_holder(data: Path, tmp_path: Path) -> None:
    given = [tmp_path / f"passphrase-{number}" for number in range(2)]
    for number, path in enumerate(given):
        path.write_text(f"correct horse {number}\n")
        path.chmod(0o600)
    named = [word for path in given for word in ("--root-passphrase-file", path)]

    run(data, "init", "--root-count", 2, "--root-threshold", 2, *named)

    assert not list((data / "keys").glob("root*.passphrase"))
    files = [data / "keys" / f"root-{number}.key" for number in (1, 2)]
    here = [word for path in files for word in ("--root-key", path)]
    run(data, "keys", "rotate", *here, *named)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--root-threshold", 2),
        ("--root-count", 2, "--root-threshold", 3),
        ("--root-count", 9),
        ("--root-count", 2, "--root-threshold", 0),
        ("--root-count", 3, "--root-dir", "a", "--root-dir", "b"),
        ("--root-dir", "a", "--root-dir", "a"),
        ("--root-count", 2, "--root-passphrase-file", "a"),
        ("--root-count", 2, "--root-passphrase-file", "a", "--root-passphrase-file", "a"),
    ],
)
def test_a_set_up_that_makes_no_sense_is_refused_and_leaves_nothing(
    data: Path,
    arguments: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)

    assert "want" in refused(data, capsys, "init", *arguments)

    assert not (data / "keys").exists()
    assert not (tmp_path / "a").exists()


def test_a_stick_that_holds_a_root_key_already_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = sticks(tmp_path)
    folders[1].mkdir()
    (folders[1] / "root.key").write_bytes(b"somebody's")
    places = [word for folder in folders for word in ("--root-dir", folder)]

    assert "is there already" in refused(data, capsys, "init", *places)

    assert (folders[1] / "root.key").read_bytes() == b"somebody's"
    assert not (folders[0] / "root.key").exists()


def test_one_file_does_not_rotate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = init(data, tmp_path)
    before = (data / "keys" / "online.key").read_bytes()

    shown = refused(data, capsys, "keys", "rotate", "--root-key", first / "root.key")

    assert "got 1 root keys, want 2" in shown
    assert (data / "keys" / "online.key").read_bytes() == before


def test_one_file_twice_does_not_rotate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = init(data, tmp_path)
    again = tmp_path / "copy"
    shutil.copytree(first, again)
    both = ("--root-key", first / "root.key", "--root-key", again / "root.key")

    assert "is in two of the files" in refused(data, capsys, "keys", "rotate", *both)


def test_a_threshold_of_files_rotates(data: Path, tmp_path: Path, database_url: str) -> None:
    _, second, third = init(data, tmp_path)
    both = ("--root-key", second / "root.key", "--root-key", third / "root.key")

    run(data, "keys", "rotate", *both)

    assert trust_of(data, database_url).keyset.version == 2


def signed_apart(data: Path, folders: list[Path], tmp_path: Path) -> list[Path]:
    """Prepare a keyset and let each holder sign where their key is; return the signed files."""
    draft = tmp_path / "keyset.json"
    run(data, "keys", "prepare")
    run(data, "keys", "draft", "--output", draft)
    signed = [folder / "signed.json" for folder in folders]
    for folder, path in zip(folders, signed, strict=True):
        elsewhere = ("keys", "sign", "--root-dir", folder, "--keyset", draft, "--output", path)
        run(folder / "nothing", *elsewhere)
    return signed


def test_holders_sign_apart(data: Path, tmp_path: Path, database_url: str) -> None:
    folders = init(data, tmp_path)
    first, _, third = signed_apart(data, folders, tmp_path)

    run(data, "keys", "publish", "--signed", first, "--signed", third)

    assert trust_of(data, database_url).keyset.version == 2


def test_one_signature_is_not_enough(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = init(data, tmp_path)
    first, *_ = signed_apart(data, folders, tmp_path)

    shown = refused(data, capsys, "keys", "publish", "--signed", first, "--signed", first)

    assert "signed by 1 trusted keys, want 2" in shown


def test_signatures_over_different_documents_are_not_joined(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = init(data, tmp_path)
    first, second, _ = signed_apart(data, folders, tmp_path)
    envelope = json.loads(second.read_text())
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    second.write_text(json.dumps(envelope))

    shown = refused(data, capsys, "keys", "publish", "--signed", first, "--signed", second)

    assert "all over the same document" in shown


def test_a_key_of_another_realm_does_not_sign(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    init(data, tmp_path)
    run(data, "keys", "draft", "--output", tmp_path / "keyset.json")
    monkeypatch.setenv("QFLARE_REALM", "other")
    stray = tmp_path / "stray" / "root.key"
    run(data, "keys", "make-root", "--root-key", stray, "--output", tmp_path / "stray.json")
    sign = ("keys", "sign", "--root-dir", stray.parent, "--keyset", tmp_path / "keyset.json")

    assert "realm" in refused(data, capsys, *sign, "--output", tmp_path / "signed.json")


def test_holders_exchange_the_root_apart(data: Path, tmp_path: Path, database_url: str) -> None:
    previous = init(data, tmp_path)
    run(data, "bundle", "--address", "localhost:1", "--output", tmp_path / "bundle.json")
    pinned = trust_of(data, database_url)
    following = [tmp_path / f"next-{number}" for number in range(2)]
    algorithms = ("slh-dsa-sha2-128s", "ml-dsa-65-ed25519")
    for folder, algorithm in zip(following, algorithms, strict=True):
        made = ("--root-key", folder / "root.key", "--output", tmp_path / f"{folder.name}.json")
        run(folder / "nothing", "keys", "make-root", "--algorithm", algorithm, *made)
    keys = [word for folder in following for word in ("--key", tmp_path / f"{folder.name}.json")]
    root, keyset = tmp_path / "root.json", tmp_path / "keyset.json"
    outputs = ("--output", root, "--keyset-output", keyset)
    run(data, "keys", "draft-root", *keys, "--root-threshold", 2, *outputs)
    roots, keysets = [], []
    for folder in [*previous[:2], *following]:
        elsewhere = ("keys", "sign", "--root-dir", folder, "--output", folder / "signed-root.json")
        run(folder / "nothing", *elsewhere, "--root-document", root)
        roots += ["--signed-root", folder / "signed-root.json"]
    for folder in following:
        elsewhere = ("keys", "sign", "--root-dir", folder, "--output", folder / "signed.json")
        run(folder / "nothing", *elsewhere, "--keyset", keyset)
        keysets += ["--signed", folder / "signed.json"]

    run(data, "keys", "publish", *roots, *keysets)

    found = trust_of(data, database_url)
    assert (found.root.version, found.root.threshold, found.keyset.version) == (2, 2, 2)
    kinds = {key.algorithm for key in found.root.keys}
    assert kinds == {int(Algorithm.SLH_DSA_SHA2_128S), int(Algorithm.ML_DSA_65_ED25519)}
    pins = security_pb2.BootstrapBundle(
        realm="qflare", root_key_ids=pinned.root_key_ids(), threshold=pinned.first_threshold()
    )
    device = TrustedKeyset.bootstrap(pins).updated(pinned.bundle(), utc_now())
    assert device.updated(found.bundle(1), utc_now()).root_version == 2


def test_rotating_the_root_keeps_count_threshold_and_algorithm(
    data: Path, database_url: str
) -> None:
    run(data, "init", "--root-count", 3, "--root-threshold", 2, "--root-algorithm", "ml-dsa-65")

    run(data, "keys", "rotate-root")

    found = trust_of(data, database_url)
    assert (found.root.version, len(found.root.keys), found.root.threshold) == (2, 3, 2)
    assert {key.algorithm for key in found.root.keys} == {int(Algorithm.ML_DSA_65)}


def test_rotating_the_root_to_one_key_leaves_no_file_of_the_previous_ones(
    data: Path, database_url: str
) -> None:
    run(data, "init", "--root-count", 2, "--root-threshold", 2)

    run(data, "keys", "rotate-root", "--root-count", 1, "--root-threshold", 1)

    assert [file.path.name for file in found_in(data / "keys")] == ["root.key"]
    assert len(trust_of(data, database_url).root.keys) == 1
    run(data, "keys", "rotate")
    assert trust_of(data, database_url).keyset.version == 3


@pytest.mark.parametrize("algorithm", ["ml-dsa-44", "slh-dsa-sha2-128s"])
def test_root_keys_of_a_chosen_algorithm_rotate_to_the_same(
    data: Path, database_url: str, algorithm: str
) -> None:
    run(data, "init", "--root-algorithm", algorithm)

    run(data, "keys", "rotate-root")
    run(data, "keys", "rotate")

    found = trust_of(data, database_url)
    assert {key.algorithm for key in found.root.keys} == {
        int(Algorithm[algorithm.upper().replace("-", "_")])
    }


def algorithms_in_use(trust: Trust) -> set[Algorithm]:
    roles = {key.role for key in trust.keyset.keys if key.HasField("signature_key")}
    return {trust.signature_keys(role)[0].algorithm for role in roles}


def test_online_keys_of_a_chosen_algorithm_rotate_to_the_same(
    data: Path, database_url: str
) -> None:
    run(data, "init", "--algorithm", "ml-dsa-65-ed25519")

    run(data, "keys", "rotate")

    assert algorithms_in_use(trust_of(data, database_url)) == {Algorithm.ML_DSA_65_ED25519}


def test_online_keys_rotate_to_another_algorithm(data: Path, database_url: str) -> None:
    run(data, "init")

    run(data, "keys", "rotate", "--algorithm", "ml-dsa-87")

    assert algorithms_in_use(trust_of(data, database_url)) == {Algorithm.ML_DSA_87}


def test_a_key_that_is_left_out_is_accepted_no_more(data: Path, database_url: str) -> None:
    run(data, "init")
    (before,) = trust_of_file(data).key_ids(security_pb2.KEY_ROLE_MODEL)

    run(data, "keys", "rotate", "--without", before)

    after = trust_of(data, database_url).key_ids(security_pb2.KEY_ROLE_MODEL)
    assert len(after) == 1
    assert before not in after


def trust_of_file(data: Path) -> Trust:
    """Return what the key file says, before anything is published."""
    ring = KeyFolder(data / "keys").read_online()
    return trust_from_bundle(ring.realm, ring.bundle)


def test_a_setting_chooses_the_algorithm(
    data: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFLARE_ONLINE_ALGORITHM", "ml-dsa-44")
    monkeypatch.setenv("QFLARE_ROOT_ALGORITHM", "ml-dsa-65-ed25519")

    run(data, "init")

    found = trust_of(data, database_url)
    assert algorithms_in_use(found) == {Algorithm.ML_DSA_44}
    assert found.root.keys[0].algorithm == int(Algorithm.ML_DSA_65_ED25519)
