"""Payload store `database`: chunks as rows.

On PostgreSQL they are written and read by binary COPY. On SQLite they are in a database file of their own with large
pages, so that a large upload is not written twice, through a write-ahead log, and does not delay small commits.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from sqlalchemy import (
    Connection,
    Delete,
    Dialect,
    Engine,
    LargeBinary,
    bindparam,
    create_engine,
    delete,
    event,
    exc,
    func,
    insert,
    select,
    type_coerce,
)
from sqlalchemy.pool import StaticPool

from qflare.tensors import BytesLike
from qflare_server.errors import StorageDamagedError
from qflare_server.storage.engine import make_private_file
from qflare_server.storage.error_translation import domain_errors
from qflare_server.storage.file_identity import FileIdentity
from qflare_server.storage.payload_store.interface import DATABASE, require_chunks
from qflare_server.storage.prepared import sqlalchemy_error
from qflare_server.storage.tables import PayloadChunk

CHUNKS = PayloadChunk.__table__
COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER: Final = struct.pack(">h", -1)
_ROW: Final = struct.Struct(">hi")  # number of columns, size of the first
_RANGE: Final = (  # built once: a cohort of a hundred updates is read in thousands of ranges
    select(type_coerce(CHUNKS.c.data, LargeBinary))
    .where(
        CHUNKS.c.payload_id == bindparam("payload"),
        CHUNKS.c.chunk_index >= bindparam("first"),
        CHUNKS.c.chunk_index < bindparam("end"),
    )
    .order_by(CHUNKS.c.chunk_index)
)


Method = TypeVar("Method", bound=Callable[..., Any])


def _noticing_damage(method: Method) -> Method:
    """Translate a method's errors; record damage of the file, which `check` reports from then on."""

    @wraps(method)
    def guarded(self: "PayloadFile", *arguments: Any) -> Any:
        try:
            with domain_errors():
                return method(self, *arguments)
        except StorageDamagedError as error:
            self.damage = error
            raise

    return cast("Method", guarded)


class PayloadFile:
    """Payload store in an SQLite file of its own; thread-safe.

    It has one connection and one lock: reads and writes are batches of a few milliseconds, and waiting for a lock is
    fairer than SQLite's sleeping retries. The rollback journal writes a new page once; a write-ahead log would write it
    twice.
    """

    name: Final = DATABASE
    batch_bytes: Final = 0
    read_chunks: Final = 4

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        self._lock = threading.Lock()
        self.damage: StorageDamagedError | None = None
        make_private_file(path)
        self._engine = create_engine(
            f"sqlite:///{path}",
            poolclass=StaticPool,
            connect_args={"timeout": timeout_s, "check_same_thread": False},
        )
        event.listen(self._engine, "connect", _configure_payload_file)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        with self._lock, self._engine.begin() as connection:
            CHUNKS.create(connection, checkfirst=True)
        self._file = FileIdentity(path)

    def identity(self) -> str:
        """Return the empty text: the chunks belong to the rows."""
        return ""

    def adopt(self, identity: str) -> None:
        """Do nothing: the chunks belong to the rows."""

    def owner(self) -> str:
        """Return the empty text: the chunks belong to the rows."""
        return ""

    def replace_owner(self, before: str, after: str) -> None:
        """Do nothing: the chunks belong to the rows."""

    @_noticing_damage
    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        """Write consecutive chunks durably in one transaction."""
        rows = [
            {"payload_id": payload_id, "chunk_index": index, "data": chunk}
            for index, chunk in enumerate(chunks, first_index)
        ]
        with self._lock, self._engine.begin() as connection:
            connection.execute(insert(CHUNKS).prefix_with("OR REPLACE"), rows)
        self._file.require()

    @_noticing_damage
    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order."""
        with self._lock, self._engine.connect() as connection:
            bounds = {"payload": payload_id, "first": first_index, "end": first_index + count}
            return list(connection.scalars(_RANGE, bounds))

    def forget(self, payload_id: str) -> None:
        """Do nothing: there is no cache."""

    @_noticing_damage
    def stored_count(self, payload_id: str) -> int:
        """Return the number of consecutive chunks from the first."""
        with self._lock, self._engine.connect() as connection:
            return _stored_count(connection, payload_id)

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Check that all chunks are stored."""
        require_chunks(self.stored_count(payload_id), size_bytes)

    @_noticing_damage
    def truncate(self, payload_id: str, count: int) -> None:
        """Delete the chunks from number `count` on."""
        with self._lock, self._engine.begin() as connection:
            connection.execute(_delete_from(payload_id, count))

    @_noticing_damage
    def payload_ids(self) -> list[str]:
        """Return the ids of all payloads that have chunks."""
        with self._lock, self._engine.connect() as connection:
            return list(connection.scalars(select(CHUNKS.c.payload_id).distinct()))

    @_noticing_damage
    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete all chunks of payloads, one payload per transaction."""
        for payload_id in payload_ids:
            with self._lock, self._engine.begin() as connection:
                connection.execute(delete(CHUNKS).where(CHUNKS.c.payload_id == payload_id))

    @_noticing_damage
    def size_bytes(self) -> int:
        """Return the size of the file."""
        with self._lock, self._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            return int(pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one())

    def check(self) -> None:
        """Check that the file still exists and that no damaged page was read.

        Raises:
            StorageDamagedError: A page has been unreadable since the process started.
            StoreUnavailableError: The file was deleted or replaced.
        """
        if self.damage is not None:
            raise self.damage
        self._file.require()

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


def _configure_payload_file(connection: Any, _entry: object) -> None:
    connection.isolation_level = None
    for pragma in (
        "page_size=65536",  # must be set before the first table is created
        "journal_mode=TRUNCATE",
        "synchronous=FULL",
        "cache_size=-8192",
    ):
        connection.execute(f"PRAGMA {pragma}")


class PayloadTable:
    """Payload store in the table `payload_chunks` of a PostgreSQL database, written and read by binary COPY."""

    name: Final = DATABASE
    batch_bytes: Final = 0
    read_chunks: Final = 4

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def identity(self) -> str:
        """Return the empty text: the chunks belong to the rows."""
        return ""

    def adopt(self, identity: str) -> None:
        """Do nothing: the chunks belong to the rows."""

    def owner(self) -> str:
        """Return the empty text: the chunks belong to the rows."""
        return ""

    def replace_owner(self, before: str, after: str) -> None:
        """Do nothing: the chunks belong to the rows."""

    @domain_errors()
    def append(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        """Write consecutive chunks durably in one transaction.

        The commit waits for the disk (`storage.postgresql`). Otherwise a crash of the server could lose chunks that an
        update's receipt, given later, vouches for.
        """
        try:
            self._copy(payload_id, first_index, chunks)
        except exc.IntegrityError:  # some exist already
            self._copy(payload_id, first_index, chunks, replacing=True)

    def _copy(
        self,
        payload_id: str,
        first_index: int,
        chunks: Sequence[BytesLike],
        *,
        replacing: bool = False,
    ) -> None:
        with self._engine.begin() as connection:
            if replacing:
                last = first_index + len(chunks) - 1
                connection.execute(
                    delete(CHUNKS).where(
                        CHUNKS.c.payload_id == payload_id,
                        CHUNKS.c.chunk_index.between(first_index, last),
                    )
                )
            with _cursor(connection) as cursor:
                _run_copy(
                    cursor,
                    "COPY payload_chunks (payload_id, chunk_index, data) FROM STDIN (FORMAT binary)",
                    _CopySource(payload_id, first_index, chunks),
                    connection.dialect,
                )

    @domain_errors()
    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        """Return up to `count` chunks in order."""
        target = _CopyTarget()
        with self._engine.connect() as connection, _cursor(connection) as cursor:
            query = cursor.mogrify(
                "COPY (SELECT data FROM payload_chunks WHERE payload_id = %s AND chunk_index >= %s"
                " AND chunk_index < %s ORDER BY chunk_index) TO STDOUT (FORMAT binary)",
                (payload_id, first_index, first_index + count),
            )
            _run_copy(cursor, query, target, connection.dialect)
        return target.values

    def forget(self, payload_id: str) -> None:
        """Do nothing: there is no cache."""

    @domain_errors()
    def stored_count(self, payload_id: str) -> int:
        """Return the number of consecutive chunks from the first."""
        with self._engine.connect() as connection:
            return _stored_count(connection, payload_id)

    def complete(self, payload_id: str, size_bytes: int) -> None:
        """Check that all chunks are stored."""
        require_chunks(self.stored_count(payload_id), size_bytes)

    @domain_errors()
    def truncate(self, payload_id: str, count: int) -> None:
        """Delete the chunks from number `count` on."""
        with self._engine.begin() as connection:
            connection.execute(_delete_from(payload_id, count))

    @domain_errors()
    def payload_ids(self) -> list[str]:
        """Return the ids of all payloads that have chunks."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(CHUNKS.c.payload_id).distinct()))

    @domain_errors()
    def delete(self, payload_ids: Sequence[str]) -> None:
        """Delete all chunks of payloads, one payload per transaction."""
        for payload_id in payload_ids:
            with self._engine.begin() as connection:
                connection.execute(delete(CHUNKS).where(CHUNKS.c.payload_id == payload_id))

    @domain_errors()
    def size_bytes(self) -> int:
        """Return the size of the table with its indexes and TOAST data."""
        with self._engine.connect() as connection:
            size = func.pg_total_relation_size(CHUNKS.name)
            return int(connection.execute(select(size)).scalar_one())

    def check(self) -> None:
        """Do nothing: `Database.check` checks the database."""

    def close(self) -> None:
        """Do nothing: the engine belongs to `Database`."""


def _delete_from(payload_id: str, count: int) -> Delete:
    return delete(CHUNKS).where(CHUNKS.c.payload_id == payload_id, CHUNKS.c.chunk_index >= count)


def _run_copy(cursor: Any, query: Any, file: Any, dialect: Dialect) -> None:
    try:
        cursor.copy_expert(query, file, size=2**20)
    except Exception as error:
        raise sqlalchemy_error(dialect, "COPY payload_chunks", error) from error


def _cursor(connection: Connection) -> Any:
    return cast("Any", connection.connection).cursor()


def _stored_count(connection: Connection, payload_id: str) -> int:
    """Return the index of the first missing chunk."""
    mine = CHUNKS.c.payload_id == payload_id
    count, last = connection.execute(
        select(func.count(), func.max(CHUNKS.c.chunk_index)).where(mine)
    ).one()
    if count == 0 or last == count - 1:
        return int(count)
    indices = select(CHUNKS.c.chunk_index).where(mine).order_by(CHUNKS.c.chunk_index)
    for wanted, index in enumerate(connection.scalars(indices)):
        if index != wanted:
            return wanted
    return int(count)


class _CopySource:
    """File-like source of chunk rows in PostgreSQL's binary COPY format (documentation of COPY, Binary Format)."""

    def __init__(self, payload_id: str, first_index: int, chunks: Sequence[BytesLike]) -> None:
        self._parts = self._iterate(payload_id.encode(), first_index, chunks)
        self._rest = memoryview(b"")

    @staticmethod
    def _iterate(
        payload_id: bytes, first_index: int, chunks: Sequence[BytesLike]
    ) -> Iterator[BytesLike]:
        yield COPY_HEADER
        for index, chunk in enumerate(chunks, first_index):
            yield (
                struct.pack(">hi", 3, len(payload_id))
                + payload_id
                + struct.pack(">iii", 4, index, len(chunk))
            )
            yield chunk
        yield COPY_TRAILER

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; empty at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._parts, b""))
        piece = self._rest[:size]
        self._rest = self._rest[size:]
        return bytes(piece)


class _CopyTarget:
    """File-like target of a binary COPY of one column, bytea, as PostgreSQL sends it: each row in a piece of its own.

    Attributes:
        values: The column's values so far.
    """

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self._rest = bytearray()
        self._is_begun = False

    def write(self, piece: bytes) -> int:
        """Take the next bytes of the copy; a row that is cut or joined with others is copied once more."""
        if not self._rest and self._is_begun and _row_bytes(piece) == len(piece):
            self.values.append(piece[_ROW.size :])
        else:
            self._rest += piece
            self._take_rest()
        return len(piece)

    def _take_rest(self) -> None:
        if not self._is_begun and len(self._rest) >= len(COPY_HEADER):
            del self._rest[: len(COPY_HEADER)]
            self._is_begun = True
        while self._is_begun and 0 < (size := _row_bytes(self._rest)) <= len(self._rest):
            self.values.append(bytes(memoryview(self._rest)[_ROW.size : size]))
            del self._rest[:size]


def _row_bytes(data: bytes | bytearray) -> int:
    """Return the size of the row that begins here, 0 where none is known to."""
    if len(data) < _ROW.size:
        return 0
    count, length = _ROW.unpack_from(data)
    return _ROW.size + length if count == 1 and length >= 0 else 0
