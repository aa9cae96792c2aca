"""The coordinator's identity while it serves, and its rotation, on both databases."""

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from qflare.crypto.envelope import open_envelope
from qflare.crypto.signing import InvalidSignatureError, SigningContext
from qflare.evidence.statements import StatementError
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import UnknownKeyError
from qflare_server.keys import KeyFolder, KeyStoreError, ServerKeys
from qflare_server.keys.held_keys import CONTEXTS
from qflare_server.keys.ring import SIGNING_ROLES, Role
from qflare_server.keys.rotation import (
    draft_keyset,
    prepare_online,
    publish_keyset,
    rotate_online,
    rotate_root,
)
from qflare_server.keys.server_keys import LOOK_INTERVAL
from qflare_server.keys.setup import initialize
from qflare_server.keys.trust_documents import Trust, UntrustedDocumentError, sign_document
from qflare_server.storage.database import Database
from qflare_server.storage.tables import TrustDocument
from tests.conftest import START, FakeClock
from tests.support.identity import (
    CALLER,
    CHEAP,
    Coordinator,
    SimulatedDevice,
    copy_of,
    everything_stored,
)
from tests.support.statements import statement_of

MODEL = security_pb2.KEY_ROLE_MODEL
SESSION_KEM = security_pb2.KEY_ROLE_SESSION_KEM
SECONDS = LOOK_INTERVAL.total_seconds()


@pytest.fixture
def keys(
    server_config: ServerConfig, database: Database, clock: FakeClock, key_folder: KeyFolder
) -> ServerKeys:
    config = replace(server_config, key_dir=key_folder.directory)
    return ServerKeys.load(config, database, clock)


@pytest.fixture
def replica(
    server_config: ServerConfig,
    database: Database,
    clock: FakeClock,
    key_folder: KeyFolder,
    tmp_path: Path,
) -> tuple[KeyFolder, ServerKeys]:
    """Return another coordinator on the same database, with its own copy of the key files."""
    copied = copy_of(key_folder, tmp_path / "replica")
    config = replace(server_config, key_dir=copied.directory)
    return copied, ServerKeys.load(config, database, clock)


def signer_of(keys: ServerKeys, role: Role) -> str:
    return str(keys.sign(role, statement_of(role)).signatures[0].key_id)


def edit(database: Database, kind: str, version: int, envelope: bytes) -> None:
    def work(session: Session) -> None:
        document = (TrustDocument.kind == kind, TrustDocument.version == version)
        session.execute(update(TrustDocument).where(*document).values(envelope=envelope))

    database.write(work)


def stored(database: Database, kind: str, version: int) -> security_pb2.SignedEnvelope:
    with database.read() as session:
        query = select(TrustDocument.envelope).where(
            TrustDocument.kind == kind, TrustDocument.version == version
        )
        return security_pb2.SignedEnvelope.FromString(session.execute(query).scalar_one())


class TestServing:
    @pytest.mark.parametrize("role", SIGNING_ROLES)
    def test_a_role_signs_in_its_context(self, keys: ServerKeys, role: Role) -> None:
        envelope = keys.sign(role, statement_of(role))
        trusted = keys.trust.signature_keys(role)
        assert open_envelope(envelope, CONTEXTS[role], trusted) == statement_of(role)

    @pytest.mark.parametrize("role", SIGNING_ROLES)
    def test_nothing_is_signed_that_every_verifier_refuses(
        self, keys: ServerKeys, role: Role
    ) -> None:
        for other in {*SIGNING_ROLES} - {role}:
            with pytest.raises(StatementError):
                keys.sign(role, statement_of(other))
        with pytest.raises(StatementError):
            keys.sign(role, b"")

    def test_a_role_signs_in_no_other_context(self, keys: ServerKeys) -> None:
        envelope = keys.sign(MODEL, statement_of(MODEL))
        with pytest.raises(InvalidSignatureError):
            open_envelope(envelope, SigningContext.TASK, keys.trust.signature_keys(MODEL))

    def test_the_session_key_signs_nothing(self, keys: ServerKeys) -> None:
        with pytest.raises(KeyStoreError):
            keys.sign(SESSION_KEM, b"payload")

    def test_the_bundle_follows_from_the_root(self, keys: ServerKeys) -> None:
        bundle = keys.bundle()
        trust = Trust.follow("qflare", list(bundle.roots), bundle.keyset)
        assert trust.root_key_ids() == keys.root_key_ids

    def test_known_roots_are_left_out_of_the_bundle(self, keys: ServerKeys) -> None:
        assert len(keys.bundle(0).roots) == 1
        assert len(keys.bundle(1).roots) == 0
        assert len(keys.bundle(-5).roots) == 1

    def test_documents_are_published_once(
        self, keys: ServerKeys, replica: tuple[KeyFolder, ServerKeys], database: Database
    ) -> None:
        assert replica[1].keyset_version == keys.keyset_version == 1
        with database.read() as session:
            assert len(session.scalars(select(TrustDocument)).all()) == 2

    def test_no_private_key_is_in_the_database(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database
    ) -> None:
        ring = key_folder.read_online()
        text = everything_stored(database)
        assert keys.state_key not in text
        for entry in ring.keys:
            assert entry.key.to_bytes()[-32:] not in text

    def test_another_realm_is_refused(
        self,
        server_config: ServerConfig,
        database: Database,
        clock: FakeClock,
        key_folder: KeyFolder,
    ) -> None:
        config = replace(server_config, key_dir=key_folder.directory, realm="elsewhere")
        with pytest.raises(KeyStoreError, match="realm"):
            ServerKeys.load(config, database, clock)

    @pytest.mark.usefixtures("keys")
    def test_a_database_of_other_keys_is_refused(
        self, server_config: ServerConfig, database: Database, clock: FakeClock
    ) -> None:
        other = KeyFolder(server_config.data_dir / "other", cost=CHEAP)
        initialize(other, "qflare", START)
        with pytest.raises(UntrustedDocumentError):
            ServerKeys.load(replace(server_config, key_dir=other.directory), database, clock)

    def test_a_keyset_that_is_about_to_expire_is_announced_once_a_day(
        self, keys: ServerKeys, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "qflare_server.keys.server_keys"):
            clock.advance(timedelta(days=371).total_seconds())
            for _ in range(3):
                clock.advance(SECONDS)
                keys.bundle()
        assert len([record for record in caplog.records if "expire" in record.message]) == 1


class TestEditedDatabase:
    def start(self, config: ServerConfig, database: Database, clock: FakeClock) -> None:
        with pytest.raises(UntrustedDocumentError):
            ServerKeys.load(config, database, clock)

    @pytest.mark.parametrize("kind", ["root", "keyset"])
    @pytest.mark.usefixtures("keys")
    def test_a_changed_document_is_refused(
        self,
        server_config: ServerConfig,
        database: Database,
        clock: FakeClock,
        kind: str,
    ) -> None:
        envelope = stored(database, kind, 1)
        envelope.payload = envelope.payload[:-1] + bytes([envelope.payload[-1] ^ 1])
        edit(database, kind, 1, envelope.SerializeToString())
        self.start(server_config, database, clock)

    @pytest.mark.usefixtures("keys")
    def test_a_signature_that_is_gone_is_missed(
        self, server_config: ServerConfig, database: Database, clock: FakeClock
    ) -> None:
        envelope = stored(database, "keyset", 1)
        del envelope.signatures[:]
        edit(database, "keyset", 1, envelope.SerializeToString())
        self.start(server_config, database, clock)

    def test_a_keyset_of_strangers_is_not_taken_over(
        self, keys: ServerKeys, server_config: ServerConfig, database: Database, clock: FakeClock
    ) -> None:
        other = KeyFolder(server_config.data_dir / "other", cost=CHEAP)
        forged = initialize(other, "qflare", START).keyset_envelope

        def work(session: Session) -> None:
            row = {"kind": "keyset", "version": 2, "created_at": clock()}
            session.add(TrustDocument(envelope=forged.SerializeToString(), **row))

        database.write(work)
        clock.advance(SECONDS)
        assert keys.keyset_version == 1

    @pytest.mark.usefixtures("keys")
    def test_a_keyset_that_is_gone_is_published_again(
        self, server_config: ServerConfig, database: Database, clock: FakeClock
    ) -> None:
        database.write(lambda session: session.execute(delete(TrustDocument)))
        assert ServerKeys.load(server_config, database, clock).keyset_version == 1


class TestRotating:
    @pytest.mark.parametrize("role", SIGNING_ROLES)
    def test_nothing_is_signed_with_a_key_that_was_withdrawn_a_moment_ago(
        self,
        keys: ServerKeys,
        key_folder: KeyFolder,
        database: Database,
        clock: FakeClock,
        role: Role,
    ) -> None:
        before = keys.sign(role, statement_of(role))
        withdrawn = keys.trust.key_ids(role)
        rotate_online(key_folder, database, clock(), without=withdrawn)
        assert not keys.accepts(role, before)
        assert keys.accepts(role, keys.sign(role, statement_of(role)))

    def test_the_next_keys_are_taken_over_while_serving(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        before = signer_of(keys, MODEL)
        rotate_online(key_folder, database, clock())
        clock.advance(SECONDS)
        assert keys.keyset_version == 2
        assert signer_of(keys, MODEL) != before
        assert signer_of(keys, MODEL) == keys.trust.key_ids(MODEL)[0]

    def test_earlier_keys_stay_accepted(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        envelope = keys.sign(MODEL, statement_of(MODEL))
        rotate_online(key_folder, database, clock())
        clock.advance(SECONDS)
        open_envelope(envelope, SigningContext.MODEL, keys.trust.signature_keys(MODEL))

    def test_a_stolen_key_is_accepted_no_longer(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        stolen = keys.trust.key_ids(SESSION_KEM)[0]
        encapsulation = keys.trust.kem_keys()[0].encapsulate()
        rotate_online(key_folder, database, clock(), without=[stolen])
        clock.advance(SECONDS)
        assert stolen not in keys.trust.key_ids(SESSION_KEM)
        with pytest.raises(UnknownKeyError):
            keys.decapsulate(stolen, encapsulation.ciphertext)

    def test_a_session_key_is_forgotten_after_two_rotations(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        first = keys.trust.key_ids(SESSION_KEM)[0]
        held = []
        for _ in range(2):
            rotate_online(key_folder, database, clock())
            held.append(first in {entry.key_id for entry in key_folder.read_online().keys})
        assert held == [True, False]

    def test_a_login_that_began_before_a_rotation_ends_after_it(
        self, coordinator: Coordinator, device: SimulatedDevice, key_folder: KeyFolder
    ) -> None:
        login = device.start_login(coordinator)
        clock = coordinator.context.clock
        assert isinstance(clock, FakeClock)
        rotate_online(key_folder, coordinator.context.database, clock())
        clock.advance(SECONDS)
        challenge = coordinator.login.begin(CALLER, login.hello(), "")
        _, proof = login.prove(challenge)
        coordinator.login.authenticate(CALLER, proof)

    def test_a_replica_with_the_prepared_keys_takes_over(
        self,
        keys: ServerKeys,
        key_folder: KeyFolder,
        replica: tuple[KeyFolder, ServerKeys],
        database: Database,
        clock: FakeClock,
    ) -> None:
        copied, other = replica
        prepare_online(key_folder)
        copied.online_file.write_bytes(key_folder.online_file.read_bytes())
        keyset = sign_document(
            draft_keyset(key_folder, database, clock()), key_folder.read_root().signing_keys()
        )
        publish_keyset(key_folder, database, keyset, clock())
        clock.advance(SECONDS)
        assert signer_of(keys, MODEL) == signer_of(other, MODEL) == keys.trust.key_ids(MODEL)[0]

    @pytest.mark.usefixtures("keys")
    def test_a_replica_without_them_signs_with_an_accepted_key(
        self,
        key_folder: KeyFolder,
        replica: tuple[KeyFolder, ServerKeys],
        database: Database,
        clock: FakeClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        _, other = replica
        rotate_online(key_folder, database, clock())
        clock.advance(SECONDS)
        assert signer_of(other, MODEL) == other.trust.key_ids(MODEL)[1]
        assert "not held here" in caplog.text

    @pytest.mark.usefixtures("keys")
    def test_the_root_is_needed(
        self, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        key_folder.root_file.unlink()
        before = key_folder.online_file.read_bytes()
        with pytest.raises(KeyStoreError):
            rotate_online(key_folder, database, clock())
        assert key_folder.online_file.read_bytes() == before

    @pytest.mark.usefixtures("keys")
    def test_a_keyset_cannot_be_published_twice(
        self, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        prepare_online(key_folder)
        keyset = sign_document(
            draft_keyset(key_folder, database, clock()), key_folder.read_root().signing_keys()
        )
        publish_keyset(key_folder, database, keyset, clock())
        with pytest.raises(KeyStoreError):
            publish_keyset(key_folder, database, keyset, clock())

    @pytest.mark.usefixtures("keys")
    def test_another_keyset_of_the_same_version_is_refused(
        self, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        prepare_online(key_folder)
        first = sign_document(
            draft_keyset(key_folder, database, clock()), key_folder.read_root().signing_keys()
        )
        prepare_online(key_folder)
        second = sign_document(
            draft_keyset(key_folder, database, clock()), key_folder.read_root().signing_keys()
        )
        publish_keyset(key_folder, database, first, clock())
        with pytest.raises(KeyStoreError):
            publish_keyset(key_folder, database, second, clock())


class TestRotatingTheRoot:
    def test_devices_keep_their_pins(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        pinned = keys.root_key_ids
        rotate_root(key_folder, database, clock())
        clock.advance(SECONDS)
        assert keys.root_key_ids == pinned
        assert keys.trust.root.version == 2
        assert len(keys.bundle(1).roots) == 1

    def test_the_next_root_signs_the_next_keyset(
        self, keys: ServerKeys, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        rotate_root(key_folder, database, clock())
        rotate_online(key_folder, database, clock())
        clock.advance(SECONDS)
        assert (keys.keyset_version, keys.trust.keyset.root_version) == (3, 2)

    @pytest.mark.usefixtures("keys")
    def test_the_previous_root_signs_no_more(
        self, key_folder: KeyFolder, database: Database, clock: FakeClock
    ) -> None:
        rotate_root(key_folder, database, clock())
        previous = key_folder.root_file.with_suffix(".key.previous")
        previous.replace(key_folder.root_file)
        with pytest.raises(UntrustedDocumentError):
            rotate_online(key_folder, database, clock())

    @pytest.mark.usefixtures("keys")
    def test_a_restart_finds_everything(
        self,
        key_folder: KeyFolder,
        server_config: ServerConfig,
        database: Database,
        clock: FakeClock,
    ) -> None:
        rotate_root(key_folder, database, clock())
        again = ServerKeys.load(server_config, database, clock)
        assert (again.keyset_version, again.trust.root.version) == (2, 2)
