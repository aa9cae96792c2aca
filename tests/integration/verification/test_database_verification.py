"""Every edit by hand of a finished training session's database is found, and nothing else is."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, delete, insert, literal_column, select, update
from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.v1 import security_pb2
from qflare.v1.device_pb2 import DeviceProfile
from qflare_server.context import Context
from qflare_server.storage.repository.audit import SYSTEM, Caller, Event, record
from qflare_server.storage.tables import (
    AuditHead,
    AuditLog,
    AuditNode,
    Device,
    DeviceGroup,
    DeviceKey,
    Evaluation,
    GlobalModel,
    ModelUpdate,
    Payload,
    Round,
    TrainingSession,
    TrainingSessionGroup,
    TrustDocument,
)
from qflare_server.use_cases.audit import witness
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.verification import (
    DatabaseReport,
    Finding,
    recompute_version,
    verify_database,
)
from tests.support.finished_session import ROUND_COUNT, Trained, finished
from tests.support.postgresql import fresh_database

AUDIT = AuditLog.__table__
NODES = AuditNode.__table__
HEADS = AuditHead.__table__
DEVICES = Device.__table__
KEYS = DeviceKey.__table__
EVALUATIONS = Evaluation.__table__
DEVICE_GROUPS = DeviceGroup.__table__
SESSION_GROUPS = TrainingSessionGroup.__table__
MODELS = GlobalModel.__table__
UPDATES = ModelUpdate.__table__
PAYLOADS = Payload.__table__
DOCUMENTS = TrustDocument.__table__
ROUNDS = Round.__table__
SESSIONS = TrainingSession.__table__


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, key_folder: Path
) -> Iterator[Trained]:
    """One training session for all tests of this module: whoever edits its database puts it right again."""
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


@pytest.fixture
def context(trained: Trained) -> Context:
    """The coordinator's parts, every entry of its log placed and signed for."""
    context = trained.deployment.coordinator.parts.context
    trained.deployment.coordinator.parts.use_cases.audit.head(fresh=True)
    return context


def verify(trained: Trained, context: Context, **options: Any) -> DatabaseReport:
    return verify_database(context, trained.pins, **options)


@contextmanager
def edited(context: Context, table: Table, where: Any, values: Mapping[str, Any]) -> Iterator[Any]:
    """Change a row, and change it back."""
    row = _first(context, table, where)
    key = _key_of(table, row)
    _write(context, update(table).where(key).values(**values))
    after = _key_of(table, {**row, **values})
    try:
        yield row
    finally:
        _write(context, update(table).where(after).values(**{name: row[name] for name in values}))


@contextmanager
def deleted(context: Context, table: Table, where: Any) -> Iterator[Any]:
    """Delete a row, and put it back."""
    row = _first(context, table, where)
    _write(context, delete(table).where(_key_of(table, row)))
    try:
        yield row
    finally:
        _write(context, insert(table).values(**row))


@contextmanager
def without_evaluations(context: Context) -> Iterator[None]:
    """Delete the evaluations, which refer to versions, and put them back."""
    with context.database.engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(select(EVALUATIONS)).mappings()]
    _write(context, delete(EVALUATIONS))
    try:
        yield
    finally:
        _write(context, insert(EVALUATIONS).values(rows))


@contextmanager
def added(context: Context, table: Table, row: Mapping[str, Any]) -> Iterator[None]:
    """Insert a row, and delete it."""
    _write(context, insert(table).values(**row))
    try:
        yield
    finally:
        _write(context, delete(table).where(_key_of(table, row)))


def _first(context: Context, table: Table, where: Any) -> dict[str, Any]:
    query = select(table).where(where).order_by(*table.primary_key).limit(1)
    with context.database.engine.connect() as connection:
        return dict(connection.execute(query).mappings().one())


def _key_of(table: Table, row: Mapping[str, Any]) -> Any:
    columns = [column == row[column.name] for column in table.primary_key]
    joined = columns[0]
    for column in columns[1:]:
        joined &= column
    return joined


def _write(context: Context, statement: Any) -> None:
    def work(session: Session) -> None:
        session.execute(statement)

    context.database.write(work)


def kinds(report: DatabaseReport) -> set[str]:
    return {finding.kind for finding in report.findings}


def test_an_untouched_database_has_no_findings(trained: Trained, context: Context) -> None:
    report = verify(trained, context)

    assert report.findings == ()
    assert report.checked["model"] == ROUND_COUNT + 1
    assert report.checked["update"] == 2 * ROUND_COUNT
    assert report.checked["device_key"] == 3
    assert report.checked["audit"] > 4 * ROUND_COUNT
    assert report.checked["head"] >= 1
    assert report.checked["round"] == ROUND_COUNT
    assert report.unchecked == {}


def test_a_log_that_grows_meanwhile_has_no_findings(trained: Trained, context: Context) -> None:
    log = trained.deployment.coordinator.parts.use_cases.audit
    done = threading.Event()
    event = Event("test.happened", "thing")

    def grow() -> None:
        while not done.is_set():
            context.database.write(lambda session: record(session, SYSTEM, event, context.clock()))
            log.head(fresh=True)

    with ThreadPoolExecutor(1) as executor:
        growing = executor.submit(grow)
        try:
            found = [verify(trained, context, read_bytes=False).findings for _ in range(5)]
        finally:
            done.set()
        growing.result()

    assert found == [()] * 5


AUDIT_EDITS: dict[str, dict[str, Any]] = {
    "event_type": {"event_type": "nothing.happened"},
    "actor": {"actor": "admin:mallory"},
    "subject": {"subject": "update:other"},
    "peer_address": {"peer_address": "192.0.2.99"},
    "authentication_method": {"authentication_method": "none at all"},
    "risk_level": {"risk_level": "critical"},
    "details": {"details": {"round": 7}},
    "salt": {"salt": bytes(16)},
    "leaf_hash": {"leaf_hash": bytes(32)},
}


@pytest.mark.parametrize("values", AUDIT_EDITS.values(), ids=AUDIT_EDITS.keys())
def test_an_edited_audit_entry_is_found(
    trained: Trained, context: Context, values: dict[str, Any]
) -> None:
    with edited(context, AUDIT, AUDIT.c.leaf_index == 3, values) as row:
        report = verify(trained, context)

    assert [finding.subject for finding in report.findings if finding.kind == "audit"] == [
        f"entry {row['id']} at place 3"
    ]


def test_the_time_of_an_audit_entry_cannot_be_moved(trained: Trained, context: Context) -> None:
    earlier = _first(context, AUDIT, AUDIT.c.leaf_index == 0)["created_at"]
    with edited(context, AUDIT, AUDIT.c.leaf_index == 3, {"created_at": earlier}):
        assert kinds(verify(trained, context)) == {"audit"}


@pytest.mark.parametrize("place", [0, 5])
def test_a_deleted_audit_entry_is_found(trained: Trained, context: Context, place: int) -> None:
    with deleted(context, AUDIT, AUDIT.c.leaf_index == place):
        report = verify(trained, context)

    assert report.findings == (
        Finding("audit", f"at place {place}", "the entry is missing: it was deleted"),
    )


def test_the_last_audit_entry_cannot_be_cut_off(trained: Trained, context: Context) -> None:
    last = trained.deployment.coordinator.parts.use_cases.audit.head(fresh=True)[0]
    assert last is not None
    with context.database.engine.connect() as connection:
        size = connection.execute(select(HEADS.c.size).order_by(HEADS.c.size.desc())).scalar()
    assert size is not None
    with deleted(context, AUDIT, AUDIT.c.leaf_index == size - 1):
        assert "head" in kinds(verify(trained, context))


def test_an_audit_entry_cannot_be_inserted_at_the_end(trained: Trained, context: Context) -> None:
    row = _first(context, AUDIT, AUDIT.c.leaf_index == 3)
    with context.database.engine.connect() as connection:
        size = connection.execute(select(HEADS.c.size).order_by(HEADS.c.size.desc())).scalar()
    with added(context, AUDIT, {**row, "id": 10**6, "leaf_index": size}):
        assert kinds(verify(trained, context)) == {"audit"}


def test_two_audit_entries_cannot_change_places(trained: Trained, context: Context) -> None:
    with (
        edited(context, AUDIT, AUDIT.c.leaf_index == 3, {"leaf_index": 10**6}),
        edited(context, AUDIT, AUDIT.c.leaf_index == 4, {"leaf_index": 3}),
    ):
        report = verify(trained, context)

    assert kinds(report) == {"audit"}


def test_an_entry_that_is_changed_with_leaf_and_nodes_does_not_fit_the_head(
    trained: Trained, context: Context
) -> None:
    """Whoever edits rows, leaves and nodes so that they fit each other cannot sign a head."""
    sibling = _first(context, NODES, (NODES.c.level == 0) & (NODES.c.node_index == 1))["hash"]
    forged = merkle.node_hash(bytes(32), sibling)
    with (
        edited(
            context, NODES, (NODES.c.level == 0) & (NODES.c.node_index == 0), {"hash": bytes(32)}
        ),
        edited(context, NODES, (NODES.c.level == 1) & (NODES.c.node_index == 0), {"hash": forged}),
    ):
        assert "head" in kinds(verify(trained, context))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_edited_or_deleted_node_is_found(trained: Trained, context: Context, level: int) -> None:
    place = (NODES.c.level == level) & (NODES.c.node_index == 1)
    with edited(context, NODES, place, {"hash": bytes(32)}):
        assert "audit" in kinds(verify(trained, context))
    with deleted(context, NODES, place):
        assert "audit" in kinds(verify(trained, context))


def test_a_node_beyond_the_log_is_found(trained: Trained, context: Context) -> None:
    with added(context, NODES, {"level": 1, "node_index": 10**5, "hash": bytes(32)}):
        assert kinds(verify(trained, context)) == {"audit"}


@pytest.mark.parametrize("column", ["root", "statement", "signature"])
def test_an_edited_head_is_found(trained: Trained, context: Context, column: str) -> None:
    with edited(context, HEADS, HEADS.c.size > 0, {column: bytes(32)}):
        assert kinds(verify(trained, context)) == {"head"}


def test_a_head_of_the_witness_that_the_log_does_not_lead_to_is_found(
    trained: Trained, context: Context, tmp_path: Path
) -> None:
    path = tmp_path / "witness.txt"
    head = security_pb2.TreeHead(origin="qflare/audit", size=3, root_digest="ab" * 32)
    signed = context.signer.sign(security_pb2.KEY_ROLE_LOG, head.SerializeToString())
    witness.append(path, signed)

    report = verify(trained, context, witness_file=path)

    assert [finding.subject for finding in report.findings] == ["of size 3"]


def test_a_witness_that_agrees_has_no_findings(
    trained: Trained, context: Context, tmp_path: Path
) -> None:
    path = tmp_path / "witness.txt"
    witness.append(path, trained.deployment.coordinator.parts.use_cases.audit.head()[0])

    report = verify(trained, context, witness_file=path)

    assert report.findings == ()
    assert report.checked["witness"] == 1


MODEL_EDITS: dict[str, Any] = {
    "digest": "ab" * 32,
    "parent_digest": "ab" * 32,
    "payload_digest": "ab" * 32,
    "size_bytes": 5,
    "layout_digest": "ab" * 32,
    "statement": b"\x0a\x06qflare",
    "signature": b"",
    "base_version": 0,
    "round_number": 9,
    "participant_count": 1,
    "example_count": 1,
    "aggregation_method": "median",
    "contributors_digest": "ab" * 32,
    "epsilon": 0.5,
    "rollback_version": 0,
    "version": 9,
    "manifest": b"",
}


@pytest.mark.parametrize("column", MODEL_EDITS)
def test_an_edited_version_is_found(trained: Trained, context: Context, column: str) -> None:
    values = {column: MODEL_EDITS[column]}
    with (
        without_evaluations(context),
        edited(context, MODELS, MODELS.c.version == ROUND_COUNT, values),
    ):
        assert "model" in kinds(verify(trained, context))


@pytest.mark.parametrize("version", [0, 1, ROUND_COUNT])
def test_a_deleted_version_is_found(trained: Trained, context: Context, version: int) -> None:
    with without_evaluations(context), deleted(context, MODELS, MODELS.c.version == version):
        assert "model" in kinds(verify(trained, context))


def test_a_version_cannot_be_given_the_payload_of_another(
    trained: Trained, context: Context
) -> None:
    other = _first(context, MODELS, MODELS.c.version == 0)["payload_id"]
    with edited(context, MODELS, MODELS.c.version == 1, {"payload_id": other}):
        assert kinds(verify(trained, context)) == {"model"}


UPDATE_EDITS: dict[str, Any] = {
    "example_count": 11,
    "payload_digest": "ab" * 32,
    "size_bytes": 5,
    "statement": b"\x0a\x06qflare",
    "statement_digest": "ab" * 32,
    "signature": b"",
    "key_id": "ab" * 32,
    "base_version": 1,
    "loss": 9.0,
    "accuracy": 0.99,
    "metrics": {"loss": 9.0},
    "id": "00000000-0000-4000-8000-000000000000",
}


@pytest.mark.parametrize("column", UPDATE_EDITS)
def test_an_edited_update_is_found(trained: Trained, context: Context, column: str) -> None:
    values = {column: UPDATE_EDITS[column]}
    with edited(context, UPDATES, UPDATES.c.round_number == 1, values):
        assert "update" in kinds(verify(trained, context))


def test_an_update_cannot_lose_its_statement(trained: Trained, context: Context) -> None:
    values = {"statement": None, "signature": None}
    with edited(context, UPDATES, UPDATES.c.round_number == 1, values):
        assert verify(trained, context).findings != ()


def test_a_deleted_update_is_found(trained: Trained, context: Context) -> None:
    with deleted(context, UPDATES, UPDATES.c.round_number == 1) as row:
        report = verify(trained, context)

    assert row["id"] in {finding.subject for finding in report.findings}
    assert kinds(report) == {"model", "update"}


def test_an_update_cannot_be_moved_out_of_its_version(trained: Trained, context: Context) -> None:
    with edited(context, UPDATES, UPDATES.c.round_number == 1, {"state": "rejected"}):
        assert kinds(verify(trained, context)) == {"model"}
    with edited(context, ROUNDS, ROUNDS.c.number == 1, {"version": None}):
        assert kinds(verify(trained, context)) == {"model"}


@pytest.mark.parametrize(
    "values", [{"acceptance_sequence": 77}, {"round_number": 2, "acceptance_sequence": 9}]
)
def test_an_update_cannot_change_its_place(
    trained: Trained, context: Context, values: dict[str, Any]
) -> None:
    row = _first(context, UPDATES, UPDATES.c.round_number == 1)
    if "round_number" in values:  # a device has one update of a round from a base version
        values = {**values, "base_version": 5}
    with edited(context, UPDATES, UPDATES.c.id == row["id"], values):
        assert "update" in kinds(verify(trained, context))


@pytest.mark.parametrize(
    "values", [{"nonce": "ab" * 32}, {"base_version": 1}, {"task": b""}, {"number": 9}]
)
def test_an_edited_round_is_found(
    trained: Trained, context: Context, values: dict[str, Any]
) -> None:
    training_session_id = trained.deployment.session(start=True)
    try:
        with edited(context, ROUNDS, ROUNDS.c.training_session_id == training_session_id, values):
            assert kinds(verify(trained, context)) == {"round"}
    finally:
        parts = trained.deployment.coordinator.parts
        parts.use_cases.training.cancel(Caller(), training_session_id, "tested")


def test_an_edited_configuration_is_found(trained: Trained, context: Context) -> None:
    where = SESSIONS.c.id == trained.session_id
    config = _first(context, SESSIONS, where)["config"]
    with edited(context, SESSIONS, where, {"config": {**config, "total_rounds": 77}}):
        report = verify(trained, context)
        made = recompute_version(context, trained.session_id)

    assert kinds(report) == {"round"}
    assert made.differences


def test_a_configuration_that_is_none_any_more_is_found(trained: Trained, context: Context) -> None:
    where = SESSIONS.c.id == trained.session_id
    with edited(context, SESSIONS, where, {"config": {"total_rounds": "many"}}):
        assert kinds(verify(trained, context)) == {"round"}


def test_an_audit_entry_whose_details_are_no_object_is_found(
    trained: Trained, context: Context
) -> None:
    with edited(context, AUDIT, AUDIT.c.event_type == "update.accepted", {"details": [1]}):
        assert kinds(verify(trained, context)) == {"audit"}


def test_a_row_that_cannot_be_read_is_found(trained: Trained, context: Context) -> None:
    """SQLite holds text that is no JSON where JSON should be, PostgreSQL at least other JSON."""
    text, kind = ("'{'", "record") if context.database.is_sqlite else ("'[1]'", "update")
    broken = update(UPDATES).values(metrics=literal_column(text))
    row = _first(context, UPDATES, UPDATES.c.round_number == 1)
    _write(context, broken.where(UPDATES.c.id == row["id"]))
    try:
        assert kind in kinds(verify(trained, context))
    finally:
        _write(
            context, update(UPDATES).where(UPDATES.c.id == row["id"]).values(metrics=row["metrics"])
        )


@pytest.mark.parametrize(
    "values",
    [
        {"metrics": {"accuracy": 1.0}},
        {"example_count": 2**40},
        {"weight": 2**40},
        {"weight": None},
        {"key_id": "ab" * 32},
        {"signature": b""},
        {"statement": b""},
        {"statement_digest": "ab" * 32},
        {"version": 0},
    ],
    ids=str,
)
def test_an_edited_evaluation_is_found(
    trained: Trained, context: Context, values: dict[str, Any]
) -> None:
    with edited(context, EVALUATIONS, EVALUATIONS.c.version == 1, values):
        assert kinds(verify(trained, context)) == {"evaluation"}


def test_a_deleted_evaluation_is_found(trained: Trained, context: Context) -> None:
    with deleted(context, EVALUATIONS, EVALUATIONS.c.version == 1):
        assert kinds(verify(trained, context)) == {"evaluation"}


def test_an_unsigned_evaluation_is_told_from_those_that_count(
    trained: Trained, context: Context
) -> None:
    names = ("statement", "statement_digest", "signature", "key_id", "weight")
    with edited(context, EVALUATIONS, EVALUATIONS.c.version == 1, dict.fromkeys(names)):
        report = verify(trained, context)
    assert kinds(report) == {"evaluation"}  # the log says that it was signed
    assert report.unchecked["evaluations from before they were signed"] == 1


@pytest.mark.parametrize("column", ["public_key", "algorithm", "kem_public_key", "statement"])
def test_an_edited_device_key_is_found(trained: Trained, context: Context, column: str) -> None:
    row = _first(context, KEYS, KEYS.c.sequence > 0)
    value = 3 if column == "algorithm" else row[column][:-1] + bytes([row[column][-1] ^ 1])
    with edited(context, KEYS, KEYS.c.key_id == row["key_id"], {column: value}):
        found = verify(trained, context).findings

    assert {finding.kind for finding in found} & {"device_key", "device"}


def test_a_device_cannot_be_given_a_key_that_it_never_had(
    trained: Trained, context: Context
) -> None:
    names = ("signature_key_id", "signature_public_key")
    row = _first(context, DEVICES, DEVICES.c.id != "")
    value = row["signature_public_key"][:-1] + bytes([row["signature_public_key"][-1] ^ 1])
    with edited(context, DEVICES, DEVICES.c.id == row["id"], {names[1]: value}):
        assert kinds(verify(trained, context)) == {"device"}
    with edited(context, DEVICES, DEVICES.c.id == row["id"], {names[0]: "ab" * 32}):
        assert kinds(verify(trained, context)) == {"device"}


@pytest.mark.parametrize(
    "values",
    [
        {"device_type": "server"},
        {"capabilities": {"ram_mib": 1e6}},
        {"device_type": "server", "confirmed_at": datetime(2030, 1, 1, tzinfo=UTC)},
    ],
    ids=str,
)
def test_a_device_that_is_made_another_is_found(
    trained: Trained, context: Context, values: dict[str, Any]
) -> None:
    with edited(context, DEVICES, DEVICES.c.id != "", values):
        assert kinds(verify(trained, context)) == {"device"}


def test_a_group_that_nobody_gave_is_found(trained: Trained, context: Context) -> None:
    device_id = trained.devices[0].device_id
    with added(context, DEVICE_GROUPS, {"device_id": device_id, "group_name": "ward-3"}):
        assert kinds(verify(trained, context)) == {"device"}
    row = {"training_session_id": trained.session_id, "group_name": "ward-3"}
    with added(context, SESSION_GROUPS, row):
        assert kinds(verify(trained, context)) == {"round"}


def test_what_an_administrator_changed_is_no_finding(trained: Trained, context: Context) -> None:
    devices = trained.deployment.coordinator.use_cases.devices
    device_id = trained.devices[0].device_id
    profile = Profile("server", capabilities={"ram_mib": 4096.0})
    devices.set_groups(Caller(), device_id, ["ward-3", "a"], "")
    devices.confirm_profile(Caller(), device_id, profile, "")
    trained.devices[0].heartbeat(DeviceProfile(device_type="phone"))
    try:
        assert verify(trained, context).findings == ()
        with deleted(context, DEVICE_GROUPS, DEVICE_GROUPS.c.group_name == "a"):
            assert kinds(verify(trained, context)) == {"device"}
        with edited(context, DEVICES, DEVICES.c.id == device_id, {"device_type": "phone"}):
            assert kinds(verify(trained, context)) == {"device"}
    finally:
        devices.set_groups(Caller(), device_id, [], "")
        devices.confirm_profile(Caller(), device_id, Profile(), "")


@pytest.mark.parametrize("column", ["digest", "chunk_digests", "size_bytes"])
def test_an_edited_payload_row_is_found(trained: Trained, context: Context, column: str) -> None:
    values = {"digest": "ab" * 32, "chunk_digests": bytes(64), "size_bytes": 7}
    with edited(context, PAYLOADS, PAYLOADS.c.location == "store", {column: values[column]}):
        assert "payload" in kinds(verify(trained, context))


def test_changed_bytes_are_found(trained: Trained, context: Context) -> None:
    row = _first(context, PAYLOADS, PAYLOADS.c.location == "store")
    chunk = context.store.read(row["id"], 1, 1)[0]
    context.store.append(row["id"], 1, [bytes([chunk[0] ^ 1]) + chunk[1:]])
    try:
        report = verify(trained, context)
    finally:
        context.store.append(row["id"], 1, [chunk])

    assert report.findings == (Finding("payload", row["id"], "chunk 1 was changed"),)


def test_bytes_are_left_alone_where_that_is_wished(trained: Trained, context: Context) -> None:
    report = verify(trained, context, read_bytes=False)

    assert report.findings == ()
    assert report.unchecked["payloads whose bytes were not read"] == report.checked["payload"]


@pytest.mark.parametrize("kind", ["root", "keyset"])
def test_an_edited_trust_document_is_found(trained: Trained, context: Context, kind: str) -> None:
    row = _first(context, DOCUMENTS, DOCUMENTS.c.kind == kind)
    changed = row["envelope"][:-1] + bytes([row["envelope"][-1] ^ 1])
    with edited(context, DOCUMENTS, DOCUMENTS.c.kind == kind, {"envelope": changed}):
        assert "keyset" in kinds(verify(trained, context))


def test_other_root_keys_are_not_trusted(context: Context) -> None:
    report = verify_database(context, ["ab" * 32])

    assert report.findings[0].kind == "keyset"


@pytest.mark.parametrize("kind", ["root", "keyset"])
def test_a_deleted_trust_document_is_found(trained: Trained, context: Context, kind: str) -> None:
    with deleted(context, DOCUMENTS, DOCUMENTS.c.kind == kind):
        found = verify(trained, context).findings

    subjects = {finding.subject for finding in found if finding.kind == "keyset"}
    assert subjects == {"in force", f"{kind}:1"}


@pytest.mark.parametrize("version", range(1, ROUND_COUNT + 1))
def test_a_version_is_made_again(trained: Trained, context: Context, version: int) -> None:
    made = recompute_version(context, trained.session_id, version)

    assert (made.recomputed, made.differences, made.update_count) == (True, (), 2)


def test_making_a_version_again_writes_nothing(trained: Trained, context: Context) -> None:
    before = _count(context)

    recompute_version(context, trained.session_id)

    assert _count(context) == before


def _count(context: Context) -> tuple[int, int]:
    with context.database.engine.connect() as connection:
        payloads = len(connection.execute(select(PAYLOADS.c.id)).all())
    return payloads, context.store.size_bytes()


def test_an_initial_model_is_not_made_from_anything(trained: Trained, context: Context) -> None:
    made = recompute_version(context, trained.session_id, 0)

    assert (made.recomputed, made.differences) == (False, ())


def test_a_changed_update_makes_another_version(trained: Trained, context: Context) -> None:
    payload_id = _first(context, UPDATES, UPDATES.c.round_number == 2)["payload_id"]
    chunk = context.store.read(payload_id, 0, 1)[0]
    # Not the last bit: half of its change may be lost in the rounding of the mean.
    context.store.append(payload_id, 0, [chunk[:2] + bytes([chunk[2] ^ 1]) + chunk[3:]])
    try:
        made = recompute_version(context, trained.session_id, 2)
    finally:
        context.store.append(payload_id, 0, [chunk])

    assert made.recomputed
    assert len(made.differences) == 1
    assert made.differences[0].startswith("payload:")


def test_a_pruned_update_keeps_a_version_from_being_made_again(
    trained: Trained, context: Context
) -> None:
    payload_id = _first(context, UPDATES, UPDATES.c.round_number == 2)["payload_id"]
    with edited(context, PAYLOADS, PAYLOADS.c.id == payload_id, {"location": "none"}):
        made = recompute_version(context, trained.session_id, 2)
        report = verify(trained, context)
        shown = trained.verify(trained.bundle(2))

    assert (made.recomputed, made.pruned_count, made.update_count) == (False, 1, 2)
    assert report.findings == ()
    assert report.unchecked == {"payloads that are pruned": 1}
    assert shown.pruned_count == 1
