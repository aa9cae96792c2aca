"""The Merkle tree over the audit log grows by every committed entry once, whoever grows it."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, text

from qflare.crypto import merkle
from qflare.evidence.statements import open_tree_head
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import AuditEntryNotFoundError, InvalidRequestError
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.repository import audit, audit_tree
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import AuditHead, AuditLog, AuditNode
from qflare_server.use_cases.audit import sequencer as trees
from qflare_server.use_cases.audit import witness
from qflare_server.use_cases.audit.log import Audit
from qflare_server.use_cases.audit.sequencer import BATCH, AuditSequencer, entry_of
from tests.conftest import FakeClock
from tests.support.audit_log import START, LogSigner, make_context, record_many

MakeSequencer = Callable[[], AuditSequencer]


@pytest.fixture(scope="module")
def key() -> LogSigner:
    return LogSigner()


@pytest.fixture
def signer(key: LogSigner) -> LogSigner:
    return LogSigner(key.key)


@pytest.fixture
def make(
    server_config: ServerConfig, database: Database, clock: FakeClock, signer: LogSigner
) -> MakeSequencer:
    return lambda: AuditSequencer(make_context(server_config, database, clock, signer))


@pytest.fixture
def log(
    server_config: ServerConfig, database: Database, clock: FakeClock, signer: LogSigner
) -> Audit:
    return Audit(make_context(server_config, database, clock, signer))


def leaves(database: Database) -> list[bytes]:
    """Leaf hashes computed from the rows, by place."""
    with database.read() as session:
        rows = audit_tree.entries_after(session, -1, 100_000)
        assert [row.leaf_index for row in rows] == list(range(len(rows)))
        return [entry_of(row).leaf_hash() for row in rows]


def heads(database: Database) -> list[int]:
    with database.read() as session:
        return list(session.scalars(select(AuditHead.size).order_by(AuditHead.size)))


def opened(envelope: security_pb2.SignedEnvelope, signer: LogSigner) -> security_pb2.TreeHead:
    return open_tree_head(envelope, [signer.public], "qflare/audit")


def test_every_entry_gets_a_place_in_the_order_of_the_ids(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 5)

    assert make().run_once() == 5

    with database.read() as session:
        rows = session.execute(select(AuditLog.leaf_index).order_by(AuditLog.id))
        assert [row[0] for row in rows] == [0, 1, 2, 3, 4]


def test_nothing_to_place_places_nothing(make: MakeSequencer, signer: LogSigner) -> None:
    assert make().run_once() == 0
    assert signer.count == 0


def test_more_entries_than_a_batch_are_placed_in_one_pass(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 2 * BATCH + 1)

    assert make().run_once() == 2 * BATCH + 1


@pytest.mark.parametrize("steps", [[1], [1, 1, 1], [3, 4, 9, 1], [BATCH, 1, BATCH]])
def test_the_head_is_the_root_of_the_entries_however_they_came(
    database: Database, make: MakeSequencer, signer: LogSigner, steps: list[int]
) -> None:
    for count in steps:
        record_many(database, count)
        make().run_once()

    head = opened(make().head(fresh=True).envelope, signer)

    assert head.size == sum(steps)
    assert head.root_digest == merkle.root(leaves(database)).hex()


def test_every_complete_subtree_is_stored_once(database: Database, make: MakeSequencer) -> None:
    record_many(database, 13)
    make().run_once()

    with database.read() as session:
        stored = {
            (row.level, row.node_index): row.hash for row in session.scalars(select(AuditNode))
        }

    node = merkle.nodes_of(leaves(database))
    assert stored == {
        (level, index): node(level, index) for level in range(4) for index in range(13 >> level)
    }


def test_an_empty_log_has_a_head(make: MakeSequencer, signer: LogSigner) -> None:
    head = opened(make().head().envelope, signer)

    assert (head.size, head.root_digest) == (0, merkle.EMPTY_ROOT.hex())


def test_a_head_is_signed_at_most_every_ten_seconds(
    database: Database, make: MakeSequencer, signer: LogSigner, clock: FakeClock
) -> None:
    for _ in range(5):
        record_many(database, 1)
        make().run_once()
        clock.advance(3)

    assert signer.count == 2
    assert make().head().size == 5


def test_a_fresh_head_covers_what_is_committed(database: Database, make: MakeSequencer) -> None:
    record_many(database, 1)
    make().run_once()
    record_many(database, 1)

    assert make().head().size == 1
    assert make().head(fresh=True).size == 2


def test_a_head_of_the_same_tree_is_not_signed_again(
    make: MakeSequencer, database: Database, signer: LogSigner, clock: FakeClock
) -> None:
    record_many(database, 1)
    first = make().head(fresh=True)
    clock.advance(1000)

    assert make().head(fresh=True).envelope == first.envelope
    assert signer.count == 1


def test_the_last_head_of_each_hour_is_kept(
    database: Database, make: MakeSequencer, clock: FakeClock
) -> None:
    for _ in range(6):
        record_many(database, 1)
        make().head(fresh=True)
        clock.advance(1200)

    # 03:04, 03:24, 03:44, 04:04, 04:24, 04:44
    assert heads(database) == [3, 6]


def test_two_sequencers_at_once_give_every_place_once(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 3 * BATCH)
    gate = threading.Barrier(2)

    def run() -> int:
        sequencer = make()
        gate.wait(10)
        return sum(sequencer.run_once() for _ in range(20))

    with ThreadPoolExecutor(2) as executor:
        counts = [future.result() for future in [executor.submit(run), executor.submit(run)]]

    assert sum(counts) == 3 * BATCH
    assert len(leaves(database)) == 3 * BATCH


def test_two_coordinators_at_once_sign_the_same_tree(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 40)
    gate = threading.Barrier(2)

    def run() -> bytes:
        sequencer = make()
        gate.wait(10)
        return sequencer.head(fresh=True).root

    with ThreadPoolExecutor(2) as executor:
        roots = [future.result() for future in [executor.submit(run), executor.submit(run)]]

    assert roots == [merkle.root(leaves(database))] * 2


def test_entries_that_are_written_meanwhile_are_not_lost(
    database: Database, make: MakeSequencer
) -> None:
    def write() -> None:
        for number in range(40):
            record_many(database, 5, first=number)

    with ThreadPoolExecutor(4) as executor:
        writers = [executor.submit(write) for _ in range(3)]
        sequencer = make()
        while not all(writer.done() for writer in writers):
            sequencer.run_once()
        for writer in writers:
            writer.result()
    make().head(fresh=True)

    assert len(leaves(database)) == 600


def test_a_lower_id_that_commits_later_gets_a_later_place(
    postgres_url: str, clock: FakeClock, signer: LogSigner
) -> None:
    config = ServerConfig(database_url=postgres_url)
    database = Database(make_engine(config))
    sequencer = AuditSequencer(make_context(config, database, clock, signer))

    def slow(session: Any) -> int:
        audit.record(session, SYSTEM, Event("test.slow", "thing"), START)
        record_many(database, 2)
        return sequencer.run_once()

    assert database.write(slow) == 2
    assert sequencer.run_once() == 1
    with database.read() as session:
        rows = session.execute(select(AuditLog.event_type).order_by(AuditLog.leaf_index))
        assert [row[0] for row in rows] == ["test.happened", "test.happened", "test.slow"]
    database.close()


def test_a_failed_batch_leaves_nothing_behind(
    database: Database, make: MakeSequencer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_many(database, 3)

    def fail(*_arguments: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(audit_tree, "insert_nodes", fail)
        with pytest.raises(RuntimeError):
            make().run_once()

    assert make().run_once() == 3
    assert len(leaves(database)) == 3


def test_a_row_of_another_hand_does_not_stop_the_log(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 3)
    with database.engine.begin() as connection:
        connection.execute(
            text("UPDATE audit_log SET salt = :salt WHERE id = 2"), {"salt": b"short"}
        )

    assert make().run_once() == 2


def test_growing_a_tree_whose_nodes_are_gone_is_refused(
    database: Database, make: MakeSequencer
) -> None:
    record_many(database, 3)
    make().run_once()
    with database.engine.begin() as connection:
        connection.execute(text("DELETE FROM audit_nodes WHERE level = 1"))
    record_many(database, 1)

    with pytest.raises(LookupError):
        make().run_once()


def test_a_head_comes_with_the_proof_that_the_log_has_only_grown(
    database: Database, log: Audit, signer: LogSigner
) -> None:
    record_many(database, 5)
    known = opened(log.head(fresh=True)[0], signer)
    record_many(database, 6)

    envelope, consistency = log.head(5, fresh=True)

    head = opened(envelope, signer)
    assert consistency is not None
    merkle.verify_consistency(
        5, 11, bytes.fromhex(known.root_digest), bytes.fromhex(head.root_digest), consistency.nodes
    )


def test_a_head_without_a_known_one_comes_without_a_proof(database: Database, log: Audit) -> None:
    record_many(database, 5)

    assert log.head(fresh=True)[1] is None


@pytest.mark.parametrize("known_size", [-1, 6])
def test_a_known_size_that_the_log_never_had_is_refused(
    database: Database, log: Audit, known_size: int
) -> None:
    record_many(database, 5)

    with pytest.raises(InvalidRequestError, match="known_size"):
        log.head(known_size)


@pytest.mark.parametrize("place", [0, 6, 12])
def test_an_entry_is_proven_to_be_in_the_tree(
    database: Database, log: Audit, signer: LogSigner, place: int
) -> None:
    record_many(database, 13)

    proof = log.proof(leaf_index=place)

    assert proof.head is not None
    head = opened(proof.head.envelope, signer)
    merkle.verify_inclusion(
        proof.entry.leaf_hash(), place, 13, proof.siblings, bytes.fromhex(head.root_digest)
    )


def test_an_entry_that_has_no_place_yet_gets_one_for_its_proof(
    database: Database, log: Audit
) -> None:
    record_many(database, 2)
    log.head(fresh=True)
    record_many(database, 1)
    with database.read() as session:
        audit_id = session.scalars(select(AuditLog.id).order_by(AuditLog.id.desc())).first()

    assert log.proof(audit_id=audit_id).leaf_index == 2


def test_an_entry_is_proven_in_an_earlier_tree(database: Database, log: Audit) -> None:
    record_many(database, 13)
    log.head(fresh=True)

    proof = log.proof(leaf_index=2, tree_size=7)

    root = merkle.root(leaves(database)[:7])
    merkle.verify_inclusion(proof.entry.leaf_hash(), 2, 7, proof.siblings, root)
    assert proof.head is None


def test_an_entry_that_is_not_there_is_not_found(database: Database, log: Audit) -> None:
    record_many(database, 3)

    with pytest.raises(AuditEntryNotFoundError):
        log.proof(audit_id=99)
    with pytest.raises(AuditEntryNotFoundError):
        log.proof(leaf_index=2, tree_size=2)


def test_a_tree_that_is_not_there_yet_is_refused(database: Database, log: Audit) -> None:
    record_many(database, 3)

    with pytest.raises(InvalidRequestError, match="tree_size"):
        log.proof(leaf_index=0, tree_size=4)


def test_a_proof_takes_one_query_for_its_nodes(database: Database, log: Audit) -> None:
    record_many(database, 100)
    log.head(fresh=True)
    queries: list[str] = []

    def note(*arguments: Any) -> None:
        queries.append(arguments[2])

    event.listen(database.engine, "before_cursor_execute", note)
    with database.read() as session:
        audit_tree.prove(session, lambda node: merkle.inclusion_proof(node, 17, 100))

    assert len([query for query in queries if query.startswith("SELECT")]) == 1


def test_heads_are_written_to_the_witness_file(
    server_config: ServerConfig,
    database: Database,
    clock: FakeClock,
    signer: LogSigner,
    tmp_path: Path,
) -> None:
    path = tmp_path / "witness.txt"
    config = dataclasses.replace(server_config, witness_file=path)
    sequencer = AuditSequencer(make_context(config, database, clock, signer))
    for _ in range(2):
        record_many(database, 3)
        sequencer.head(fresh=True)

    assert [opened(envelope, signer).size for envelope in witness.read(path)] == [3, 6]
    assert [line.split()[:2] for line in path.read_text().splitlines()] == [
        ["qflare/audit", "3"],
        ["qflare/audit", "6"],
    ]


def test_a_witness_file_that_cannot_be_written_does_not_stop_the_log(
    server_config: ServerConfig,
    database: Database,
    clock: FakeClock,
    signer: LogSigner,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(server_config, witness_file=tmp_path / "absent" / "witness.txt")
    record_many(database, 3)

    assert AuditSequencer(make_context(config, database, clock, signer)).head(fresh=True).size == 3


def test_origin_names_the_realm() -> None:
    assert trees.origin_of("hospital-net") == "hospital-net/audit"


@pytest.mark.parametrize("sign", [lambda it: it.run_once(), lambda it: it.head()])
def test_a_head_whose_key_has_left_the_keyset_gives_way_to_a_new_one_at_once(
    database: Database,
    make: MakeSequencer,
    signer: LogSigner,
    sign: Callable[[AuditSequencer], Any],
) -> None:
    sequencer = make()
    record_many(database, 1)
    earlier = sequencer.head(fresh=True)

    record_many(database, 1)  # that of the keyset
    signer.replace_key()
    sign(sequencer)

    assert not signer.accepts(security_pb2.KEY_ROLE_LOG, earlier.envelope)
    assert opened(sequencer.head().envelope, signer).size == 2
    assert heads(database) == [2]
