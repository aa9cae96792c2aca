"""The ledger of a helper: connections that a thread holds over several calls."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qflare.v1 import security_pb2
from qflare_helper.errors import OverlapError, StoreError
from qflare_helper.ledger import FILE, AnsweredSet, Ledger, LedgerMember

MEMBER = LedgerMember("update", "device", b"s" * 32)


def sign(counter: int, previous_digest: str) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope(payload=f"{counter}{previous_digest}".encode())


def wanted(round_number: int) -> AnsweredSet:
    return AnsweredSet("session", round_number, "task", "members")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Return the connections that were opened to the ledger of the test."""
    found: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def note(path: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, *arguments, **options)
        if path == tmp_path / FILE:
            found.append(connection)
        return connection

    monkeypatch.setattr("qflare_helper.ledger.sqlite3.connect", note)
    return found


def test_calls_of_a_thread_share_the_connection_that_it_holds(
    tmp_path: Path, opened: list[sqlite3.Connection]
) -> None:
    ledger = Ledger(tmp_path)
    opened.clear()
    with ledger.held():
        pass
    assert opened == []
    with ThreadPoolExecutor(1) as other, ledger.held():
        assert ledger.used_seeds([MEMBER]) == []
        envelope = ledger.record(wanted(1), [MEMBER], sign)
        assert ledger.latest() == envelope
        assert len(opened) == 1
        assert other.submit(ledger.counter).result() == 1
        assert len(opened) == 2
    assert ledger.counter() == 1
    assert len(opened) == 3


def test_a_call_that_fails_leaves_nothing_open_on_the_held_connection(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.require_keyset(2, "b")
    with ThreadPoolExecutor(1) as other, ledger.held():
        assert not ledger.require_keyset(1, "a")
        other.submit(ledger.record, wanted(1), [MEMBER], sign).result()
        with pytest.raises(OverlapError):
            ledger.record(wanted(2), [MEMBER], sign)
        assert other.submit(ledger.require_keyset, 3, "c").result()
        assert ledger.counter() == 1


def test_a_known_keyset_is_not_written_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.require_keyset(2, "b")
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("BEGIN IMMEDIATE")  # nobody else can write
        assert ledger.require_keyset(2, "b")
        other.rollback()
    assert not ledger.require_keyset(2, "other")
    assert not ledger.require_keyset(1, "b")
    assert ledger.require_keyset(3, "c")
    assert not ledger.require_keyset(2, "b")


def test_errors_of_a_held_connection_are_errors_of_the_store(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.held():
        with sqlite3.connect(tmp_path / FILE) as other:
            other.execute("DROP TABLE noise")
            other.execute("DROP TABLE members")
        with pytest.raises(StoreError):
            ledger.used_seeds([MEMBER])
        assert ledger.counter() == 0
