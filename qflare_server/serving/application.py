"""The coordinator's components, without its network listeners."""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from qflare.command_line import disable_core_dumps
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import Clock, Context, Telemetry
from qflare_server.errors import PayloadStoreMismatchError, StoreUnavailableError
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.secret_files import read_secret
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.keys.signature_cache import SignatureCache
from qflare_server.serving.helper_folder import HelperFolder
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine, normalize_url
from qflare_server.storage.payload_store import (
    DATABASE,
    FILES,
    OBJECT,
    PayloadFile,
    PayloadFolder,
    PayloadStore,
    PayloadTable,
    StoreCatalog,
)
from qflare_server.storage.repository import payloads
from qflare_server.storage.schema import is_empty, require_current, require_unicode, upgrade
from qflare_server.use_cases import UseCases, build_use_cases

logger = logging.getLogger(__name__)

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


def open_stores(config: ServerConfig, database: Database) -> tuple[PayloadStore, StoreCatalog]:
    """Open the payload store of new payloads, and those that existing payloads are in; return it and all others.

    Raises:
        PayloadStoreMismatchError: A folder or bucket is not that of this database.
        ConfigError: The extra of the object store is not installed, or its credentials cannot be used.
        StoreUnavailableError: The store of new payloads cannot be opened.
    """
    openers: dict[str, Callable[[], PayloadStore]] = {
        DATABASE: partial(_open_chunk_rows, config, database),
        FILES: partial(_open_own, database, partial(PayloadFolder, config.payload_folder)),
    }
    if config.object_store_url:
        openers[OBJECT] = partial(_open_own, database, partial(_open_bucket, config))
    store = openers.pop(config.payload_store or (FILES if database.is_sqlite else DATABASE))()
    others = StoreCatalog(openers)
    with database.read() as session:
        in_use = payloads.named_stores(session)
    for name in set(in_use) - {store.name}:
        try:
            _ = others[name]
        except KeyError:
            logger.warning("the payload store %s has payloads, but is not configured", name)
        except StoreUnavailableError as error:
            logger.warning("the payload store %s has payloads, but cannot be used: %s", name, error)
    return store, others


def _open_bucket(config: ServerConfig) -> PayloadStore:
    """Open the bucket of the payload store `object`; the library is imported here, where it is needed.

    Raises:
        ConfigError: The extra is not installed, or a setting cannot be used.
    """
    try:
        from qflare_server.storage.payload_store.bucket import Bucket, BucketSettings  # noqa: PLC0415
        from qflare_server.storage.payload_store.objects import PayloadBucket  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"QFLARE_OBJECT_STORE_URL needs {error.name}",
            remedy="pip install 'qflare[object-store]'",
        ) from error
    file = config.object_store_credentials_file
    settings = BucketSettings(
        url=config.object_store_url,
        endpoint=config.object_store_endpoint,
        region=config.object_store_region,
        timeout_s=config.object_store_timeout_s,
        read_credentials=None if file is None else partial(read_secret, file),
    )
    return PayloadBucket(Bucket(settings))


def _open_own(database: Database, open_store: Callable[[], PayloadStore]) -> PayloadStore:
    """Open a payload store outside of the database, and check that it is that of this database."""
    store = open_store()
    _require_own(database, store)
    return store


def _require_own(database: Database, store: PayloadStore) -> None:
    """Check that a folder or bucket is that of this database; give a new one its name.

    Raises:
        PayloadStoreMismatchError: It belongs to another deployment, or is empty although payloads are in it.
    """
    with database.read() as session:
        known = payloads.place_identity(session, store.name)
        is_used = payloads.has_payloads(session, store.name)
    found = store.identity()
    if not known and not found:
        known = database.write(partial(_name_place, store=store.name, at=database.clock()))
    if known and not found and not is_used:
        store.adopt(known)
        found = store.identity()
    if not known or known != found:
        raise PayloadStoreMismatchError(store.name, is_empty=not found)


def _name_place(session: Session, store: str, at: datetime) -> str:
    known = payloads.place_identity(session, store)
    if not known:
        known = secrets.token_hex(16)
        payloads.record_place(session, store, known, at)
    return known


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
        store, others = open_stores(config, database)
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
            other_stores=others,
            helpers=HelperFolder(config, keys.sign_request),
        )
        use_cases = build_use_cases(context, keys, executor)
        return cls(config, database, keys, context, use_cases, executor, wake)

    @property
    def helper_key_ids(self) -> list[str]:
        """Ids of the helpers for secure aggregation that bootstrap bundles name, sorted."""
        return [] if self.context.helpers is None else sorted(self.context.helpers.documents())

    def close(self) -> None:
        """Finish pending work and close all parts."""
        self.executor.shutdown()
        for store in self.context.stores:
            store.close()
        if self.context.helpers is not None:
            self.context.helpers.close()
        self.database.close()


@contextmanager
def open_application(config: ServerConfig) -> Iterator[Application]:
    """Open the parts for a command and close them afterwards."""
    parts = Application.open(config)
    try:
        yield parts
    finally:
        parts.close()
