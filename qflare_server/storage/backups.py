"""Backups: a consistent copy of the database, its payloads and the keys, taken while coordinators serve.

::

    backup.json               what the backup holds: schema, program, and size and SHA-256 of every file
    database/qflare.db        rows of an SQLite database
    database/qflare.payloads  large payloads of the store `database` beside an SQLite database
    payloads/                 large payloads of the store `files`
    database/qflare.dump      a PostgreSQL database, in the custom format of pg_dump
    keys/                     the key folder

A backup appears under its name when it is complete. The rows are one snapshot. Chunks of payloads never change, so they
are copied after the snapshot that refers to them; if retention deletes some during the copy, a new snapshot is taken.
Payloads of the store `object` are not copied: a bucket is copied with the tools of its provider, after the backup.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import psycopg2.extensions
from sqlalchemy import Connection, Engine, NullPool, create_engine, inspect, text

import qflare
from qflare.files import make_private_folder, new_file, synchronize_folder
from qflare.tensors import CHUNK_BYTES
from qflare_server.config import ServerConfig
from qflare_server.errors import StorageDamagedError
from qflare_server.storage.engine import make_engine, normalize_url
from qflare_server.storage.payload_store import (
    DATABASE,
    FILES,
    MARKER,
    READ_CHUNKS,
    PayloadFile,
    PayloadFolder,
    PayloadStore,
)
from qflare_server.storage.schema import current_revision, is_empty, require_known

FORMAT: Final = 1
MANIFEST: Final = "backup.json"
ROWS: Final = "database/qflare.db"
PAYLOADS: Final = "database/qflare.payloads"
FOLDER: Final = "payloads"
DUMP: Final = "database/qflare.dump"
KEYS: Final = "keys"
LOGS: Final = ("-wal", "-shm", "-journal")
SNAPSHOT_ATTEMPTS: Final = 10
COORDINATOR: Final = "--data-dir, QFLARE_DATABASE_URL and QFLARE_KEY_DIR of the coordinator"


class BackupError(Exception):
    """A backup cannot be taken or restored. Never sent to a client.

    Args:
        cause: What is wrong.
        remedy: What to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause, self.remedy = cause, remedy


@dataclass(frozen=True)
class StoredFile:
    """One file of a backup."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of `backup.json`.

    Attributes:
        created_at: Time of the snapshot, ISO 8601 in UTC.
        program: Version of the program that took the backup.
        dialect: `sqlite` or `postgresql`.
        schema: Revision of the database's schema.
        files: Every other file, by its path relative to the backup.
    """

    created_at: str
    program: str
    dialect: str
    schema: str
    files: Mapping[str, StoredFile]

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files.values())

    def to_json(self) -> str:
        """Return the text of `backup.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `backup.json`.

        Raises:
            BackupError: The folder is no backup, or one of a later program.
        """
        try:
            fields = json.loads((folder / MANIFEST).read_bytes())
            number = fields.pop("format")
            if number != FORMAT:
                raise BackupError(
                    f"{folder} has format {number} of backups, this program reads {FORMAT}",
                    "pip install --upgrade 'qflare[server]'",
                )
            files = {path: StoredFile(**file) for path, file in fields.pop("files").items()}
            return cls(files=files, **fields)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BackupError(
                f"{folder} is no backup: it has no {MANIFEST}",
                "a folder that qflare-server backup wrote",
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BackupError(f"{folder / MANIFEST} is damaged", "another backup") from error


def back_up(config: ServerConfig, key_folder: Path, target: Path) -> Manifest:
    """Take a backup.

    Args:
        config: Names the database.
        key_folder: Folder of the coordinator's keys.
        target: Folder that is created for the backup.

    Raises:
        BackupError: The target exists, or there is no database, or no keys.
        StorageDamagedError: The database refers to payloads that it lacks.
        OSError: The backup cannot be written.
    """
    if target.exists():
        raise BackupError(f"{target} exists already", "a folder that does not exist yet")
    make_private_folder(target.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        make_private_folder(made / "database")
        manifest = _fill(config, key_folder, made)
        with new_file(made / MANIFEST) as file:
            file.write(manifest.to_json().encode())
        made.rename(target)
        synchronize_folder(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def _fill(config: ServerConfig, key_folder: Path, made: Path) -> Manifest:
    _require_database(config)
    with _engine(config) as engine:
        schema = current_revision(engine)
        if schema is None:
            raise BackupError("the database has no schema", COORDINATOR)
        for _attempt in range(SNAPSHOT_ATTEMPTS):
            keys = _contents(key_folder)
            at = datetime.now(UTC)
            _copy_database(config, engine, made)
            if keys == _contents(key_folder):
                break
        else:
            raise BackupError("the keys changed again and again", "the same command again")
    _write_keys(keys, made / KEYS)
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    files = {str(path.relative_to(made)): _describe(path) for path in paths}
    return Manifest(at.isoformat(), qflare.__version__, engine.dialect.name, schema, files)


@contextmanager
def _engine(config: ServerConfig) -> Iterator[Engine]:
    engine = make_engine(config)
    try:
        yield engine
    finally:
        engine.dispose()


def _require_database(config: ServerConfig) -> None:
    """Refuse an SQLite database that does not exist: connecting would create it."""
    url = normalize_url(config.database_url)
    file = Path(url.database or "")
    if url.get_backend_name() == "sqlite" and (not file.exists() or file.stat().st_size == 0):
        raise BackupError(f"there is no database in {file}", COORDINATOR)


def _contents(key_folder: Path) -> dict[str, bytes]:
    """Return the files of a key folder; names with a leading dot are temporary, or belong to a mounted secret."""
    if not key_folder.is_dir():
        raise BackupError(f"there are no keys in {key_folder}", COORDINATOR)
    visible = (path for path in sorted(key_folder.iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in visible if path.is_file()}


def _write_keys(files: Mapping[str, bytes], folder: Path) -> None:
    make_private_folder(folder)
    for name, data in files.items():
        with new_file(folder / name) as file:
            file.write(data)


def _describe(path: Path) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return StoredFile(path.stat().st_size, digest)


def _copy_database(config: ServerConfig, engine: Engine, made: Path) -> None:
    """Copy a snapshot of the rows, and the payloads in local stores that it refers to."""
    is_sqlite = engine.dialect.name == "sqlite"
    with _local_stores(config, engine, made) as stores:
        missing = ""
        for _attempt in range(SNAPSHOT_ATTEMPTS):
            if is_sqlite:
                references = _copy_rows(
                    Path(engine.url.database or ""), made / ROWS, config.database_timeout_s
                )
            else:
                references = _dump(engine, made / DUMP)
            _require_stores(config, engine, references, stores)
            missing = _copy_payloads(references, stores)
            if not missing:
                break
        else:
            raise StorageDamagedError(f"payload {missing} lacks chunks")
    Path(f"{made / PAYLOADS}-journal").unlink(missing_ok=True)


class _Copied(NamedTuple):
    """A payload store and its copy."""

    original: PayloadStore
    copy: PayloadStore


@contextmanager
def _local_stores(
    config: ServerConfig, engine: Engine, made: Path
) -> Iterator[Mapping[str, _Copied]]:
    """Open the payload stores on this machine's disks, and an empty copy of each."""
    stores: dict[str, _Copied] = {}
    if engine.dialect.name == "sqlite":
        file = Path(engine.url.database or "").with_suffix(".payloads")
        timeout_s = config.database_timeout_s
        if file.exists():
            stores[DATABASE] = _Copied(
                PayloadFile(file, timeout_s=timeout_s),
                PayloadFile(made / PAYLOADS, timeout_s=timeout_s),
            )
    folder = config.payload_folder
    if folder.is_dir():
        make_private_folder(made / FOLDER)
        _put(folder / MARKER, made / FOLDER / MARKER)
        stores[FILES] = _Copied(PayloadFolder(folder), PayloadFolder(made / FOLDER))
    try:
        yield stores
    finally:
        for store in stores.values():
            store.original.close()
            store.copy.close()


def _require_stores(
    config: ServerConfig,
    engine: Engine,
    references: Sequence["_Reference"],
    stores: Mapping[str, _Copied],
) -> None:
    """Refuse to back up rows whose payloads should be on a disk of this machine, but are not there."""
    local = {FILES: config.payload_folder}
    if engine.dialect.name == "sqlite":
        local[DATABASE] = Path(engine.url.database or "").with_suffix(".payloads")
    for name in {each.store for each in references if each.size_bytes is not None} - set(stores):
        if name in local:
            remedy = "qflare-server restore, of the latest backup"
            raise BackupError(f"{local[name]} is missing", remedy)


class _Reference(NamedTuple):
    """Chunks that a snapshot refers to.

    Attributes:
        payload_id: Payload.
        store: Payload store.
        size_bytes: Size of a payload; None for chunks of an unfinished upload.
    """

    payload_id: str
    store: str
    size_bytes: int | None


def _references(connection: Connection) -> list[_Reference]:
    """Return the chunks that the rows refer to; in a schema before payload stores, all are rows."""
    columns = {column["name"] for column in inspect(connection).get_columns("payloads")}
    store, chunks_id = ("store", "chunks_id") if "store" in columns else (f"'{DATABASE}'", "id")
    whole = f"SELECT {chunks_id}, {store}, size_bytes FROM payloads WHERE location = 'store'"  # noqa: S608
    unfinished = f"SELECT payload_id, {store}, NULL FROM uploads"  # noqa: S608
    return [
        _Reference(*row) for query in (whole, unfinished) for row in connection.execute(text(query))
    ]


def _copy_rows(source: Path, target: Path, timeout_s: float) -> list[_Reference]:
    """Write one snapshot of a database into one file, without a write-ahead log; return what it refers to."""
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    with (
        closing(sqlite3.connect(source, timeout=timeout_s)) as reader,
        closing(sqlite3.connect(target)) as writer,
    ):
        reader.backup(writer)  # all pages in one step: one snapshot
        writer.execute("PRAGMA journal_mode=DELETE")
    engine = create_engine(f"sqlite:///{target}", poolclass=NullPool)
    with engine.begin() as connection:
        _forget_owners(connection)
        return _references(connection)


def _forget_owners(connection: Connection) -> None:
    """Let restored rows own no folder or bucket that is still in use (`storage.place_ownership`)."""
    tables = inspect(connection)
    columns = tables.get_columns("payload_places") if tables.has_table("payload_places") else []
    if "owner" in {column["name"] for column in columns}:
        connection.execute(text("UPDATE payload_places SET owner = NULL, next_owner = NULL"))


def _copy_payloads(references: Sequence[_Reference], stores: Mapping[str, _Copied]) -> str:
    """Copy the chunks that a snapshot refers to; return the id of a payload that lacks some, empty if none does."""
    wanted = {(each.store, each.payload_id) for each in references if each.size_bytes is not None}
    for name, (_, copy) in stores.items():
        copy.delete([each for each in copy.payload_ids() if (name, each) not in wanted])
    for reference in references:
        if reference.store not in stores:
            continue
        count = _copy_payload(reference.payload_id, *stores[reference.store])
        if reference.size_bytes is None:
            continue
        if count < -(-reference.size_bytes // CHUNK_BYTES):
            return reference.payload_id
        stores[reference.store].copy.complete(reference.payload_id, reference.size_bytes)
    return ""


def _copy_payload(payload_id: str, original: PayloadStore, copy: PayloadStore) -> int:
    """Copy the chunks of a payload that are not copied yet; return how many the copy has."""
    count = copy.stored_count(payload_id)
    while chunks := original.read(payload_id, count, READ_CHUNKS):
        copy.append(payload_id, count, chunks)
        count += len(chunks)
    return count


def _dump(engine: Engine, target: Path) -> list[_Reference]:
    """Write a snapshot of a PostgreSQL database's schema with pg_dump; return the chunks outside that it refers to."""
    target.unlink(missing_ok=True)
    options = ("--format=custom", "--no-owner", "--no-privileges", "--no-password")
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        # The snapshot lasts as long as this transaction, which waits for pg_dump.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout TO 0"))
        schema = connection.execute(text("SELECT quote_ident(current_schema())")).scalar_one()
        snapshot = connection.execute(text("SELECT pg_export_snapshot()")).scalar_one()
        words = (f"--schema={schema}", f"--snapshot={snapshot}", f"--file={target}")
        references = _references(connection)
        _run(engine, "pg_dump", *options, *words)
    return references


def _load(engine: Engine, source: Path) -> None:
    """Load a dump into an empty PostgreSQL database in one transaction."""
    with engine.connect() as connection:
        schema = connection.execute(text("SELECT current_schema()")).scalar_one()
    options = ("--no-owner", "--no-privileges", "--no-password", "--single-transaction")
    _run(engine, "pg_restore", *options, "--exit-on-error", f"--schema={schema}", str(source))


def _run(engine: Engine, program: str, *words: str) -> None:
    """Run a client program of PostgreSQL on a database; the password is in its environment, not in its arguments."""
    found = shutil.which(program)
    remedy = "install PostgreSQL's client programs, at least as new as the server, on PATH"
    if found is None:
        raise BackupError(f"{program} is not installed", remedy)
    _arguments, parameters = engine.dialect.create_connect_args(engine.url)
    password = parameters.pop("password", None)
    target = psycopg2.extensions.make_dsn(**parameters)
    done = subprocess.run(  # noqa: S603 - no shell, and only words of this module
        [found, f"--dbname={target}", *words],
        env=os.environ | ({} if password is None else {"PGPASSWORD": password}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        umask=0o077,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise BackupError(said, remedy)


def restore(config: ServerConfig, key_folder: Path, source: Path) -> Manifest:
    """Restore a backup into a place that holds no coordinator.

    Every file is compared with the manifest first. A restore that was interrupted can be repeated.

    Args:
        config: Names the database, which does not exist yet or is empty.
        key_folder: Folder for the keys, which does not exist yet or is empty.
        source: A backup.

    Raises:
        BackupError: The backup is damaged or unsuitable, or something would be overwritten.
        SchemaError: The backup is from a later program.
        OSError: The files cannot be written.
    """
    manifest = Manifest.read(source)
    require_known(manifest.schema)
    url = normalize_url(config.database_url)
    if url.get_backend_name() != manifest.dialect:
        raise BackupError(
            f"the backup is of a {manifest.dialect} database, got {url.get_backend_name()}",
            "--data-dir for SQLite, QFLARE_DATABASE_URL for PostgreSQL",
        )
    _require_intact(source, manifest)
    places = {
        path: key_folder / Path(path).name for path in manifest.files if path.startswith(f"{KEYS}/")
    }
    if manifest.dialect == "sqlite":
        file = Path(url.database or "")
        places |= {PAYLOADS: file.with_suffix(".payloads")} if PAYLOADS in manifest.files else {}
        places |= {ROWS: file}
    places |= {
        path: config.payload_folder / Path(path).name
        for path in manifest.files
        if path.startswith(f"{FOLDER}/")
    }
    _require_vacant(places, manifest, key_folder)
    if manifest.dialect == "postgresql":
        _require_empty(config)
    for path, place in places.items():
        _put(source / path, place)
    if manifest.dialect == "postgresql":
        with _engine(config) as engine:
            _load(engine, source / DUMP)
            with engine.begin() as connection:
                _forget_owners(connection)
    return manifest


def _require_empty(config: ServerConfig) -> None:
    with _engine(config) as engine:
        if not is_empty(engine):
            raise BackupError(
                "the database holds tables already", "an empty database: nothing is overwritten"
            )


def _require_intact(source: Path, manifest: Manifest) -> None:
    for path, expected in manifest.files.items():
        file = source / path
        if not file.is_file() or _describe(file) != expected:
            raise BackupError(f"{file} is missing or damaged", "another backup")


def _require_vacant(places: Mapping[str, Path], manifest: Manifest, key_folder: Path) -> None:
    """Refuse to overwrite anything but what an interrupted restore of the same backup has put there."""
    logs = [Path(f"{place}{suffix}") for place in places.values() for suffix in LOGS]
    strangers = [path for path in logs if path.exists()]
    if key_folder.is_dir():
        strangers += set(key_folder.iterdir()) - set(places.values())
    strangers += [
        place
        for path, place in places.items()
        if place.exists() and _describe(place) != manifest.files[path]
    ]
    if strangers:
        raise BackupError(
            f"{strangers[0]} exists already: nothing is overwritten",
            "another --data-dir, or move the old files away",
        )


def _put(source: Path, place: Path) -> None:
    make_private_folder(place.parent)
    with source.open("rb") as reader, new_file(place) as writer:
        shutil.copyfileobj(reader, writer, length=2**20)
