"""The coordinator's components, without its network listeners."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qflare.command_line import disable_core_dumps
from qflare_server.config import ServerConfig
from qflare_server.context import Clock, Context, Telemetry
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.keys.signature_cache import SignatureCache
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine, normalize_url
from qflare_server.storage.payload_store import (
    DATABASE,
    FILES,
    PayloadFile,
    PayloadFolder,
    PayloadStore,
    PayloadTable,
)
from qflare_server.storage.schema import is_empty, require_current, require_unicode, upgrade
from qflare_server.use_cases import UseCases, build_use_cases

WRITER_THREADS: Final = 8


def open_database(config: ServerConfig) -> Database:
    """Open the database; migrate it if it is an empty SQLite file or the configuration says so.

    Raises:
        SchemaError: Its schema is older or newer than this program; names the command to run.
    """
    is_sqlite = normalize_url(config.database_url).drivername == "sqlite"
    engine = make_engine(config)
    require_unicode(engine)
    if config.auto_migrate or (is_sqlite and is_empty(engine)):
        upgrade(engine)
    require_current(engine)
    return Database(engine, timeout_s=config.database_timeout_s)


def open_stores(config: ServerConfig, database: Database) -> list[PayloadStore]:
    """Open the configured payload stores, that of new payloads first.

    The store `files` is opened beside another one only if its folder exists, `object` only if it has a URL.

    Raises:
        StoreUnavailableError: A store cannot be opened.
    """
    chosen = config.payload_store or (FILES if database.is_sqlite else DATABASE)
    opened: dict[str, PayloadStore] = {DATABASE: _open_chunk_rows(config, database)}
    if chosen == FILES or config.payload_folder.is_dir():
        opened[FILES] = PayloadFolder(config.payload_folder)
    return [opened.pop(chosen), *opened.values()]


def _open_chunk_rows(config: ServerConfig, database: Database) -> PayloadStore:
    if not database.is_sqlite:
        return PayloadTable(database.engine)
    path = Path(normalize_url(config.database_url).database or "").with_suffix(".payloads")
    return PayloadFile(path, timeout_s=config.database_timeout_s)


@dataclass(frozen=True)
class Application:
    """The open parts of a coordinator."""

    config: ServerConfig
    database: Database
    keys: ServerKeys
    context: Context
    use_cases: UseCases
    executor: ThreadPoolExecutor
    wake: threading.Event

    @classmethod
    def open(
        cls, config: ServerConfig, clock: Clock | None = None, telemetry: Telemetry | None = None
    ) -> "Application":
        """Open database, payload store and keys, and build the use cases.

        The process holds the online keys from here on, so its core dumps are disabled.

        Args:
            config: The settings.
            clock: Returns the time; None means the database's clock.
            telemetry: Telemetry sink.

        Raises:
            SchemaError: The database schema does not match this program.
            KeyStoreError: The keys are missing or cannot be decrypted.
        """
        disable_core_dumps()
        database = open_database(config)
        clock = clock or database.clock
        store, *others = open_stores(config, database)
        executor = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="payload-writer")
        keys = ServerKeys.load(config, database, clock)
        wake = threading.Event()
        hearer = telemetry or Telemetry()
        context = Context(
            config,
            database,
            store,
            keys,
            clock,
            wake.set,
            hearer,
            keys.state_key,
            earlier_state_keys=keys.earlier_state_keys,
            decapsulate=keys.decapsulate,
            keyset_status=keys.status,
            signatures=SignatureCache(),
            identities=DeviceIdentities(database, keys.realm, keys),
            other_stores={other.name: other for other in others},
        )
        use_cases = build_use_cases(context, keys, executor)
        return cls(config, database, keys, context, use_cases, executor, wake)

    def close(self) -> None:
        """Finish pending work and close all parts."""
        self.executor.shutdown()
        for store in self.context.stores:
            store.close()
        self.database.close()


@contextmanager
def open_application(config: ServerConfig) -> Iterator[Application]:
    """Open the parts for a command and close them afterwards."""
    parts = Application.open(config)
    try:
        yield parts
    finally:
        parts.close()
