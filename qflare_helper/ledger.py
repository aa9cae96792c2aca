"""Ledger of a helper: every answer that it gave, and what must not be used again.

One SQLite file. An answer, the ids of its updates, the hashes of their seeds and the devices of the round are written
in one transaction, synchronized to disk, before the answer is sent: after a crash at any time, a set that was answered
is known to be. Answers are numbered without gaps, and each names the digest of the one before.

The noise of an answer is written with it, because the same set must get the same sum. It is deleted with the next
answer for a later round of the training session: no coordinator repeats a request for a round after the next one.

Thread-safe: each call opens its own connection, or uses the one that its thread holds; writers take turns.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qflare.evidence.statements import digest_of
from qflare.v1 import security_pb2
from qflare_helper.errors import OverlapError, StoreError

FILE: Final = "ledger.db"
TIMEOUT_S: Final = 30.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS answers (
    counter INTEGER PRIMARY KEY,
    training_session_id TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    task_digest TEXT NOT NULL,
    members_digest TEXT NOT NULL,
    envelope BLOB NOT NULL,
    UNIQUE (training_session_id, round_number, task_digest, members_digest)
) STRICT;
CREATE TABLE IF NOT EXISTS members (
    update_id TEXT PRIMARY KEY,
    training_session_id TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    device_id TEXT NOT NULL,
    seed_hash BLOB NOT NULL UNIQUE,
    counter INTEGER NOT NULL REFERENCES answers (counter),
    UNIQUE (training_session_id, round_number, device_id)
) STRICT;
CREATE TABLE IF NOT EXISTS noise (
    counter INTEGER NOT NULL REFERENCES answers (counter),
    chunk INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (counter, chunk)
) STRICT;
CREATE TABLE IF NOT EXISTS keysets (version INTEGER PRIMARY KEY, digest TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class AnsweredSet:
    """Names a set of updates.

    Attributes:
        training_session_id: Training session.
        round_number: Round.
        task_digest: Digest of the round's task.
        members_digest: Merkle root over the updates.
    """

    training_session_id: str
    round_number: int
    task_digest: str
    members_digest: str


@dataclass(frozen=True)
class LedgerMember:
    """One update of a set.

    Attributes:
        update_id: Id of the update.
        device_id: Its device.
        seed_hash: Hash of its seed, 32 bytes.
    """

    update_id: str
    device_id: str
    seed_hash: bytes


SignAnswer = Callable[[int, str], security_pb2.SignedEnvelope]
"""`sign(counter, previous_digest)` signs an answer."""


class Ledger:
    """The ledger in a folder; created if there is none.

    Raises:
        StoreError: It cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._held = threading.local()
        with self._connection() as connection:
            connection.executescript(_SCHEMA)
        self._path.chmod(0o600)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the calls of this thread within the block share a connection, which saves a millisecond for each.

        The first call opens it: a block that makes none costs nothing.
        """
        with ExitStack() as stack:
            self._held.stack, self._held.connection = stack, None
            try:
                yield
            finally:
                self._held.stack = self._held.connection = None

    def find(self, wanted: AnsweredSet) -> security_pb2.SignedEnvelope | None:
        """Return the answer to a set; None if it was not answered."""
        with self._connection() as connection:
            return _find(connection, wanted)

    def latest(self) -> security_pb2.SignedEnvelope | None:
        """Return the answer with the highest counter; None before the first."""
        with self._connection() as connection:
            return _latest(connection)

    def counter(self) -> int:
        """Return the highest counter; 0 before the first answer."""
        with self._connection() as connection:
            return _counter(connection)

    def noise(self, wanted: AnsweredSet, index: int) -> bytes | None:
        """Return a chunk of the noise of an answer; None if it has none, or none any more."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT data FROM noise JOIN answers USING (counter) WHERE training_session_id = ?"
                " AND round_number = ? AND task_digest = ? AND members_digest = ? AND chunk = ?",
                (*_key(wanted), index),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def record(
        self,
        wanted: AnsweredSet,
        members: Sequence[LedgerMember],
        sign: SignAnswer,
        noise: Iterable[bytes] = (),
    ) -> security_pb2.SignedEnvelope:
        """Record a set and return its answer: a new one, or the one that was given before.

        Args:
            wanted: The set.
            members: Its updates.
            sign: Signs the answer.
            noise: Chunks of the noise in the answer.

        Raises:
            OverlapError: An update, a seed or a device of the round is in another set.
        """
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            known = _find(connection, wanted)
            if known is not None:
                connection.rollback()
                return known
            latest, counter = _latest(connection), _counter(connection) + 1
            envelope = sign(counter, "" if latest is None else digest_of(latest.payload))
            connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (counter, *_key(wanted), envelope.SerializeToString()),
            )
            self._insert_members(connection, wanted, members, counter)
            connection.execute(
                "DELETE FROM noise WHERE counter IN (SELECT counter FROM answers"
                " WHERE training_session_id = ? AND round_number < ?)",
                (wanted.training_session_id, wanted.round_number),
            )
            connection.executemany(
                "INSERT INTO noise VALUES (?, ?, ?)",
                ((counter, index, data) for index, data in enumerate(noise)),
            )
            connection.commit()
        return envelope

    def _insert_members(
        self,
        connection: sqlite3.Connection,
        wanted: AnsweredSet,
        members: Sequence[LedgerMember],
        counter: int,
    ) -> None:
        place = (wanted.training_session_id, wanted.round_number)
        rows = [(m.update_id, *place, m.device_id, m.seed_hash, counter) for m in members]
        try:
            connection.executemany("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.IntegrityError as error:
            connection.rollback()
            raise OverlapError(
                "an update, or another one of its device in the round, is in a set that was answered before"
            ) from error

    def used_seeds(self, members: Sequence[LedgerMember]) -> list[str]:
        """Return the ids of updates whose seed masked another update before."""
        used = []
        with self._connection() as connection:
            for member in members:
                row = connection.execute(
                    "SELECT update_id FROM members WHERE seed_hash = ?", (member.seed_hash,)
                ).fetchone()
                if row is not None and row[0] != member.update_id:
                    used.append(member.update_id)
        return used

    def require_keyset(self, version: int, digest: str) -> bool:
        """Record a verified keyset; return False if it is older than one seen before, or another of its version."""
        with self._connection() as connection:
            if _newest_keyset(connection) == (version, digest):
                return True
            connection.execute("BEGIN IMMEDIATE")
            newest = _newest_keyset(connection)
            if newest is not None and newest != (version, digest) and version <= newest[0]:
                return False
            connection.execute("INSERT OR IGNORE INTO keysets VALUES (?, ?)", (version, digest))
            connection.commit()
        return True

    def answers(self) -> Iterator[tuple[int, security_pb2.SignedEnvelope, int]]:
        """Yield counter, signed answer and number of recorded updates of each answer, in order."""
        after = 0
        while True:
            with self._connection() as connection:
                row = connection.execute(
                    "SELECT counter, envelope, (SELECT count(*) FROM members WHERE members.counter = answers.counter)"
                    " FROM answers WHERE counter > ? ORDER BY counter LIMIT 1",
                    (after,),
                ).fetchone()
            if row is None:
                return
            after = row[0]
            yield after, security_pb2.SignedEnvelope.FromString(row[1]), row[2]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Give the connection that this thread holds, or a new one; what is not committed in the block is undone."""
        stack: ExitStack | None = getattr(self._held, "stack", None)
        if stack is None:
            with self._opened() as opened:
                yield opened
            return
        held = self._held.connection
        if held is None:
            held = self._held.connection = stack.enter_context(self._opened())
        try:
            yield held
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        finally:
            held.rollback()

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._path, timeout=TIMEOUT_S, isolation_level=None)
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            yield connection
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        finally:
            connection.close()


def _key(wanted: AnsweredSet) -> tuple[str, int, str, str]:
    return (
        wanted.training_session_id,
        wanted.round_number,
        wanted.task_digest,
        wanted.members_digest,
    )


def _find(
    connection: sqlite3.Connection, wanted: AnsweredSet
) -> security_pb2.SignedEnvelope | None:
    row = connection.execute(
        "SELECT envelope FROM answers WHERE training_session_id = ? AND round_number = ?"
        " AND task_digest = ? AND members_digest = ?",
        _key(wanted),
    ).fetchone()
    return None if row is None else security_pb2.SignedEnvelope.FromString(row[0])


def _latest(connection: sqlite3.Connection) -> security_pb2.SignedEnvelope | None:
    row = connection.execute(
        "SELECT envelope FROM answers ORDER BY counter DESC LIMIT 1"
    ).fetchone()
    return None if row is None else security_pb2.SignedEnvelope.FromString(row[0])


def _newest_keyset(connection: sqlite3.Connection) -> tuple[int, str] | None:
    row = connection.execute(
        "SELECT version, digest FROM keysets ORDER BY version DESC LIMIT 1"
    ).fetchone()
    return None if row is None else (row[0], row[1])


def _counter(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(counter), 0) FROM answers").fetchone()[0])
