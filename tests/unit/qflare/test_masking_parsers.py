"""Whatever a file or a transcript of secure aggregation holds, its parser takes it or raises its own error."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from google.protobuf import json_format

from qflare.crypto.signing import PublicKey
from qflare.evidence.statements import StatementError, digest_of
from qflare.evidence.unmasking import (
    check_masked_update,
    masking_of,
    open_helper,
    verify_transcript,
)
from qflare.training_settings import SettingError, read_file
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import Analytics, InvalidArgumentError, SecureAggregation
from qflare_client.errors import KeyStoreError
from qflare_client.flower.project import read_project
from qflare_client.keystore.store import read_document
from qflare_helper.errors import HelperError
from qflare_helper.identity import HelperIdentity, read_bootstrap
from qflare_helper.policy import read_policy, write_policy
from qflare_server.config import ServerConfig
from qflare_server.serving.helper_folder import HelperFolder
from qflare_server.storage.backups import BackupError, Manifest
from tests.support.hostile_requests import RequestMaker
from tests.unit.qflare.test_masking_vectors import UNMASKING, _made, _transcript, _update

COUNT: Final = 400

HELPER_POLICY: Final = (
    "min_cohort = 3\n"
    'training_sessions = ["00000000-0000-4000-8000-000000000000"]\n'
    f'roster = ["{"a" * 64}"]\n'
)
DEVICE_POLICY: Final = (
    "min_cohort = 3\n"
    f'helper_key_ids = ["{"a" * 64}"]\n'
    'metrics = ["loss"]\n'
    'evaluation_metrics = ["accuracy"]\n'
)
PIECES: Final = (
    *(b"", b"\0", b"\xff\xfe", b"\n", b"[", b"]", b"{", b"}", b'"', b"'''", b"#", b"=", b",", b"."),
    *(
        b"-1",
        b"0",
        b"1e999",
        b"nan",
        b"inf",
        b"0x10",
        b"9" * 5000,
        b"true",
        b"null",
        b"[[",
        b"[" * 3000,
    ),
    *(
        b'"\\ud800"',
        b"\\u0000",
        b"1979-05-27T07:32:00Z",
        b"a.b",
        b"min_cohort = 3.0\n",
        b"[a]\n",
        b'""',
    ),
    *(
        b"roster = 5\n",
        b'roster = [["a"]]\n',
        b"metrics = {a = 1}\n",
        b'{"@type": 1}',
        "\u202e".encode(),
    ),
)


def spoiled(text: str, seed: int, count: int = COUNT) -> Iterator[bytes]:
    """Yield texts with parts that are cut out, doubled, replaced or put in."""
    random, data = Random(seed), text.encode()
    yield data
    for _ in range(count):
        changed = data
        for _ in range(random.choice((1, 1, 2, 5))):
            start = random.randrange(len(changed) + 1)
            stop = min(len(changed), start + random.choice((0, 1, 1, 4, 30, len(data))))
            put = random.choice((*PIECES, changed[start:stop] * 2, bytes([random.randrange(256)])))
            changed = changed[:start] + put + changed[stop:]
        yield changed


def outcomes(
    texts: Iterator[bytes], parse: Callable[[bytes], object], *refusals: type[Exception]
) -> set[bool]:
    """Parse every text; return whether texts were taken and refused. Any other exception ends the test."""
    found = set()
    for text in texts:
        try:
            parse(text)
        except refusals:
            found.add(False)
        else:
            found.add(True)
    return found


def test_policy_files_of_helpers(tmp_path: Path) -> None:
    write_policy(tmp_path, 3)
    file = tmp_path / "policy.toml"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        policy = read_policy(tmp_path)
        assert policy.min_cohort >= 2
        assert all(len(key_id) == 64 for key_id in policy.roster)

    texts = (text for base in (HELPER_POLICY, file.read_text()) for text in spoiled(base, 1))
    assert outcomes(texts, parse, HelperError) == {True, False}


def test_policy_files_of_devices(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        policy = SecureAggregation.from_file(file)
        assert policy.min_cohort >= 2
        assert policy.helper_key_ids or policy.neighbors

    assert outcomes(spoiled(DEVICE_POLICY, 2), parse, InvalidArgumentError) == {True, False}


def test_a_policy_for_neighbors_names_no_helper(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("min_cohort = 3\nneighbors = true\n")
    assert SecureAggregation.from_file(file) == SecureAggregation(3, neighbors=True)

    file.write_text("min_cohort = 3\n")
    with pytest.raises(InvalidArgumentError, match="helper_key_ids: want one or more"):
        SecureAggregation.from_file(file)


@pytest.fixture(scope="module")
def identity() -> HelperIdentity:
    """Return a helper."""
    pinned = security_pb2.BootstrapBundle(realm="qflare", root_key_ids=["a" * 64], threshold=1)
    return HelperIdentity.generate(pinned, "127.0.0.1:1", "")


def test_bundles_of_helpers_at_a_coordinator(
    identity: HelperIdentity, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    config = ServerConfig(helper_dir=tmp_path, realm="qflare")
    file, taken = tmp_path / "helper.json", 0
    for data in spoiled(json_format.MessageToJson(identity.bundle), 3, 150):
        file.write_bytes(data)
        folder = HelperFolder(config, lambda _: security_pb2.SignedEnvelope())
        documents = folder.documents()
        assert set(documents) <= {identity.helper_id}
        taken += len(documents)
    assert 0 < taken < 150


def test_bootstrap_bundles_at_a_helper(identity: HelperIdentity, tmp_path: Path) -> None:
    file = tmp_path / "bootstrap.json"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read_bootstrap(file)

    text = json_format.MessageToJson(identity.pinned)
    assert outcomes(spoiled(text, 4), parse, HelperError) == {True, False}


def _spoiled_message(random: Random, message: Any) -> None:
    RequestMaker(random, {}).spoil(message)


def test_documents_of_helpers(identity: HelperIdentity) -> None:
    random, taken = Random(5), 0
    for number in range(COUNT):
        envelope = security_pb2.SignedEnvelope()
        envelope.CopyFrom(identity.bundle.document)
        document = security_pb2.HelperDocument.FromString(envelope.payload)
        if number % 2:
            _spoiled_message(random, document)
            envelope.payload = document.SerializeToString(deterministic=True)
        else:
            _spoiled_message(random, envelope)
        try:
            helper = open_helper(envelope, "qflare")
        except StatementError:
            continue
        assert envelope.payload == identity.bundle.document.payload
        assert helper.helper_id == identity.helper_id
        taken += 1
    assert 0 < taken < COUNT


def _verify(
    transcript: verification_pb2.UnmaskingTranscript, made: security_pb2.ModelStatement
) -> None:
    envelopes = [_update(vector)[0] for vector in UNMASKING["updates"]]
    stated = [security_pb2.UpdateStatement.FromString(item.payload) for item in envelopes]
    digests = [digest_of(item.payload) for item in envelopes]
    key = security_pb2.PublicKey.FromString(bytes.fromhex(UNMASKING["task_key"]))
    verify_transcript(transcript, made, [PublicKey.from_proto(key)], stated, digests)


def test_transcripts() -> None:
    random, refused = Random(6), 0
    for _ in range(COUNT):
        transcript, made = _transcript(), _made()
        _spoiled_message(random, random.choice((transcript, transcript.task, made)))
        try:
            _verify(transcript, made)
        except StatementError:
            refused += 1
    assert refused > COUNT // 4
    for data in spoiled("", 7, 100):
        transcript = _transcript()
        transcript.task.payload = data
        with pytest.raises(StatementError):
            _verify(transcript, _made())


def test_masking_of_tasks_and_updates() -> None:
    """Whoever holds a task key signs any task: what devices and helpers read after the signature is fuzzed too."""
    random, taken = Random(8), 0
    envelope, _ = _update(UNMASKING["updates"][0])
    update = security_pb2.UpdateStatement.FromString(envelope.payload)
    for _ in range(COUNT):
        signed = _transcript().task
        task = security_pb2.TaskStatement.FromString(signed.payload)
        part = random.choice((task, task.masking, task.masking.policy, task.masking.helpers[0]))
        _spoiled_message(random, part)
        signed.payload = task.SerializeToString(deterministic=True)
        try:
            masking = masking_of(signed)
            if masking is not None:
                taken += 1
                check_masked_update(update, masking)
        except StatementError:
            continue
    assert taken > COUNT // 20


NESTED: Final = "[" * 100_000


def _settings(path: Path) -> object:
    read_file(path, config := training_pb2.TrainingConfig())
    return config


@pytest.mark.parametrize(
    ("name", "text", "parse", "refusal"),
    [
        (
            "policy.toml",
            f"min_cohort = {NESTED}",
            lambda path: read_policy(path.parent),
            HelperError,
        ),
        ("policy.toml", f"metrics = {NESTED}", SecureAggregation.from_file, InvalidArgumentError),
        ("policy.toml", f"columns = {NESTED}", Analytics.from_file, InvalidArgumentError),
        ("session.toml", f"rounds = {NESTED}", _settings, SettingError),
        ("session.json", NESTED, _settings, SettingError),
        (
            "pyproject.toml",
            f"tool = {NESTED}",
            lambda path: read_project(path.parent),
            InvalidArgumentError,
        ),
        ("trust.json", NESTED, lambda path: read_document(path.parent, path.name), KeyStoreError),
        ("backup.json", NESTED, lambda path: Manifest.read(path.parent), BackupError),
        ("bootstrap.json", NESTED, read_bootstrap, HelperError),
    ],
)
def test_files_that_are_nested_deeply(
    name: str,
    text: str,
    parse: Callable[[Path], object],
    refusal: type[Exception],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(refusal):
        parse(tmp_path / name)
