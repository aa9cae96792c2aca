"""A version's evidence, exported by a real coordinator and checked offline; whatever is changed in it is found."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from sqlalchemy import select

from qflare.crypto import merkle
from qflare.evidence.statements import check_entry, open_tree_head
from qflare.evidence.verification import (
    VerificationError,
    open_evidence,
    verify_bundle,
    verify_payload,
)
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import security_pb2
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import rotate_online, rotate_root
from qflare_server.keys.secret_files import Cost
from qflare_server.storage.tables import AuditLog
from qflare_server.verification import verify_database
from tests.independent.bundle import check_bundle
from tests.independent.verifier import RefusedError
from tests.integration.conftest import Deployment
from tests.support.finished_session import ROUND_COUNT, Bundle, Trained, finished, train
from tests.support.postgresql import fresh_database


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, key_folder: Path
) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("trained")
    if request.param == "sqlite":
        with finished(f"sqlite:///{folder / 'qflare.db'}", folder, key_folder) as found:
            yield found
        return
    server, template = map(request.getfixturevalue, ("postgres_server_url", "postgres_template"))
    with (
        fresh_database(server, template=template) as url,
        finished(url, folder, key_folder) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Bundle:
    return trained.bundle()


@pytest.fixture
def bundle(exported: Bundle) -> Bundle:
    return copy.deepcopy(exported)


def test_a_version_is_shown_with_nothing_but_the_root_key_ids(
    trained: Trained, bundle: Bundle
) -> None:
    report = trained.verify(bundle)

    assert (report.version, report.lineage_length) == (ROUND_COUNT, ROUND_COUNT + 1)
    assert (report.contributor_count, report.signed_count, report.device_count) == (2, 2, 2)
    assert report.missing == ()
    assert report.evaluation_count == 2
    assert report.log_size > 2 * ROUND_COUNT


def test_an_initial_model_is_shown(trained: Trained) -> None:
    report = trained.verify(trained.bundle(0))

    assert (report.version, report.contributor_count) == (0, 0)


def test_the_bytes_of_a_shown_version_are_checked(trained: Trained, bundle: Bundle) -> None:
    report = trained.verify(bundle)
    deliveries = trained.deployment.coordinator.parts.use_cases.deliveries
    chunks = [data for _, data in deliveries.chunks(deliveries.find(trained.session_id), 0)]

    verify_payload(report, chunks)
    with pytest.raises(VerificationError, match="payload"):
        verify_payload(report, [*chunks[:-1], b"\x01" + chunks[-1][1:]])


def flip(data: bytes, place: int = -1) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def forge_root(bundle: Bundle) -> None:
    signature = bundle.keyset.roots[0].signatures[0]
    signature.signature = flip(signature.signature)


def forge_keyset(bundle: Bundle) -> None:
    bundle.keyset.keyset.payload = flip(bundle.keyset.keyset.payload)


def other_realm(bundle: Bundle) -> None:
    bundle.realm = "elsewhere"


def forge_statement(bundle: Bundle) -> None:
    signature = bundle.statements[1].signatures[0]
    signature.signature = flip(signature.signature)


def drop_statement(bundle: Bundle) -> None:
    del bundle.statements[1]


def drop_first_statement(bundle: Bundle) -> None:
    del bundle.statements[0]


def drop_last_statement(bundle: Bundle) -> None:
    del bundle.statements[-1]


def other_session(bundle: Bundle) -> None:
    bundle.training_session_id = "00000000-0000-4000-8000-000000000000"


def forge_head(bundle: Bundle) -> None:
    bundle.head.payload = flip(bundle.head.payload, 20)


def drop_publication(bundle: Bundle) -> None:
    del bundle.entries[0]


def change_entry(bundle: Bundle) -> None:
    bundle.entries[-1].actor = "admin:mallory"


def change_detail(bundle: Bundle) -> None:
    bundle.entries[-1].details["sequence"] = "99"


def change_salt(bundle: Bundle) -> None:
    bundle.entries[-1].salt = "00" * 16


def malformed_salt(bundle: Bundle) -> None:
    bundle.entries[-1].salt = "not hex"


def change_time(bundle: Bundle) -> None:
    bundle.entries[-1].create_time.nanos = (bundle.entries[-1].create_time.nanos + 1000) % 10**9


def move_entry(bundle: Bundle) -> None:
    bundle.entries[-1].proof.leaf_index += 1


def drop_update(bundle: Bundle) -> None:
    del bundle.updates[0]


def repeat_update(bundle: Bundle) -> None:
    bundle.updates.append(bundle.updates[0])


def forge_update(bundle: Bundle) -> None:
    signature = bundle.updates[0].statement.signatures[0]
    signature.signature = flip(signature.signature)


def change_update(bundle: Bundle) -> None:
    envelope = bundle.updates[0].statement
    statement = security_pb2.UpdateStatement.FromString(envelope.payload)
    statement.example_count += 1
    envelope.payload = statement.SerializeToString(deterministic=True)


def swap_statements(bundle: Bundle) -> None:
    first, second = bundle.updates[0].statement, bundle.updates[1].statement
    kept = copy.deepcopy(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


def drop_acceptance(bundle: Bundle) -> None:
    drop_entry(bundle, "update.accepted")


def drop_entry(bundle: Bundle, event_type: str) -> None:
    types = [entry.event_type for entry in bundle.entries]
    del bundle.entries[types.index(event_type)]


def drop_key(bundle: Bundle) -> None:
    del bundle.device_keys[-1]


def forge_evaluation(bundle: Bundle) -> None:
    signature = bundle.evaluations[0].signatures[0]
    signature.signature = flip(signature.signature)


def change_evaluation(bundle: Bundle) -> None:
    envelope = bundle.evaluations[0]
    statement = security_pb2.EvaluationStatement.FromString(envelope.payload)
    statement.metrics["accuracy"] = 1.0
    envelope.payload = statement.SerializeToString(deterministic=True)


def repeat_evaluation(bundle: Bundle) -> None:
    bundle.evaluations.append(bundle.evaluations[0])


def drop_report(bundle: Bundle) -> None:
    drop_entry(bundle, "evaluation.reported")


def drop_receipts(bundle: Bundle) -> None:
    for key in bundle.device_keys:
        key.ClearField("receipt")


def forge_receipt(bundle: Bundle) -> None:
    key = next(key for key in bundle.device_keys if key.HasField("receipt"))
    key.receipt.signatures[0].signature = flip(key.receipt.signatures[0].signature)


def forge_rotation(bundle: Bundle) -> None:
    key = next(key for key in bundle.device_keys if key.HasField("rotation"))
    key.rotation.signatures[0].signature = flip(key.rotation.signatures[0].signature)


def other_device(bundle: Bundle) -> None:
    first, last = bundle.device_keys[0], bundle.device_keys[-1]
    first.device_id, last.device_id = last.device_id, first.device_id


EDITS: dict[str, list[Callable[[Bundle], None]]] = {
    "keyset": [forge_root, forge_keyset, other_realm],
    "lineage": [
        forge_statement,
        drop_statement,
        drop_first_statement,
        drop_last_statement,
        other_session,
    ],
    "log": [
        forge_head,
        drop_publication,
        change_entry,
        change_detail,
        change_salt,
        malformed_salt,
        change_time,
        move_entry,
    ],
    "device": [drop_receipts, forge_receipt, forge_rotation, other_device],
    "contributors": [drop_update, repeat_update],
    "update": [forge_update, change_update, swap_statements, drop_acceptance, drop_key],
    "evaluation": [forge_evaluation, change_evaluation, repeat_evaluation, drop_report],
}


@pytest.mark.parametrize(
    ("step", "edit"),
    [pytest.param(step, edit, id=edit.__name__) for step, edits in EDITS.items() for edit in edits],
)
def test_a_changed_bundle_is_refused_at_the_step_that_it_breaks(
    trained: Trained, bundle: Bundle, step: str, edit: Callable[[Bundle], None]
) -> None:
    edit(bundle)

    with pytest.raises(VerificationError) as caught:
        trained.verify(bundle)

    assert caught.value.step == step
    with pytest.raises((RefusedError, ValueError)):
        check_bundle(bundle, trained.pins, len(trained.pins), datetime.now(UTC))


def test_an_evaluation_of_another_version_is_refused(trained: Trained, bundle: Bundle) -> None:
    other = trained.bundle(1)
    del bundle.evaluations[:]
    bundle.evaluations.extend(other.evaluations)

    with pytest.raises(VerificationError, match=r"^evaluation: version"):
        trained.verify(bundle)


def test_other_root_keys_are_not_trusted(bundle: Bundle) -> None:
    with pytest.raises(VerificationError, match="keyset"):
        verify_bundle(bundle, ["ab" * 32], datetime.now(UTC))


def test_no_root_keys_are_not_enough(bundle: Bundle) -> None:
    with pytest.raises(VerificationError, match="keyset"):
        verify_bundle(bundle, [], datetime.now(UTC))


def test_an_expired_keyset_is_refused(trained: Trained, bundle: Bundle) -> None:
    later = datetime.now(UTC) + timedelta(days=5000)

    with pytest.raises(VerificationError, match="expired"):
        verify_bundle(bundle, trained.pins, later)


def test_an_empty_bundle_is_refused(trained: Trained) -> None:
    with pytest.raises(VerificationError, match="keyset"):
        trained.verify(Bundle())


def test_an_audit_entry_is_proven_over_the_network(trained: Trained) -> None:
    answer = trained.deployment.admin.GetAuditProof(
        admin_pb2.GetAuditProofRequest(leaf_index=2), metadata=trained.deployment.metadata
    )

    trust = trained.deployment.coordinator.parts.keys.trust
    keys = trust.signature_keys(security_pb2.KEY_ROLE_LOG)
    head = open_tree_head(answer.head, keys, "qflare/audit")
    check_entry(head, open_evidence(answer.entry).leaf_hash(), answer.entry.proof)


def test_an_audit_entry_that_is_not_there_is_not_found(trained: Trained) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        trained.deployment.admin.GetAuditProof(
            admin_pb2.GetAuditProofRequest(audit_id=10**6), metadata=trained.deployment.metadata
        )

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_proof_of_an_entry_names_nobody_else(trained: Trained, bundle: Bundle) -> None:
    """Siblings are hashes: what is next to an entry in the log stays unsaid."""
    evidence = bundle.entries[0]

    lengths = {len(sibling) for sibling in evidence.proof.sibling_digests}

    assert lengths == {2 * merkle.HASH_BYTES}
    assert trained.devices[0].device_id not in str(evidence)


def published(trained: Trained) -> list[str]:
    """What the audit log says of root documents and keysets."""
    types = ("root.published", "keyset.published")
    with trained.deployment.coordinator.parts.database.read() as session:
        query = select(AuditLog.subject).where(AuditLog.event_type.in_(types)).order_by(AuditLog.id)
        return list(session.scalars(query))


def cheap_folder(trained: Trained) -> KeyFolder:
    """The coordinator's key folder, its next files encrypted at little cost."""
    folder = KeyFolder.from_config(trained.deployment.config)
    return dataclasses.replace(folder, cost=Cost(iterations=1, memory_kib=1024, lanes=1))


def test_a_version_is_shown_after_every_key_has_been_exchanged(
    deploy: Callable[..., Deployment],
) -> None:
    """Receipts are signed by keys that the keyset in force no longer names: the bundle brings those before it."""
    trained = train(deploy())
    parts = trained.deployment.coordinator.parts
    folder = cheap_folder(trained)
    for _ in range(2):
        rotate_online(folder, parts.database, parts.context.clock())
    rotate_root(folder, parts.database, parts.context.clock())
    rotate_online(folder, parts.database, parts.context.clock())

    bundle = trained.bundle()
    report = trained.verify(bundle)

    assert (report.root_version, report.keyset_version) == (2, 5)
    assert len(bundle.earlier_keysets) == 4
    assert verify_database(parts.context, trained.pins).findings == ()
    assert published(trained) == [
        *("root:1", "keyset:1", "keyset:2", "keyset:3", "root:2", "keyset:4", "keyset:5")
    ]
    del bundle.earlier_keysets[:]
    with pytest.raises(VerificationError, match="device"):
        trained.verify(bundle)


def test_earlier_keysets_cannot_be_forged(deploy: Callable[..., Deployment]) -> None:
    trained = train(deploy())
    parts = trained.deployment.coordinator.parts
    folder = cheap_folder(trained)
    rotate_online(folder, parts.database, parts.context.clock())
    bundle = trained.bundle()
    keyset = bundle.earlier_keysets[0]
    keyset.payload = flip(keyset.payload)

    with pytest.raises(VerificationError, match="keyset"):
        trained.verify(bundle)


def enums_in(kind: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every enum field of a message."""
    for field in kind.fields:
        if field.enum_type is not None:
            yield (*path, field.name)
        elif field.message_type is not None:
            yield from enums_in(field.message_type, (*path, field.name))


def set_unknown(message: Message, path: tuple[str, ...]) -> None:
    """Set an enum field to an unknown number, wherever it is present."""
    found = getattr(message, path[0])
    if len(path) == 1:
        setattr(message, path[0], 99)
    elif isinstance(found, Message):
        if message.HasField(path[0]):
            set_unknown(found, path[1:])
    else:
        for one in found:
            set_unknown(one, path[1:])


@pytest.mark.parametrize("path", [*enums_in(Bundle.DESCRIPTOR)], ids=".".join)
def test_a_bundle_of_a_later_release_is_refused_with_what_to_upgrade(
    trained: Trained, bundle: Bundle, path: tuple[str, ...]
) -> None:
    exported = bundle.SerializeToString()
    set_unknown(bundle, path)

    if bundle.SerializeToString() != exported:
        with pytest.raises(VerificationError, match="upgrade qflare"):
            trained.verify(bundle)
