"""Keys in a real PKCS#11 token: SoftHSM, whichever build is there.

Every build guards the passphrase. Debian's 2.6.1 has no ML-DSA: with it, the tests of signing show that the coordinator
refuses to go on without; with a build that has it (``-DENABLE_MLDSA=ON`` and OpenSSL 3.5, named by
``QFLARE_TEST_PKCS11_MODULE``), that the signature keys live in the token.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from qflare.crypto.envelope import open_envelope
from qflare.crypto.signing import Algorithm, SigningContext
from qflare.v1 import security_pb2
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import UnknownKeyError
from qflare_server.keys import KeyFolder, KeyStoreError, ServerKeys, ensure_initialized
from qflare_server.keys.hardware import Pkcs11Module
from qflare_server.keys.held_keys import CONTEXTS
from qflare_server.keys.ring import SIGNING_ROLES
from qflare_server.keys.rotation import replace_stolen, rotate_online
from qflare_server.keys.secret_files import write_secret
from qflare_server.keys.server_keys import LOOK_INTERVAL
from qflare_server.keys.setup import initialize
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from tests.conftest import ROOT, START, FakeClock
from tests.support.identity import CHEAP
from tests.support.statements import statement_of

MODEL: Final = security_pb2.KEY_ROLE_MODEL
PIN: Final = "1234"
UNPACKED: Final = ROOT / ".tools" / "softhsm" / "usr"
LIBRARIES: Final = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib/pkcs11/libsofthsm2.so"),
    Path("/usr/local/lib/softhsm/libsofthsm2.so"),
    *sorted((UNPACKED / "lib").glob("**/libsofthsm2.so")),
)
LABELS: Final = ("guard", "other", "sign", "sign-too")


@dataclass(frozen=True)
class SoftHsm:
    """A module with initialized tokens."""

    library: Path
    pin_file: Path

    def open(self, label: str, *, signs: bool = False) -> Pkcs11Module:
        return Pkcs11Module(self.library, label, self.pin_file, signs=signs)


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    given = os.environ.get("QFLARE_TEST_PKCS11_MODULE")
    library = Path(given) if given else next((path for path in LIBRARIES if path.exists()), None)
    program = shutil.which("softhsm2-util", path=f"{os.environ['PATH']}:{UNPACKED / 'bin'}")
    if library is None or program is None:
        pytest.skip("SoftHSM is not installed: apt install softhsm2, or `make tools`")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    config = folder / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
    write_secret(folder / "pin", PIN.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(config))
        command = [program, "--module", str(library), "--init-token", "--free"]
        for label in LABELS:
            subprocess.run(
                [*command, "--label", label, "--pin", PIN, "--so-pin", "5678"],
                check=True,
                capture_output=True,
            )
        yield SoftHsm(library, folder / "pin")


@pytest.fixture(scope="session")
def guard(softhsm: SoftHsm) -> Pkcs11Module:
    return softhsm.open("guard")


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    opened = Database(make_engine(ServerConfig(database_url=sqlite_url)))
    yield opened
    opened.close()


class TestGuarding:
    @pytest.fixture
    def folder(self, tmp_path: Path, guard: Pkcs11Module) -> KeyFolder:
        folder = KeyFolder(tmp_path / "keys", cost=CHEAP, hardware=guard)
        initialize(folder, "qflare", START)
        return folder

    def test_what_was_wrapped_comes_back(self, guard: Pkcs11Module) -> None:
        assert guard.unwrap(guard.wrap(b"secret")) == b"secret"

    def test_it_is_wrapped_anew_each_time(self, guard: Pkcs11Module) -> None:
        assert guard.wrap(b"secret") != guard.wrap(b"secret")

    def test_another_token_does_not_unwrap_it(self, guard: Pkcs11Module, softhsm: SoftHsm) -> None:
        with pytest.raises(KeyStoreError):
            softhsm.open("other").unwrap(guard.wrap(b"secret"))

    @pytest.mark.parametrize("place", [0, 11, 12, -1])
    def test_a_changed_bit_is_noticed(self, guard: Pkcs11Module, place: int) -> None:
        wrapped = bytearray(guard.wrap(b"secret"))
        wrapped[place] ^= 1
        with pytest.raises(KeyStoreError):
            guard.unwrap(bytes(wrapped))

    @pytest.mark.parametrize("wrapped", [b"", bytes(12), bytes(27)])
    def test_too_few_bytes_are_refused(self, guard: Pkcs11Module, wrapped: bytes) -> None:
        with pytest.raises(KeyStoreError):
            guard.unwrap(wrapped)

    def test_the_key_file_opens_with_the_token(self, folder: KeyFolder) -> None:
        assert folder.read_online().realm == "qflare"

    def test_the_key_file_does_not_open_without_it(self, folder: KeyFolder) -> None:
        with pytest.raises(KeyStoreError):
            replace(folder, hardware=None).read_online()

    def test_a_plain_passphrase_is_not_taken_for_a_wrapped_one(self, folder: KeyFolder) -> None:
        write_secret(folder.online_passphrase_file, b"plain words\n", replace=True)
        with pytest.raises(KeyStoreError, match="PKCS#11"):
            folder.read_online()

    def test_the_root_keys_need_no_token(self, folder: KeyFolder) -> None:
        assert replace(folder, hardware=None).read_root().realm == "qflare"

    def test_keys_rotate(self, folder: KeyFolder, database: Database) -> None:
        clock = FakeClock()
        keys = ServerKeys(folder.read_online(), database, clock, reread=folder.read_online)
        rotate_online(folder, database, clock())
        clock.advance(LOOK_INTERVAL.total_seconds())
        assert (
            keys.sign(MODEL, statement_of(MODEL)).signatures[0].key_id
            == keys.trust.key_ids(MODEL)[0]
        )


class TestOpening:
    def test_a_wrong_pin_is_refused(self, softhsm: SoftHsm, tmp_path: Path) -> None:
        write_secret(tmp_path / "pin", b"9999")
        with pytest.raises(KeyStoreError, match="open the token"):
            Pkcs11Module(softhsm.library, "sign-too", tmp_path / "pin", signs=False)

    def test_a_token_that_is_not_there_is_refused(self, softhsm: SoftHsm) -> None:
        with pytest.raises(KeyStoreError, match="open the token"):
            softhsm.open("no such token")

    def test_a_pin_that_everybody_may_read_is_refused(
        self, softhsm: SoftHsm, tmp_path: Path
    ) -> None:
        write_secret(tmp_path / "pin", PIN.encode())
        (tmp_path / "pin").chmod(0o644)
        with pytest.raises(KeyStoreError, match="open to others"):
            Pkcs11Module(softhsm.library, "sign-too", tmp_path / "pin", signs=False)

    def test_a_library_that_is_none_is_refused(self, softhsm: SoftHsm, tmp_path: Path) -> None:
        with pytest.raises(KeyStoreError, match="open the token"):
            Pkcs11Module(tmp_path / "none.so", "guard", softhsm.pin_file, signs=False)

    def test_module_and_pin_go_together(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="PKCS11"):
            ServerConfig(pkcs11_module=tmp_path / "library.so").checked()

    def test_a_configuration_names_it(self, softhsm: SoftHsm, tmp_path: Path) -> None:
        config = ServerConfig(
            data_dir=tmp_path,
            pkcs11_module=softhsm.library,
            pkcs11_token="sign-too",  # a label, no secret
            pkcs11_pin_file=softhsm.pin_file,
            pkcs11_signing=False,
        ).checked()
        assert ensure_initialized(config)
        assert KeyFolder.from_config(config).read_online().realm == "qflare"


@pytest.fixture(scope="session")
def signing(softhsm: SoftHsm) -> Pkcs11Module | None:
    """Return a token that signs, or None after it was seen that one without ML-DSA is refused."""
    try:
        return softhsm.open("sign", signs=True)
    except KeyStoreError as error:
        assert "no ML-DSA" in str(error)  # noqa: PT017 - which refusal it is, decides what is tested
        return None


class TestSigning:
    """Without ML-DSA in the token, that it is refused (by the fixture) is all there is to see."""

    def test_signature_keys_live_in_the_token(
        self, signing: Pkcs11Module | None, tmp_path: Path, database: Database
    ) -> None:
        if signing is None:
            return
        clock = FakeClock()
        folder = KeyFolder(tmp_path / "keys", cost=CHEAP, hardware=signing)
        initialize(folder, "qflare", START)
        ring = folder.read_online()
        assert [entry.role for entry in ring.keys] == [security_pb2.KEY_ROLE_SESSION_KEM]
        keys = ServerKeys(ring, database, clock, provide=folder.provider, reread=folder.read_online)
        for role in SIGNING_ROLES:
            trusted = keys.trust.signature_keys(role)
            assert open_envelope(
                keys.sign(role, statement_of(role)), CONTEXTS[role], trusted
            ) == statement_of(role)
        before = keys.trust.key_ids(MODEL)[0]
        rotate_online(folder, database, clock())
        clock.advance(LOOK_INTERVAL.total_seconds())
        assert keys.sign(MODEL, statement_of(MODEL)).signatures[0].key_id != before
        stolen = set(keys.trust.key_ids(MODEL))
        replace_stolen(folder, database, clock())
        clock.advance(LOOK_INTERVAL.total_seconds())
        assert not stolen & set(keys.trust.key_ids(MODEL))
        assert {key.signature_key.key_id for key in signing.public()} == {
            key.signature_key.key_id
            for key in keys.trust.keyset.keys
            if not key.HasField("kem_key")
        }

    def test_many_threads_sign(self, signing: Pkcs11Module | None) -> None:
        if signing is None:
            return
        key = signing.generate(MODEL, Algorithm.ML_DSA_44)

        def sign(number: int) -> None:
            message = str(number).encode()
            key.verify(
                SigningContext.MODEL,
                message,
                signing.sign(key.key_id, SigningContext.MODEL, message),
            )

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(sign, range(40)))

    def test_a_hybrid_key_is_not_to_be_had(self, signing: Pkcs11Module | None) -> None:
        if signing is None:
            return
        with pytest.raises(KeyStoreError, match="ML_DSA_65_ED25519"):
            signing.generate(MODEL, Algorithm.ML_DSA_65_ED25519)

    def test_an_unknown_key_does_not_sign(self, signing: Pkcs11Module | None) -> None:
        if signing is None:
            return
        with pytest.raises(UnknownKeyError):
            signing.sign("0" * 64, SigningContext.MODEL, b"message")

    def test_a_destroyed_key_does_not_sign(self, signing: Pkcs11Module | None) -> None:
        if signing is None:
            return
        key = signing.generate(MODEL, Algorithm.ML_DSA_65)
        signing.keep_only([])
        with pytest.raises(UnknownKeyError):
            signing.sign(key.key_id, SigningContext.MODEL, b"message")
